"""Packing: nothing lost, nothing torn, the same order for any workers; on lengths and texts that are not in the notebook."""

import itertools
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import InputError, SettingsError
from llmbook.packing import Packed, Prefetch, cut_stream, document_mask, fill_row, fit_best

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 40), st.sampled_from([cut_stream, fit_best]))
@settings(max_examples=150, deadline=None)
def test_every_token_lies_in_one_row(lengths, size, way):
    packing = way(lengths, size)
    covered = np.concatenate([np.arange(s, s + n) for s, n in zip(packing.starts, packing.lengths, strict=True)])
    assert (np.sort(covered) == np.arange(sum(lengths))).all()
    sums = [int(packing.lengths[a:b].sum()) for a, b in itertools.pairwise(packing.rows)]
    assert max(sums) <= size and min(sums) >= 1 and packing.rows[-1] == len(packing.starts)
    starts = np.cumsum(lengths) - lengths
    owner = np.searchsorted(starts, packing.starts, "right") - 1
    assert (packing.starts + packing.lengths <= starts[owner] + np.array(lengths)[owner]).all()
    if way is fit_best:
        assert packing.count_cut(starts) == 0
        assert (np.bincount(owner) == -(-np.array(lengths) // size)).all()


@given(LENGTHS, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_best_fit_equals_a_plain_search(lengths, size):
    "Room by room, as the definition has it."
    pieces = [size] * sum(n // size for n in lengths) + sorted((n % size for n in lengths if n % size), reverse=True)
    rooms: list[int] = []
    for piece in pieces:
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms[rooms.index(min(fitting))] -= piece
        else:
            rooms.append(size - piece)
    assert len(fit_best(lengths, size)) == len(rooms)


def test_many_documents_are_packed_in_seconds():
    chance = np.random.default_rng(0)
    lengths = chance.geometric(1 / 300, 200_000)
    packing = fit_best(lengths, 2048)
    assert packing.padding < 0.002 and packing.count_cut(np.cumsum(lengths) - lengths) == 0


def make_text(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "A stream of documents that end with 0."
    chance = np.random.default_rng(seed)
    lengths = chance.integers(2, 50, 80)
    tokens = chance.integers(1, 90, lengths.sum()).astype(np.uint16)
    tokens[np.cumsum(lengths) - 1] = 0
    return tokens, np.cumsum(lengths) - lengths


SHAPE = DecoderSettings(90, 2, 32, 4, 2, 48, 32)


@pytest.mark.parametrize("seed", range(4))
def test_each_document_as_if_alone(seed):
    "Also with grouped heads, and gradients too."
    tokens, documents = make_text(seed)
    torch.manual_seed(seed)
    model, part = Decoder(SHAPE), Packed(tokens, documents, 32, 6, seed).batch(seed)
    how = {"positions": part["positions"], "mask": document_mask(part["documents"])}
    packed = model.states(part["ids"], **how)
    for row, owners in enumerate(part["documents"]):
        for number in owners.unique():
            own = owners == number
            alone = model.states(part["ids"][row : row + 1, own])
            assert torch.allclose(packed[row : row + 1, own], alone, atol=1e-5)
    last = packed[0, part["documents"][0] == 0].sum()
    grad = torch.autograd.grad(last, model.embedding.weight)[0]
    own = part["ids"][0, part["documents"][0] == 0]
    assert set(grad.abs().sum(1).nonzero()[:, 0].tolist()) <= set(own.tolist())


def test_an_epoch_reads_everything_once_and_the_next_in_another_order():
    tokens, documents = make_text()
    objective = Packed(tokens, documents, 32, 1)
    count = len(objective.packing)
    epochs = [[objective.batch(step)["labels"] for step in range(e * count, (e + 1) * count)] for e in (0, 1)]
    for epoch in epochs:
        read = torch.cat(epoch)
        assert (np.bincount(read[read >= 0]) == np.bincount(tokens)).all()
    assert not all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))
    again = Packed(tokens, documents, 32, 1)
    assert all(torch.equal(again.batch(step)["ids"], objective.batch(step)["ids"]) for step in (count + 3, 0, 5))


def test_first_token_is_guessed_from_an_end():
    tokens, documents = make_text()
    row = fill_row(tokens, [0, int(documents[3])], [4, 5], 12)
    assert row[0, 0] == 0 and row[0, 4] == 0 and (row[1, 9:] == -100).all()
    assert row[2].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0] and row[3, 9] == 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_order_does_not_depend_on_workers(workers):
    tokens, documents = make_text()
    objective = Packed(tokens, documents, 32, 4)
    fetch = Prefetch(objective, workers, ahead=3)
    state = torch.get_rng_state()
    for step in (*range(12), 5, 6, 1000, 1001, 3):
        batch = fetch(step)
        assert all(torch.equal(batch[name], values) for name, values in objective.batch(step).items())
    assert torch.equal(state, torch.get_rng_state())
    fetch.close()


def test_error_of_a_worker_arrives():
    class Broken(Packed):
        def batch(self, step: int) -> dict:
            if step == 2:
                raise InputError("row 2 is empty", "a row with tokens")
            return super().batch(step)

    fetch = Prefetch(Broken(*make_text(), 32, 4), workers=1)
    fetch(0), fetch(1)
    with pytest.raises(InputError, match="row 2 is empty"):
        fetch(2)
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


FORGETFUL = """
import numpy as np, sys
from llmbook.packing import Packed, Prefetch

class Broken(Packed):
    def batch(self, step):
        if step == 2:
            raise ValueError("no row 2")
        return super().batch(step)

fetch = Prefetch(Broken(np.arange(4000) % 50, np.arange(0, 4000, 20), 32, 4), workers=2)
fetch(0), fetch(1)
if sys.argv[1] == "error":
    try:
        fetch(2)
    except ValueError as error:
        kept = error  # its traceback holds the loader
print("done")
"""


@pytest.mark.parametrize("way", ["plain", "error"])
def test_a_program_that_forgets_to_close_ends(way):
    done = subprocess.run([sys.executable, "-c", FORGETFUL, way], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_bad_input_is_named():
    tokens, documents = make_text()
    for lengths, size in (([], 8), ([3, 0], 8), ([3], 0), ([-1], 8)):
        for way in (fit_best, cut_stream):
            with pytest.raises(InputError, match="1 token or more"):
                way(lengths, size)
    with pytest.raises(InputError, match="first document"):
        Packed(tokens, documents[1:], 32, 4)
    with pytest.raises(InputError, match="1 token or more"):
        Packed(tokens, documents[::-1][-2:][::-1].repeat(2), 32, 4)
    with pytest.raises(SettingsError, match="0 or more"):
        Prefetch(Packed(tokens, documents, 32, 4), workers=-1)
