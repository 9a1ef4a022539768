"""Cleaning: any text, twice, in linear time; code and tables stay; planted noise goes."""

import random
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmbook.cleaning import (
    CLEANERS,
    RepeatedLines,
    clean_text,
    is_markup,
    normalise_text,
    remove_boilerplate,
    remove_machine_noise,
    remove_page_furniture,
    remove_rulers,
    repair_encoding,
    strip_markup,
)
from llmbook.core import SettingsError
from llmbook.documents import Ledger

PIECES = [
    "\n", "\r\n", "\r", " ", "\t", "    ", "-\n", "é", "e\u0301", "ñ", "Ã©", "â€œ", "&amp;", "&eacute;", "<p>", "</p>",
    "<b>", "</b>", "<",
    "<br>", "<li>", "1", "2", "3", "\n\n\n", "....", "Page 1", "Home", " | ", "About", "Leia mais", "Share", "Print",
    "We use cookies",
    "Todos os direitos reservados", "##########", "**********", "```", ">>> f(x)", "2024-01-01 10:00:00", "INFO ", "a" * 70,
    "aB3" * 25,
    "\u200b", "\ufeff", "\ud800", "\xad", "\u2028", "\x00", "word", "infor-\nmation", "information", "\x85", "\xa0", "✔️", "½",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=30).map("".join)


@settings(max_examples=500, deadline=None)
@given(TEXTS)
@example("a\n\n\n" + "#" * 12 + "\n\n\nb")
@example("é\r\né\r\n")
def test_any_text_is_cleaned_once_and_for_all(text):
    once = clean_text(text)
    assert clean_text(once) == once
    once.encode("utf-8")
    assert unicodedata.is_normalized("NFC", once)
    assert "\r" not in once and "\n\n\n" not in once and not any(line != line.rstrip(" \t") for line in once.split("\n"))


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_each_step_alone_never_fails_and_notes_what_it_does(text):
    for function in CLEANERS.values():
        assert isinstance(function(text), str)
    ledger = Ledger()
    assert clean_text(text, ledger, "here") == clean_text(text)
    assert bool(ledger.counts()) or clean_text(text) == text


LONG = [
    " ", "\n", "#", "<", "=", "\t", "a", "a ", "é", "\r", "- ", "-\n", "a-\n", ".", ". ", "1\n", "<p", "<p>", "</p>", "<!--",
    "&", "&amp;", "0",
    "x\n\n\n", "| ", "»", "Home | ", "aB3", "`", "```\n", "<b", "&#", "2024-01-01 10:00:00 x\n", "Share\n", "Page 1\n", "[",
    "....1\n", " \n",
    "cookie", "we use cookies\n", "a" * 80 + " ", "\n ", "\n1", "\n - ", "\n\t",
]


@pytest.mark.parametrize("unit", LONG)
def test_a_megabyte_of_anything_takes_linear_time(unit):
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        start = time.process_time()
        clean_text(text)
        return time.process_time() - start

    # eight times the text; a square would take 64 times as long, in each of three tries
    assert any(seconds(1_000_000) < 30 * seconds(125_000) + 0.5 for _ in range(3))


def test_line_ends_do_not_double():
    assert clean_text("é\r\nà\r\nb\rc\u2028d") == "é\nà\nb\nc\nd"


@pytest.mark.parametrize("wrong, right", [
    ("FranÃ§ais", "Français"), ("EspaÃ±a", "España"), ("nÃ£o", "não"), ("itâ€™s", "it’s"), ("&lt;tag&gt; &amp; more",
    "<tag> & more"),
    ("ação", "ação"), ("x ≤ y → z", "x ≤ y → z"), ("naïve café — “quoted”", "naïve café — “quoted”"), ("AT&T; x", "AT&T; x"),
])
def test_encoding(wrong, right):
    assert repair_encoding(wrong) == right
    assert repair_encoding(right) == right or "&" in right or "<" in right


CODE = '''Compute the mean.

Parameters
----------
x : array_like
    Values; see `Notes`.

======  ======
input   output
======  ======
a | b   1
======  ======

>>> mean([1, 2])
1.5

    def home(menu):
        return menu | share   # next

        # ########## a ruler of a comment
\tif a < b > c:
\t\tprint("<p>Hello</p>")

```
<div><p>About</p></div>
Share
Print
Next
```
'''


def test_documentation_with_code_and_tables_stays():
    assert clean_text(CODE) == CODE.rstrip("\n")


@pytest.mark.parametrize("prose", [
    "The header Set-Cookie is sent if the policy allows it, and cookies are kept in a jar.", "Next", "Help", "Contact",
    "Search\n======",
    "The copyright of a work ends seventy years after the death of the author, and all rights reserved "
    "to him before then pass to the public, "
    "which is why many an old book is now free to read.",
    "The well-\nknown writer", "values:\n1\n2\n3\n4", "At 10:00:00 the bell rings.", "See page 3 of the manual.",
    "A página 3 é a melhor.",
    "a < b and c > d", "List<int> and Map<String, List<int>>", "x <- c(1, 2)", "Use the <b> tag.\nThen close it.",
    "| home | 3 |\n| away | 4 |",
    "1. Open the file\n2. Read it\n3. Close it", "Dr. Silva ... e os outros",
])
def test_prose_stays(prose):
    assert clean_text(prose) == prose


@pytest.mark.parametrize("line", [
    "Copyright © 2020 Tea Ltd. All rights reserved.", "© Casa do Chá. Todos os direitos reservados.",
    "Todos los derechos reservados © 2011",
    "We use cookies to give you the best experience.", "Este site utiliza cookies.",
    "Utilizamos cookies para melhorar o site.", "Aceptar cookies",
    "Home | News | Contact", "Início » Notícias » Contato", "Inicio › Noticias › Contacto", "Skip to main content",
    "Saltar al contenido principal",
    "Pular para o conteúdo", "Suscríbete a nuestro boletín", "Assine a nossa newsletter", "Política de privacidade",
    "Página 3 de 10", "Page 3",
    "- Page 3 of 10 -", "~" * 20, "*" * 30, "Please enable JavaScript to continue.",
])
def test_lines_of_noise_go(line):
    assert clean_text(f"The tea is ready.\n{line}\nThe cup is warm.") == "The tea is ready.\nThe cup is warm."


def test_long_lines_are_not_condemned_for_a_phrase():
    line = "A long paragraph that tells the story of a company. " * 5 + "All rights reserved, said the lawyer."
    assert remove_boilerplate(line) == line


def test_page_numbers_need_to_count_up():
    body = "one line\nanother line\nand a third\none more\n"
    assert remove_page_furniture(f"{body}\n7\n\n{body}\n8\n\n{body}\n9\n").count("\n") == 17
    for numbers in ((7, 9, 12), (3, 2, 1), (5, 5, 5), (1, 2, 1)):
        text = "".join(f"{body}\n{n}\n\n" for n in numbers)
        assert remove_page_furniture(text) == text


def test_broken_words():
    assert remove_page_furniture("infor-\nmation is information") == "information\nis information"
    assert remove_page_furniture("a well-\nknown, well-known man") == "a well-known,\nwell-known man"
    assert remove_page_furniture("left-\nright") == "left-\nright"
    habit = "\n".join(f"Algo que se que-\nbra na linha {w} do livro" for w in ("um", "dois", "três", "quatro", "cinco", "seis"))
    assert "quebra\nna linha" in remove_page_furniture(habit) and "-" not in remove_page_furniture(habit)


def test_machine_noise_and_what_only_looks_like_it():
    draw = random.Random(3)
    run = "".join(draw.choices("ABCabcdef0123456789+/", k=200))
    assert remove_machine_noise(f"before {run}= after") == "before  after"
    assert remove_machine_noise(draw.randbytes(40).hex()) == ""
    for text in ("0" * 100, "a_very_long_name" * 6, "/usr/share/Docs2/" * 6, "-" * 90, "word" * 20):
        assert remove_machine_noise(text) == text
    log = "2024-01-01 10:00:00 INFO a\n"
    assert remove_machine_noise("x\n" + log * 3 + "y") == "x\ny"
    assert remove_machine_noise("x\n" + log * 2 + "y") == "x\n" + log * 2 + "y"


def test_markup():
    assert strip_markup("<p>Olá<p>mundo</p>") == "Olá\n\nmundo"
    assert strip_markup("<div>a &lt; b &amp; c</div><div>d</div>") == "a < b & c\n\nd"
    assert strip_markup("<ul><li>um<li>dois</ul>") == "- um\n- dois"
    assert "alert" not in strip_markup("<p>x</p><script>alert(1)</script><p>y</p>")
    assert strip_markup("<pre>a\n   b</pre><p>c</p>") == "a\n   b\n\nc"
    assert not is_markup("") and not is_markup("<") and not is_markup("<p>")
    assert is_markup("<td>x</td>\n" * 3) and not is_markup("    <td>x</td>\n" * 3)


def test_normalise_keeps_indentation():
    text = "def f():\n\tif x:\n\t\treturn 'ação'  \n    \n        y = 1"
    assert normalise_text(text) == "def f():\n\tif x:\n\t\treturn 'ação'\n\n        y = 1"
    assert normalise_text("\n\n  first line is indented\n") == "  first line is indented"
    assert remove_rulers(">>> print('*' * 12)\n************\n") == ">>> print('*' * 12)\n************"


# lines that a source repeats


def test_repeated_lines_against_counting_everything():
    draw = random.Random(5)
    motto, rare = "the motto of this paper is short", "a line that few pages have indeed"
    noise = [[f"line number {draw.random()} of nothing" for _ in range(20)] for _ in range(400)]
    pages = ["\n".join([motto, *lines, *[rare] * (i % 10 == 0)]) for i, lines in enumerate(noise)]
    for counters in (10_000, 200, 60):
        finder = RepeatedLines(counters=counters)
        for page in pages:
            finder.count(page, "paper")
        assert finder.shared("paper") == {motto} and len(finder._counts["paper"]) <= counters
    ledger = Ledger()
    removed = finder.remove(pages[0], "paper", ledger, "page 0")
    assert motto not in removed and removed.count("\n") == pages[0].count("\n") - 1
    assert ledger.counts() == {"repeated lines removed": 1} and ledger.steps["repeated lines removed"]["bytes"] == len(motto) + 1


def test_sources_do_not_mix_and_few_documents_prove_nothing():
    finder = RepeatedLines()
    for i in range(3):
        finder.count(f"three words repeated\npage {i} of three", "small")
    assert finder.shared("small") == set() == finder.shared("never seen")
    for i in range(20):
        code = "Parameters\n    x = code of three\n>>> run the code"
        finder.count(f"three words repeated\n{code}\npage {i} of many", "large")
    assert finder.shared("large") == {"three words repeated"}
    assert finder.remove("three words repeated", "small") == "three words repeated"


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_repeated_lines_never_fail(texts):
    finder = RepeatedLines(least=2, counters=5)
    for text in texts:
        finder.count(text)
    for text in texts:
        assert len(finder.remove(text)) <= len(text)


@pytest.mark.parametrize("wrong", [
    {"share": 0.0}, {"share": 1.5}, {"least": 1}, {"counters": 1}, {"words": 0}, {"share": float("nan")},
])
def test_repeated_lines_refuse_what_cannot_work(wrong):
    with pytest.raises(SettingsError, match="Allowed"):
        RepeatedLines(**wrong)


def test_a_sample_never_shows_half_an_address():
    ledger = Ledger()
    for pad in range(70):
        clean_text(f"{'x' * pad} CafÃ© Ann ann.longname@tea.org writes to bob@post.org daily.", ledger, "note")
        clean_text(f"Ann ann.longname@tea.org {'y' * pad} CafÃ© opens.", ledger, "note")
    ledger.samples = 1000
    for pad in range(70):
        clean_text(f"{'x ' * pad}CafÃ© Ann ann.longname@tea.org writes.", ledger, "note")
        clean_text(f"Ann ann.longname@tea.org{' y' * pad} CafÃ© opens.", ledger, "note")
    shown = [sample["text"] for entry in ledger.steps.values() for sample in entry["samples"]]
    assert len(shown) > 100 and not any("longname" in text or "@" in text for text in shown)
