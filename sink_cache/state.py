"""How far the rows of a cache are: the only thing that advances while a text is read.

Layers hold tensors and no position. Everything that depends on where the stream is follows from a row's *count*: the number of
its own tokens so far, without pads, less what `rebase` took off.

    count = fed - pads - rebased        position of the next token = start + count

A cache of plain layers keeps one integer, `fed`. A compileable cache keeps the counts of all rows in one tensor on each device,
because a compiled step cannot read changing numbers from the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .chunk_attention import ExactChunk

PerRow = tuple[int, ...]  # one number for each row, or one number for all rows

# With the tensors of the layers, these attributes describe a stream completely.
_NUMBERS = ("fed", "pads", "rebased", "starts", "begun", "unfinished")
# These attributes say how the next calls are treated. Saved files do not hold them.
_MODES = ("exact_chunks", "recording", "prompt_length", "new_pads", "recheck_positions")


class StreamState:
    """The state of the stream of one cache.

    Attributes:
        fed (`int`): how many tokens each row was given, ever, pads included.
        pads (`PerRow`): how many of these do not count for the row: padding, and steps in which it paused.
        rebased (`PerRow`): what `rebase` has taken off each row's count.
        starts (`PerRow`): the position of each row's first token, as the caller numbered it.
        begun (`bool`): every row has a token, so that the next calls of one token are steps.
        unfinished (`bool`): a call has begun and has not reached its last layer. If this is so when the next call begins, a
            forward was interrupted.
        exact_chunks (`bool`): calls with several tokens are exact chunks; see `LayerStack.exact_chunks`.
        unmerged (`set[ExactChunk]`, *optional*): while attention merges the sinks of exact chunks, the chunks that it has not
            merged yet; otherwise None.
        recording (`bool`): overwritten keys and values are kept, so that `crop` can bring them back.
        recheck_positions (`bool`): rows have moved or were replaced, so the positions of the next call must be read.
        prompt_length (`int`): the length of the prompt in a first call that is recorded and exceeds the capacity, else 0. Draft
            candidates follow the prompt.
        call_indices (`dict`): indices that layers have computed for the call that is under way; see `RingLayer`.
        new_pads (`PerRow`, *optional*): inside `LayerStack.rows_of_any_length`, how many pads a call brings before each row's
            new tokens; otherwise None.
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
        self.begun = self.unfinished = self.recheck_positions = False
        self.new_pads: PerRow | None = None
        self.call_indices: dict[Any, Any] = {}
        self.prompt_length = 0
        self.fed = 0

    def forget_start(self) -> None:
        """Forgets what a refused first call has left behind: its padding and its first positions."""
        self.begun, self.starts = False, (0,)
        self.set_pads((0,))

    def forget_layers(self) -> None:
        """Forgets what belongs to the present layers, before other layers read this state."""

    @property
    def counts(self) -> PerRow:
        """The count of each row; negative while pads are still to come."""
        fed = self.fed
        return tuple(fed - pads - off for pads, off in self.per_row(self.pads, self.rebased))

    @property
    def padded(self) -> bool:
        """Whether any row has pads."""
        return any(self.pads)

    @property
    def chunks_are_exact(self) -> bool:
        """Whether calls with several tokens are exact chunks."""
        return self.exact_chunks or self.recording

    @property
    def dense_tokens(self) -> int:
        """How many tokens of the next call attend to every earlier token. Later tokens see only the sinks and their window."""
        return 0 if self.fed else self.prompt_length

    def least_after(self, new_tokens: int) -> int:
        """The least count of a row after a call with `new_tokens` tokens, `new_pads` included."""
        return min(count + new_tokens - pads for count, pads in self.per_row(self.counts, self.new_pads or (0,)))

    def per_row(self, *numbers: PerRow) -> list[tuple[int, ...]]:
        """Zips the numbers of each row: one entry if all rows are alike, else one entry for each row."""
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
        if self.new_pads is not None and any(self.new_pads):
            self.pads = compact(tuple(pads + more for pads, more in self.per_row(self.pads, self.new_pads)))
        self.call_indices.clear()
        self.fed += new_tokens

    def step(self) -> None:
        """Counts one token of each row."""
        self.advance(1)

    def next_step_may_pass(self, max_position: int) -> bool:
        """Counts the step that comes, and returns whether its position may exceed `max_position`."""
        return False  # here layers check by themselves, because they need not wait for a device

    def remember_fed(self) -> None:
        """Notes that a call is under way, in which `fed` does not change."""

    def forget_fed(self) -> None:
        """Notes that the call is over."""

    def set_pads(self, pads: PerRow) -> None:
        """Notes how many pads each row began with."""
        self.pads = compact(pads)

    def rebase(self, by: PerRow) -> None:
        """Takes the numbers `by` off the counts of the rows."""
        self.rebased = compact(tuple(before + more for before, more in self.per_row(self.rebased, by)))

    def select(self, rows: list[int]) -> None:
        """Keeps the numbers of these rows, in this order."""
        self.pads, self.rebased, self.starts = (
            compact(tuple(numbers[row] for row in rows)) if len(numbers) > 1 else numbers
            for numbers in (self.pads, self.rebased, self.starts)
        )

    def row(self, row: int) -> tuple[int, int, int]:
        """Returns `count`, `start` and `rebased` of one row."""
        numbers = self.per_row(self.counts, self.starts, self.rebased)
        count, start, rebased = numbers[row if len(numbers) > 1 else 0]
        return count, start, rebased

    def set_row(self, row: int, rows: int, count: int, start: int, rebased: int) -> None:
        """Replaces one of `rows` rows by a row of another stream.

        `pads` may become negative: the row has then seen more tokens than `fed`.
        """
        fed, new = self.fed, {"pads": self.fed - count - rebased, "rebased": rebased, "starts": start}
        for name, number in new.items():
            numbers = list(getattr(self, name))
            numbers = numbers * rows if len(numbers) < rows else numbers
            numbers[row] = number
            setattr(self, name, compact(tuple(numbers)))
        self.fed = fed  # writes the counts again if they are on devices

    def numbers(self) -> dict[str, Any]:
        """Returns all that a copy of the stream needs to go on, as plain numbers."""
        return {name: getattr(self, name) for name in _NUMBERS}

    def take_over(self, numbers: dict[str, Any]) -> None:
        """Goes on from the `numbers` of another state, which may have been in a file."""
        for name, value in numbers.items():
            if name != "fed":
                setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.fed = numbers["fed"]  # last, because counts follow from all of these numbers

    def __getstate__(self) -> dict[str, Any]:
        return self.numbers() | {name: getattr(self, name) for name in _MODES}

    def __setstate__(self, numbers: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.take_over(numbers)


class DeviceStreamState(StreamState):
    """A `StreamState` with the counts on the devices, for compiled steps.

    Attributes:
        at_most (`int`): an upper bound of the next position, known without waiting for a device.
        shared_steps (`dict`): what layers compute together in a step; see `layers.SharedStep`.
    """

    def __init__(self) -> None:
        self._counts: dict[torch.device, torch.Tensor] = {}
        self._fed_in_call: int | None = None
        self._written = 0  # the `fed` that was set last, for the time before there are counts
        self.shared_steps: dict[Any, Any] = {}
        super().__init__()

    @property
    def fed(self) -> int:
        """As in the base class; waits for a device, but not while a call with several tokens is under way."""
        if self._fed_in_call is not None:
            return self._fed_in_call
        counts = next(iter(self._counts.values()), None)
        if counts is None:
            return self._written
        return int(counts[0]) + self.pads[0] + self.rebased[0]

    @fed.setter
    def fed(self, fed: int) -> None:
        self._fed_in_call = self._written = fed
        per_row, self.at_most = self.counts, max(self.next_positions())
        self._fed_in_call = None
        if len(per_row) > 1:  # after a reset, the batch may have another size
            self._counts = {device: counts for device, counts in self._counts.items() if len(counts) == len(per_row)}
        for counts in self._counts.values():  # also on devices that the cache has left: it may come back
            _write(counts, per_row)

    def forget_layers(self) -> None:
        """As in the base class."""
        self.shared_steps = {}

    def remember_fed(self) -> None:
        """Reads `fed` once for the call that is under way, because otherwise each layer would wait for the device."""
        self._fed_in_call = self.fed

    def forget_fed(self) -> None:
        """Drops the `fed` that was read. Later reads come from the device again."""
        self._fed_in_call = None

    def next_step_may_pass(self, max_position: int) -> bool:
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
            kept = {place: counts for place, counts in self._counts.items() if len(counts) == rows}
            self._counts = kept | {device: found}
            held, self.fed = self._fed_in_call, fed
            self._fed_in_call = held
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
        """Writes the counts again after its body has changed the numbers that they follow from."""
        fed = self.fed
        yield
        self.fed = fed

    def pause(self, running: torch.Tensor) -> None:
        """Takes back the last step of rows whose `running` `[rows]` is 0 instead of 1, on the devices alone."""
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


def compact(numbers: PerRow) -> PerRow:
    """Returns one number for all rows if their numbers are equal, else all numbers."""
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def static(tensor: torch.Tensor) -> torch.Tensor:
    """Promises that the tensor keeps its address and shape, so that graphs need neither copy it nor be compiled again.

    The compiler takes the shapes of parameters for constants. (`torch._dynamo.mark_static` says the same of any tensor. But its
    mark is read again at every step, which takes the host 1 us for each tensor.)
    """
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(parameter)
    return parameter


def _write(counts: torch.Tensor, per_row: PerRow) -> None:
    with torch.inference_mode():  # inference mode may write to any tensor
        if len(per_row) == 1:
            counts.fill_(per_row[0])
        else:
            counts.copy_(torch.tensor(per_row, device="cpu"))
