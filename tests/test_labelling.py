"""Agreement against the libraries, label models, files that come back broken, and pairs that must differ."""

import json
from types import SimpleNamespace

import krippendorff
import numpy
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import InputError, SettingsError
from llmbook.labelling import (
    Votes,
    as_messages,
    check_preferences,
    cohen_kappa,
    collect_votes,
    export_tasks,
    find_label_issues,
    fit_label_model,
    fleiss_kappa,
    krippendorff_alpha,
    majority_vote,
    make_conversations,
    make_preferences,
    measure_agreement,
    predict_out_of_fold,
    read_labels,
    vote_by_pattern,
)

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60)


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.sampled_from(["none", "linear", "quadratic"]))
def test_cohen_equals_sklearn(pairs, weights):
    first, second = zip(*pairs, strict=True)
    ours = cohen_kappa(first, second, weights)
    if len({*first, *second}) > 1:
        theirs = sklearn.metrics.cohen_kappa_score(first, second, weights=None if weights == "none" else weights)
        assert ours == pytest.approx(theirs, abs=1e-9)
    else:
        assert ours != ours, "one label only: chance agreement is certain, kappa is undefined"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([1, 2, 3, 5, None]), min_size=3, max_size=3), min_size=2, max_size=25),
    st.sampled_from(["nominal", "ordinal", "interval"]),
)
def test_alpha_equals_the_package(rows, level):
    pairable = [row for row in rows if sum(x is not None for x in row) > 1]
    values = {x for row in pairable for x in row if x is not None}
    if not pairable:
        with pytest.raises(InputError):
            krippendorff_alpha(rows, level)
        return
    ours = krippendorff_alpha(rows, level)
    if len(values) < 2:
        assert ours != ours
        return
    matrix = numpy.array([[numpy.nan if x is None else x for x in row] for row in pairable], float).T
    theirs = krippendorff.alpha(reliability_data=matrix, level_of_measurement=level)
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_alpha_of_names_and_refusals():
    assert krippendorff_alpha([["a", "a"], ["b", "b"], ["b", ""]]) == 1
    assert krippendorff_alpha([["a", "b"], ["b", "a"]]) < 0
    for bad, level in (([["a", "b"]], "interval"), ([[1, "b"]], "nominal"), ([["a", "b"]], "ratio"), ([], "nominal")):
        with pytest.raises((InputError, SettingsError)):
            krippendorff_alpha(bad, level)


def test_fleiss_of_two_raters_is_close_to_alpha_and_refuses():
    draw = numpy.random.default_rng(0)
    labels = numpy.stack([draw.integers(0, 3, 400), draw.integers(0, 3, 400)], 1)
    labels[::2, 1] = labels[::2, 0]
    counts = (labels[:, :, None] == numpy.arange(3)).sum(1)
    assert fleiss_kappa(counts) == pytest.approx(krippendorff_alpha(labels.tolist()), abs=0.002)
    for bad in ([], [[1]], [[2, 1], [1, 1]], [[-1, 3], [1, 1]], [1, 2]):
        with pytest.raises(InputError):
            fleiss_kappa(bad)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draw, held = numpy.random.default_rng(5), 0
    rows = lambda n: numpy.where(draw.random((n, 2)) < 0.3, draw.integers(0, 2, (n, 2)), draw.integers(0, 2, (n, 1)))
    truth = krippendorff_alpha(rows(200_000).tolist())
    for seed in range(150):
        found = measure_agreement(rows(80).tolist(), draws=300, seed=seed)
        held += found.low <= truth <= found.high
    assert 0.88 <= held / 150 <= 0.99
    assert "one value" in measure_agreement([["a", "a"], ["a", "a"]]).reading


def planted(size, accuracies, labels=3, coverage=0.7, seed=0):
    draw = numpy.random.default_rng(seed)
    truth = draw.integers(0, labels, size)
    right = draw.random((size, len(accuracies))) < accuracies
    matrix = numpy.where(right, truth[:, None], (truth[:, None] + draw.integers(1, labels, right.shape)) % labels)
    matrix[draw.random(matrix.shape) > coverage] = -1
    return Votes(matrix, [str(i) for i in range(len(accuracies))], [str(k) for k in range(labels)]), truth


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("abstentions", [True, False])
def test_label_model_finds_planted_accuracies_and_beats_the_majority(seed, abstentions):
    known = [0.95, 0.8, 0.7, 0.6, 0.5, 0.5, 0.45]
    votes, truth = planted(3000, known, seed=seed)
    model = fit_label_model(votes, abstentions)
    assert abs(model.accuracies - known).max() < 0.06
    assert numpy.diff(model.likelihood).min() > -0.05
    right = lambda chance: (chance.argmax(1) == truth).mean()
    assert right(model.probabilities()) > right(majority_vote(votes)) + 0.02


def test_rules_that_vote_for_one_label_only_can_be_joined():
    draw = numpy.random.default_rng(0)
    truth = draw.integers(0, 2, 2000)
    chance = {0: [0.7, 0.6, 0.05, 0.1], 1: [0.05, 0.1, 0.7, 0.5]}
    spoken = draw.random((2000, 4)) < numpy.array([chance[int(t)] for t in truth])
    votes = Votes(numpy.where(spoken, [0, 0, 1, 1], -1), list("abcd"), ["no", "yes"])
    found = fit_label_model(votes).probabilities()[spoken.any(1)].argmax(1)
    assert (found == truth[spoken.any(1)]).mean() > 0.88


def test_texts_without_votes_get_the_prior_and_new_votes_are_judged():
    votes, _ = planted(500, [0.9, 0.8, 0.8])
    model = fit_label_model(votes)
    new = Votes(numpy.array([[-1, -1, -1], [1, 1, 1]]), votes.functions, votes.labels)
    chance = model.probabilities(new)
    assert chance[0] == pytest.approx(model.prior) and chance[1].argmax() == 1
    assert majority_vote(new)[0] == pytest.approx([1 / 3] * 3)


def test_votes_are_checked():
    with pytest.raises(InputError, match="voted 'x' on text 0"):
        collect_votes(["a"], {"odd": lambda text: "x"}, ["a", "b"])
    with pytest.raises(InputError, match="unknown label"):
        collect_votes(["a"], {"f": vote_by_pattern("a", "a")}, ["a", "b"]).table(truth=["c"])
    for bad in (("text", {"f": len}, ["a", "b"]), (["x"], {}, ["a", "b"]), (["x"], {"f": len}, ["a"])):
        with pytest.raises(InputError):
            collect_votes(*bad)
    table = collect_votes(
        ["a", "b", "c"], {"f": vote_by_pattern("a", "a|b"), "g": vote_by_pattern("b", "b")}, ["a", "b"]
    ).table(["a", "b", "b"])
    assert [(row["coverage"], row["conflict"], row["accuracy"]) for row in table.rows] == [
        (2 / 3, 1 / 3, 0.5),
        (1 / 3, 1 / 3, 1.0),
    ]


TASKS = {"1": 'First, "quoted"\ntext; with marks', "2": "=SUM(A1)", "3": "terceiro ação"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_files_go_out_and_come_back(tmp_path, suffix, delimiter):
    path = tmp_path / f"ana{suffix}"
    export_tasks(TASKS, path, ["yes", "no"])
    text = path.read_text()
    if suffix == ".csv":
        import csv
        import io

        rows = list(csv.DictReader(io.StringIO(text)))
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(row | {"label": "yes"} for row in rows)
        path.write_text("\ufeff" + stream.getvalue())
    else:
        path.write_text("\n".join(json.dumps(json.loads(line) | {"label": "yes"}) for line in text.splitlines()))
    found = read_labels([path], TASKS, ["yes", "no"])
    assert not found.problems and found.ratings() == [["yes"]] * 3 and found.annotators == ["ana"]


def test_everything_odd_is_listed(tmp_path):
    row = lambda key, label, who="ana", **more: json.dumps({"id": key, "label": label, "annotator": who} | more)
    path = tmp_path / "back.jsonl"
    path.write_text(
        "\n".join(
            [
                row("1", "yes"),
                row("1", "no"),
                row("2", "perhaps"),
                row("9", "yes"),
                row("3", "", "luis"),
                row("3", " no ", "luis"),
                row("2", "no", "luis", mark="another"),
            ]
        )
    )
    found = read_labels([path], TASKS, ["yes", "no"])
    assert [p["problem"] for p in found.problems] == [
        "labelled twice",
        "unknown label `perhaps`",
        "unknown id `9`",
        "labelled another version of the text",
    ]
    assert found.ratings() == [["yes", None], [None, None], [None, "no"]]
    assert found.votes(["no", "yes"]).matrix.tolist() == [[1, -1], [-1, -1], [-1, 0]]
    (tmp_path / "broken.jsonl").write_text('{"id": ')
    for bad in (tmp_path / "broken.jsonl", tmp_path / "nowhere.csv"):
        with pytest.raises(InputError, match="cannot read"):
            read_labels([bad], TASKS, ["yes", "no"])
    for bad in ((TASKS, "x.txt", ["a", "b"]), ({}, "x.csv", ["a", "b"]), (TASKS, "x.csv", ["a"])):
        with pytest.raises(InputError):
            export_tasks(*bad)


ANSWERS = st.text(st.sampled_from("ab 1is true first.\n"), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(st.lists(ANSWERS, min_size=1, max_size=12), st.integers(1, 4))
def test_no_pair_rejects_its_own_answer(answers, documents):
    rows = [{"question": f"q{i}", "answer": a, "document": str(i % documents)} for i, a in enumerate(answers)]
    pairs = make_preferences(rows)
    check_preferences(pairs)
    check_preferences(as_messages(pairs))
    assert pairs == make_preferences(rows)
    assert all(pair["chosen"] in answers and pair["reason"] for pair in pairs)
    plain = {" ".join(a.lower().split()).rstrip(".") for a in answers}
    for pair in pairs:
        if pair["reason"] != "other document":
            assert " ".join(pair["rejected"].lower().split()).rstrip(".") not in plain


def test_each_reason_is_what_it_says():
    rows = [
        {
            "question": f"What is {i}?",
            "answer": f"It is not the first of {100 * i} things that one can count here.",
            "document": str(i),
        }
        for i in range(30)
    ]
    only = {reason: make_preferences(rows, [reason]) for reason in ("other document", "cut short", "unsupported")}
    assert all(len(pairs) == 30 for pairs in only.values())
    assert all(pair["chosen"].startswith(pair["rejected"]) for pair in only["cut short"])
    for pair in only["unsupported"]:
        assert pair["rejected"] not in {row["answer"] for row in rows} and "not not" not in pair["rejected"]
    assert all(pair["rejected"] in {row["answer"] for row in rows} for pair in only["other document"])
    with pytest.raises(SettingsError):
        make_preferences(rows, ["rude"])
    for bad in ({"question": "", "answer": "x"}, {"question": "q"}, {"question": "q", "answer": None}):
        with pytest.raises(InputError):
            make_conversations([bad])
    with pytest.raises(InputError, match="both"):
        check_preferences([{"prompt": "p", "chosen": "Yes.", "rejected": "yes"}])
    system = make_conversations(rows[:1], "Be brief.")[0]["messages"]
    assert [message["role"] for message in system] == ["system", "user", "assistant"]


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_planted_label_errors_are_found(noise):
    draw = numpy.random.default_rng(2)
    truth = draw.integers(0, 4, 3000)
    chance = draw.dirichlet([0.3] * 4, 3000) * 0.4
    chance[numpy.arange(3000), truth] += 0.6
    wrong = draw.random(3000) < noise
    given_ = numpy.where(wrong, (truth + draw.integers(1, 4, 3000)) % 4, truth)
    found = find_label_issues([str(k) for k in given_], chance / chance.sum(1, keepdims=True))
    hits = wrong[found.order].sum()
    assert hits / len(found.order) > 0.9 and hits / wrong.sum() > 0.75 and abs(found.noise - noise) < 0.03
    assert [int(s) for s in found.suggested][:20] == truth[found.order[:20]].tolist()
    assert found.joint.sum() == pytest.approx(1)


def test_label_issues_refuse():
    good = [[0.5, 0.5], [0.5, 0.5]]
    for labels, chance in (
        (["a", "b"], [[0.5, 0.5]]),
        (["a", "b"], [[0.5, 0.9], [1, 0]]),
        (["a", "b"], [[float("nan"), 1], [1, 0]]),
        (["a", "a"], [[1.0], [1.0]]),
    ):
        with pytest.raises(InputError):
            find_label_issues(labels, chance)
    with pytest.raises(InputError, match="unknown label"):
        find_label_issues(["a", "c"], good, ["a", "b"])


def test_nothing_judges_what_it_has_seen():
    texts, labels = [f"text {i}" for i in range(30)], ["a", "b", "c"] * 10
    seen = []

    def train(some, theirs):
        seen.append(set(some))
        return SimpleNamespace(labels=("c", "a", "b"), probabilities=lambda new: _judge(new, some))

    def _judge(new, some):
        assert not set(new) & set(some)
        return numpy.tile([0.2, 0.5, 0.3], (len(new), 1))

    chance, names = predict_out_of_fold(texts, labels, train, folds=5)
    assert names == ["a", "b", "c"] and chance.tolist() == [[0.5, 0.3, 0.2]] * 30 and len(seen) == 5
    for bad in (
        (texts, labels[:-1], train, 5),
        (texts, ["a"] * 30, train, 5),
        (texts, labels, train, 11),
        (texts, labels, train, 1),
    ):
        with pytest.raises(InputError):
            predict_out_of_fold(*bad)
