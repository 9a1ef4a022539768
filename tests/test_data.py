"""From any source to a corpus: hand-overs, bad input, and properties that a page need not carry."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook import data, duplicates, environment
from llmbook.cleaning import clean_text
from llmbook.core import CorruptFileError, InputError, PolicyError, Run, SettingsError, Stage, read_json
from llmbook.data import (
    CorpusSettings, build_corpus, load_pairs, load_split, stream_split,
)
from llmbook.documents import Document, Ledger, classify_licence, cut_text, is_allowed, read_dataset, read_folder
from llmbook.duplicates import find_near_duplicates, hash_shingles, jaccard, split_documents
from llmbook.personal import redact
from llmbook.provenance import explain_text, read_document
from llmbook.questions import make_pairs

WORDS = "river stone cloud lamp winter garden letter engine harbour violin copper meadow signal thread window".split()


def essay(seed: int, length: int = 40) -> str:
    draw = numpy.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, length)).capitalize() + "."


@pytest.fixture
def notes(tmp_path):
    """A folder of twelve short texts."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"Note {i}. {essay(i)}")
    return folder


@pytest.fixture(scope="module")
def package():
    """The documentation of one small distribution."""
    found = [d for d in environment.list_distributions() if d.name == "fastcore"]
    return list(environment.read_environment(distributions=found))


PLAIN = {"quality": "none", "likeness": "jaccard"}  # essays of fifteen words are no good prose, and all alike


def corpus(source, output, **named) -> Path:
    output.mkdir(exist_ok=True)
    build_corpus(CorpusSettings(source=str(source), **PLAIN | named), {}, output)
    return output


# sources


def test_every_format_gives_its_text(tmp_path):
    from pypdf import PdfWriter

    (tmp_path / "a.txt").write_text("Plain.")
    (tmp_path / "b.md").write_text("# Head\n\nMarked.")
    (tmp_path / "c.ipynb").write_text(json.dumps({"cells": [
        {"cell_type": "markdown", "source": ["Noted."]}, {"cell_type": "code", "source": "x = 1", "outputs": []}]}))
    (tmp_path / "d.jsonl").write_text('{"text": "One."}\n\n{"content": "Two."}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["Three.", None]}), tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_bytes("Größe".encode("utf-16"))
    (tmp_path / "g.txt").write_bytes("Größe".encode("cp1252"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "h.TXT").write_text("Deep.")
    (tmp_path / ".hidden.txt").write_text("Not read.")
    PdfWriter().write(tmp_path / "i.pdf")
    ledger = Ledger()
    found = {d.symbol: d.text for d in read_folder(tmp_path, ledger)}
    assert found == {
        "a.txt": "Plain.", "b.md": "# Head\n\nMarked.", "c.ipynb": "Noted.\n\nx = 1", "d.jsonl:1": "One.",
        "d.jsonl:2": "Two.", "e.parquet:1": "Three.", "f.txt": "Größe", "g.txt": "Größe", "sub/h.TXT": "Deep.",
    }
    assert ledger.counts() == {"broken row": 1, "unreadable file": 1}


@pytest.mark.parametrize("name, content", [
    ("a.txt", b""), ("b.txt", b"\x89PNG\0"), ("c.parquet", b"PAR1"), ("d.ipynb", b"{"), ("e.ipynb", b"{}"),
    ("f.pdf", b"%PDF-1.4 nothing"), ("g.html", b"<html><body></body></html>"), ("h.txt", b"\x81\x8d\xff"),
])
def test_an_unusable_file_is_counted_and_the_others_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("Good text.")
    ledger = Ledger()
    assert [d.text for d in read_folder(tmp_path, ledger)] == ["Good text."]
    assert ledger.counts() == {"unreadable file": 1}
    assert ledger.steps["unreadable file"]["samples"][0]["reason"]


def test_a_broken_line_costs_one_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "One."}\n{"text": \n[1]\n"x"\n{"other": 1}\n{"text": "Two."}')
    ledger = Ledger()
    assert [d.text for d in read_folder(tmp_path / "rows.jsonl", ledger)] == ["One.", "Two."]
    assert ledger.counts() == {"broken row": 4}


@given(st.text(alphabet="ab. \n", max_size=400), st.integers(4, 60))
def test_cutting_loses_no_word(text, size):
    pieces = cut_text(text, size)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(len(piece) <= size for piece in pieces)


def test_a_dataset_folder_is_streamed(tmp_path):
    rows = {"text": [f"Row {i}. {essay(i)}" for i in range(8)], "other": list(range(8))}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "train-00000.parquet")
    found = list(read_dataset(str(tmp_path), Ledger(), "MIT", "de"))
    assert [d.text for d in found] == rows["text"]
    assert {(d.licence, d.language, d.kind) for d in found} == {("MIT", "de", "file")}
    assert len({d.id for d in found}) == 8 and str(tmp_path) not in found[0].source
    out = tmp_path / "out"
    assert len(load_split(corpus(f"hf:{tmp_path}", out, licence="MIT"), "train")) == 6


def test_a_dataset_without_a_licence_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [essay(1)]}), tmp_path / "train.parquet")
    with pytest.raises(PolicyError, match="LicenseRef-unknown"):
        corpus(f"hf:{tmp_path}", tmp_path / "out")


@pytest.mark.parametrize("source", ["hf:wikipedya", "nowhere/at/all", "hf:none/such-dataset"])
def test_an_unknown_source_says_what_is_allowed(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="What to do"):
        corpus(source, tmp_path)


def test_the_presets_are_known():
    from llmbook.documents import PRESETS

    assert set(PRESETS) == {"bookcorpus", "gutenberg", "wikipedia", "codeparrot"}


# the environment


def test_symbols_have_the_names_people_use():
    chunks = environment._chunks(None)
    runtime = environment._read_chunk(next(chunks))
    found = {d.symbol: d for d in environment._documents(runtime, {"source": "python", "licence": "PSF-2.0"})}
    assert {"os.replace", "len", "open", "str.join", "math.sqrt", "itertools.chain", "io.BytesIO.read",
            "collections.deque.append", "datetime.datetime.now"} <= set(found)
    assert not {"posix.replace", "builtins.len", "pathlib.S_ISSOCK"} & set(found)
    assert found["os.replace"].text.startswith("os.replace(src, dst, *, src_dir_fd=None, dst_dir_fd=None)\n\nRename")
    assert not [name for name, d in found.items() if " at 0x" in d.text]


def test_workers_change_nothing(package):
    found = [d for d in environment.list_distributions() if d.name == "fastcore"]
    parallel = list(environment.read_environment(workers=2, distributions=found))
    assert [d.text for d in parallel] == [d.text for d in package]


def test_a_script_without_a_main_guard_still_works(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from llmbook import environment as e\n"
        "found = [d for d in e.list_distributions() if d.name == 'fastcore']\n"
        "print(len(list(e.read_environment(2, distributions=found))))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) > 100


def test_development_tools_do_not_belong_to_the_source():
    names = {d.name.lower() for d in environment.list_distributions()}
    assert "numpy" in names and not names & {"pytest", "ruff", "jupyterlab", "nbdev", "llmbook"}


# licences


@pytest.mark.parametrize("expression, allowed", [
    ("MIT", True), ("MIT AND GPL-3.0-only", False), ("MIT OR GPL-3.0-only", True), ("", False),
    ("(MIT OR GPL-3.0-only) AND (Apache-2.0 WITH LLVM-exception)", True), ("GPL-3.0-only OR (MIT AND MPL-2.0)", False),
    ("((MIT))", True), ("LicenseRef-unknown", False), ("MIT AND", False),
])
def test_expressions_are_decided(expression, allowed):
    assert is_allowed(expression) is allowed


def test_whole_licence_texts_are_recognised():
    from importlib.metadata import distribution

    known = {"numpy": "BSD-3-Clause", "transformers": "Apache-2.0"}
    for name, licence in known.items():
        files = [f for f in distribution(name).files if "info" in str(f) and f.name.startswith("LICENSE")]
        assert classify_licence(files[0].locate().read_text()) == licence


def test_a_disallowed_licence_is_dropped_and_counted_or_fails(notes, tmp_path):
    with pytest.raises(PolicyError, match=r"00\.txt \(GPL-3\.0-only\)"):
        corpus(notes, tmp_path / "a", licence="GPL-3.0-only", on_disallowed="fail")
    with pytest.raises(PolicyError, match="corpus.licences"):
        corpus(notes, tmp_path / "b", licence="GPL-3.0-only")
    allowed = corpus(notes, tmp_path / "c", licence="GPL-3.0-only", licences=("GPL-3.0-only",))
    assert set(load_split(allowed, "train").licence) == {"GPL-3.0-only"}


# cleaning and personal data


@given(st.text(max_size=200))
def test_cleaning_twice_changes_nothing(text):
    once = clean_text(text)
    assert clean_text(once) == once or clean_text(clean_text(once)) == clean_text(once)
    once.encode("utf-8")


@given(st.text(max_size=200))
def test_redaction_never_fails_and_counts_what_it_masks(text):
    masked, counts = redact(text)
    assert (masked == text) == (not counts)


def test_the_ledger_shows_no_personal_data(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"{essay(i)}\r\nAsk ann{i}@tea.org or +44 20 7946 095{i}. "
            f"All rights reserved.\nMail ann{i}@tea.org, she knows the garden.")
    out = corpus(folder, tmp_path / "out")
    for path in out.iterdir():
        raw = load_any(path).encode() if path.suffix == ".parquet" else path.read_bytes()
        assert b"@tea.org" not in raw and b"7946" not in raw, path.name
    assert read_json(out / "card.json")["removed"]["e-mail redacted"]["count"] == 5


def load_any(path: Path) -> str:
    return pyarrow.parquet.read_table(path).to_pandas().to_csv()


# duplicates


def test_clusters_equal_all_pairs():
    texts = []
    for seed in range(60):
        text = essay(seed, 60).split()
        texts += [" ".join(text[:60 - cut]) for cut in (0, 3, 12, 30)]
    for threshold in (0.5, 0.8):
        hashes, offsets = hash_shingles(texts)
        sets = [hashes[offsets[i]:offsets[i + 1]] for i in range(len(texts))]
        pairs = [(a, b) for a in range(len(texts)) for b in range(a) if jaccard(sets[a], sets[b]) >= threshold]
        assert pairs and (find_near_duplicates(texts, threshold) == duplicates._join(pairs, len(texts))).all()


@settings(max_examples=50)
@given(st.lists(st.text(alphabet="ab c", max_size=30), max_size=8), st.integers(1, 4))
def test_shingles_equal_those_of_sets(texts, width):
    hashes, offsets = hash_shingles(texts, width)
    for i, text in enumerate(texts):
        words = text.split()
        expected = {tuple(words[j:j + width]) for j in range(max(1, len(words) - width + 1))} if words else set()
        assert offsets[i + 1] - offsets[i] == len(expected)


def test_planted_twins_are_found():
    texts = [essay(seed, 80) for seed in range(400)]
    twins = [" ".join(["New", *text.split()[1:]]) for text in texts[:100]]
    labels = find_near_duplicates(texts + twins, 0.8)
    assert labels[400:].tolist() == list(range(100)) and labels[:400].tolist() == list(range(400))


def test_nothing_leaks_between_the_splits(tmp_path, package):
    rows = [{"text": d.body} for d in package] + [{"text": d.body + " Indeed, as always."} for d in package]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = corpus(tmp_path / "rows.jsonl", tmp_path / "out", near_duplicate_threshold=1.0)
    frames = {split: load_split(out, split) for split in data.SPLITS}
    texts = [text for split in data.SPLITS for text in frames[split].text]
    owner = numpy.repeat(numpy.arange(3), [len(frames[split]) for split in data.SPLITS])
    labels = find_near_duplicates(texts, 0.5)
    assert all(len(set(owner[labels == label])) == 1 for label in set(labels.tolist()))
    assert not set(load_pairs(out, "test").document) & set(frames["train"].id)


def test_a_growing_corpus_keeps_its_split():
    documents = [Document(essay(i, 60), f"{i}", "file", "s", "MIT") for i in range(400)]
    before = split_documents(documents[:380], range(380), 0.1, 0.1)
    after = split_documents(documents, range(400), 0.1, 0.1)
    assert sum(a == b for a, b in zip(before, after, strict=False)) > 360


# pairs


def test_answers_are_verbatim_and_questions_stable(package):
    pairs = make_pairs(package)
    texts = {d.id: d.text for d in package}
    assert len(pairs) > len(package)
    assert all(pair["answer"] in texts[pair["document"]] for pair in pairs)
    assert pairs == make_pairs(package)
    assert all(pair["question"].strip() and "\n" not in pair["question"] for pair in pairs)
    unnamed = [pair for pair in pairs if pair["symbol"].split(".")[-1] not in pair["question"]]
    assert len(unnamed) > len(pairs) / 5


# the stage


def test_the_corpus_has_its_format(notes, tmp_path):
    out = corpus(notes, tmp_path / "out")
    frame = load_split(out, "train")
    assert list(frame.columns) == list(data.COLUMNS)
    assert not frame.isna().any().any() and frame.id.is_unique
    assert list(load_pairs(out, "train").columns) == list(data.PAIR_COLUMNS)
    card, croissant = read_json(out / "card.json"), read_json(out / "croissant.json")
    assert sum(card["numbers"]["documents"].values()) == 12
    assert "http://mlcommons.org/croissant/1.1" in croissant["conformsTo"]
    assert {entry["@id"]: entry["sha256"] for entry in croissant["distribution"]} == card["files"]
    assert sum(name.startswith("rai:") for name in croissant) >= 7


def test_the_stage_runs_once_and_again_when_a_file_changes(notes, tmp_path):
    stage = Stage("corpus", build_corpus, CorpusSettings, outside=data.source_state)
    run = Run(tmp_path / "run", [stage], {"corpus": CorpusSettings(source=str(notes), **PLAIN)})
    assert run.execute() == ["corpus"] and run.execute() == []
    (notes / "new.txt").write_text(essay(99))
    assert run.execute() == ["corpus"] and run.execute() == []


@pytest.mark.parametrize("prepare, message", [
    (lambda folder: None, "it is empty"),
    (lambda folder: (folder / "a.bin").write_bytes(b"\0"), "1 format not read"),
    (lambda folder: (folder / "a.txt").write_bytes(b"\0"), "1 unreadable file"),
    (lambda folder: (folder / "a.txt").write_text("Short."), "1 noise documents"),
    (lambda folder: (folder / "a.txt").write_text(essay(1)), "3 or more"),
])
def test_a_source_without_text_is_an_error(tmp_path, prepare, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(InputError, match=message):
        corpus(folder, tmp_path / "out")


def test_reading_stops_at_the_wanted_size(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": essay(i, 150)}) for i in range(200)))
    out = corpus(tmp_path / "rows.jsonl", tmp_path / "out", max_megabytes=0.05)
    card = read_json(out / "card.json")
    assert 50_000 <= sum(card["numbers"]["bytes"].values()) < 52_000


@pytest.mark.parametrize("wrong, said", [
    ({"quality": "strict"}, "documentation"), ({"likeness": "cosine"}, "jaccard"), ({"on_disallowed": "warn"}, "drop"),
    ({"languages": "en"}, r"\('en',\)"), ({"max_megabytes": "10"}, "a number"), ({"test_share": float("nan")}, "above 0"),
    ({"workers": 1.5}, "0 or more"),
])
def test_settings_of_a_corpus_are_checked(wrong, said):
    with pytest.raises(SettingsError, match=said):
        CorpusSettings(**wrong)


def test_missing_and_damaged_tables_are_refused(notes, tmp_path):
    out = corpus(notes, tmp_path / "out")
    with pytest.raises(InputError, match="build the corpus first"):
        load_split(tmp_path, "train")
    for read in (load_split, load_pairs, lambda *names: list(stream_split(*names))):
        with pytest.raises(InputError, match="train, validation, test"):
            read(out, "dev")
    with pytest.raises(InputError, match="1 or more"):
        list(stream_split(out, "train", 0))
    raw = (out / "pairs-train.parquet").read_bytes()
    (out / "pairs-train.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CorruptFileError):
        load_pairs(out, "train")


def test_an_unreadable_folder_entry_is_not_fatal(notes, tmp_path):
    os.symlink(notes / "gone.txt", notes / "link.txt")
    assert len(list(read_folder(notes, Ledger()))) == 12


# from a document back to its source


def test_every_document_that_was_read_is_in_the_corpus_or_in_the_ledger(tmp_path):
    rows = [{"text": essay(i)} for i in range(30)] + [{"text": essay(3)}, {"text": "Short"}, {"text": 5}]
    rows += [{"text": essay(40), "license": "GPL-3.0-only"}, {"text": essay(7).replace("river", "stream", 1)}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = corpus(tmp_path / "rows.jsonl", tmp_path / "out")
    card = read_json(out / "card.json")
    ledger = pyarrow.parquet.read_table(out / "ledger.parquet").to_pandas()
    lost = ledger[~ledger.step.str.contains("redacted|repaired|normalised|removed")]
    assert sum(card["numbers"]["documents"].values()) + len(lost) == len(rows)
    assert ledger.groupby("step")["count"].sum().to_dict() == card["numbers"]["removed"]
    assert explain_text(out, "rows.jsonl:31")[0]["step"] == "exact duplicates"
    assert explain_text(out, "rows.jsonl:34")[0]["reason"] == "GPL-3.0-only"
    assert explain_text(out, "rows.jsonl:1") == []


def test_a_document_knows_the_file_it_was_read_from(notes, tmp_path):
    (notes / "13.txt").write_text(f"The cafÃ© is open. {essay(50)} Ask ann@tea.org.")
    out = corpus(notes, tmp_path / "out")
    rows = {row.symbol: row for split in data.SPLITS for row in load_split(out, split).itertuples()}
    assert list(rows["13.txt"].changes) == ["encoding repaired", "e-mail redacted"]
    assert list(rows["01.txt"].changes) == []
    for symbol, row in rows.items():
        assert row.original == hashlib.sha256((notes / symbol).read_text().strip().encode()).hexdigest()
        assert row.sha256 == hashlib.sha256(row.text.encode()).hexdigest()
    assert explain_text(out, "13.txt")[0]["step"] == "encoding repaired"


def test_one_document_is_read_without_the_others(package, tmp_path):
    with open(tmp_path / "rows.jsonl", "w") as stream:
        for document in [d for d in package * 3][:1500]:
            text = f"{essay(stream.tell(), 20)} {document.body}"
            stream.write(json.dumps({"text": text, "license": "MIT"}) + "\n")
    out = corpus(tmp_path / "rows.jsonl", tmp_path / "out")
    whole = load_split(out, "train")
    assert pyarrow.parquet.ParquetFile(out / "train.parquet").num_row_groups == -(-len(whole) // 512)
    for number in (0, 511, 512, len(whole) - 1):
        assert read_document(out, "train", number)["text"] == whole.text[number]
    assert [text for part in stream_split(out, "train", 100) for text in part.text] == whole.text.tolist()
    for number in (-1, len(whole)):
        with pytest.raises(InputError, match=f"0 to {len(whole) - 1}"):
            read_document(out, "train", number)


def test_owners_who_said_no_are_left_out(notes, tmp_path):
    copied = hashlib.sha256((notes / "07.txt").read_bytes()).hexdigest()
    (tmp_path / "no.txt").write_text(f"0[1-3].txt  # asked by letter\n{copied}\n")
    out = corpus(notes, tmp_path / "out", opt_out=str(tmp_path / "no.txt"))
    card = read_json(out / "card.json")
    assert card["removed"]["opted out"]["count"] == 4 and sum(card["numbers"]["documents"].values()) == 8
    summary = {row["field"]: row["answer"] for row in read_json(out / "training_data_summary.json")["fields"]}
    assert "4 texts left out" in summary["3.1.2"]
    with pytest.raises(InputError, match="opt-out list"):
        corpus(notes, tmp_path / "again", opt_out=str(tmp_path / "nowhere.txt"))


def test_languages_are_named_and_filtered(notes, tmp_path):
    texts = {
        "pt": "Os navios atravessavam o rio todas as manhãs, carregados de sal, de vinho e de cartas que ninguém lia.",
        "pt2": "A biblioteca fechou as portas às nove horas, e os últimos leitores desceram a escada em silêncio.",
        "pt3": "Na aldeia dizia-se que o moinho só parava quando o moleiro adormecia à sombra da figueira grande.",
        "es": "Los barcos cruzaban el río todas las mañanas, cargados de sal, de vino y de cartas que nadie leía.",
        "en": "The boats crossed the river every morning, and every evening the last of them came home without a light.",
    }
    for code, text in texts.items():
        (notes / f"{code}.txt").write_text(text, encoding="utf-8")
    every = corpus(notes, tmp_path / "all")
    found = {row.symbol: row.language for split in data.SPLITS for row in load_split(every, split).itertuples()}
    assert {code: found[f"{code}.txt"] for code in texts} == {code: code[:2] for code in texts}
    some = corpus(notes, tmp_path / "some", languages=("pt",))
    assert set(read_json(some / "card.json")["languages"]) == {"pt"}
    assert read_json(some / "card.json")["removed"]["other language"]["count"] >= 2


def test_items_of_a_benchmark_are_not_learnt(notes, tmp_path):
    secret = " ".join(f"{word}{i}" for i, word in enumerate(WORDS))
    (notes / "leak.txt").write_text(f"{essay(60)} {secret.capitalize()} {essay(61)}")
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": secret}) + "\n" + json.dumps({"text": essay(99, 20)}) + "\n")
    out = corpus(notes, tmp_path / "out", benchmarks=(str(tmp_path / "exam.jsonl"),))
    assert [row["step"] for row in explain_text(out, "leak.txt")] == ["benchmark texts"]
    assert "exam.jsonl:1" in explain_text(out, "leak.txt")[0]["reason"]
    assert sum(read_json(out / "card.json")["numbers"]["documents"].values()) == 12


def test_rules_of_quality_hold_for_files(notes, tmp_path):
    (notes / "menu.txt").write_text("Home\nLog in to your account\nYour cart is empty\n\n" * 2)
    for name, when in (("good", "the evening"), ("dry", "the summer of the long drought"), ("late", "a week, or never")):
        said = f"The boats came home in {when}, and the harbour of {name} was quiet until the next of them left."
        (notes / f"{name}.txt").write_text(said)
    found = corpus(notes, tmp_path / "out", quality="documentation")
    assert explain_text(found, "menu.txt")[0]["step"] == "low quality"
    assert explain_text(found, "good.txt") == []


# scale


def test_worker_processes_make_the_same_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH", 2_000)
    monkeypatch.setattr(data, "EARLY", 2)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": essay(i % 90, 60)}) for i in range(120)))
    outs = [corpus(tmp_path / "rows.jsonl", tmp_path / str(workers), workers=workers) for workers in (1, 2)]
    for name in ("train", "validation", "test", "pairs-train", "ledger"):
        one, two = (pyarrow.parquet.read_table(out / f"{name}.parquet") for out in outs)
        assert one.equals(two), name
    assert read_json(outs[0] / "card.json")["files"] == read_json(outs[1] / "card.json")["files"]


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Six times the text, and the peak of a process of its own grows by a fraction of it."""
    script = (
        "import sys; from pathlib import Path; from llmbook.data import *; from llmbook.core import Meter\n"
        "rules = CorpusSettings(source=sys.argv[1], max_megabytes=1e6, workers=1, quality='none', likeness='jaccard')\n"
        "with Meter() as meter: build_corpus(rules, {}, Path(sys.argv[2]))\n"
        "print(meter.peak_memory)"
    )
    peaks, draw = [], numpy.random.default_rng(1)
    words = numpy.array(["".join(draw.choice(list("aeioulnrst"), 6)) for _ in range(3000)])
    for size in (2, 12):
        source, out = tmp_path / f"{size}.jsonl", tmp_path / str(size)
        out.mkdir()
        with open(source, "w") as stream:
            for _ in range(400 * size):
                row = {"text": " ".join(draw.choice(words, 700)), "license": "MIT", "lang": "en"}
                stream.write(json.dumps(row) + "\n")
        command = [sys.executable, "-c", script, str(source), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    grown = (tmp_path / "12.jsonl").stat().st_size - (tmp_path / "2.jsonl").stat().st_size
    assert peaks[1] - peaks[0] < grown, f"{peaks} for {grown} more bytes"  # a list would take 2.2 times as much
