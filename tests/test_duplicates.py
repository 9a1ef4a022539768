"""The finder of near-duplicates: batches, workers, files, memory."""

import itertools
import multiprocessing
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook import duplicates
from llmbook.core import InputError
from llmbook.duplicates import (
    DuplicateFinder, _candidates, _join, _overlap, assign_splits, choose_bands, find_near_duplicates, hash_shingles, hash_words,
    jaccard, minhash,
)
from llmbook.environment import list_distributions, read_environment


def essay(seed: int, words: int) -> str:
    """Words drawn from a small vocabulary with a long tail."""
    draw = numpy.random.default_rng(seed)
    return " ".join(f"w{int(1.2 ** k)}" for k in draw.integers(0, 60, words))


@pytest.fixture(scope="module")
def family():
    """Sixty texts, each with three cut forms."""
    texts = []
    for seed in range(60):
        words = essay(seed, 60).split()
        texts += [" ".join(words[: 60 - cut]) for cut in (0, 3, 12, 30)]
    return [*texts, "", "?!", "tea", "tea"]


def in_one_piece(texts: list[str], threshold: float, permutations: int, width: int) -> numpy.ndarray:
    """The clusters without a finder: signatures of all texts, candidates, exact comparison."""
    hashes, offsets = hash_shingles(texts, width)
    sets = [hashes[offsets[i] : offsets[i + 1]] for i in range(len(texts))]
    pairs = _candidates(minhash(texts, permutations, width), *choose_bands(threshold, permutations))
    alike = lambda i, j: len(sets[i]) and len(sets[j]) and jaccard(sets[i], sets[j]) >= threshold
    return _join([(i, j) for i, j in pairs.tolist() if alike(i, j)], len(texts))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize(("permutations", "width"), [(128, 3), (64, 2)])
def test_one_call_equals_the_steps(family, threshold, permutations, width):
    found = find_near_duplicates(family, threshold, permutations, width)
    assert found.dtype == numpy.int64
    assert found.tolist() == in_one_piece(family, threshold, permutations, width).tolist()


@pytest.mark.parametrize("on_disk", [False, True])
def test_batches_change_nothing(family, tmp_path, on_disk):
    finder = DuplicateFinder(folder=tmp_path / "spool" if on_disk else None)
    finder.add(family[:7])
    assert len(finder.clusters(0.5)) == 7  # one may ask in between
    finder.add([])
    finder.add(family[7:100])
    finder.add(family[100:])
    assert len(finder) == len(family)
    for threshold in (0.9, 0.5, 0.8):
        assert finder.clusters(threshold).tolist() == find_near_duplicates(family, threshold).tolist()


def test_workers_hash(family):
    whole, sent = DuplicateFinder(), DuplicateFinder()
    whole.add(family)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for prepared in pool.map(DuplicateFinder.prepare, [family[:50], family[50:]]):
            sent.add(prepared=prepared)
    assert sent.clusters(0.8).tolist() == whole.clusters(0.8).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(alphabet="ab c\U0001f375é", max_size=40), max_size=12), st.integers(0, 12))
def test_any_text_in_any_batch(texts, cut):
    finder = DuplicateFinder(permutations=32)
    finder.add(texts[:cut])
    finder.add(texts[cut:])
    assert finder.clusters(0.7).tolist() == find_near_duplicates(texts, 0.7, 32).tolist()


def test_folder_starts_empty(tmp_path):
    DuplicateFinder(folder=tmp_path).add(["one two three four"])
    again = DuplicateFinder(folder=tmp_path)
    assert len(again) == len(again.clusters(0.8)) == 0
    again.add(["tea", "tea"])
    assert again.clusters(0.8).tolist() == [0, 0]


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(InputError, match="threshold"):
        find_near_duplicates(["a", "b"], threshold)


@pytest.mark.parametrize("texts", ["one text", [b"bytes"], [None], [3]])
def test_texts_that_are_none(texts):
    with pytest.raises(InputError, match="list of texts"):
        find_near_duplicates(texts)


@pytest.mark.parametrize("call", [
    lambda: hash_shingles("one text"), lambda: hash_words([None]), lambda: hash_shingles(["a b"], 0), lambda: minhash(["a"], 0),
    lambda: choose_bands(1.5), lambda: choose_bands(float("nan")), lambda: choose_bands(0.5, 0),
    lambda: find_near_duplicates(["a", "b"], 0.5, width=0),
    lambda: assign_splits([1, 2, 3], ["a", "b"], [0, 1, 2]), lambda: assign_splits([1] * 3, [*"abc"], [0, 1, 2], float("nan")),
])
def test_what_cannot_be_meant(call):
    with pytest.raises(InputError, match="Allowed"):
        call()


def test_mixed_recipes():
    with pytest.raises(InputError, match="prepare them"):
        DuplicateFinder().add(prepared=DuplicateFinder.prepare(["a"], width=2))
    with pytest.raises(InputError, match="1 or more"):
        DuplicateFinder(permutations=0)


MEASURE = """
import sys
from pathlib import Path
import numpy
from llmbook.core import _peak_memory
from llmbook.duplicates import DuplicateFinder
words, folder = int(sys.argv[1]), Path(sys.argv[2])
draw = numpy.random.default_rng(0)
finder = DuplicateFinder(folder=folder)
_peak_memory(reset=True)
for _ in range(20):
    batch = [" ".join(map(str, draw.integers(0, 10**6, words).tolist())) for _ in range(100)]
    finder.add(batch + batch[:20])
clusters = finder.clusters(0.8)
assert len(set(clusters.tolist())) == 2000
print(_peak_memory(), sum(file.stat().st_size for file in folder.iterdir()))
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    peaks, spooled = [], []
    for words in (1500, 6000):
        command = [sys.executable, "-c", MEASURE, str(words), str(tmp_path / str(words))]
        peak, size = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        peaks.append(peak)
        spooled.append(size)
    assert spooled[1] - spooled[0] > 80e6  # bytes that stay outside memory
    assert peaks[1] - peaks[0] < 0.3 * (spooled[1] - spooled[0])


# copies as a reader sees them

FORM = """Return the {0} of the values. The {0} is taken over all values unless an axis is given.
Parameters: values, numbers or what can become numbers; axis, the direction along which the {0} is computed;
out, where the result is put; keep, whether the reduced direction stays with size one.
Returns: the {0}, as an array of one direction less. Notes: {1}"""


@pytest.fixture(scope="module")
def planted():
    """(texts, number of the original of each, whether it is a copy)."""
    draw = numpy.random.default_rng(7)
    vocabulary = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in ("a", "é", "ão", "i", "ñu") for c in ("r", "s", "lo", "ca", "nte")]
    weights = 1 / (3 + numpy.arange(len(vocabulary)))
    sentence = lambda: " ".join(draw.choice(vocabulary, draw.integers(8, 15), p=weights / weights.sum())) + "."
    article = lambda: [sentence() for _ in range(10)]
    originals, frame = [article() for _ in range(120)], " ".join(article() + article()).split()
    edit = lambda text: " ".join(draw.choice(vocabulary) if draw.random() < 0.07 else word for word in text.split())
    copies = []
    for i, parts in enumerate(originals):
        text = " ".join(parts)
        copies.append([edit(text), " ".join(draw.permutation(parts)), " ".join([*frame[:60], text, *frame[60:120]]),
                       text[: len(text) // 2]][i % 4])  # fmt: skip
    names = ("mean", "sum", "median", "largest", "smallest", "spread", "product", "range")
    misleading = [FORM.format(name, sentence()) for name in names]
    misleading += [" ".join([*frame[:60], *article(), *frame[60:120]]) for _ in range(30)]
    texts = [*map(" ".join, originals), *copies, *misleading]
    origin = [*range(120), *range(120), *range(240, len(texts))]
    return texts, numpy.array(origin)


def test_copies_of_four_kinds_and_no_others(planted):
    texts, origin = planted
    labels = find_near_duplicates(texts)
    assert (labels[:120] == numpy.arange(120)).all()
    for kind in range(4):
        assert (labels == origin)[120:240][kind::4].mean() > 0.96, kind
    assert (labels == origin)[240:].all()
    by_jaccard = find_near_duplicates(texts, 0.8)
    assert (by_jaccard == origin)[120:240].mean() < 0.5


def test_order_and_batches_do_not_matter_for_containment(planted, tmp_path):
    texts, _ = planted
    finder = DuplicateFinder(width=2, folder=tmp_path)
    for start in range(0, len(texts), 37):
        finder.add(texts[start : start + 37])
    assert finder.clusters(0.55, "containment").tolist() == find_near_duplicates(texts).tolist()
    turned = find_near_duplicates(texts[::-1])
    groups = lambda labels: {frozenset(numpy.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}
    back = {frozenset(len(texts) - 1 - i for i in group) for group in groups(turned)}
    assert back == groups(find_near_duplicates(texts))


def test_unknown_likeness():
    with pytest.raises(InputError, match="jaccard or containment"):
        find_near_duplicates(["a"], 0.5, likeness="cosine")


def by_definition(texts: list[str], threshold: float) -> numpy.ndarray:
    """Containment of all pairs, with sets and a dictionary of the holders."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    sets = [set(zip(held, held[1:])) if len(held) > 1 else {tuple(held)} - {()} for held in words]  # noqa: B905
    holders = Counter(shingle for held in sets for shingle in held)
    total = lambda held: sum(1 / holders[shingle] for shingle in held)
    weight, pairs = [total(held) for held in sets], []
    for j, i in itertools.combinations(range(len(sets)), 2):
        if not (common := sets[i] & sets[j]):
            continue
        light, heavy = sorted((weight[i], weight[j]))
        few, many = sorted((len(sets[i]), len(sets[j])))
        need = threshold if few / many >= 0.6 else max(threshold, 0.8)
        held = total(common) / light >= need - 1e-9 and total(common) / heavy >= 0.1 - 1e-9
        if held or len(common) / (few + many - len(common)) >= 0.9:
            pairs.append((i, j))
    return _join(pairs, len(texts))


@pytest.mark.parametrize("threshold", [0.3, 0.55, 0.8, 1.0])
def test_containment_equals_all_pairs(family, planted, threshold):
    for texts in (family, planted[0]):
        found = find_near_duplicates(texts, threshold, likeness="containment")
        assert found.dtype == numpy.int64
        assert found.tolist() == by_definition(texts, threshold).tolist()


def test_containment_of_real_documentation():
    package = [found for found in list_distributions() if found.name == "numpy"]
    texts = [document.body for document in read_environment(distributions=package)][:500]
    found, wanted = find_near_duplicates(texts), by_definition(texts, 0.55)
    assert (wanted != numpy.arange(len(texts))).sum() > 50
    assert (found != wanted).mean() < 0.005


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="ab c", max_size=30), max_size=9), st.sampled_from([0.2, 0.55, 1.0]))
def test_containment_of_any_texts(texts, threshold):
    found = find_near_duplicates(texts, threshold, likeness="containment")
    assert found.tolist() == by_definition(texts, threshold).tolist()


@pytest.mark.parametrize("size", [64, 500, 2**12])
def test_parts_change_nothing(family, planted, size, monkeypatch):
    texts = [*family, *planted[0]]
    wanted = find_near_duplicates(texts).tolist(), find_near_duplicates(texts, 0.5).tolist()
    monkeypatch.setattr(duplicates, "_PART", size)
    finder = DuplicateFinder()
    finder.add(texts)
    assert finder._parts() > 4
    hashes = numpy.concatenate([finder._part(number)[0] for number in range(finder._parts())])
    assert sorted(hashes.tolist()) == sorted(hash_shingles(texts)[0].tolist())
    assert (find_near_duplicates(texts).tolist(), find_near_duplicates(texts, 0.5).tolist()) == wanted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 20), max_size=12), min_size=2, max_size=6), st.data())
def test_overlap_equals_sets(sets, data):
    place = st.integers(0, len(sets) - 1)
    pairs = data.draw(st.lists(st.tuples(place, place).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=9))
    keys = numpy.array([key for held in sets for key in sorted(held)], numpy.uint64)
    bounds, weights = numpy.cumsum([0, *map(len, sets)]), 1 / numpy.arange(1, 22)
    found = _overlap(keys, bounds, numpy.array(pairs), weights)
    common = [sets[i] & sets[j] for i, j in pairs]
    assert found[0].tolist() == list(map(len, common))
    assert numpy.allclose(found[1], [sum(weights[key] for key in held) for held in common])


def test_a_hundred_copies_of_one_text_and_of_its_half():
    whole = essay(1, 300)
    half = " ".join(whole.split()[:200])
    texts = [essay(2, 200), *[whole] * 100, *[half] * 100]
    assert find_near_duplicates(texts).tolist() == [0] + [1] * 200
