"""Text classification: ours against scikit-learn's HashingVectorizer with SGDClassifier and LogisticRegression.

    python benchmarks/text_classification.py [RESULT.json] [--texts 6000] [--rounds 3]

All see words, pairs of words and runs of three and four characters, hashed to 2^18 rows, of the same texts: which package does
a piece of documentation come from? Training includes reading the texts. Ours calibrates too.
"""

import argparse
import json
import re
import statistics
import time
import warnings

import numpy
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.pipeline import make_pipeline, make_union

from llmbook.classification import train_classifier
from llmbook.core import Table
from llmbook.environment import list_distributions, read_environment


def peer(model: object) -> object:
    """scikit-learn's usual pipeline over the same pieces."""
    hashing = {"n_features": 2**17, "alternate_sign": False}
    words = HashingVectorizer(ngram_range=(1, 2), **hashing)
    return make_pipeline(make_union(words, HashingVectorizer(analyzer="char", ngram_range=(3, 4), **hashing)), model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--texts", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    wanted = ("numpy", "pandas", "scikit-learn", "transformers", "torch", "matplotlib")
    packages = [None, *(d for d in list_distributions() if d.name in wanted)]
    documents = [d for d in read_environment(distributions=packages) if len(d.body) > 100]
    order = numpy.random.default_rng(0).permutation(len(documents))[: arguments.texts]
    texts = [documents[i].body[:2000] for i in order]
    owners = [re.split("[ =]", documents[i].source)[0] for i in order]
    cut = len(texts) * 4 // 5
    names = sorted(set(owners))
    truth = numpy.array([names.index(owner) for owner in owners[cut:]])
    sides = {
        "ours": None,
        "SGDClassifier": lambda: SGDClassifier(loss="log_loss", alpha=1e-6, random_state=0),
        "LogisticRegression": lambda: LogisticRegression(C=30, max_iter=60),
    }
    taken, found = {name: [] for name in sides}, {}
    for round_ in range(arguments.rounds):
        for name, make in sides.items():
            if name == "LogisticRegression" and round_:
                continue  # minutes a round, and the same each time
            start = time.process_time()
            model = train_classifier(texts[:cut], owners[:cut]) if make is None else peer(make()).fit(texts[:cut], owners[:cut])
            middle = time.process_time()
            chance = model.probabilities(texts[cut:]) if make is None else model.predict_proba(texts[cut:])
            taken[name].append((middle - start, time.process_time() - middle))
            right = chance[numpy.arange(len(truth)), truth]
            found[name] = (chance.argmax(1) == truth).mean(), -numpy.log(numpy.maximum(right, 1e-12)).mean()
    rows = []
    for name, pairs in taken.items():
        learn, answer = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({
            "side": name, "accuracy": float(found[name][0]), "loss": float(found[name][1]), "training, CPU s": learn,
            "texts answered per CPU s": (len(texts) - cut) / answer,
        })
    for row in rows:
        row["times ours, training"] = row["training, CPU s"] / rows[0]["training, CPU s"]
        row["times ours, answering"] = rows[0]["texts answered per CPU s"] / row["texts answered per CPU s"]
    size = sum(map(len, texts)) / len(texts)
    print(Table(rows, f"{cut} texts teach, {len(texts) - cut} test, {size:.0f} characters each, {len(names)} labels"))
    if arguments.result:
        with open(arguments.result, "w", encoding="utf-8") as stream:
            json.dump({"texts": len(texts), "labels": names, "rows": rows}, stream, indent=1)


if __name__ == "__main__":
    main()
