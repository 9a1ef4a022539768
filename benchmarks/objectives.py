"""What the same compute learns under each objective: hidden tokens guessed, missing spans written.

The documentation of some installed distributions is split so that near-duplicates stay
on one side. Every objective trains a model of the same width for the same number of floating-point
operations by the same loop. Then all fill the same gaps of held-out text: gaps of one token, and gaps
of about three. A model that cannot tell where a gap ends is told its length; the others are not.
A row of T5 teaches few targets, so T5 takes more rows per step and fewer steps; one line shows what
becomes of it with as few rows as the others, for as many operations.
    python benchmarks/objectives.py [RESULT.json] [--teraflops 1] [--only NAME …]
"""

import argparse
import importlib.metadata
import json
import tempfile
import time
from collections import Counter

import numpy as np
import torch

from llmbook.architecture import Decoder, DecoderSettings, Encoder, EncoderDecoder
from llmbook.architecture import EncoderDecoderSettings, EncoderSettings, count_flops
from llmbook.architecture import initialise_weights
from llmbook.core import Table, set_seed
from llmbook.denoising import Denoising, FutureNgrams, FutureStreams, Gap, SpanCorruption
from llmbook.denoising import choose_marks, cut_gaps, infill, look_near
from llmbook.denoising import reserve_sentinels, score_by_length, score_infilling
from llmbook.duplicates import assign_splits, find_near_duplicates
from llmbook.environment import read_environment
from llmbook.masking import MaskedLanguage, Neighbours, choose_masking, reserve_tokens
from llmbook.objectives import Autoregressive
from llmbook.optimisation import TrainSettings
from llmbook.pretraining import continue_greedily
from llmbook.tokenization import encode_plain, train_tokenizer
from llmbook.training import train

CONTEXT, ROWS = 32, 16
RATES = {"learning_rate": 1e-2, "matrix_rate": 7e-3}  # 2e-2 is better for the encoder, too high for T5


def read_texts(names: list[str]) -> tuple[list[str], list[str]]:
    "Documentation to learn from and to be tested on; near-duplicates on the same side."
    wanted = [None if name == "python" else importlib.metadata.distribution(name) for name in names]
    documents = [d for d in read_environment(distributions=wanted) if 100 < len(d.text) < 20_000]
    texts = [document.text for document in documents]
    clusters = find_near_duplicates(texts)
    splits = assign_splits([len(t) for t in texts], [d.id for d in documents], clusters, 0.02, 0.02)
    firsts = [i for i, cluster in enumerate(clusters) if cluster == i]
    side = lambda split: [texts[i] for i in firsts if splits[i] == split]
    return side("train"), side("test")


def fill_by_masks(model: Encoder, gaps: list[Gap], mask: int) -> list[list[int]]:
    "All tokens of a gap at once; the length is told."
    rows = [[*g.left, *[mask] * len(g.span), *g.right] for g in gaps]
    with torch.no_grad():
        best = model(torch.tensor(rows)).argmax(-1).tolist()
    return [row[len(g.left) : len(g.left) + len(g.span)] for row, g in zip(best, gaps, strict=True)]


def fill_from_left(model: Decoder, gaps: list[Gap]) -> list[list[int]]:
    "Continue what stands on the left; the length is told."
    return [continue_greedily(model, g.left, len(g.span)) for g in gaps]


def main() -> None:
    "Train each, score each."
    parser = argparse.ArgumentParser()
    parser.add_argument("result", nargs="?")
    parser.add_argument("--teraflops", type=float, default=1.0, help="per objective")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--width", type=int, default=96, help="a multiple of 16")
    parser.add_argument("--depth", type=int, default=2, help="blocks; half of them in each half")
    parser.add_argument("--gaps", type=int, default=500)
    parser.add_argument("--distributions", nargs="*", default=["numpy", "pandas"],
                        help="`python` is the standard library")
    parser.add_argument("--only", nargs="*", help="names of objectives")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    learn, test = read_texts(options.distributions)
    tokenizer = reserve_sentinels(reserve_tokens(train_tokenizer(learn, options.vocabulary)), 32)
    end, v = tokenizer.eos_token_id, len(tokenizer)
    encode = lambda texts: np.concatenate([[*ids, end] for ids in encode_plain(tokenizer, texts)])
    tokens, heldout = encode(learn), encode(test)
    print(f"{len(learn)} documents, {len(tokens):,} tokens to learn from; {len(test)} documents, "
          f"{len(heldout):,} tokens held out", flush=True)
    marks, masking = choose_marks(tokenizer), {r: choose_masking(tokenizer, r) for r in (0.15, 0.4)}
    gaps = {"one": cut_gaps(heldout, options.gaps, CONTEXT, 1.0, seed=1),
            "span": cut_gaps(heldout, options.gaps, CONTEXT, 3.0, seed=2)}
    read, width, depth = (CONTEXT, ROWS), options.width, options.depth
    heads, hidden = width // 16, 8 * width // 3 // 32 * 32
    cut = lambda rate, rows: SpanCorruption(tokens, CONTEXT, rows, marks, rate, seed=options.seed)
    few, spans, half = cut(0.15, 4 * ROWS), cut(0.3, 2 * ROWS), cut(0.5, 2 * ROWS)
    narrow = cut(0.15, ROWS)
    decoder = DecoderSettings(v, depth, width, heads, heads, hidden, CONTEXT)
    encoder = EncoderSettings(v, depth, width, heads, hidden, CONTEXT)
    both = EncoderDecoderSettings(v, depth // 2, depth // 2, width, heads, hidden)
    text = lambda shape: count_flops(shape, CONTEXT) * 3 * CONTEXT * ROWS
    # one half reads, the other writes; the second stream's few operations are not counted
    pair = lambda objective: count_flops(both, CONTEXT) * 3 / 2 * sum(
        objective.batch(0)[name].numel() for name in ("ids", "targets"))
    masked = lambda rate: MaskedLanguage(tokens, *read, masking[rate], options.seed)
    by_mask = lambda model, some: fill_by_masks(model, some, tokenizer.mask_token_id)
    by_span = lambda model, some: infill(model, some, marks)
    bart = Denoising(tokens, *read, marks, seed=options.seed)
    plans = {  # name: shape, model, objective, flops per step, how to fill, whether told the length
        "left to right": (decoder, Decoder, Autoregressive(tokens, *read, options.seed),
                          text(decoder), fill_from_left, True),
        "masked 15 %": (encoder, Encoder, masked(0.15), text(encoder), by_mask, True),
        "masked 40 %": (encoder, Encoder, masked(0.4), text(encoder), by_mask, True),
        "spans 15 % (T5)": (both, EncoderDecoder, few, pair(few), by_span, False),
        "spans 15 %, few rows": (both, EncoderDecoder, narrow, pair(narrow), by_span, False),
        "spans 50 %": (both, EncoderDecoder, half, pair(half), by_span, False),
        "spans 30 %": (both, EncoderDecoder, spans, pair(spans), by_span, False),
        "spans 30 %, flat start": (both, EncoderDecoder, spans, pair(spans), by_span, False),
        "spans 30 %, 2 ahead": (both, EncoderDecoder, FutureNgrams(spans), pair(spans), by_span, False),
        "denoising (BART)": (both, EncoderDecoder, bart, pair(bart),
                             lambda model, some: infill(model, some, marks, 8, whole=True), False),
    }
    rows = score_baselines(tokens, gaps)
    for name, (shape, kind, objective, flops, fill, told) in plans.items():
        if options.only and name not in options.only:
            continue
        set_seed(options.seed)
        model = kind(shape)
        initialise_weights(model)
        if kind is EncoderDecoder and "flat" not in name:
            look_near(model)
        learner = FutureStreams(model, 2) if isinstance(objective, FutureNgrams) else model
        steps = max(1, round(options.teraflops * 1e12 / flops))
        settings = TrainSettings(steps, checkpoint_every=10**9, device="cpu", seed=options.seed, **RATES)
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            numbers = train(learner, objective, settings, folder, watch_every=10**9)
        spent = time.process_time() - start
        model.eval()
        one = score_infilling(fill(model, gaps["one"]), gaps["one"])
        written = fill(model, gaps["span"])
        rows.append({"objective": name, "parameters": sum(p.numel() for p in model.parameters()),
                     "steps": steps, "targets": numbers["targets"], "CPU s": round(spent, 1),
                     "length": "told" if told else "found",
                     "one token": one["exact"], **score_spans(written, gaps["span"])})
        print(Table(rows[-1:]), flush=True)
    print(Table(rows, f"Share of {options.gaps} held-out gaps filled, {options.teraflops} TFLOP each"))
    if options.result:
        with open(options.result, "w") as stream:
            json.dump(rows, stream)


def score_spans(written: list[list[int]], gaps: list[Gap]) -> dict[str, float]:
    "Exact spans, of all and by their length, and tokens at their place."
    scores = {f"span {name}": value for name, value in score_by_length(written, gaps).items()}
    return scores | {"span tokens": score_infilling(written, gaps)["tokens"]}


def score_baselines(tokens: np.ndarray, gaps: dict[str, list[Gap]]) -> list[dict]:
    "What counting knows: the most frequent span; a token from both neighbours, or from two before."
    counts, stream = Neighbours(tokens), tokens.tolist()
    one = [[counts.guess(g.left[-1], g.right[0])] for g in gaps["one"]]
    common = Counter(zip(stream, stream[1:], stream[2:], strict=False)).most_common(1)[0][0]
    after: dict[tuple[int, int], Counter] = {}
    for a, b, c in zip(stream, stream[1:], stream[2:], strict=False):
        after.setdefault((a, b), Counter())[c] += 1
    best = {pair: seen.most_common(1)[0][0] for pair, seen in after.items()}

    def go_on(gap: Gap) -> list[int]:
        row = list(gap.left[-2:])
        for _ in gap.span:
            row.append(best.get((row[-2], row[-1]), common[0]))
        return row[2:]

    return [
        {"objective": "most frequent span", "length": "told",
         **score_spans([list(common[: len(g.span)]) for g in gaps["span"]], gaps["span"])},
        {"objective": "counts of pairs and threes", "length": "told",
         "one token": score_infilling(one, gaps["one"])["exact"],
         **score_spans([go_on(g) for g in gaps["span"]], gaps["span"])},
    ]


if __name__ == "__main__":
    main()
