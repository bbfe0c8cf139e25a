"""How far the rows of a cache are: the only thing that advances while a text is read.

Layers hold tensors and no position. Everything that depends on where the stream is follows from a row's *count*: the number of
its own tokens so far, without pads, less what `rebase` took off.

    count = fed - pads - rebased        position of the next token = start + count

A cache of plain layers keeps one integer, `fed`. A compileable cache keeps the counts of all rows in one tensor on each device,
because a compiled step may read nothing from the host that changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .chunk_attention import ExactChunk

PerRow = tuple[int, ...]  # one number for each row, or one number for all rows

# What a stream is, besides the tensors of the layers.
_NUMBERS = ("fed", "pads", "rebased", "starts", "begun", "unfinished", "moved")
# How its next calls are treated, which a file does not say.
_MODES = ("exact_chunks", "recording", "prompt", "skips")


class StreamState:
    """The state of the stream of one cache.

    Attributes:
        fed (`int`): how many tokens each row was given, ever, pads included.
        pads (`PerRow`): how many of these were padding, before the row's first token.
        rebased (`PerRow`): what `rebase` has taken off each row's count.
        starts (`PerRow`): the position of each row's first token, as the caller numbered it.
        begun (`bool`): every row has a token, so that the next calls of one token are steps.
        unfinished (`bool`): a call has begun and its last layer has not come. If this is so when the next call begins, a
            forward was interrupted.
        exact_chunks (`bool`): each query of a call with several tokens gets its own copy of the sinks.
        unmerged (`set[ExactChunk]`, *optional*): set while attention merges the sinks of exact chunks: the chunks of layers whose
            attention has not come yet.
        recording (`bool`): what is overwritten is kept, so that `crop` can bring it back.
        moved (`bool`): `rebase` has moved the rows, and the positions of a caller have not been looked at since.
        prompt (`int`): the length of the prompt in a first call that is recorded and exceeds the capacity, else 0. Draft
            candidates follow the prompt.
        of_call (`dict`): indices that layers have computed for the call that is under way; see `RingLayer`.
        skips (`PerRow`, *optional*): inside `LayerStack.rows_of_any_length`, the number of pads before each row's new tokens.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets the stream."""
        self.exact_chunks = self.recording = False
        self.unmerged: set[ExactChunk] | None = None
        self.pads: PerRow = (0,)
        self.rebased: PerRow = (0,)
        self.starts: PerRow = (0,)
        self.begun = self.unfinished = self.moved = False
        self.skips: PerRow | None = None
        self.of_call: dict[Any, Any] = {}
        self.prompt = 0
        self.fed = 0

    def forget_start(self) -> None:
        """Forgets what a refused first call has left behind: its padding and its first positions."""
        self.begun, self.starts = False, (0,)
        self.set_pads((0,))

    def forget_layers(self) -> None:
        """Other layers will read this state."""

    @property
    def counts(self) -> PerRow:
        """The count of each row; negative while pads are still to come."""
        fed = self.fed
        return tuple(fed - pads - off for pads, off in self.per_row(self.pads, self.rebased))

    @property
    def padded(self) -> bool:
        """Whether the rows began at different times."""
        return any(self.pads)

    @property
    def chunked(self) -> bool:
        """Whether the queries of a call with several tokens see each other's evictions."""
        return self.exact_chunks or self.recording

    @property
    def dense_tokens(self) -> int:
        """How many tokens of the next call attend to every earlier token. Later tokens see only the sinks and their window."""
        return 0 if self.fed else self.prompt

    def least_after(self, new_tokens: int) -> int:
        """The least count of a row after a call with so many tokens, of which some may be padding."""
        return min(count + new_tokens - skip for count, skip in self.per_row(self.counts, self.skips or (0,)))

    def per_row(self, *numbers: PerRow) -> list[tuple[int, ...]]:
        """The numbers of each row beside each other: one entry if all rows are alike, else one for each row."""
        rows = max(map(len, numbers))
        return list(zip(*(n if len(n) == rows else n * rows for n in numbers), strict=True))

    def next_positions(self) -> PerRow:
        """The position of each row's next token."""
        fed = self.fed
        return tuple(
            fed + start - pads - off for start, pads, off in self.per_row(self.starts, self.pads, self.rebased)
        )

    def advance(self, new_tokens: int) -> None:
        """Counts tokens that have been through all layers."""
        if self.skips is not None and any(self.skips):
            self.pads = alike(tuple(pads + skip for pads, skip in self.per_row(self.pads, self.skips)))
        self.of_call.clear()
        self.fed += new_tokens

    def step(self) -> None:
        """Counts one token of each row."""
        self.advance(1)

    def may_pass(self, max_position: int) -> bool:
        """Notes that a step comes, and returns whether its position might be beyond `max_position`."""
        return False  # layers check by themselves where nothing has to be waited for

    def remember_fed(self) -> None:
        """A call is under way, in which nothing advances."""

    def forget_fed(self) -> None:
        """The call is over."""

    def set_pads(self, pads: PerRow) -> None:
        """Notes how many pads each row began with."""
        self.pads = alike(pads)

    def rebase(self, by: PerRow) -> None:
        """Takes these numbers off the counts of the rows."""
        self.rebased = alike(tuple(before + more for before, more in self.per_row(self.rebased, by)))

    def select(self, rows: list[int]) -> None:
        """Keeps the numbers of these rows, in this order."""
        self.pads, self.rebased, self.starts = (
            alike(tuple(numbers[row] for row in rows)) if len(numbers) > 1 else numbers
            for numbers in (self.pads, self.rebased, self.starts)
        )

    def row(self, row: int) -> tuple[int, int, int]:
        """The count, the start and what was rebased of one row."""
        numbers = self.per_row(self.counts, self.starts, self.rebased)
        count, start, rebased = numbers[row if len(numbers) > 1 else 0]
        return count, start, rebased

    def set_row(self, row: int, rows: int, count: int, start: int, rebased: int) -> None:
        """Puts a row of another stream in the place of one of `rows` rows.

        `pads` may become negative: the row has then seen more tokens than `fed`.
        """
        fed, new = self.fed, {"pads": self.fed - count - rebased, "rebased": rebased, "starts": start}
        for name, number in new.items():
            numbers = list(getattr(self, name))
            numbers = numbers * rows if len(numbers) < rows else numbers
            numbers[row] = number
            setattr(self, name, alike(tuple(numbers)))
        self.fed = fed  # writes the counts anew, where these are on devices

    def numbers(self) -> dict[str, Any]:
        """All that a copy of the stream needs to go on, as plain numbers."""
        return {name: getattr(self, name) for name in _NUMBERS}

    def take_over(self, numbers: dict[str, Any]) -> None:
        """Goes on from the `numbers` of another state, which may have been in a file."""
        for name, value in numbers.items():
            if name != "fed":
                setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.fed = numbers["fed"]  # at last, because counts follow from all of them

    def __getstate__(self) -> dict[str, Any]:
        return self.numbers() | {name: getattr(self, name) for name in _MODES}

    def __setstate__(self, numbers: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.take_over(numbers)


class DeviceStreamState(StreamState):
    """The same with the counts on the devices, for compiled steps.

    Attributes:
        at_most (`int`): a bound of the next position that needs no look at a device.
        shared_steps (`dict`): what layers compute together in a step; see `layers.SharedStep`.
    """

    def __init__(self) -> None:
        self._counts: dict[torch.device, torch.Tensor] = {}
        self._held: int | None = None
        self._written = 0  # `fed`, when it was last written: before there are counts, it is nowhere else
        self.shared_steps: dict[Any, Any] = {}
        super().__init__()

    @property
    def fed(self) -> int:
        """As in the base class; waits for a device, but not while a call with several tokens is under way."""
        if self._held is not None:
            return self._held
        counts = next(iter(self._counts.values()), None)
        if counts is None:
            return self._written
        return int(counts[0]) + self.pads[0] + self.rebased[0]

    @fed.setter
    def fed(self, fed: int) -> None:
        self._held = self._written = fed
        per_row, self.at_most = self.counts, max(self.next_positions())
        self._held = None
        if len(per_row) > 1:  # after a reset, the batch may have another size
            self._counts = {device: counts for device, counts in self._counts.items() if len(counts) == len(per_row)}
        for counts in self._counts.values():  # of devices that were left, too: the cache may come back to them
            _write(counts, per_row)

    def forget_layers(self) -> None:
        """As in the base class."""
        self.shared_steps = {}

    def remember_fed(self) -> None:
        """Reads `fed` once for the call that is under way, in which each layer would wait for the device otherwise."""
        self._held = self.fed

    def forget_fed(self) -> None:
        """Drops the `fed` that was read. Later reads come from the device again."""
        self._held = None

    def may_pass(self, max_position: int) -> bool:
        """As in the base class."""
        self.at_most += 1
        if self.at_most <= max_position:
            return False
        self.at_most = max(self.next_positions()) + 1
        return True

    def counts_on(self, device: torch.device, rows: int) -> torch.Tensor:
        """The counts `[rows]`, int64, on a device; the same tensor as long as the number of rows stays."""
        found = self._counts.get(device)
        if found is None or len(found) != rows:
            fed = self.fed
            with torch.inference_mode(False):
                found = static(torch.zeros(rows, dtype=torch.int64, device=device))
            self._counts = {place: one for place, one in self._counts.items() if len(one) == rows} | {device: found}
            held, self.fed = self._held, fed
            self._held = held
        return found

    def advance(self, new_tokens: int) -> None:
        """As in the base class."""
        self.remember_fed()
        super().advance(new_tokens)

    def step(self) -> None:
        """As in the base class, on the devices alone."""
        for counts in self._counts.values():
            counts.add_(1)

    @contextmanager
    def _keeping_fed(self) -> Iterator[None]:
        """Writes the counts anew after what they are made of has changed."""
        fed = self.fed
        yield
        self.fed = fed

    def pause(self, running: torch.Tensor) -> None:
        """Takes the last step back, on the devices alone, where `running` `[rows]` is 0 and not 1."""
        for counts in self._counts.values():
            counts.add_(running.to(counts.device) - 1)

    def copied_counts(self) -> dict[torch.device, torch.Tensor]:
        """A copy of the counts on each device."""
        return {device: counts.clone() for device, counts in self._counts.items()}

    def bring_back(self, counts: dict[torch.device, torch.Tensor]) -> None:
        """Writes counts that were copied before a step."""
        with torch.inference_mode():  # in which any tensor can be written to
            for device, before in counts.items():
                self._counts[device].copy_(before)

    def set_pads(self, pads: PerRow) -> None:
        """As in the base class."""
        with self._keeping_fed():
            super().set_pads(pads)

    def rebase(self, by: PerRow) -> None:
        """As in the base class."""
        with self._keeping_fed():
            super().rebase(by)

    def select(self, rows: list[int]) -> None:
        """As in the base class."""
        fed = self.fed
        super().select(rows)
        kept = {device: counts for device, counts in self._counts.items() if len(counts) == len(rows)}
        missing = [device for device in self._counts if device not in kept]
        self._counts = kept
        for device in missing:
            self.counts_on(device, len(rows))
        self.fed = fed


def alike(numbers: PerRow) -> PerRow:
    """One number for all rows, if they are equal."""
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def static(tensor: torch.Tensor) -> torch.Tensor:
    """Promises that the tensor keeps its address and shape, so that a graph neither copies it nor is made anew.

    The compiler takes the shapes of parameters for constants. (`torch._dynamo.mark_static` says the same of any tensor, but is
    looked at again at every step, which takes the host 1 us for each.)
    """
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(parameter)
    return parameter


def _write(counts: torch.Tensor, per_row: PerRow) -> None:
    with torch.inference_mode():  # in which any tensor can be written to
        if len(per_row) == 1:
            counts.fill_(per_row[0])
        else:
            counts.copy_(torch.tensor(per_row, device="cpu"))
