"""Random sequences of everything that can be done to a cache, against a slow model of lists that says what must be seen.

Keys and values are made up, and say which token of which layer they are. So no attention is computed: after each call,
the keys that each query's mask shows it are compared, one by one, with the tokens that the contract says it sees, at the
rotary distance that the contract says. A few hundred steps by default;
`HYPOTHESIS_PROFILE=long pytest tests/test_fuzz.py -s` takes more than ten thousand, and says how many.
"""

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from sink_cache import SinkWindowCache
from sink_cache.cache import prepare_as, stack_of
from sink_cache.rotary import Rotation
from sink_cache.twin import PositionScheme

HEADS, HEAD_DIM, IDS = 2, 6, 2**14
PARTNERS = [(2, 3, 0, 1, 4, 5), (1, 0, 3, 2, 4, 5), (0, 1, 2, 3, 4, 5)]  # half-split, interleaved, none; 4 and 5 stay
FREQUENCIES = [(-1.0, -0.1, 1.0, 0.1, 0.0, 0.0), (0.7, -0.7, -0.03, 0.03, 0.0, 0.0), (0.0,) * 6]
LAYERS = [0, 0, 1, 2]  # which of these each layer has; alike layers share storage, and the last joins one of them
CONFIG = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=len(LAYERS), num_attention_heads=2,
    max_position_embeddings=4096, attn_implementation="eager",
)  # fmt: skip
SCHEME = PositionScheme(
    {layer: Rotation(PARTNERS[kind], FREQUENCIES[kind]) for layer, kind in enumerate(LAYERS)}, None, None, {}
)
REAL_MODEL = LlamaForCausalLM(CONFIG)  # only says to load() where layers are
RANDOM = torch.Generator().manual_seed(0)
CONTENT = torch.randn(len(LAYERS), IDS, HEADS, HEAD_DIM, dtype=torch.float64, generator=RANDOM)
ROUNDING = 2e-5  # of float32, at positions of a few hundred

COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}
PROFILES = {
    "default": settings(max_examples=45, stateful_step_count=30, derandomize=True, **COMMON),
    "long": settings(max_examples=600, stateful_step_count=40, **COMMON),
}
STEPS: Counter[str] = Counter()


def keys_at(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys `[..., HEADS, HEAD_DIM]`, float64, of these tokens at these positions: the definition of a rotary embedding."""
    content = CONTENT[layer, ids]
    angle = positions.double()[..., None, None] * torch.tensor(FREQUENCIES[LAYERS[layer]], dtype=torch.float64)
    return content * angle.cos() + content[..., list(PARTNERS[LAYERS[layer]])] * angle.sin()


class Model(torch.nn.Module):
    """What a transformers model does with a cache: asks for a mask, then gives each layer its keys."""

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: SinkWindowCache
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        embeds = torch.zeros(*ids.shape, 8)
        mask = create_causal_mask(CONFIG, embeds, attention_mask, cache, position_ids)
        attended = []
        for layer in range(len(LAYERS)):
            keys = keys_at(layer, ids, position_ids.expand_as(ids)).float().transpose(1, 2)
            values = torch.stack([ids, torch.full_like(ids, layer)], dim=-1).float()[:, None].expand(-1, HEADS, -1, -1)
            attended.append(cache.update(keys, values.contiguous(), layer))
        return mask == 0, attended


class Prepared(SinkWindowCache):
    """A cache that knows the made-up positions, whatever the model."""

    def prepare_for(self, model: PreTrainedModel) -> None:
        prepare_as(self, CONFIG, SCHEME)


class Row:
    """One row as the contract has it: its tokens so far, all of them, where their positions start, and what rebases took off."""

    def __init__(self, pads: int, start: int) -> None:
        self.pads, self.start, self.rebased = pads, start, 0
        self.tokens: list[int] = []


KINDS = ["plain", "padded", "compileable", "compileable padded"]
PADS = st.lists(st.integers(0, 9), min_size=3, max_size=3)


class CacheMachine(RuleBasedStateMachine):
    cache: SinkWindowCache

    @initialize(
        n_sink=st.integers(0, 4), window=st.integers(1, 6), kind=st.sampled_from(KINDS),
        batch_size=st.integers(1, 3), data=st.data(),
    )  # fmt: skip
    def make(self, n_sink: int, window: int, kind: str, batch_size: int, data: st.DataObject) -> None:
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self.cache = Prepared(n_sink, window, compileable=kind.startswith("compileable"))
        prepare_as(self.cache, CONFIG, SCHEME)
        self.ids = 0
        self.empty(batch_size, data.draw(PADS) if kind.endswith("padded") else None)

    def empty(self, batch_size: int, pads: list[int] | None = None, start: int = 0) -> None:
        self.rows = [Row((pads or [0] * batch_size)[i], start + i * (start > 0)) for i in range(batch_size)]
        self.seen = 0  # tokens and pads of a row
        self.recording = False
        self.recorded: list[int] = []  # where calls began that can be undone

    @property
    def padded(self) -> bool:
        return any(row.pads for row in self.rows)

    # --- what must be seen ---

    def expected(self, row: Row, before: int, query: int, exact: bool) -> tuple[list[int], list[int]]:
        """The tokens that the query at index `query` of a row sees, in a call that began at index `before`; positions."""
        evicted = max(0, (query if exact else before) + 1 - self.capacity)
        first = self.n_sink + evicted
        seen = [t for t in range(query + 1) if t < self.n_sink or t >= first]
        shift = row.start - row.rebased
        return [row.tokens[t] for t in seen], [t + shift + (evicted if t < self.n_sink else 0) for t in seen]

    def feed(self, length: int, exact: bool, with_mask: bool) -> None:
        """One call of the model, all of whose keys are compared."""
        exact = exact or self.recording
        new = torch.full((len(self.rows), length), 1)
        for i, row in enumerate(self.rows):
            for j in range(length):
                if self.seen + j >= row.pads:
                    self.ids += 1
                    row.tokens.append(self.ids)
                    new[i, j] = self.ids
        assert self.ids < IDS
        index = torch.arange(self.seen, self.seen + length)
        starts = torch.tensor([[row.start - row.pads - row.rebased] for row in self.rows])
        positions = (starts + index).clamp(min=0)  # those of pads do not matter
        mask = None
        if with_mask:
            columns = torch.arange(self.seen + length)
            mask = torch.stack([columns >= row.pads for row in self.rows]).long()
        with torch.no_grad():
            visible, attended = Model()(new, mask, positions, self.cache)
        for i, row in enumerate(self.rows):
            before = max(0, self.seen - row.pads)
            for j in range(length):
                query = self.seen + j - row.pads
                if query < 0:
                    continue
                ids, at = self.expected(row, before, query, exact)
                shown = visible[i, 0, j].nonzero()[:, 0]
                for layer, (keys, values) in enumerate(attended):
                    assert keys.shape[2] == values.shape[2] == visible.shape[-1]
                    got = values[i, 0, shown].long()
                    order = got[:, 0].argsort()
                    assert got[order, 0].tolist() == ids
                    assert (got[:, 1] == layer).all()
                    assert torch.equal(values[i, 0], values[i, 1])
                    expected = keys_at(layer, torch.tensor(ids), torch.tensor(at))
                    assert (keys[i][:, shown[order]].transpose(0, 1) - expected).abs().max() < ROUNDING
        if self.recording and length > self.window:
            self.recorded = []
        elif self.recording and self.seen:
            while len(self.recorded) > 1 and self.seen - self.recorded[1] >= self.window:
                del self.recorded[0]
            self.recorded.append(self.seen)
        self.seen += length

    def refused(self, error: type[Exception]) -> "pytest.RaisesContext[Exception]":
        STEPS["refused"] += 1
        return pytest.raises(error)

    # --- what can be done ---

    @rule(length=st.integers(1, 14), with_mask=st.booleans())
    def feed_several(self, length: int, with_mask: bool) -> None:
        self.feed_or_be_refused(length, exact=False, with_mask=with_mask)

    @rule(times=st.integers(1, 5), with_mask=st.booleans())
    def feed_one_by_one(self, times: int, with_mask: bool) -> None:
        for _ in range(times):
            self.feed_or_be_refused(1, exact=False, with_mask=with_mask)

    @precondition(lambda self: not self.padded)
    @rule(length=st.integers(1, 14))
    def feed_exactly(self, length: int) -> None:
        with stack_of(self.cache).exact_chunks():
            self.feed_or_be_refused(length, exact=True, with_mask=False)

    def feed_or_be_refused(self, length: int, exact: bool, with_mask: bool) -> None:
        if self.recording and not self.seen and length > self.capacity:
            rows = copy.deepcopy(self.rows)
            with self.refused(NotImplementedError):
                self.feed(length, exact, with_mask)
            self.rows = rows
            return
        lightest = min(self.seen - row.pads for row in self.rows)
        with_mask = with_mask or (self.padded and lightest + 1 < self.capacity)
        self.feed(length, exact, with_mask)

    @precondition(lambda self: self.seen > self.capacity)
    @rule(batch_size=st.integers(1, 3), pads=st.none() | PADS, start=st.integers(0, 9))
    def reset(self, batch_size: int, pads: list[int] | None, start: int) -> None:
        self.cache.reset()
        self.empty(batch_size, pads, start)

    @precondition(lambda self: not self.recording and not self.cache.compileable and not self.padded)
    @rule()
    def record(self) -> None:
        self.cache.activate_past_recording()
        self.recording = True

    @precondition(lambda self: self.recording)
    @rule(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), remove=st.integers(0, 9))
    def feed_and_crop(self, lengths: list[int], remove: int) -> None:
        for length in lengths:
            self.feed_or_be_refused(min(length, self.window), exact=False, with_mask=False)
        self.crop(min(remove, sum(lengths)))

    @precondition(lambda self: not self.padded and not self.cache.compileable)
    @rule(remove=st.integers(0, 8))
    def crop(self, remove: int) -> None:
        remove = min(remove, self.seen)
        if remove and self.seen > self.capacity and self.seen - remove < min(self.recorded, default=self.seen):
            with self.refused(ValueError):
                self.cache.crop(-remove)
            return
        self.cache.crop(-remove)
        self.seen -= remove
        self.recorded = []
        for row in self.rows:
            del row.tokens[self.seen :]

    def take(self, indices: list[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[i]) for i in indices]
        self.recorded = []

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        if data.draw(st.booleans()):
            keep = data.draw(st.lists(st.booleans(), min_size=len(self.rows), max_size=len(self.rows)).filter(any))
            self.cache.batch_select_indices(torch.tensor(keep))
            indices = [i for i, kept in enumerate(keep) if kept]
        else:
            indices = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
            self.cache.batch_select_indices(torch.tensor(indices))
        if self.seen:
            self.take(indices)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        size = len(self.rows)
        beams = data.draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
        self.cache.reorder_cache(torch.tensor(beams))
        if self.seen:
            self.take(beams)

    @precondition(lambda self: len(self.rows) <= 2)
    @rule()
    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        if self.seen:
            self.take([i for i in range(len(self.rows)) for _ in range(2)])

    @rule(go_on_with_the_copy=st.booleans(), length=st.integers(1, 3))
    def copy(self, go_on_with_the_copy: bool, length: int) -> None:
        # Whichever is left behind takes in other tokens, of which the one that goes on must not know.
        one, other = self.cache, copy.deepcopy(self.cache)
        if go_on_with_the_copy:
            one, other = other, one
        state = self.rows, self.seen, list(self.recorded)
        self.rows, self.cache = copy.deepcopy(self.rows), other
        self.feed_or_be_refused(length, exact=False, with_mask=True)
        (self.rows, self.seen, self.recorded), self.cache = state, one

    @precondition(lambda self: self.seen > 0)
    @rule()
    def rebase(self) -> None:
        most = 0
        for row in self.rows:
            # By as many windows as leave the row full.
            by = max(0, self.seen - row.pads - row.rebased - self.capacity) // self.window * self.window
            row.rebased, most = row.rebased + by, max(most, by)
        assert self.cache.rebase() == most
        if most:
            self.recorded = []
        starts = torch.tensor([row.start - row.pads - row.rebased for row in self.rows])
        known = torch.tensor([row.pads < self.seen for row in self.rows])
        expected = starts[:, None] + self.seen + torch.arange(3)
        assert torch.equal(self.cache.next_position_ids(3).expand(len(self.rows), -1)[known], expected[known])

    @precondition(lambda self: self.seen > 0)
    @rule(into_itself=st.booleans(), length=st.integers(1, 3))
    def save_and_load(self, into_itself: bool, length: int) -> None:
        # Into a new cache, or into the same after other tokens, of which it must not know any more.
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(f"{folder}/cache")
            if into_itself:
                state = self.rows, self.seen
                self.rows = copy.deepcopy(self.rows)
                self.feed_or_be_refused(length, exact=False, with_mask=True)
                self.rows, self.seen = state
            else:
                self.cache = Prepared(self.n_sink, self.window, compileable=self.cache.compileable)
            self.cache.load(f"{folder}/cache", REAL_MODEL)
        self.recording, self.recorded = False, []

    @invariant()
    def counts(self) -> None:
        STEPS["steps"] += 1
        if hasattr(self, "seen"):
            assert self.cache.get_seq_length() == self.seen
            if self.seen:
                slots = len(LAYERS) * len(self.rows) * HEADS * 4
                assert self.cache.nbytes == slots * (self.capacity * (HEAD_DIM + 2) + self.n_sink * HEAD_DIM)


class TestCache(CacheMachine.TestCase):
    settings = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "default")]


@pytest.fixture(autouse=True, scope="module")
def _say_how_many_steps() -> Iterator[None]:
    yield
    print(f"\n{STEPS['steps']:,} steps, of which {STEPS['refused']:,} were refused, as they had to be")
