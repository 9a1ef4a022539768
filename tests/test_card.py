"""The card of a corpus: read by the reference reader of Croissant, honest about gaps, and deaf to hostile text."""

from pathlib import Path

import mlcroissant
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbook.card import FIELDS, RESPONSIBLE, Histogram, Tally, check_statements, describe_tally, lay_out_corpus, write_card
from llmbook.core import InputError, read_json
from llmbook.data import CorpusSettings, build_corpus
from llmbook.documents import Document

TEXTS = (
    "The harbour crane lifts forty tonnes and was built before the war by people who never saw the sea.",
    "O chá verde é preparado com água a oitenta graus e servido em chávenas pequenas que guardam o calor.",
    "El café se tuesta durante doce minutos en un tambor de hierro y después descansa dos días.",
    "Swallows return in April to the roof that they left in autumn, and repair last year's nest with mud.",
    "Write to ann@tea.org; the roots of a tree reach as far as its crown and drink what falls from it.",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    home, out = tmp_path_factory.mktemp("notes"), tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(TEXTS):
        (home / f"{i}.txt").write_text(text, encoding="utf-8")
    (home / "broken.pdf").write_bytes(b"%PDF nothing")
    build_corpus(CorpusSettings(source=str(home)), {}, out)
    return out


def test_the_reference_reader_finds_no_error_and_reads_the_records(corpus):
    dataset = mlcroissant.Dataset(jsonld=str(corpus / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors and not dataset.metadata.ctx.issues.warnings
    rows = [row for split in ("train", "validation", "test") for row in dataset.records(split)]
    texts = {row[next(name for name in row if name.endswith("/text"))].decode() for row in rows}
    assert len(texts) == len(TEXTS) and TEXTS[1] in texts


def test_every_property_is_filled_or_missing_by_name(corpus):
    croissant, missing = read_json(corpus / "croissant.json"), read_json(corpus / "card.json")["missing"]
    for name in RESPONSIBLE:
        assert (f"rai:{name}" in croissant) != (f"rai:{name}" in missing), name
    summary = read_json(corpus / "training_data_summary.json")
    assert [row["field"] for row in summary["fields"]] == [field.number for field in FIELDS]
    for row in summary["fields"]:
        assert bool(row["answer"]) == (row["from"] in ("the records", "a person")), row


def test_what_a_person_says_is_taken_and_an_unknown_field_is_refused(corpus, tmp_path):
    facts = read_json(corpus / "card.json")
    everything = {field.number: "said" for field in FIELDS} | {name: "said" for name in RESPONSIBLE}
    assert write_card(tmp_path, facts, everything) == []
    assert "To be filled" not in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="'1.1.9'"):
        check_statements({"1.1.9": "nothing"})
    with pytest.raises(InputError, match="'1.1.1'"):
        check_statements({"1.1.1": "  "})


def test_the_page_asks_nobody_and_obeys_nobody(corpus):
    facts = read_json(corpus / "card.json")
    evil = '"><img src=x onerror=alert(1)><script>'
    facts["removed"]["noise documents"] = {"count": 1, "bytes": 3, "samples": [{"what": evil, "reason": evil, "text": evil}]}
    facts["licences"][evil], facts["licence_bytes"][evil] = 1, 9
    page = lay_out_corpus(facts, read_json(corpus / "training_data_summary.json")["fields"])
    assert "<script" not in page and "<img" not in page and "http-equiv" in page
    assert "src=" not in page.replace("&quot;", "").replace("src=x onerror", "")


@given(st.lists(st.floats(-10, 1e7), max_size=30))
def test_a_histogram_counts_every_value_once(values):
    histogram = Histogram((1.0, 2.0, 4.0, 8.0))
    for value in values:
        histogram.add(value)
    inside = sum(2 <= value < 4 for value in values)
    assert sum(histogram.counts) == len(values) and histogram.counts[1] == inside


def test_a_million_pages_of_one_site_are_one_line():
    tally = Tally()
    for i in range(1000):
        tally.add(Document("A page.", str(i), "file", f"https://site.example/{i}", "MIT", collected="2026-01-01"))
    facts = describe_tally(tally)
    assert facts["source_count"] == 1 and facts["sources"][0] == {
        "source": "site.example", "bytes": 7000, "documents": 1000, "licence": "MIT"}
