"""Records of a whole run as the stages write them, for pages that must be tested without running one."""

import json
import math
from pathlib import Path

from llmbook.core import seal, write_json

STARTED = "2026-11-22T10:{:02d}:00Z"
VERSIONS = {"python": "3.11.2", "system": "Linux", "llmbook": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
CHAIN = {
    "corpus": (), "tokenizer": ("corpus",), "tokens": ("corpus", "tokenizer"), "model": ("tokens", "tokenizer"),
    "chat": ("corpus", "tokens", "tokenizer", "model"), "quantized": ("chat", "tokens"),
    "encoder": ("corpus", "tokenizer"), "index": ("corpus", "encoder"),
    "evaluation": ("corpus", "tokens", "tokenizer", "model", "chat", "encoder", "index"),
    "version": ("corpus", "tokenizer", "model", "chat", "quantized", "encoder", "index", "evaluation"),
    "service": ("chat", "encoder", "index"),
}  # fmt: skip
SECONDS = dict(zip(CHAIN, (24, 3.1, 2.4, 141, 38, 6.2, 19, 3.9, 21, 2.6, 4.4), strict=True))


def sample_corpus() -> tuple[dict, dict]:
    """Numbers and files of a corpus."""
    removed = {
        "too short": {"count": 8213, "bytes": 160_412, "samples": [
            {"what": "json.decoder.JSONObject", "reason": "12 characters", "text": "Parse it."}]},
        "near-duplicates": {"count": 2114, "bytes": 901_233, "samples": [
            {"what": "numpy.ma.sum", "reason": "like numpy.sum", "text": "Return the sum of the elements"},
            {"what": "pandas.Series.add", "reason": "like pandas.add", "text": "Add <b>dataframe</b> & other"}]},
        "e-mail redacted": {"count": 37, "bytes": 0, "samples": [
            {"what": "email.utils", "reason": "address", "text": "Written by [e-mail] in 2001"}]},
        "licence not allowed": {"count": 412, "bytes": 88_100, "samples": [
            {"what": "somepackage", "reason": "GPL-3.0-only", "text": "This function <script>alert(1)</script>"}]},
    }  # fmt: skip
    numbers = {
        "documents": {"train": 16_204, "validation": 911, "test": 902},
        "bytes": {"train": 4_712_000, "validation": 266_000, "test": 259_000},
        "pairs": {"train": 9120, "validation": 512, "test": 498},
        "removed": {name: entry["count"] for name, entry in removed.items()},
    }
    names = (
        "python",
        "numpy",
        "torch",
        "pandas",
        "transformers",
        "scipy",
        "datasets",
        "pyarrow",
        "fastapi",
        "openai",
        "mlflow",
        "sqlalchemy",
        "jinja2",
        "tqdm",
    )
    sources = [
        {
            "source": f"{name} {i}.{i + 2}",
            "bytes": int(2_100_000 / (i + 1)),
            "licence": ("PSF-2.0", "BSD-3-Clause", "Apache-2.0")[min(i, 2)],
        }
        for i, name in enumerate(names)
    ]
    card = {
        "name": "llmbook corpus of environment", "settings": {"source": "environment"},
        "numbers": numbers, "removed": removed,
        "kinds": {"function": 9120, "method": 6011, "class": 1980, "module": 906}, "languages": {"en": 18_017},
        "licences": {"BSD-3-Clause": 8120, "Apache-2.0": 5011, "PSF-2.0": 3900, "MIT": 986},
        "sources": sources, "collected": ["2026-11-20", "2026-11-22"],
    }  # fmt: skip
    return numbers, {"card.json": card, "removed.json": removed}


def sample_training(steps: int, first: float, last: float, name: str) -> dict:
    """Numbers of a training."""
    curve = []
    for i in range(9):
        level = last + (first - last) * math.exp(-i / 1.6)
        point = {
            "step": i * steps // 8,
            "targets": i * steps * 128,
            name: level,
            "samples": [
                "Return the "
                + ("the the of of a" if i < 2 else "value of the array along the given axis, or None if it")
            ],
        }
        curve.append(point | ({"loss": level * 1.9} if i else {}))
    return {"steps": steps, "curve": curve, "targets": steps * 1024, "targets_per_second": 7412.0, "utilisation": 0.0}


def sample_numbers() -> dict[str, tuple[dict, dict]]:
    """Stage -> its numbers and its files."""
    compare = lambda d, low, high, before, after: {
        "difference": d,
        "low": low,
        "high": high,
        "p": 0.001,
        "before": before,
        "after": after,
    }
    tokens = {
        s: {"tokens": n, "documents": d, "bytes": 4 * n}
        for s, n, d in (("train", 1_240_113, 16_204), ("validation", 70_012, 911), ("test", 68_220, 902))
    }
    shape = {"vocabulary": 4096, "depth": 5, "width": 192, "heads": 3, "context": 256, "tied": True}
    answers = [
        {"kind": "answers", "question": "what does os.replace guarantee?", "model": "llmbook-docs",
         "text": "Rename a file or directory, overwriting the destination.", "abstained": False, "reason": "",
         "citations": [{"symbol": "os.replace", "source": "python 3.11.2", "licence": "PSF-2.0", "quote": "Rename"}],
         "ttft_seconds": 0.021, "seconds": 0.024, "tokens": 10, "tokens_per_second": None},
        {"kind": "answers", "question": "who won the cup in 1954?", "text": "", "abstained": True, "citations": [],
         "reason": "nothing in the documents supports an answer", "ttft_seconds": 0.018, "seconds": 0.018, "tokens": 0},
        {"kind": "chat", "question": "what does os.replace guarantee?", "text": "Return the path of the file.",
         "tokens": 9,
         "ttft_seconds": 0.034, "seconds": 0.071, "tokens_per_second": 243.0},
    ]  # fmt: skip
    checks = {
        "a wrong key is refused (401)": True,
        "the third request of two per minute is refused (429)": True,
        "the door is closed after draining": False,
    }
    latency = {
        "answers": {"ttft_seconds": 0.0195, "seconds": 0.021},
        "chat": {"ttft_seconds": 0.034, "seconds": 0.071, "tokens_per_second": 243.0},
    }
    ranks = lambda low, high: {"mrr@10": low, "ndcg@10": high, "recall@10": high + 0.1}
    evaluation = {
        "text": {
            "model": {"bits_per_byte": 2.21, "perplexity": 331.0},
            "five_gram": {"bits_per_byte": 2.34},
            "zstd": {"bits_per_byte": 2.61},
            "model_against_five_gram_bits_per_byte": compare(-0.13, -0.15, -0.11, 2.34, 2.21),
            "bytes": 141_002,
            "documents": 211,
        },
        "tuning": {"answer_loss": compare(-0.41, -0.47, -0.35, 3.31, 2.90)},
        "retrieval": {
            "dense": ranks(0.48, 0.55),
            "sparse": ranks(0.66, 0.71),
            "hybrid": ranks(0.68, 0.722),
            "reranked": ranks(0.74, 0.79),
            "hybrid_against_sparse_ndcg": compare(0.012, -0.006, 0.031, 0.71, 0.722),
            "reranked_against_hybrid_ndcg": compare(0.068, 0.041, 0.096, 0.722, 0.79),
        },
        "answers": {
            "answered": 0.93,
            "verbatim": 1.0,
            "retrieved": {"exact_match": 0.31, "f1": 0.63},
            "from_memory": {"exact_match": 0.0, "f1": 0.09},
            "retrieved_against_memory_f1": compare(-0.04, -0.06, -0.02, 0.67, 0.63),
            "support_ece": 0.08,
        },
        "silence": {"threshold": 0.42, "false_answers": 0.04, "false_abstentions": 0.07, "unanswerable": 50},
    }
    return {
        "corpus": sample_corpus(), "tokens": (tokens, {}),
        "tokenizer": ({"vocabulary": 4096, "bytes_per_token": 3.8}, {}),
        "model": (sample_training(600, 4.9, 2.2, "bits_per_byte")
                  | {"parameters": 3_011_712, "shape": shape, "bits_per_byte": 2.21}, {}),
        "chat": (sample_training(120, 3.4, 2.9, "heldout_loss") | {
            "before": {"answer_loss": 3.31, "bits_per_byte": 2.21, "answer_losses": [3.1, 3.5], "samples": [
                {"question": "What does shutil.move do?", "answer": "the the of the"}]},
            "after": {"answer_loss": 2.90, "bits_per_byte": 2.27, "answer_losses": [2.8, 3.0], "samples": [
                {"question": "What does shutil.move do?", "answer": "Return a path <i>of</i> the file."}]}}, {}),
        "quantized": ({"table": [
            {"model": "original", "bytes": 12_046_848, "bits_per_byte": 2.270, "perplexity_change": 0.0},
            {"model": "8 bits", "bytes": 3_400_100, "bits_per_byte": 2.272, "perplexity_change": 0.0009},
            {"model": "4 bits, GPTQ", "bytes": 2_012_000, "bits_per_byte": 2.331, "perplexity_change": 0.027}],
            "tokens_per_second": {"original": 81.0, "8 bits": 243.0}}, {}),
        "encoder": ({"hit_at_1": 0.52}, {}), "index": ({"chunks": 19_204}, {}), "evaluation": (evaluation, {}),
        "version": ({"release": "release/llmbook 3", "status": "production", "objections": [],
                     "parts": {"chat": "model/llmbook-chat 3", "index": "index/llmbook-index 2"}}, {}),
        "service": ({"requests": 8, "checks": checks, "latency": latency}, {"transcript.json": {"exchanges": answers}}),
    }  # fmt: skip


def make_sample_run(folder: Path) -> dict[str, Path]:
    """Write the folders of a finished run; stage -> folder."""
    inputs, contents = {}, {}
    made = sample_numbers()
    for minute, stage in enumerate(CHAIN):
        numbers, files = made[stage]
        place = inputs[stage] = folder / stage
        place.mkdir(parents=True)
        (place / "made.txt").write_text(f"what {stage} made")
        for name, value in files.items():
            (place / name).write_text(json.dumps(value))
        contents[stage], seconds = seal(place), SECONDS[stage]
        write_json(
            place / "stage.json",
            {
                "name": stage,
                "title": stage,
                "fingerprint": "f" * 64,
                "started": STARTED.format(minute),
                "settings": {"seed": 0, "source": "environment"} if stage == "corpus" else {"seed": 0},
                "inputs": {name: contents[name] for name in CHAIN[stage]},
                "numbers": numbers,
                "versions": VERSIONS,
                "content": contents[stage],
                "seconds": seconds,
                "cpu_seconds": 1.8 * seconds,
                "peak_memory": 1_900_000_000,
                "joules": 18 * seconds,
                "joules_from": "10 W per busy core",
                "carbon_grams": 18 * seconds / 3.6e6 * 445,
            },
        )
    return inputs
