"""Languages and domains: odd text, close relatives, code, and text that would make patterns crawl."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.classification import ClassifierSettings, train_classifier
from llmbook.core import InputError, SettingsError
from llmbook.documents import Document, Ledger
from llmbook.languages import (
    COMMON_LANGUAGES,
    DOMAIN_RULES,
    KeywordRule,
    filter_domains,
    filter_languages,
    identify_languages,
    language_shares,
    portuguese_variant,
    strip_code,
)

PORTUGUESE = "A lua nasce atrás da serra e ilumina os telhados da vila. Ninguém dorme ainda, porque há festa na praça."
SPANISH = "La luna sale detrás de la sierra e ilumina los tejados del pueblo. Nadie duerme todavía, porque hay fiesta."
ENGLISH = "The moon rises behind the hills and lights the roofs of the village. Nobody sleeps yet, because there is a feast."
CODE = "```python\nfor name in names:\n    print(name.upper(), end='')\nthe_result = compute_the_mean(values)\n```"


def document(text, symbol="a", language="en"):
    return Document(text, symbol, "file", "own", "CC0-1.0", language=language)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\n `>.:=({[</-_@ab ")), max_size=300))
def test_any_text_has_languages_whose_shares_sum_to_one(text):
    codes, chances = identify_languages([text])
    assert codes[0] in {*COMMON_LANGUAGES, "und"} and 0 <= chances[0] <= 1
    shares = language_shares(text)
    assert sum(shares.values()) == pytest.approx(1) and all(0 < share <= 1 for share in shares.values())
    assert list(shares.values()) == sorted(shares.values(), reverse=True) or "zxx" in shares
    assert strip_code(text).count("\n") <= max(len(text.splitlines()), 1) - 1


@pytest.mark.parametrize("text", [
    "a" * 400_000, "`" * 400_000, "<" * 400_000, "a." * 200_000, " " * 400_000, "\n" * 400_000, "a@" * 200_000, "(" * 400_000,
    "x = " * 100_000, "-" * 400_000, "if " * 130_000, ":" * 400_000, "a[" * 200_000, "http://" * 60_000, "```\n" * 100_000,
    "a_" * 200_000, "from a" * 60_000, "@" * 400_000,
])
def test_long_runs_take_linear_time(text):
    def seconds(part: str) -> float:
        start = time.process_time()
        strip_code(part)
        return time.process_time() - start

    # eight times the text; a square would take 64 times as long, in each of three tries
    assert any(seconds(text) < 24 * seconds(text[: len(text) // 8]) + 0.5 for _ in range(3))


def test_relatives_and_variants():
    assert identify_languages([PORTUGUESE, SPANISH, ENGLISH])[0] == ["pt", "es", "en"]
    assert identify_languages([PORTUGUESE.upper(), SPANISH.upper()])[0] == ["pt", "es"]
    assert identify_languages(["", "  \n", "12 + 3", CODE])[0] == ["und", "und", "zxx", "zxx"]
    assert portuguese_variant("O autocarro chegou tarde.") == "pt-PT"
    assert portuguese_variant("O ônibus chegou tarde.") == "pt-BR"
    assert portuguese_variant("A lua nasce.") == portuguese_variant("") == "pt"


@pytest.mark.parametrize("prose, code", [(PORTUGUESE, "pt"), (SPANISH, "es"), (ENGLISH, "en")])
def test_code_does_not_change_the_language(prose, code):
    examples = "    >>> the_mean(of_the_values, from_the_list)\n    the result of the call\n\n" * 8
    for page in (f"{prose}\n\n{CODE}\n" * 3, f"{prose}\n\n{examples}", f"{CODE}\n{prose}"):
        assert identify_languages([page])[0] == [code]
        shares = language_shares(page)
        assert max(set(shares) - {"zxx"}, key=shares.get) == code and len(set(shares) - {"zxx"}) == 1


@pytest.mark.parametrize("prose", [
    "preparar o banco de dados para a festa;", "the value of the first one (optional);", "return the sum of all values",
    "class of functions that grow slowly", "if you want the following:", "import duties are paid at the border",
    "senha (opcional): do grupo;", "with the parameters below:", "for example:", "from the beginning to the end",
])
def test_prose_that_looks_like_code_stays(prose):
    assert strip_code(prose).split() == prose.split()


@pytest.mark.parametrize("code", [
    "return total;", "x += 1", "def f(x):", "class A:", "import numpy as np", "for i in range(3):", "if (x > 0) {", "}", "i++;",
    "print(x)", "from a import b", "while True == x:", "values[0] = 3", "raise ValueError(x)", "else:", "$ ls -l", "@cache",
])
def test_code_goes(code):
    assert not strip_code(code).split()


def test_shares_of_a_mixed_page():
    shares = language_shares(f"Título\n\n{PORTUGUESE}\n\n{CODE}\n\n{SPANISH}\n")
    assert set(shares) == {"pt", "es", "zxx"} and shares["zxx"] > 0.1


def test_bad_input_is_named():
    with pytest.raises(InputError, match="one text"):
        identify_languages("text")
    with pytest.raises(InputError, match="NoneType"):
        identify_languages([None])
    with pytest.raises(SettingsError, match="'klingon'"):
        identify_languages(["x"], ["en", "klingon"])
    with pytest.raises(SettingsError):
        identify_languages(["x"], ["en"])
    with pytest.raises(SettingsError, match="at least one word"):
        KeywordRule("tea", " ")
    with pytest.raises(SettingsError, match="above 0"):
        KeywordRule("tea", "tea", per_thousand=float("nan"))


def test_filter_drops_counts_and_shows():
    ledger = Ledger()
    stream = [
        document(PORTUGUESE, "pt", "pt-PT"), document(SPANISH, "es"), document(CODE, "code"), document("", "empty"),
        document(f"{PORTUGUESE}\n\n{SPANISH} Escriba a ana@tienda.es.", "mixed"),
    ]
    kept = list(filter_languages(stream, ["pt"], ledger=ledger))
    assert [(d.symbol, d.language) for d in kept] == [("pt", "pt-PT"), ("code", "en"), ("empty", "en")]
    assert ledger.counts() == {"other language": 2}
    samples = ledger.steps["other language"]["samples"]
    assert samples[0]["reason"] == "es 100%" and "pt" in samples[1]["reason"]
    assert ledger.steps["other language"]["bytes"] == sum(len(d.text.encode()) for d in stream if d.symbol in ("es", "mixed"))
    assert [d.symbol for d in filter_languages(stream, ["pt", "es"])] == ["pt", "es", "code", "empty", "mixed"]
    for keep in ([], ["pt-BR"], "en"):
        with pytest.raises(SettingsError):
            list(filter_languages(stream, keep))


def test_rules_read_words_phrases_endings_and_refusals():
    rule = KeywordRule("files", "file* pequeno_arquivo", always="open", never="socket spam*", per_thousand=100)
    assert rule.matches("Open the FILES now") and rule.matches("open um pequeno\narquivo")
    assert not rule.matches("files without the verb") and not rule.matches("open a profile")
    assert not rule.matches("open a file from a socket") and not rule.matches("open the file, spammer")
    assert not rule.matches("open a file " + "and go on for a while " * 9)
    assert rule.rate("") == 0
    assert KeywordRule("c", "c++").rate("") == 0  # signs of patterns are only signs


def test_both_kinds_of_judges_filter():
    texts = {"net": "Send a request to the server over a socket.", "file": "Rename a file in a folder.", "empty": ""}
    stream = [document(text, name) for name, text in texts.items()] * 200
    ledger = Ledger()
    kept = list(filter_domains(stream, DOMAIN_RULES, ["networking"], ledger=ledger))
    assert {d.symbol for d in kept} == {"net"} and len(kept) == 200 and ledger.counts() == {"other subject": 400}
    texts = [d.body for d in stream[:2]] * 20
    judge = train_classifier(texts, ["networking", "files"] * 20, ClassifierSettings(held_out=0, epochs=20))
    assert [d.symbol for d in filter_domains(stream[:2], judge, ["files"], 0.6)] == ["file"]
    for wrong in ([], ["tea"], "files"):
        with pytest.raises(SettingsError, match="networking"):
            list(filter_domains(stream, judge, wrong))
