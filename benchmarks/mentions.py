"""Finding mentions: our look-up against one long regular expression of the same lists, and one book in three languages.

    python benchmarks/mentions.py [RESULT.json] [--rounds 3] [--chapters 200]

The regular expression only finds words; capitals, names, articles and exceptions are not checked, which favours it. The
book is the Debian handbook (package `debian-handbook`), whose chapters say the same in English, Portuguese and Spanish.
Its regions should come out alike in the three: the likeness is Pearson's correlation of the counts of the groups.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy

from llmbook.core import Table
from llmbook.documents import read_html
from llmbook.mentions import default_lexicon, find_mentions

BOOK = Path("/usr/share/doc/debian-handbook/html")
FOLDERS = {"en": "en-US", "pt": "pt-BR", "es": "es-ES"}


def read_book(folder: str, chapters: int) -> list[str]:
    """The texts of the longest chapters of a translation, in the order of their names."""
    names = sorted((path.name for path in (BOOK / "en-US").glob("*.html")), key=lambda n: -(BOOK / "en-US" / n).stat().st_size)
    return [read_html(BOOK / folder / name) for name in sorted(names[:chapters]) if (BOOK / folder / name).is_file()]


def by_expression(language: str) -> re.Pattern:
    """One expression of all forms of all lists of a language."""
    table = default_lexicon().entries[language]
    forms = {entry.first if entry.rest is None else entry.first + entry.rest.pattern.removesuffix(r"(?!\w)")
             for entries in table.values() for entry in entries}
    return re.compile(r"\b(?:" + "|".join(sorted(forms, key=len, reverse=True)) + r")\b", re.I)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chapters", type=int, default=200)
    arguments = parser.parse_args()
    if not (BOOK / "pt-BR").is_dir():
        sys.exit("the Debian handbook is missing: apt-get install debian-handbook")
    rows, regions = [], {}
    for language, folder in FOLDERS.items():
        texts = read_book(folder, arguments.chapters)
        size = sum(len(text.encode()) for text in texts) / 1e6
        expression, seconds = by_expression(language), {"ours": [], "expression": []}
        for _ in range(arguments.rounds):
            sides = {"ours": lambda text, key=language: find_mentions(text, key), "expression": expression.findall}
            for side, function in sides.items():
                start = time.process_time()
                found = [function(text) for text in texts]
                seconds[side].append(time.process_time() - start)
                if side == "ours":
                    regions[language] = Counter(m.group for mentions in found for m in mentions if m.dimension == "region")
        ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["expression"], strict=True))
        rows.append({
            "language": language, "megabytes": round(size, 2),
            "forms": sum(map(len, default_lexicon().entries[language].values())),
            "ours, MB per CPU second": size / statistics.median(seconds["ours"]),
            "expression, MB per CPU second": size / statistics.median(seconds["expression"]),
            "expression takes": f"{ratios[0]:.1f}–{ratios[-1]:.1f} times ours",
        })
    print(Table(rows, f"Finding mentions, {arguments.rounds} rounds, medians"))
    groups = default_lexicon().groups["region"]
    counts = {key: [regions[key][group] for group in groups] for key in FOLDERS}
    print(Table([{"region": g, **{key: counts[key][i] for key in FOLDERS}} for i, g in enumerate(groups)], "Regions in one book"))
    pairs = (("en", "pt"), ("en", "es"), ("pt", "es"))
    likeness = {f"{a}–{b}": float(numpy.corrcoef(counts[a], counts[b])[0, 1]) for a, b in pairs}
    print(Table([likeness], "Correlation of the counts"))
    if arguments.result:
        with open(arguments.result, "w", encoding="utf-8") as stream:
            json.dump({"speed": rows, "regions": counts, "correlation": likeness}, stream, indent=1)


if __name__ == "__main__":
    main()
