"""How a model rotates its keys, read off the keys themselves, and rotating the sinks forward.

Every rotary embedding (RoFormer, arXiv 2104.09864), whatever its convention (half-split or interleaved pairs, either
sign, partial, scaled), turns dimension `d` of a key together with one partner dimension:

    key(position)[d] = cos(position * frequency[d]) * key(0)[d] + sin(position * frequency[d]) * key(0)[partner[d]]

so two vectors of `head_dim` numbers say all there is to know, and rotations add up: a key moves forward by `shift`
positions by the same formula with `shift` for `position`. A dimension that does not rotate has frequency 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

# Angles for this many consecutive shifts are tabulated at once: one small transfer to the device every so many steps.
_TABLE_ROWS = 64


class NotARotation(Exception):
    """The keys do not turn with the position as a rotary embedding turns them; `str` says what they do instead."""


@dataclass(frozen=True)
class Rotation:
    """What a rotary embedding does to one layer's keys.

    Attributes:
        partner (`tuple[int, ...]`): for each of the `head_dim` dimensions, the dimension that it turns with.
        frequency (`tuple[float, ...]`): for each dimension, radians per position, signed; 0 where nothing turns.
    """

    partner: tuple[int, ...]
    frequency: tuple[float, ...]

    @property
    def is_identity(self) -> bool:
        """Whether nothing turns: a layer without rotary embedding."""
        return not any(self.frequency)

    def is_close_to(self, other: Rotation) -> bool:
        """Whether both turn the same dimensions together, at frequencies that differ only by rounding."""
        pairs = zip(self.frequency, other.frequency, strict=False)
        return self.partner == other.partner and all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs)


def fit_rotation(keys: dict[int, torch.Tensor], tolerance: float = 1e-3) -> Rotation:
    """Finds the rotation in keys of the same tokens at several positions.

    Args:
        keys (`dict[int, torch.Tensor]`): position → keys `[samples, head_dim]` of the same samples. Must hold position 0
            and consecutive powers of 8 from 1; other positions only take part in the check.
        tolerance (`float`): allowed deviation of the keys from the fitted rotation, relative to their size.

    Raises:
        NotARotation: when no rotation with constant frequencies explains all the keys.
    """
    positions = sorted(keys)
    start = keys[0].double()  # [samples, head_dim]
    turned = torch.stack([keys[p].double() for p in positions])  # [positions, samples, head_dim]
    scale = start.abs().amax().item()
    moves = (turned - start).abs().amax(dim=(0, 1)) > tolerance * scale  # [head_dim]

    # Least squares of each dimension d at each position on (start[d], start[e]), for every candidate partner e.
    gram = start.T @ start  # [head_dim, head_dim]
    own, other = gram.diagonal()[:, None], gram.diagonal()[None, :]
    with_start = torch.einsum("psd,se->pde", turned, start)  # [positions, head_dim, head_dim]
    with_own = with_start.diagonal(dim1=1, dim2=2)[:, :, None]
    determinant = own * other - gram**2
    determinant.fill_diagonal_(math.inf)  # a dimension is not its own partner
    cos = (with_own * other - with_start * gram) / determinant
    sin = (with_start * own - with_own * gram) / determinant
    residual = turned.pow(2).sum(1)[:, :, None] - cos * with_own - sin * with_start
    partner = residual.sum(0).fill_diagonal_(math.inf).argmin(dim=1)  # [head_dim]
    every = torch.arange(start.shape[1], device=start.device)
    angle = torch.atan2(sin[:, every, partner], cos[:, every, partner])  # [positions, head_dim]

    # The angle at position 1 gives the frequency roughly; each longer stretch divides the error by 8.
    frequency = torch.zeros_like(angle[0])
    position = 1
    while position in keys:
        measured = angle[positions.index(position)]
        turns = torch.round((frequency * position - measured) / (2 * math.pi))
        frequency = (measured + 2 * math.pi * turns) / position
        position *= 8
    frequency = torch.where(moves, frequency, 0.0)
    partner = torch.where(moves, partner, every)

    rotation = Rotation(tuple(partner.tolist()), tuple(frequency.tolist()))
    unexplained = first_unexplained(keys, rotation, tolerance)
    if unexplained is not None:
        raise NotARotation(f"no rotation of constant frequency turns its keys from position 0 to {unexplained}")
    return rotation


def first_unexplained(keys: dict[int, torch.Tensor], rotation: Rotation, tolerance: float = 1e-3) -> int | None:
    """The first position at which `keys` (as in `fit_rotation`) are not those of position 0 rotated; None if all are."""
    start = keys[0].double()
    scale = start.abs().amax().item()
    for position in sorted(keys):
        error = (rotate(start, rotation, position) - keys[position]).abs().amax().item()
        if not error <= tolerance * scale:
            return position
    return None


def rotate(keys: torch.Tensor, rotation: Rotation, shift: int) -> torch.Tensor:
    """Moves keys `[..., head_dim]` forward by `shift` positions, in float64, and rounds once to the keys' dtype."""
    frequency = torch.tensor(rotation.frequency, dtype=torch.float64, device=keys.device)
    partner = torch.tensor(rotation.partner, device=keys.device)
    exact = keys.double()
    moved = torch.cos(shift * frequency) * exact + torch.sin(shift * frequency) * exact[..., partner]
    return moved.to(keys.dtype)


class ForwardRotation:
    """Moves the sink keys of several layers forward: all layers by the number of evicted tokens, or one layer by many shifts.

    Angles are computed in float64, rotations in float32, and the result is rounded once to the keys' dtype.

    Args:
        rotations (`list[Rotation]`): one for each layer; those that are no identity with the same `partner`.
        device (`torch.device`): where the keys are.
    """

    def __init__(self, rotations: list[Rotation], device: torch.device) -> None:
        turning = [rotation for rotation in rotations if not rotation.is_identity] or rotations
        if len({rotation.partner for rotation in turning}) != 1:
            raise ValueError("layers that rotate together must pair their dimensions in the same way")
        distinct = rotations[:1] if len(set(rotations)) == 1 else rotations
        # [layers or 1, head_dim], on the CPU because MPS has no float64
        self._frequency = torch.tensor([r.frequency for r in distinct], dtype=torch.float64, device="cpu")
        self._partner = torch.tensor(turning[0].partner, device=device)
        self._evicted: tuple[int, ...] = ()
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._shifts = range(0)
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tables are made anew where they are needed; a row of one would be pickled with the whole.
        return vars(self) | {"_evicted": (), "_rows": [], "_shifts": range(0), "_tables": {}}

    def _cos_sin(self, shifts: torch.Tensor, frequency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[..., head_dim]` of the angles by which keys move, for shifts `[...]`, float32 on the device."""
        angle = shifts.double()[..., None] * frequency
        cos, sin = (t.float().to(self._partner.device) for t in (torch.cos(angle), torch.sin(angle)))
        return cos, sin

    def all_layers(self, pristine: torch.Tensor, evicted: tuple[int, ...], out: torch.Tensor) -> None:
        """Writes `pristine` `[layers, batch, heads, n_sink, head_dim]` to `out`, moved forward: 3 kernels.

        `evicted` has one number for each row of the batch or one for all; keys of a row move by it if it is positive.
        """
        steps = evicted[0] - self._evicted[0] if self._evicted else -1
        table_fits = 0 <= steps < _TABLE_ROWS and all(
            new - old == steps for new, old in zip(evicted, self._evicted, strict=False)
        )
        if not table_fits or len(evicted) != len(self._evicted):
            shifts = torch.arange(_TABLE_ROWS, device="cpu")[:, None] + torch.tensor(evicted, device="cpu")
            # [steps, layers or 1, rows, 1, 1, head_dim] of [steps, rows, layers or 1, head_dim]
            tables = self._cos_sin(shifts.clamp(min=0)[..., None], self._frequency)
            steps_of = [table.transpose(1, 2)[:, :, :, None, None].unbind() for table in tables]
            self._rows = list(zip(*steps_of, strict=True))
            self._evicted, steps = evicted, 0
        cos, sin = self._rows[steps]
        torch.addcmul(pristine * cos, pristine.index_select(-1, self._partner), sin, out=out)

    def one_layer(self, pristine: torch.Tensor, layer: int, shifts: range) -> torch.Tensor:
        """Copies of `pristine` `[batch, heads, n_sink, head_dim]`, moved forward by each of `shifts`.

        Returns:
            `torch.Tensor`: `[batch, heads, len(shifts) * n_sink, head_dim]`.
        """
        cos, sin = self._table_of(shifts, layer)  # [shifts, 1, head_dim]
        copies = pristine[:, :, None] * cos + pristine[:, :, None].index_select(-1, self._partner) * sin
        return copies.flatten(2, 3).to(pristine.dtype)

    def _table_of(self, shifts: range, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if shifts != self._shifts:
            self._shifts, self._tables = shifts, {}
        layer = layer if len(self._frequency) > 1 else 0
        if layer not in self._tables:
            every_shift = torch.arange(shifts.start, shifts.stop, device="cpu")[:, None]
            self._tables[layer] = self._cos_sin(every_shift, self._frequency[layer])
        return self._tables[layer]


def move_in_place(keys_of_layers: Iterable[tuple[torch.Tensor, Rotation]], shift: int) -> None:
    """Moves the keys `[batch, heads, tokens, head_dim]` of several layers by `shift` positions, which may be negative.

    One layer at a time, because float32 copies of all keys would be large; angles once for all that rotate alike.
    """
    turns: dict[tuple[Rotation, torch.device], ForwardRotation] = {}
    for keys, rotation in keys_of_layers:
        if not rotation.is_identity:
            alike = rotation, keys.device
            if alike not in turns:
                turns[alike] = ForwardRotation([rotation], keys.device)
            keys.copy_(turns[alike].one_layer(keys, 0, range(shift, shift + 1)))
