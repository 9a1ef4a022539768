"""Language identification on text by others: ours against py3langid alone, on manual pages and a handbook.

    python benchmarks/language_identification.py [RESULT.json] [--rounds 3]

Reads Debian's packages `debian-handbook` (one book in many languages) and `manpages`, `manpages-pt-br`, `manpages-es`. The
handbook is read paragraph by paragraph, without listings, so that the share can be shown by length; the manual pages whole,
options and code included. What a text is written in is known from its folder. Parts that were never translated are left out
where they are word for word those of the English edition, or where one word in eight is a small English word.
"""

import argparse
import gzip
import html
import json
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy

from llmbook.core import Table
from llmbook.languages import COMMON_LANGUAGES, _everything, _identifier, identify_languages, portuguese_variant

BOOK = Path("/usr/share/doc/debian-handbook/html")
PAGES = Path("/usr/share/man")
LANGUAGES = {"en": "en-US", "pt": "pt-BR", "es": "es-ES", "ca": "ca-ES", "fr": "fr-FR", "it": "it-IT", "de": "de-DE"}
SMALL = set("the of and to is are that this with for be which you it by".split())


def untranslated(text: str) -> bool:
    """Whether one word in eight is a small English word."""
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in SMALL for word in words) * 8 >= max(len(words), 1)


def book_paragraphs(folder: Path) -> list[str]:
    """The paragraphs of a handbook, without markup and listings."""
    found = []
    for path in sorted(folder.glob("*.html")):
        page = re.sub(r"<pre.*?</pre>", " ", path.read_text("utf-8", "replace"), flags=re.S)
        for part in re.findall(r"<(?:p|div class=\"para\")[^>]*>(.*?)</(?:p|div)>", page, re.S):
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", part)).split())
            found += [text] if len(text) >= 20 else []
    return found


def manual_pages(folder: Path) -> list[str]:
    """The text of manual pages: requests of roff removed, lines kept."""
    found = []
    for path in sorted(folder.glob("man*/*")):
        try:
            raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        except OSError:
            continue
        text = re.sub(r'^[.\'](?:\\"|[a-z]{2}\b).*$|^\.(?:[A-Z]{2})\b ?', "", raw.decode("utf-8", "replace"), flags=re.M)
        text = re.sub(r"\\f.|\\-|\\&|\\\(..|\\\[[^\]]*\]", " ", text)
        found += [text[:20_000]] if len(text) > 300 else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    samples = {}
    for code, folder in LANGUAGES.items():
        if (BOOK / folder).is_dir():
            english = set(book_paragraphs(BOOK / "en-US")) if code != "en" else set()
            texts = [text for text in book_paragraphs(BOOK / folder) if text not in english]
            samples["handbook", code] = [text for text in texts if code == "en" or not untranslated(text)]
    for code, folder in {"en": "", "pt": "pt_BR", "es": "es", "fr": "fr", "de": "de", "it": "it"}.items():
        if (PAGES / folder / "man1").is_dir():
            texts = manual_pages(PAGES / folder)
            texts = texts[:: max(1, len(texts) // 1000)]
            samples["manual pages", code] = [text for text in texts if code == "en" or not untranslated(text)]
    samples = {key: texts for key, texts in samples.items() if len(texts) >= 10}
    if not {"pt", "es"} <= {code for _, code in samples}:
        sys.exit("no Portuguese and Spanish text found: apt-get install debian-handbook manpages-pt-br manpages-es")
    common, every = _identifier(COMMON_LANGUAGES), _everything()
    sides = {
        "ours": lambda texts: identify_languages(texts)[0],
        "py3langid, the same languages": lambda texts: [common.classify(text[:4000])[0] for text in texts],
        "py3langid, all languages": lambda texts: [every.classify(text[:4000])[0] for text in texts],
    }
    seconds = {name: [] for name in sides}
    rows, confused, by_length = [], Counter(), []
    for number in range(arguments.rounds):
        for (kind, code), texts in samples.items():
            for name, identify in sides.items():
                start = time.process_time()
                codes = identify(texts)
                seconds[name].append((number, time.process_time() - start))
                if number == 0:
                    right = numpy.array([found == code for found in codes])
                    share = float(right.mean())
                    rows.append({"text": kind, "language": code, "samples": len(texts), "side": name, "right": share})
                    if name == "ours":
                        confused.update((code, found) for found in codes if found != code)
                        by_length += [(len(text), good) for text, good in zip(texts, right, strict=True) if kind == "handbook"]
    table = {}
    for row in rows:
        line = table.setdefault((row["text"], row["language"]), {k: row[k] for k in ("text", "language", "samples")})
        line[row["side"]] = round(row["right"], 4)
    print(Table(table.values(), "Share named rightly"))
    worst = [{"written in": a, "taken for": b, "by ours": n} for (a, b), n in confused.most_common(10)]
    print(Table(worst, "Most frequent confusions"))
    edges = (20, 40, 80, 160, 320, 10**9)
    length = []
    for low, high in zip(edges, edges[1:], strict=False):
        found = [good for size, good in by_length if low <= size < high] or [False]
        length.append({"characters": f"from {low}", "paragraphs": len(found), "right": float(numpy.mean(found))})
    print(Table(length, "Handbook by length of the paragraph, ours"))
    variants = Counter(portuguese_variant(text) for text in samples.get(("handbook", "pt"), []))
    print(Table([dict(variants)], "Paragraphs of the Brazilian handbook by their words"))
    volume = sum(min(len(text), 4000) for texts in samples.values() for text in texts) / 1e6
    total = {}
    for name, taken in seconds.items():
        total[name] = statistics.median(sum(s for r, s in taken if r == k) for k in range(arguments.rounds))
    speed = [{"side": n, "CPU seconds": s, "MB/s": volume / s, "times ours": s / total["ours"]} for n, s in total.items()]
    print(Table(speed, f"{volume:.1f} million characters, {arguments.rounds} rounds"))
    if arguments.result:
        content = {"right": rows, "confusions": worst, "by length": length, "variants": dict(variants), "speed": speed}
        with open(arguments.result, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)


if __name__ == "__main__":
    main()
