"""Questions on any text: answers verbatim, the same in every run, forms in balance."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import InputError
from llmbook.documents import Document
from llmbook.environment import list_distributions, read_environment
from llmbook.questions import (
    as_order,
    ask_document,
    ask_naturally,
    find_arguments,
    find_sections,
    keywords,
    make_pairs,
    reword,
    word_overlap,
)

KINDS = st.sampled_from(["function", "class", "module", "topic", "file"])
PIECES = st.sampled_from(
    [
        "Return the number of items.",
        "Raises ValueError if x.",
        "Parameters\n----------\n",
        "x : int\n    The size, by default 3.\n",
        "Args:\n",
        "    y: how much of it",
        "Raises:\n    KeyError: If it is missing.",
        "Unlike `dict`, this grows.",
        "\n\n",
        "# Title\n",
        "Examples\n--------\n>>> f(1)\n1",
        "Devolve a lista.",
        "NOMBRE\n  mv - mueve ficheros",
        "é",
        ".",
        "e.g. this",
        "Deprecated: use `g` instead.",
    ]
)


def function(text, language="en", **more):
    return Document(f"f(x)\n\n{text}", "f", "function", "p", "MIT", signature="f(x)", language=language, **more)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(max_size=300), st.lists(PIECES, max_size=12).map(" ".join), st.lists(PIECES, max_size=12).map("\n".join)
    ),
    KINDS,
    st.sampled_from(["en", "pt-BR", "es", "de", ""]),
)
def test_answers_are_verbatim_whatever_the_text(text, kind, language):
    document = Document(text, "a.b", kind, "p", "MIT", signature="a.b(x)", language=language)
    pairs = list(ask_document(document))
    assert all(answer in text and len(answer) >= 10 and question.strip() for _, question, answer in pairs)
    assert pairs == list(ask_document(document))
    assert len(make_pairs([document], limit=3)) == min(3, len(pairs))


@pytest.mark.parametrize(
    "text",
    [
        "Return the " * 5000,
        "a" * 50000,
        "Raises ValueError " * 3000,
        "x : " * 10000,
        "`" * 20000,
        ". " * 20000,
        "NAME\n" * 5000,
    ],
)
def test_long_repeated_text_ends(text):
    for kind in ("function", "file"):
        list(ask_document(Document(text, "f", kind, "p", "MIT")))


@pytest.fixture(scope="module")
def documents():
    packages = [d for d in list_distributions() if d.name in ("numpy", "scikit-learn", "torch")]
    return list(read_environment(distributions=packages, share=4e5))


def test_forms_are_in_balance(documents):
    asked = [(d, *pair) for d in documents for pair in ask_document(d)]
    forms = Counter(form for _, form, _, _ in asked)
    harder = {"natural", "error", "comparison", "instead", "default", "example"}
    assert harder <= set(forms)
    assert 0.03 < sum(forms[form] for form in harder) / forms.total() < 0.25
    each = Counter(d.id for d, form, _, _ in asked if form in harder)
    assert max(each.values()) <= 2
    assert forms["named"] > 0.9 * len(documents)
    repeated = lambda form: sum(word_overlap(q, a) for _, f, q, a in asked if f == form) / forms[form]
    assert repeated("natural") < 0.6 < repeated("described")


def test_harder_questions_come_last_and_do_not_change_the_others(documents):
    harder = {"natural", "error", "comparison", "instead", "default", "example"}
    for document in documents[::20]:
        forms = [form for form, _, _ in ask_document(document)]
        assert [form in harder for form in forms] == sorted(form in harder for form in forms)


@pytest.mark.parametrize(
    ("body", "form", "answer"),
    [
        ("Do it.\n\nRaises ValueError if the list is empty. More.", "error", "Raises ValueError if the list is empty."),
        ("Do it.\n\nRaises\n------\nKeyError\n    If it is missing.", "error", "KeyError\n    If it is missing."),
        (
            "Do it.\n\nUnlike `other`, this keeps the order. More.",
            "comparison",
            "Unlike `other`, this keeps the order.",
        ),
        ("Do it.\n\nThis is deprecated, use `g` from now on.", "instead", "This is deprecated, use `g` from now on."),
        ("Do it.\n\nArgs:\n    x: How many. By default 3 are taken.", "default", "By default 3 are taken."),
        ("Do it.\n\nExamples\n--------\n>>> f(1)\n1", "example", ">>> f(1)\n1"),
    ],
)
def test_further_forms(body, form, answer):
    found = {f: (q, a) for f, q, a in ask_document(function(body))}
    assert found[form][1] == answer and "f" in found[form][0]


def test_a_thing_is_not_compared_with_itself():
    assert "comparison" not in {form for form, _, _ in ask_document(function("Do.\n\nSimilar to `f`, it does."))}


@pytest.mark.parametrize(
    ("language", "lead", "order"),
    [
        ("en", "Copies a file.", "Copy a file."),
        ("pt", "Lê um arquivo.", "Ler um arquivo."),
        ("pt", "Substitui o texto.", "Substituir o texto."),
        ("es", "Devuelve y borra el último.", "Devolver y borrar el último."),
        ("es", "Añade un elemento.", "Añadir un elemento."),
        ("es", "La lista está vacía.", ""),
        ("de", "Liest eine Datei.", ""),
    ],
)
def test_orders(language, lead, order):
    assert as_order(lead, language) == order


def test_languages():
    asked = [
        question
        for _, question, _ in ask_document(
            function("Remove um ficheiro do disco.\n\nRetorna:\n    O nome do ficheiro.", "pt-PT")
        )
    ]
    assert "Como remover um ficheiro do disco?" in asked and "O que devolve f?" in asked
    asked = [
        question
        for _, question, _ in ask_document(
            function("Muestra el contenido del fichero.\n\nLanza:\n    OSError si no existe.", "es")
        )
    ]
    assert "¿Cómo mostrar el contenido del fichero?" in asked and "¿Qué errores lanza f?" in asked
    assert keywords("Muestra los ficheros que están en la lista.", language="es") == "muestra archivos están lista"
    assert reword("Remover um elemento", "pt") == "apagar um item"
    assert find_arguments("Faz.\n\nParâmetros\n----------\nx : int\n    O tamanho da caixa.") == {
        "x": "O tamanho da caixa."
    }
    assert set(find_sections("Hace.\n\nDevuelve:\n    Una lista.\n\nEjemplos:\n    >>> f()")) == {
        "",
        "return",
        "example",
    }


def test_natural_questions_use_other_words():
    for lead in ("Return a copy of the array.", "Convert a string to an integer.", "Remove duplicates from a list."):
        asked = ask_naturally(lead)
        assert asked.endswith(("?", ".")) and word_overlap(asked, lead) <= 0.6
    assert ask_naturally("Return the size of os.path.sep as numpy.Array.") in (
        "",
        ask_naturally("Return the size of os.path.sep as numpy.Array."),
    )
    assert ask_naturally("") == ask_naturally("This is no order.") == ""
    assert word_overlap("", "x") == 0 and word_overlap("How do I rename a file?", "Rename a file.") == 1


def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match="poem"):
        make_pairs([Document("x", "x", "poem", "p", "MIT")])
