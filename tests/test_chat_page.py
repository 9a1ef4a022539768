"""The chat page in a real browser: what people see, with the keyboard alone, and what a hostile model cannot do."""

import json
import re
import shutil
import threading
from importlib.resources import files
from types import SimpleNamespace

import pytest

from llmbook.admission import KeyStore, ServiceSettings
from llmbook.deployment import create_app, serving
from llmbook.protocol import Part, Service
from test_deployment import Parrot

PAGE = files("llmbook").joinpath("chat.html").read_text(encoding="utf-8")
HOSTILE = (
    "Look: <img src=x onerror=document.title='owned'><script>document.title='owned'</script> "
    "**bold** `code`\n\n- one\n- two"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_page_is_one_file_that_asks_nobody():
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)""", PAGE)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", PAGE)
    assert "innerHTML" not in PAGE and "insertAdjacentHTML" not in PAGE and "eval(" not in PAGE
    assert not re.search(r"<[^>]+\s(on\w+|style)\s*=", PAGE.split("<script>")[0])
    assert PAGE.count("<script>") == 1 and PAGE.count("<style>") == 1 and len(PAGE) < 40_000


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Scripted(Parrot):
    """Says what it is told to say, word by word, and can be held."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def write(self, ids, options, cancelled):
        for word in HOSTILE.split(" "):
            yield Part(word + " ", 1)
            while not self.gate.wait(0.02):
                if cancelled():
                    self.stopped.set()
                    return
        yield Part("", 0, "stop")


def look_up(question, passages):
    from dataclasses import make_dataclass

    Passage = make_dataclass("Passage", ["quote", "symbol", "source", "licence"])
    if "weather" in question:
        return SimpleNamespace(text="", citations=[], abstained=True, reason="nothing here speaks of that")
    cited = [Passage("Rename a file,\noverwriting the destination. <b>", "os.replace", "Python 3.11", "PSF-2.0")]
    return SimpleNamespace(
        text="Rename a file, overwriting the destination.", citations=cited, abstained=False, reason=""
    )


@pytest.fixture
def house(tmp_path, browser):
    store = KeyStore(tmp_path / "keys.json")
    writer, secret = Scripted(), store.create("ada", requests_per_minute=8)
    settings = ServiceSettings(port=0, keys=str(store.path), records=str(tmp_path / "records"))
    app = create_app(Service(writer, look_up, examples=("What does os.replace do?",)), settings)
    with serving(app, settings) as url:
        page = browser.new_page()
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(url)
        yield SimpleNamespace(
            page=page, url=url, secret=secret, writer=writer, records=tmp_path / "records", store=store
        )
        assert page.faults == []
        assert all(address.startswith((url, "data:")) for address in page.asked)
        assert page.title() == "llmbook"
        page.close()


def enter(house):
    page = house.page
    page.wait_for_selector("dialog[open]")
    page.keyboard.type(house.secret)
    page.keyboard.press("Enter")
    page.wait_for_selector(".tries button")


def ask(house, text, model=None):
    if model:
        house.page.select_option("#model", model)
    house.page.focus("#question")
    house.page.keyboard.type(text)
    house.page.keyboard.press("Enter")


def test_answer_with_sources_by_keyboard_alone(house):
    page = house.page
    enter(house)
    assert page.evaluate("document.activeElement.id") == "question"
    ask(house, "What does os.replace do?")
    page.wait_for_selector(".sources")
    assert page.inner_text(".theirs p") == "Rename a file, overwriting the destination."
    assert page.inner_text(".sources summary").split() == ["os.replace", "Python", "3.11", "·", "PSF-2.0"]
    assert not page.is_visible(".sources blockquote")
    page.focus(".sources summary")
    page.keyboard.press("Enter")
    assert page.inner_text(".sources blockquote") == "Rename a file,\noverwriting the destination. <b>"
    ask(house, "How is the weather?")
    page.get_by_text("nothing here speaks of that").first.wait_for()
    assert page.locator(".sources").count() == 1


def test_example_answers_itself(house):
    enter(house)
    house.page.click(".tries button")
    house.page.wait_for_selector(".sources")
    assert not house.page.is_visible("#welcome")
    house.page.click("#fresh")
    assert house.page.is_visible("#welcome") and house.page.locator("article").count() == 0


def test_model_text_is_never_html(house):
    page = house.page
    enter(house)
    ask(house, "Say it", "llmbook-chat")
    page.wait_for_selector(".rate")
    assert "<img src=x" in page.inner_text(".theirs") and page.locator("#talk img, #talk script").count() == 0
    assert page.inner_text(".theirs strong") == "bold" and page.inner_text(".theirs code") == "code"
    assert page.locator(".theirs li").all_inner_texts() == ["one", "two"]


def test_stop_button_and_escape(house):
    page = house.page
    enter(house)
    for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        house.writer.gate.clear()
        house.writer.stopped.clear()
        ask(house, "Say it", "llmbook-chat")
        page.wait_for_selector("#stop:visible")
        page.get_by_text("Look:").last.wait_for()
        stop()
        page.wait_for_selector("#send:visible")
        assert house.writer.stopped.wait(3)
    assert page.locator(".trouble").count() == 0


def test_thumbs(house):
    page = house.page
    enter(house)
    ask(house, "What does os.replace do?")
    page.click(".rate .down")
    page.fill(".why input", "too short")
    page.keyboard.press("Enter")
    page.get_by_text("Thank you, that helps.").wait_for()
    assert page.get_attribute(".rate .down", "aria-pressed") == "true"
    kept = [json.loads(line) for line in (house.records / "feedback.jsonl").read_text().splitlines()]
    assert [(line["rating"], line["comment"]) for line in kept] == [("down", ""), ("down", "too short")]


def test_errors_in_plain_words(house):
    page = house.page
    enter(house)
    for _ in range(9):
        ask(house, "What does os.replace do?")
        page.wait_for_selector("#send:visible")
        if page.locator(".trouble").count():
            break
    assert "faster than this service allows" in page.inner_text(".trouble")
    assert page.input_value("#question") == "What does os.replace do?", "the question is not lost"
    house.store.revoke("ada")
    page.focus("#question")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert "does not know this key" in page.inner_text(".trouble >> nth=-1")


def test_every_control_has_a_name(house):
    enter(house)
    ask(house, "What does os.replace do?")
    house.page.wait_for_selector(".rate")
    nameless = house.page.evaluate("""
        [...document.querySelectorAll('button, input, select, textarea')]
            .filter(node => !(node.innerText.trim() || node.ariaLabel || node.labels?.length))
            .map(node => node.outerHTML)""")
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(house, scheme):
    house.page.emulate_media(color_scheme=scheme)
    names = ["paper", "card", "ink", "soft", "accent", "on-accent", "wrong", "mine"]
    colours = house.page.evaluate("""names => {
        const style = getComputedStyle(document.documentElement);
        return Object.fromEntries(names.map(name => [name, style.getPropertyValue('--' + name).trim()]));
    }""", names)

    def light(name):
        channels = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for front, back in (
        ("ink", "paper"),
        ("soft", "paper"),
        ("soft", "card"),
        ("accent", "card"),
        ("on-accent", "accent"),
        ("wrong", "card"),
        ("ink", "mine"),
    ):
        bright, dark = sorted((light(front), light(back)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (front, back)
    enter(house)


def test_narrow_screen_does_not_scroll_sideways(house):
    house.page.set_viewport_size({"width": 360, "height": 640})
    enter(house)
    ask(house, "What does os.replace do?" + "x" * 200)
    house.page.wait_for_selector(".sources")
    assert house.page.evaluate("document.documentElement.scrollWidth") <= 360
