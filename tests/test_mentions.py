"""Word lists on odd text: nothing crashes, places are right, names and code are no mentions."""

import re

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import InputError
from llmbook.mentions import (
    Lexicon,
    default_lexicon,
    find_mentions,
    find_speakers,
    find_years,
    inflect,
    wilson_interval,
)

LANGUAGES = ("en", "pt", "es")
PIECES = st.sampled_from(
    "the The judge to Polish polish Christian Baker Jordan US us child process O médico a médica pai filho "
    'Estados Unidos EE. UU. non-binary May 2020 ( ) . , _ / \n " ” İ ß ǅ 1999 é ñ'.split(" ")
)


def groups(text, language="en", *dimensions):
    return [m.group for m in find_mentions(text, language) if not dimensions or m.dimension in dimensions]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=30).map(" ".join)), st.sampled_from(LANGUAGES))
def test_any_text_gives_ordered_places_that_hold_the_text(text, language):
    found = find_mentions(text, language)
    assert all(text[m.start : m.end] == m.text and m.text for m in found)
    assert [m.start for m in found] == sorted(m.start for m in found)
    for dimension in {m.dimension for m in found}:
        mine = [m for m in found if m.dimension == dimension]
        assert all(a.end <= b.start for a, b in zip(mine, mine[1:], strict=False)), "a word counts once per dimension"
    assert all(1500 <= year < 2040 for year in find_years(text))
    assert all(speaker in text for speaker, _ in find_speakers(text, language))


@pytest.mark.parametrize(
    "text", ["child " * 20000, "A" * 100000, "the old " * 20000, "(" * 50000, "Ana Lima " * 15000, "in 1999 " * 20000]
)
def test_long_repeated_text_ends(text):
    for language in LANGUAGES:
        find_mentions(text, language)
        find_speakers(text, language)
    find_years(text)


@pytest.mark.parametrize(
    ("language", "text", "wanted"),
    [
        ("en", "Turkey and turkey", ["Middle East"]),
        ("en", "I polish it; a Polish poet polishes it.", ["Europe"]),
        ("en", "Mr. Jordan Smith saw Jordan.", ["Middle East"]),
        ("en", "Give us time, said the US envoy.", ["North America"]),
        ("en", "Latin American and South American poets", ["Latin America", "Latin America"]),
        ("en", "Michael Jordan plays", []),
        ("en", "TIMEZONES = 'Europe/Lisbon'", []),
        ("en", "china cups from China", ["Asia"]),
        ("pt", "o peru do Peru", ["Latin America"]),
        ("pt", "uma aluna cabo-verdiana, um espanhol, duas espanholas", ["Africa", "Europe", "Europe"]),
        ("pt", "os EUA e os Estados Unidos", ["North America", "North America"]),
        ("pt", "escrito em português", []),
        ("es", "las chinas y los marroquíes", ["Asia", "Africa"]),
        ("es", "EE. UU., EE.UU. y EEUU", ["North America"] * 3),
        ("es", "traducido al español", []),
        ("es", "una brasileña y dos brasileñas", ["Latin America", "Latin America"]),
    ],
)
def test_regions(language, text, wanted):
    assert groups(text, language, "region") == wanted


@pytest.mark.parametrize(
    ("language", "text", "wanted"),
    [
        ("en", "She may judge; the judge must not; the old judge slept.", ["law and state"] * 2),
        ("en", "Ask Professor Silva or Lena Cook.", ["education"]),
        ("en", "call stream_writer.write(x)", []),
        ("pt", "o exame médico e a médica", ["health"]),
        ("pt", "a juíza, os juízes e as professoras", ["law and state", "law and state", "education"]),
        ("es", "el seguro médico, la médica, los médicos", ["health", "health"]),
    ],
)
def test_professions(language, text, wanted):
    assert groups(text, language, "profession") == wanted


def test_may_is_a_month_or_a_doubt():
    assert groups("It may rain in May. May 2020 was dry.", "en", "stance") == ["possible"]
    assert groups("Ela pode vir.", "pt", "stance") == groups("Quizás venga.", "es", "stance") == ["possible"]


def test_headings_in_capitals_count():
    assert groups("NURSES AND DOCTORS", "en", "profession") == ["health", "health"]


def test_forms_of_real_words():
    assert "homens" in inflect("homem", "pt") and "juízes" not in inflect("juiz", "pt")
    assert {"alemães", "alemã"} <= set(inflect("alemão", "pt"))
    assert {"andaluz", "andaluces"} <= set(inflect("andaluz", "es"))
    assert inflect("boy", "en") == ["boy", "boys"] and inflect("church", "en")[1] == "churches"


def test_a_lexicon_can_be_extended_and_bad_notation_is_refused():
    more = default_lexicon().extended("[team en]\nred: Ajax+\n[gender fr]\nfeminine: femme\n[except en]\nAjax call")
    assert [(m.dimension, m.group) for m in find_mentions("Ajax won. An Ajax call.", "en", more)] == [("team", "red")]
    assert find_mentions("une femme", "fr", more)[0].group == "feminine"
    for bad in (
        "words without heading",
        "[gender en]\nno colon here",
        "[except en]\n(unclosed",
        "[gender de]\nx: Frau+",
    ):
        with pytest.raises(InputError):
            Lexicon(bad)
    assert "team" not in default_lexicon().groups


def test_language_codes():
    assert groups("uma mulher", "pt-BR") == groups("uma mulher", "PT") == ["feminine"]
    with pytest.raises(InputError, match="extend the lexicon"):
        find_mentions("eine Frau", "de")
    assert find_speakers("Sie sagte", "de") == []


def test_every_word_of_the_lists_finds_itself():
    for language, table in default_lexicon().entries.items():
        for entries in table.values():
            for entry in entries:
                if entry.rest is None and not entry.after and not re.search(r"\W", entry.first):
                    found = find_mentions(f"x, {entry.first}, x", language)
                    assert entry.group in {m.group for m in found if m.dimension == entry.dimension}, entry


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 500), st.floats(0, 1), st.floats(0.5, 0.99))
def test_wilson_equals_scipy(n, share, confidence):
    k = round(share * n)
    theirs = scipy.stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(k / n, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_without_data_and_with_bad_data():
    assert wilson_interval(0.5, 0) == (0.0, 1.0)
    for bad in ((1.1, 5), (0.5, -1), (float("nan"), 5), (0.5, 5, 1.0)):
        with pytest.raises(InputError):
            wilson_interval(*bad)
