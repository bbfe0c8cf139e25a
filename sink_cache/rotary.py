"""How a model rotates its keys, read off the keys themselves, and rotating the sinks forward.

Every rotary embedding (RoFormer, arXiv 2104.09864), whatever its convention (half-split or interleaved pairs, either
sign, partial, scaled), turns dimension `d` of a key together with one partner dimension:

    key(position)[d] = cos(position * frequency[d]) * key(0)[d] + sin(position * frequency[d]) * key(0)[partner[d]]

so two vectors of `head_dim` numbers say all there is to know, and rotations add up: a key moves forward by `shift`
positions by the same formula with `shift` for `position`. A dimension that does not rotate has frequency 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    every = torch.arange(start.shape[1])
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
    """Moves the sink keys of several layers forward: all layers by one shift, or one layer by many shifts.

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
        # [layers or 1, batch, heads, tokens, head_dim], on the CPU because MPS has no float64
        frequency = torch.tensor([r.frequency for r in distinct], dtype=torch.float64, device="cpu")
        self._frequency = frequency[:, None, None, None, :]
        self._partner = torch.tensor(turning[0].partner, device=device)
        self._shifts, self._cos, self._sin = range(0), torch.empty(0), torch.empty(0)
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _tabulate(self, shifts: range) -> None:
        if shifts != self._shifts:
            angle = (
                torch.tensor(shifts, dtype=torch.float64, device="cpu")[:, None, None, None, None, None]
                * self._frequency
            )
            self._shifts = shifts
            self._cos, self._sin = (t.float().to(self._partner.device) for t in (torch.cos(angle), torch.sin(angle)))
            self._rows = list(zip(self._cos.unbind(), self._sin.unbind(), strict=True))

    def all_layers(self, pristine: torch.Tensor, shift: int, out: torch.Tensor) -> None:
        """Writes `pristine` `[layers, batch, heads, n_sink, head_dim]`, moved forward by `shift`, to `out`: 3 kernels."""
        if shift not in self._shifts:
            self._tabulate(range(shift, shift + _TABLE_ROWS))
        cos, sin = self._rows[shift - self._shifts.start]
        torch.addcmul(pristine * cos, pristine.index_select(-1, self._partner), sin, out=out)

    def one_layer(self, pristine: torch.Tensor, layer: int, shifts: range) -> torch.Tensor:
        """Copies of `pristine` `[batch, heads, n_sink, head_dim]`, moved forward by each of `shifts`.

        Returns:
            `torch.Tensor`: `[batch, heads, len(shifts) * n_sink, head_dim]`.
        """
        self._tabulate(shifts)
        layer = layer if self._cos.shape[1] > 1 else 0
        cos, sin = (table[:, layer, 0, 0] for table in (self._cos, self._sin))  # [shifts, 1, head_dim]
        copies = pristine[:, :, None] * cos + pristine[:, :, None].index_select(-1, self._partner) * sin
        return copies.flatten(2, 3).to(pristine.dtype)
