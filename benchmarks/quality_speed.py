"""What each judge of quality costs: texts and megabytes per processor second, beside datatrove's Gopher filters.

    python benchmarks/quality_speed.py [RESULT.json] [--documents 1500] [--rounds 3]

The texts are documentation of the environment. datatrove's two filters get our splitter, because theirs wants spaCy; they stop at
the first broken rule, ours measure everything. All sides run interleaved in one process on one thread; medians of the rounds.
"""

import argparse
import json
import statistics
import time

from datatrove.data import Document
from datatrove.pipeline.filters import gopher_quality_filter, gopher_repetition_filter

from llmbook.core import Table
from llmbook.environment import list_distributions, read_environment
from llmbook.quality import PerplexityScorer, classifier_scores, find_tokens, judge_corpus, judge_quality, order_gains


def by_datatrove(texts: list[str]) -> None:
    """Both filters over all texts, each to its first broken rule."""
    filters = gopher_repetition_filter.GopherRepetitionFilter(), gopher_quality_filter.GopherQualityFilter()
    for text in texts:
        for one in filters:
            one.filter(Document(text, "1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for module in (gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, language: find_tokens(text)
    packages = [found for found in list_distributions() if found.name in ("numpy", "pandas", "transformers")]
    bodies = [d.body for d in read_environment(distributions=packages) if len(d.body) > 200]
    texts, reference = bodies[::2][: options.documents], bodies[1::2][: options.documents // 4]
    scorer = PerplexityScorer(reference)
    sides = {
        "datatrove's Gopher filters": lambda: by_datatrove(texts),
        "rules, web": lambda: [judge_quality(text, "web") for text in texts],
        "rules, documentation": lambda: [judge_quality(text) for text in texts],
        "perplexity": lambda: scorer.perplexity(texts),
        "order gain, both halves": lambda: order_gains(texts),
        "classifier, both folds": lambda: classifier_scores(texts, reference),
        "rules, then order": lambda: judge_corpus(texts),
    }
    seconds = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, judge in sides.items():
            start = time.process_time()
            judge()
            seconds[name].append(time.process_time() - start)
    size = sum(len(text.encode()) for text in texts) / 1e6
    rows = []
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds["datatrove's Gopher filters"], taken, strict=True))
        rows.append({
            "judge": name, "texts per CPU second": round(len(texts) / middle),
            "megabytes per CPU second": round(size / middle, 2),
            "speed against datatrove": f"{ratios[0]:.1f}–{ratios[-1]:.1f}×",
        })
    print(Table(rows, f"{len(texts)} texts, {size:.1f} MB, {options.rounds} rounds, medians"))
    if options.result:
        with open(options.result, "w", encoding="utf-8") as stream:
            json.dump({"texts": len(texts), "megabytes": size, "rows": rows}, stream, indent=1)


if __name__ == "__main__":
    main()
