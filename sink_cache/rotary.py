"""Reading off keys how a model rotates them, and rotating the sinks forward.

Every rotary embedding (RoFormer, arXiv 2104.09864), whatever its convention (half-split or interleaved pairs, either
sign, partial, scaled), turns dimension `d` of a key together with one partner dimension:

    key(position)[d] = cos(position * frequency[d]) * key(0)[d] + sin(position * frequency[d]) * key(0)[partner[d]]

So `partner` and `frequency`, `head_dim` numbers each, describe the embedding. Rotations add up: the same formula with `shift` for
`position` moves a key forward by `shift` positions. A dimension that does not rotate has frequency 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Angles for this many consecutive shifts are computed at once, so that most steps transfer nothing to the device.
_TABLE_ROWS = 64


class NotARotation(Exception):
    """The keys do not turn with the position as those of a rotary embedding; `str` says what they do instead."""


@dataclass(frozen=True)
class Rotation:
    """What a rotary embedding does to one layer's keys.

    Attributes:
        partner (`tuple[int, ...]`): for each of the `head_dim` dimensions, the dimension with which it turns.
        frequency (`tuple[float, ...]`): for each dimension, radians per position, signed; 0 if it does not turn.
    """

    partner: tuple[int, ...]
    frequency: tuple[float, ...]

    @property
    def is_identity(self) -> bool:
        """Whether no dimension turns, as in a layer without rotary embedding."""
        return not any(self.frequency)

    def is_close_to(self, other: Rotation) -> bool:
        """Whether both turn the same dimensions together, at frequencies that differ only by rounding."""
        pairs = zip(self.frequency, other.frequency, strict=False)
        return self.partner == other.partner and all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs)


def fit_rotation(keys: dict[int, torch.Tensor], tolerance: float = 1e-3) -> Rotation:
    """Finds the rotation in keys of the same tokens at several positions.

    Args:
        keys (`dict[int, torch.Tensor]`): for each position, the keys `[samples, head_dim]` of the same samples. Position 0 and
            consecutive powers of 8 from 1 must be there. Other positions only take part in the check.
        tolerance (`float`): the allowed deviation of the keys from the fitted rotation, relative to the largest key.

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

    # The angle at position 1 gives the frequency roughly. Each longer distance divides the error by 8.
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
    """Finds the first position whose `keys` (see `fit_rotation`) are not those of position 0 rotated; None if all are."""
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
        rotations (`list[Rotation]`): one for each layer. All that are not the identity have the same `partner`.
        device (`torch.device`): the device of the keys.
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
        self._table: tuple[torch.Tensor, torch.Tensor] = (self._frequency, self._frequency)  # of `_shifts`
        self._rest = (0, 0)
        self._turns = self._frequency  # of `_rest`

    def _cos_sin(self, shifts: torch.Tensor, frequency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes cos and sin `[..., head_dim]` of the angles for shifts `[...]`; float32, on the device of the keys."""
        angle = shifts.double()[..., None] * frequency
        cos, sin = (t.float().to(self._partner.device) for t in (torch.cos(angle), torch.sin(angle)))
        return cos, sin

    def all_layers(self, pristine: torch.Tensor, evicted: tuple[int, ...], out: torch.Tensor) -> None:
        """Moves `pristine` `[layers, batch, heads, n_sink, head_dim]` forward, and writes it to `out`, in 3 kernels.

        `evicted` has one number for each row of the batch, or one for all rows. Rows with a negative number do not move.
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

    def one_layer(self, pristine: torch.Tensor, shifts: range) -> torch.Tensor:
        """Moves `pristine` `[batch, heads, n_sink, head_dim]` of the first layer forward by each of `shifts`.

        Returns:
            `torch.Tensor`: `[batch, heads, len(shifts) * n_sink, head_dim]`.
        """
        if shifts != self._shifts:
            every_shift = torch.arange(shifts.start, shifts.stop, device="cpu")[:, None]
            self._shifts, self._table = shifts, self._cos_sin(every_shift, self._frequency[0])
        cos, sin = self._table  # [shifts, 1, head_dim]
        return self._moved(pristine[:, :, None], cos, sin).flatten(2, 3).to(pristine.dtype)

    def turns(self, pristine: torch.Tensor, first: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepares products of queries with the first layer's keys, which move by `max(0, first + i)` for query `i`.

        The product of a query and a moved key equals the product of `[query * cos, query * sin]` and `[key, key[partner]]`.

        Args:
            pristine (`torch.Tensor`): keys `[batch, heads, n_sink, head_dim]`.
            first (`int`): the shift for the first query. If it is negative, the keys do not move for the first `-first` queries.
            queries (`int`): how many queries there are.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: keys and partners `[batch, heads, n_sink, 2, head_dim]`, and cos and sin
                `[queries, 2, head_dim]`, both float32.
        """
        # Rotations add up. The keys move by the shift that all queries share. The rest is the same for all chunks of a size.
        common, rest = max(0, first), (min(0, first), queries)
        keys = self._moved(pristine, *self._cos_sin(torch.tensor(common, device="cpu"), self._frequency[0]))
        if self._rest != rest:
            exact_on = "cpu" if self._partner.device.type == "mps" else self._partner.device
            shifts = (torch.arange(queries, device=exact_on) + rest[0]).clamp(min=0)
            cos_sin = self._cos_sin(shifts, self._frequency[0].to(exact_on))
            self._rest, self._turns = rest, torch.stack(cos_sin, dim=1)
        return torch.stack([keys, keys.index_select(-1, self._partner)], dim=-2), self._turns

    def _moved(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return keys * cos + keys.index_select(-1, self._partner) * sin

    def move_rows(self, keys: torch.Tensor, shifts: tuple[int, ...]) -> None:
        """Moves keys `[batch, heads, tokens, head_dim]` of the first layer in place: each row by its shift, or all by one."""
        by_row = torch.tensor(shifts, device="cpu")[:, None, None]
        cos, sin = self._cos_sin(by_row, self._frequency[0])  # [rows or 1, 1, 1, head_dim]
        keys.copy_(self._moved(keys, cos, sin))


class ForwardRotations:
    """One `ForwardRotation` for each rotation and device among the layers of a cache."""

    def __init__(self) -> None:
        self._made: dict[tuple[Rotation, torch.device], ForwardRotation] = {}

    def of(self, rotation: Rotation, device: torch.device) -> ForwardRotation:
        """Returns the `ForwardRotation` for layers with this rotation on this device."""
        if (rotation, device) not in self._made:
            self._made[rotation, device] = ForwardRotation([rotation], device)
        return self._made[rotation, device]
