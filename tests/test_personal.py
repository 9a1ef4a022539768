"""Personal data: hard cases by hand, properties, adversarial texts, streams, pseudonyms."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stdnum import luhn
from stdnum.es import dni

import llmbook.personal as personal
from llmbook.core import InputError, PolicyError
from llmbook.identifiers import SCHEMES, WORDS, Identifier
from llmbook.personal import (
    PERSONAL_DATA,
    Pseudonyms,
    find_personal_data,
    load_names_model,
    redact,
    redact_stream,
)

ID, CARD, PHONE, MAIL, IP, IBAN = "national id", "payment card", "phone", "e-mail", "IP address", "IBAN"

FOUND = [  # text, kind, what is found
    ("Reach out: rita.o-neill@mail.co.uk!", MAIL, "rita.o-neill@mail.co.uk"),
    ("<joão@correio.pt>", MAIL, "joão@correio.pt"),
    ("user=ana+lista@casa.dev&x=1", MAIL, "ana+lista@casa.dev"),
    ("'rui_2@uni-porto.edu'", MAIL, "rui_2@uni-porto.edu"),
    ("mailto:ANA@CORREO.ES?subject=x", MAIL, "ANA@CORREO.ES"),
    ("ana@correo.es:secreto", MAIL, "ana@correo.es"),
    ("You can text me at 415-555-2671 tonight", PHONE, "415-555-2671"),
    ("tel:+1-415-555-2671", PHONE, "+1-415-555-2671"),
    ("(415) 555 2671", PHONE, "(415) 555 2671"),
    ("Ring 0161 496 0123 ext. 45 before six", PHONE, "0161 496 0123 ext. 45"),
    ("Mobile 07700900123.", PHONE, "07700900123"),
    ("+44 (0)20 7946 0958", PHONE, "+44 (0)20 7946 0958"),
    ("O telefone é (21) 2345-6789, ramal 12", PHONE, "(21) 2345-6789, ramal 12"),
    ("WhatsApp: 11987654321", PHONE, "11987654321"),
    ("+55 (85) 98765-4321", PHONE, "+55 (85) 98765-4321"),
    ("Telemóvel 912345678", PHONE, "912345678"),
    ("+351 21 234 5678", PHONE, "+351 21 234 5678"),
    ("Su número de teléfono: 91 123 45 67", PHONE, "91 123 45 67"),
    ("Llámanos al 900 123 456", PHONE, "900 123 456"),
    ("0034 612-345-678", PHONE, "0034 612-345-678"),
    ("Celular 55 1234 5678", PHONE, "55 1234 5678"),
    ("+54 9 11 2345-6789", PHONE, "+54 9 11 2345-6789"),
    ("connect to 91.198.174.192 on port 22", IP, "91.198.174.192"),
    ("http://151.101.1.69:80/", IP, "151.101.1.69"),
    ("[2a02:2e0:3fe:1001:302::1]", IP, "2a02:2e0:3fe:1001:302::1"),
    ("DE89 3704 0044 0532 0130 00 for the rent", IBAN, "DE89 3704 0044 0532 0130 00"),
    ("PT50000201231234567890154", IBAN, "PT50000201231234567890154"),
    ("es91 2100 0418 4502 0005 1332", IBAN, "es91 2100 0418 4502 0005 1332"),
    ("BR1800360305000010009795493C1", IBAN, "BR1800360305000010009795493C1"),
    ("4111 1111 1111 1111", CARD, "4111 1111 1111 1111"),
    ("5555-5555-5555-4444", CARD, "5555-5555-5555-4444"),
    ("Amex 3782 822463 10005", CARD, "3782 822463 10005"),
    ("cartão 30569309025904", CARD, "30569309025904"),
    ("tarjeta 41111 11111 111111", CARD, "41111 11111 111111"),
    ("CPF/MF sob o nº 529.982.247-25", ID, "529.982.247-25"),
    ("cpf 52998224725", ID, "52998224725"),
    ("CNPJ: 11.222.333/0001-81", ID, "11.222.333/0001-81"),
    ("NIF PT 123456789", ID, "PT 123456789"),
    ("contribuinte nº 123 456 789", ID, "123 456 789"),
    ("con DNI 12.345.678-Z", ID, "12.345.678-Z"),
    ("NIE X-1234567-L", ID, "X-1234567-L"),
    ("CIF A58818501", ID, "A58818501"),
    ("SSN 536-90-4399", ID, "536-90-4399"),
    ("social security number is 536904399", ID, "536904399"),
    ("NI number AB 12 34 56 C", ID, "AB 12 34 56 C"),
    ("NHS number 943 476 5919", ID, "943 476 5919"),
    ("CURP BOXW310820HNERXN09", ID, "BOXW310820HNERXN09"),
    ("RFC GODE561231GR8", ID, "GODE561231GR8"),
    ("CUIT 20-05536168-2", ID, "20-05536168-2"),
    ("RUT 12.531.909-2", ID, "12.531.909-2"),
    ("SIN 123-456-782", ID, "123-456-782"),
    ("passport no. AB1234567", "passport", "AB1234567"),
]


@pytest.mark.parametrize(("text", "kind", "value"), FOUND)
def test_found(text, kind, value):
    assert (kind, value) in [(one.kind, one.text) for one in find_personal_data(text)]
    masked, counts = redact(text)
    assert value not in masked and f"[{kind}]" in masked and sum(counts.values()) >= 1


@pytest.mark.parametrize("text", [
    "pi is 3.141592653589793", "version 1.2.3 of 2020-10-10", "array([0.0000, +0.70710678j])", "x = 4111111111111112",
    "2001:db8::1 is for examples", "git@github.com:owner/name", "12:30:45 and a::b", "decorate with @cache.clear()",
    "numpy==1.26.4.1", "Chrome/120.0.6099.109 Safari/537.36", "sha 9fceb02d0ae598e95dc970b74767f19372d61af8",
    "6fa459ea-ee8a-3ca4-894e-db77e160355e", "ISBN 978-0-306-40615-7", "ISBN-10 0-306-40615-2", "ISSN 0378-5955",
    "2024-01-31T12:30:45.123456Z", "31/12/2024 23:59:59", "20240131123045", "lat 40.416775, lon -3.703790",
    "R$ 1.234.567,89", "US$ 4,111,111.11", "order 4539578763621486", "pedido n.º 912345678", "factura 612345678",
    "00:1A:2B:3C:4D:5E", "[0.5488135  0.71518937 0.60276338 0.54488318]", "ann@example.com, bob@mail.example.org",
    "root@localhost", "deploy@web01:~$", "@babel/core@7.23.0", "lodash@4.17.21", "ssh bob@server.corp.com",
    "scp a.txt bob@server.corp.com:/srv", "ssh://git@host.corp.com/x", "icon@2x.png", "user@1000.service", "A@B.T",
    "W @ x.to(device), (A@B.to(c))", "555 - 123 - 4567 = -4135", "(212) * 555 - 1234", "population 912 345 678 people",
    "speed 299 792 458 m/s", "127.0.0.1:8080 or 10.1.2.3 or 192.168.0.7", "203.0.113.9", "8.0.0.0/8", "std::dec::add",
    "CPF 529.982.247-24", "DNI 12345678A", "GB82 WEST 1234 5698 7654 33", "4111 1111 1111 1112", "SSN 000-12-3456",
    "Physical Review E, 62, 4473 (2000), 479-487 (1988)", "arXiv:2106.09685", "doi:10.1145/3292500.3330701",
    "1 100 200 300\n2 400 500 600", "1234567890123 ms", "rows 31940 10396", "0x7f3a9c2b1d4e", "RFC 2606", "page 211-252",
])
def test_left_alone(text):
    assert redact(text) == (text, {})


LETTERS = {
    "en": "Call me on 020 7946 0958. NINO AB123456C. I paid with 4111 1111 1111 1111; write to ruth@lane.co.uk.",
    "pt": "Ligue para (11) 98765-4321. CPF 529.982.247-25. Paguei com 4111 1111 1111 1111; escreva a rute@lagoa.pt.",
    "es": "Llámeme al 612 34 56 78. DNI 12345678Z. Pagué con 4111 1111 1111 1111; escriba a rut@correo.es.",
}


@pytest.mark.parametrize("language", LETTERS)
def test_a_letter_in_each_language(language):
    masked, counts = redact(LETTERS[language])
    assert counts == {PHONE: 1, ID: 1, CARD: 1, MAIL: 1}
    assert not any(sign.isdigit() for sign in masked) and "@" not in masked


def test_kinds_can_be_chosen_and_wrong_input_is_refused():
    text = LETTERS["en"]
    assert redact(text, kinds=("e-mail",))[1] == {MAIL: 1}
    assert redact(text, kinds=()) == (text, {})
    with pytest.raises(InputError, match="CPF"):
        redact(text, kinds=("CPF",))
    for call in (redact, find_personal_data, lambda value: list(redact_stream([value]))):
        with pytest.raises(InputError, match="bytes"):
            call(b"ann@tea.org")


def test_numbers_that_the_libraries_make_are_found():
    draw = random.Random(0)
    for _ in range(300):
        body = "".join(draw.choices("0123456789", k=8))
        if len(set(body)) > 2:
            assert [one.scheme for one in find_personal_data(f"DNI {body}{dni.calc_check_digit(body)}.")] == ["DNI"]
        card = "4" + "".join(draw.choices("0123456789", k=14))
        wrong = card + str((int(luhn.calc_check_digit(card)) + 1 + draw.randrange(9)) % 10)
        assert [one.scheme for one in find_personal_data(f"paid by {card}{luhn.calc_check_digit(card)}.")] == ["Visa"]
        assert not any(one.kind == CARD for one in find_personal_data(f"paid by {wrong}."))


def test_every_scheme_names_a_module_that_exists():
    for scheme in SCHEMES:
        assert scheme.labels <= set(WORDS)
        scheme.fits("123456789", next(iter(scheme.labels)))


# any text

PIECES = [
    *"0123456789 .-()+@:/aAbZxX,;\n=[]$", "tel ", "CPF ", "order ", "\ud800", "ann@tea.org ", "912 345 678", "\n\n",
    "4111 1111 1111 1111", "GB82WEST12345698765432", "Mr Ann Lee", "8.8.8.8 ", "DNI 12345678Z", "phone", "[phone]",
    "529.982.247-25", "ramal 1", "é", "٣",
]
texts = st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=60).map("".join))


@settings(max_examples=400, deadline=None)
@given(texts)
def test_any_text(text):
    masked, counts = redact(text, names=True)
    assert redact(masked, names=True) == (masked, {}), "twice changes nothing"
    assert (masked == text) == (not counts)
    found = find_personal_data(text, names=True)
    assert all(text[one.start : one.end] == one.text and one.kind in {*PERSONAL_DATA, "name"} for one in found)
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))
    assert bool(found) == bool(counts)


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(st.integers(0, 400), max_size=8), st.integers(1, 30))
def test_stream_is_whole(text, cuts, times):
    text = text * times
    cuts = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    least, most = personal._LEAST, personal._MOST
    try:
        for personal._LEAST, personal._MOST in ((least, most), (40, 160)):
            assert "".join(redact_stream(chunks)) == redact(text)[0]
            assert "".join(redact_stream(list(text[:2000]))) == redact(text[:2000])[0]
    finally:
        personal._LEAST, personal._MOST = least, most


def test_long_text_is_found_where_it_is_and_twice_changes_nothing():
    block = "A line of prose that says nothing at all about anybody.\n" * 40 + "\nCall 020 7946 0958 or ann@tea.org.\n\n"
    text = block * 60
    found = find_personal_data(text)
    assert len(found) == 120 and all(text[one.start : one.end] == one.text for one in found)
    masked, counts = redact(text)
    assert counts == {PHONE: 60, MAIL: 60} and redact(masked) == (masked, {})
    one_line = text.replace("\n", " ")
    assert redact(one_line)[1] == counts, "no number is cut where no line ends"


@pytest.mark.parametrize("piece", [
    "7", "1234567890", "@", "a@", "a.a.a.", "(((", "1 ", "123 ", "1.1.", "+1", "(12)", "a.b@c.d.", "2a00:", "GB82 ",
    "912 345 678 ", " ", "1   ", "978", "x@y.", "://", "12345678-", "Mr A ", "\n", "tel ", "10.1234/", "-", "1-",
    "e-mail ", "[phone]", "4111 ",
])
def test_no_text_takes_quadratic_time(piece):
    def seconds(size: int) -> float:
        text = (piece * (size // len(piece) + 1))[:size]
        start = time.process_time()
        redact(text, names=True)
        return time.process_time() - start

    seconds(1000)
    # 8 times where it is linear, 64 where it is quadratic; a busy machine gets two more tries, a square fails all three
    assert any(seconds(160_000) < 40 * max(seconds(20_000), 0.01) for _ in range(3))


# names


def test_names_are_an_option():
    text = "My name is Ann Lee. Me llamo Inés de la Vega. O meu nome é Rui Sá. Dear Mrs. Hale, from Paris."
    assert redact(text) == (text, {})
    assert redact(text, names=True)[1] == {"name": 4}
    places = lambda text: [(m, m + 5) for m in range(len(text)) if text.startswith("Paris", m)]
    assert redact(text, names=places)[0].endswith("from [name].")


def test_a_model_can_find_names(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ann", "came", "by"]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        id2label={0: "O", 1: "B-PER"}, label2id={"O": 0, "B-PER": 1},
    )
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path)
    names = load_names_model(tmp_path)
    found = find_personal_data("ann came by\n" * 30, names=names)
    assert all(isinstance(one, Identifier) and one.kind == "name" for one in found)
    with pytest.raises(InputError, match="no model"):
        load_names_model(tmp_path / "none")


# pseudonyms


@settings(max_examples=150, deadline=None)
@given(texts)
def test_pseudonyms_can_be_undone(text):
    mine = Pseudonyms(b"k" * 32)
    hidden, counts = mine.apply(text, names=True)
    assert mine.restore(hidden) == text
    assert mine.apply(hidden, names=True)[0] == hidden
    assert Pseudonyms(b"k" * 32).apply(text, names=True) == (hidden, counts), "the key alone decides"
    if counts:
        assert Pseudonyms(b"x" * 32).apply(text, names=True)[0] != hidden
        assert Pseudonyms(b"k" * 32).restore(hidden) == hidden, "without the sealed file nothing comes back"


def test_the_sealed_file_opens_with_its_key_alone(tmp_path):
    mine = Pseudonyms(b"k" * 32)
    hidden, _ = mine.apply(LETTERS["es"])
    mine.save(tmp_path / "sealed")
    assert b"rut" not in (tmp_path / "sealed").read_bytes()
    other = Pseudonyms(b"k" * 32)
    other.load(tmp_path / "sealed")
    assert other.restore(hidden) == LETTERS["es"]
    assert other.forget(hidden) == 4 and other.forget(hidden) == 0
    other.save(tmp_path / "less")
    again = Pseudonyms(b"k" * 32)
    again.load(tmp_path / "less")
    assert again.restore(hidden) == hidden, "what is forgotten is not in the file"
    with pytest.raises(PolicyError, match="does not open"):
        Pseudonyms(b"x" * 32).load(tmp_path / "sealed")
    raw = bytearray((tmp_path / "sealed").read_bytes())
    raw[40] ^= 1
    (tmp_path / "sealed").write_bytes(raw)
    with pytest.raises(PolicyError):
        Pseudonyms(b"k" * 32).load(tmp_path / "sealed")
    for key in (b"short", "k" * 32, None):
        with pytest.raises(InputError, match="32 bytes"):
            Pseudonyms(key)


def test_pseudonyms_link_ways_of_writing():
    mine = Pseudonyms(b"k" * 32)
    tag = lambda text: mine.apply(text)[0].split(":")[1][:16]
    assert tag("Tel +34 612 345 678") != tag("Tel +34 612 345 679")
    assert len({tag(f"tel {number}"[4:]) for number in ("+34 612 345 678", "+34612345678", "0034 612 345 678")}) == 1
    assert tag("ANN@tea.org") == tag("ann@tea.org") != tag("bob@tea.org")
