"""The papers of a run: complete, honest, escaped, and silent on the network."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from llmbook.cards import GovernanceSettings, data_sheet, model_card, to_markdown
from llmbook.core import read_json, write_json
from llmbook.evidence import Evidence, Finding, collect_findings
from llmbook.governance import SECTIONS, write_cards
from llmbook.pages import Markup, draw_table, say_bytes, say_number, say_time, tabulate, tag, to_html, together
from sample_run import CHAIN, make_sample_run

BROWSER = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Path]:
    return make_sample_run(tmp_path_factory.mktemp("runs") / "laptop")


@pytest.fixture(scope="module")
def papers(run, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("cards")
    write_cards(GovernanceSettings("tiny"), run, output)
    return output


def test_report_asks_nobody(papers):
    page = (papers / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.findall(
        r"""(?:src|href|action|data|srcset)=["'](?!#)|url\((?!#)|@import|<script|<link|<iframe""", page
    )
    assert "http" not in re.sub(r"http-equiv|over HTTP", "", page), "not even a name space"


def test_report_shows_every_stage(papers):
    page = (papers / "report.html").read_text(encoding="utf-8")
    assert "This step was not run" not in page
    for said in ("2.21 → 2.27", "Failed in the rehearsal: the door is closed after draining", "in production",
                 "too short", "GPL-3.0-only", "os.replace", "estimate from 10 W",
                 "4 bits, GPTQ", "step 600"):  # fmt: skip
        assert said in page, said
    assert "<b>dataframe</b>" not in page and "alert(1)</script>" not in page and "&lt;script&gt;" in page


def test_names_in_the_page_are_unique(papers):
    page = (papers / "report.html").read_text(encoding="utf-8")
    names = re.findall(r'\sid="([^"]+)"', page)
    assert len(names) == len(set(names))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(names)


@pytest.mark.parametrize("stage", CHAIN)
def test_any_stage_may_be_missing(stage, run, tmp_path):
    rest = {name: folder for name, folder in run.items() if name != stage}
    numbers = write_cards(GovernanceSettings(), rest, tmp_path)
    assert numbers["stages"] == len(CHAIN) - 1
    assert f"Not done: {stage}" in (tmp_path / "MODEL_CARD.md").read_text()


def test_nothing_was_run(tmp_path):
    numbers = write_cards(GovernanceSettings(), {"corpus": tmp_path / "corpus"}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert numbers["stages"] == 0 and page.count("This step was not run") >= len(SECTIONS) - 2
    assert "number of parameters" in numbers["to_be_filled"]


def test_a_record_without_numbers_and_a_damaged_file(run, tmp_path):
    folder = tmp_path / "laptop" / "corpus"
    shutil.copytree(run["corpus"], folder)
    (folder / "card.json").write_text('{"half')
    model = tmp_path / "laptop" / "model"
    write_json(
        model / "stage.json", {"name": "model", "numbers": None, "inputs": {}, "content": "0" * 64, "started": "x"}
    )
    numbers = write_cards(GovernanceSettings(), {"corpus": folder, "model": model}, tmp_path)
    assert "corpus/card.json: damaged" in numbers["to_be_filled"]


def test_card_is_read_by_hugging_face(papers):
    from huggingface_hub import ModelCard

    card = ModelCard.load(papers / "MODEL_CARD.md")
    assert card.data.license == "unknown" and card.data.language == ["en"]
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results["evaluation: text model bits per byte"] == 2.21
    assert "To be filled by a person" in card.text and "licence of the model" in card.text


def test_what_a_person_says_fills_the_gaps(run, tmp_path):
    said = GovernanceSettings(
        "tiny", "A. Person", "a@example.org", "Apache-2.0", "teaching", "medicine", "a course", "the author"
    )
    numbers = write_cards(said, run, tmp_path)
    assert numbers["to_be_filled"] == []
    assert "license: apache-2.0" in (tmp_path / "MODEL_CARD.md").read_text()


def test_same_run_same_papers(run, papers, tmp_path):
    write_cards(GovernanceSettings("tiny"), run, tmp_path)
    for name in ("report.html", "MODEL_CARD.md", "DATA_SHEET.md"):
        assert (tmp_path / name).read_bytes() == (papers / name).read_bytes()


def test_sections_of_the_papers(run):
    evidence, settings = Evidence(run), GovernanceSettings()
    assert [h for h, _ in model_card(evidence, settings)] == [
        "Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data",
        "Quantitative analyses",
        "Ethical considerations", "Caveats and recommendations", "To be filled by a person"]  # fmt: skip
    assert [h for h, _ in data_sheet(evidence, settings)] == [
        "Motivation",
        "Composition",
        "Collection process",
        "Preprocessing, cleaning, labelling",
        "Uses",
        "Distribution",
        "Maintenance",
    ]


@given(st.text(), st.text(), st.text())
def test_no_text_gets_out_of_its_element(name, text, value):
    rows = draw_table([{name: text, "x": value}])
    page = together(tag("p", text, title=value), rows, to_html([(name, [text, [value]])]))
    known = "p|div|table|thead|tbody|tr|th|td|h3|ul|li|em"
    assert not re.search(rf"<(?!/?(?:{known})[ >])", page)
    assert tag("p", tag("b", text)).count("<b>") == 1


@given(st.text(min_size=1))
def test_markdown_stays_in_its_line(text):
    lines = to_markdown([("Heading", [text, [text]])], text).split("\n")
    assert sum(line.startswith("#") for line in lines) == 2
    assert "<" not in re.sub(r"\\<", "", "\n".join(lines))


numbers = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.dictionaries(
        st.sampled_from(["low", "high", "difference", "loss", "a", "b"]), inner, max_size=4
    ),
    max_leaves=12,
)


@hypothesis_settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), numbers, max_size=4))
def test_any_numbers_become_tables(value):
    for finding in collect_findings(value):
        assert finding.verdict in ("better", "worse", "undecided")
    for caption, rows in tabulate(value, ""):
        assert isinstance(draw_table(rows, caption), Markup)


@given(st.one_of(st.none(), st.floats(), st.integers(-(10**15), 10**15)))
def test_any_number_has_words(value):
    assert say_number(value) and "e+" not in say_number(value if value is None or abs(value) < 1e12 else 1)
    if value is not None and 0 <= value < 1e9:
        assert say_bytes(value) and say_time(value)


def test_verdicts():
    assert Finding("loss", -1, -2, -0.5).verdict == "better"
    assert Finding("loss", 1, 0.5, 2).verdict == "worse"
    assert Finding("recall", 1, 0.5, 2).verdict == "better"
    assert Finding("recall", 1, 0.0, 2).verdict == "undecided"
    assert Finding("recall", 1, float("nan"), 2).verdict == "undecided"


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_in_a_browser(papers, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    asked, complaints = [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for width in (1280, 360):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: complaints.append(message.text))
            page.goto((papers / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
            ink, ground = page.evaluate(
                "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            )
            light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, ground)]
            assert abs(light[0] - light[1]) > 400, "text stands out from the ground"
        browser.close()
    assert complaints == [] and len(asked) == 2 and all(url.startswith("file:") for url in asked)


def test_record_of_the_stage(run, tmp_path):
    numbers = write_cards(GovernanceSettings(), run, tmp_path)
    write_json(tmp_path / "numbers.json", numbers)
    assert read_json(tmp_path / "numbers.json")["worse"] == 1
