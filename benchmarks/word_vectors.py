"""Word vectors: our trainer against gensim's Word2Vec on the same texts, with a planted truth, in three languages.

    python benchmarks/word_vectors.py [RESULT.json] [--language en|pt|es] [--rounds 2]

English text is the documentation of numpy and scikit-learn. Portuguese and Spanish text are manual pages and the Debian
handbook; they are used where the Debian packages manpages-pt-br, manpages-es and debian-handbook are installed.
gensim is not a dependency of llmbook: `pip install gensim` into the same environment, or only our side is shown.

Some rarer words become twins: two names that fall on their occurrences at random. A trainer is right when the second twin is
the nearest neighbour of the first among all words. Both sides get the same words, window, width, noise words and thinning.
"""

import argparse
import gzip
import json
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import numpy

from llmbook.core import Table
from llmbook.embeddings import (
    RELATIONS,
    SkipGramSettings,
    WordVectors,
    cut_words,
    find_twins,
    measure_analogies,
    plant_twins,
    train_skip_gram,
)
from llmbook.environment import list_distributions, read_environment

FOLDERS = {
    "pt": ("/usr/share/man/pt_BR", "/usr/share/doc/debian-handbook/html/pt-BR"),
    "es": ("/usr/share/man/es", "/usr/share/doc/debian-handbook/html/es-ES"),
}


def read_texts(language: str) -> list[list[str]]:
    """Texts of a language as lists of words."""
    if language == "en":
        packages = [d for d in list_distributions() if d.name in ("numpy", "scikit-learn")]
        return [cut_words(page.body) for page in read_environment(distributions=packages)]
    texts = []
    for path in sorted(path for folder in FOLDERS[language] for path in Path(folder).rglob("*")):
        if path.suffix == ".gz":
            raw = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
            texts.append(re.sub(r"\\f.|\\\S\S?|^[.'].?\w+", " ", raw, flags=re.M))
        elif path.suffix == ".html":
            raw = re.sub(r"<(script|style|pre).*?</\1>", " ", path.read_text("utf-8", "replace"), flags=re.S)
            texts.append(re.sub(r"<[^>]+>", " ", raw))
    if not texts:
        raise SystemExit(f"no text in {' or '.join(FOLDERS[language])}: install the Debian packages named above")
    return [cut_words(text) for text in texts]


def by_llmbook(texts: list[list[str]], epochs: int) -> WordVectors:
    """Our trainer."""
    return train_skip_gram(texts, SkipGramSettings(epochs=epochs))


def by_gensim(texts: list[list[str]], epochs: int) -> WordVectors:
    """gensim's compiled trainer on one thread."""
    from gensim.models import Word2Vec

    own = SkipGramSettings()
    model = Word2Vec(
        texts, vector_size=own.d, window=own.window, min_count=own.minimum, sg=1, negative=own.negative,
        sample=own.thin, epochs=epochs, workers=1, seed=1,
    )
    return WordVectors(model.wv.index_to_key, model.wv.vectors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--language", choices=("en", "pt", "es"), default="en")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    texts = read_texts(arguments.language)
    counts = Counter(word for text in texts for word in text)
    rare = sorted(word for word, count in counts.items() if 20 <= count < 120 and len(word) > 3)[::5]
    planted = plant_twins(texts, rare)
    sides = {("llmbook", 5): by_llmbook, ("llmbook", 10): by_llmbook}
    try:
        import gensim  # noqa: F401

        sides |= {("gensim", 5): by_gensim, ("gensim", 10): by_gensim, ("gensim", 20): by_gensim}
    except ImportError:
        print("gensim is not installed: only our side is shown")
    seconds, spaces = {side: [] for side in sides}, {}
    for _ in range(arguments.rounds):
        for side, train in sides.items():
            start = time.process_time()
            spaces[side] = train(planted, side[1])
            seconds[side].append(time.process_time() - start)
    rows = []
    for side, space in spaces.items():
        ranks = find_twins(space, rare)
        answers = measure_analogies(space, RELATIONS[arguments.language])
        asked = sum(row["questions"] for row in answers)
        rate = lambda name: sum(row[name] * row["questions"] for row in answers if row["questions"]) / max(asked, 1)  # noqa: B023
        rows.append({
            "side": side[0], "epochs": side[1], "CPU seconds": statistics.median(seconds[side]),
            "twin is nearest": float((ranks == 1).mean()), "mean reciprocal rank": float((1 / ranks).mean()),
            "analogies": rate("first"), "in five": rate("in five"), "without a and b": rate("without a and b"),
        })
    words = sum(map(len, texts))
    caption = f"{words:,} words ({arguments.language}), {len(ranks)} twins, {asked} questions, {arguments.rounds} rounds, medians"
    print(Table(rows, caption))
    if arguments.result:
        numbers = {"language": arguments.language, "words": words, "twins": len(ranks), "rows": rows}
        Path(arguments.result).write_text(json.dumps(numbers, indent=1, default=numpy.ndarray.tolist), encoding="utf-8")


if __name__ == "__main__":
    main()
