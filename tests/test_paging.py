"""The pool of pages under any order of calls; the chapter's page shows the rest."""

from collections import Counter

import pytest
import torch
from hypothesis import settings as budget, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import InputError, set_seed
from llmbook.generation import KeyValueCache, LeanDecoder
from llmbook.paging import Chunk, PagedCache, PagePool, page_keys, read_chunks

PAGES, SIZE = 9, 2


class Readers(RuleBasedStateMachine):
    """Readers come with texts, share, write, publish and go; a written page must hold what its reader thinks."""

    def __init__(self):
        super().__init__()
        self.pool, self.readers, self.written = PagePool(PAGES), [], {}

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=12), salt=st.sampled_from(["", "a"]))
    def come(self, text, salt):
        keys = page_keys(text, SIZE, salt=salt)
        found = self.pool.match(keys)
        for page, key in zip(found, keys, strict=False):
            assert self.written[page] == key, "a page was found whose content is another"
        need = -(-len(text) // SIZE) - len(found)
        blank = self.pool.take(need)
        if blank is None:
            assert need > len(self.pool.free)
            self.pool.release(found)
            return
        for page, key in zip(blank, [*keys[len(found) :], None], strict=False):
            self.written[page] = key  # the last, half-full page has no key
        self.readers.append((found + blank, keys, len(found)))

    @rule(i=st.integers(0, 20), count=st.integers(0, 6))
    def publish(self, i, count):
        if self.readers:
            pages, keys, start = self.readers[i % len(self.readers)]
            for page, key in list(zip(pages, keys, strict=False))[start : start + count]:
                if page not in self.pool.keys:
                    self.pool.publish(page, key)

    @rule(i=st.integers(0, 20))
    def go(self, i):
        if self.readers:
            self.pool.release(self.readers.pop(i % len(self.readers))[0])

    @invariant()
    def no_page_is_lost_and_none_lent_twice(self):
        held = Counter(page for pages, *_ in self.readers for page in pages)
        assert self.pool.holders == [held[page] for page in range(PAGES)]
        assert set(self.pool.free) == set(range(PAGES)) - set(held)
        private = Counter(page for pages, _, start in self.readers for page in pages[start:])
        assert all(times == 1 for times in private.values()), "two readers write on one page"

    @invariant()
    def the_index_tells_the_truth(self):
        assert {page: key for key, page in self.pool.index.items()} == self.pool.keys
        assert all(self.written[page] == key for page, key in self.pool.keys.items())


TestReaders = Readers.TestCase
TestReaders.settings = budget(max_examples=150, stateful_step_count=40, deadline=None)


def test_blank_pages_go_first_then_the_longest_free_and_tails_before_heads():
    pool = PagePool(6)
    first, second = pool.take(2), pool.take(2)
    for pages, text in ((first, [1, 2, 3, 4]), (second, [5, 6, 7, 8])):
        for page, key in zip(pages, page_keys(text, 2), strict=True):
            pool.publish(page, key)
    pool.release(first)
    pool.release(second)
    assert pool.take(6) == [4, 5, *reversed(first), *reversed(second)]
    with pytest.raises(InputError, match="nobody holds"):
        PagePool(1).release([0])


def test_keys_depend_on_everything_before():
    keys = page_keys(range(40), 4)
    assert len({*keys}) == len(keys) == 10 and keys[:9] == page_keys(range(39), 4)
    assert page_keys(range(40), 4, known=keys[:3]) == keys
    changed = page_keys([99, *range(1, 40)], 4)
    assert not {*keys} & {*changed}


@pytest.mark.parametrize("changes", [{}, {"key_value_heads": 4}, {"key_value_heads": 1, "tied": False}, {"head_width": 20}])
def test_chunks_in_any_cut_equal_one_stream(changes):
    """Rows that wait, rows in gaps, chunks of one and of many tokens, more than one group of rows."""
    set_seed(0)
    shape = {"depth": 2, "width": 32, "heads": 4, "key_value_heads": 2, "hidden": 48, "context": 64} | changes
    model = LeanDecoder.of(Decoder(DecoderSettings(50, **shape)).double())
    texts = torch.randint(50, (12, 40)).tolist()
    cache = PagedCache(model.settings, 12 * 10, 4, 12, model.norm.weight)
    done, chance = [0] * 12, torch.Generator().manual_seed(1)
    draw = lambda high: int(torch.randint(high, (), generator=chance))
    with torch.inference_mode():
        while min(done) < 40:
            counts = [min(40 - done[i], (0, 1, 1, 1, 2, 9)[draw(6)]) for i in range(12)]
            chosen = sorted((i for i in range(12) if counts[i]), key=lambda i: counts[i] > 1)
            if not chosen:
                continue
            chunks = [Chunk(i, done[i], texts[i][done[i] : done[i] + counts[i]], [10 * i + 9 - p for p in range(10)])
                      for i in chosen]
            states = read_chunks(model, cache, chunks)
            for state, i in zip(states, chosen, strict=True):
                done[i] += counts[i]
                alone = model.states(torch.tensor([texts[i][: done[i]]]))[0, -1]
                torch.testing.assert_close(state, alone, atol=1e-6, rtol=1e-6)
        one = KeyValueCache(model.settings, 40, like=model.norm.weight)
        model.states(torch.tensor([texts[7]]), one)
    held = cache.pages[:, [79 - p for p in range(10)]].transpose(1, 2).flatten(2, 3)
    assert torch.equal(held, cache.rows[:, 7, :, :40])
    torch.testing.assert_close(held, torch.cat([one.keys, one.values], 2)[:, 0], atol=1e-6, rtol=1e-6)
