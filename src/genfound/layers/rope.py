"""Rotary position embedding on a two-dimensional grid, and its rules for images larger than those of training.

Each axis owns half of the head: the first half turns with the row, the second with the column. There is no
table and no parameter: angles follow from whole positions on the device, so any size works, and the rule of a
trained network can be changed by replacing its `Rope`.

Legend: B images, T packed tokens (elsewhere B, N), H heads, d head size, a = d / 2 channels of one axis,
F = a / 2 frequencies of one axis, R = B where every image has its own frequencies, else 1.
L0 is the trained length and L the wanted length of an axis in tokens; s = max(L / L0, 1).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfound.config.checks import one_of
from genfound.layers.float64 import double, float64_device


@dataclass(frozen=True)
class Rope:
    """Frequencies theta^(-2i / a), i = 0 .. F - 1, of each axis, changed by a rule for larger images."""

    head: int  # d, a multiple of four
    theta: float  # base of the frequencies
    rule: str  # a name of `RULES`
    trained: int  # L0
    target: Sequence[int] | None  # L of rows and of columns; None takes each image's own rows and columns
    decouple: bool  # each axis has its own s (VisionNTK, VisionYaRN); otherwise the longer one gives it to both
    exact: bool  # false rounds angles, cosines, sines to bfloat16, as the released samplers of FiT and NiT do in bf16

    def __post_init__(self) -> None:
        one_of("model.rope_scaling.rule", self.rule, RULES)
        if self.head % 4 or (self.rule != "normal" and self.head < 8):
            raise ValueError(
                f"rotary positions need heads of a multiple of 4 channels, and 8 with model.rope_scaling.rule other "
                f"than normal, not {self.head}; change model.heads"
            )
        if self.trained < 2:
            raise ValueError(f"model.rope_scaling.trained={self.trained} must be at least 2 tokens")
        if self.target is not None and (len(self.target) != 2 or min(self.target) < 1):
            raise ValueError(f"model.rope_scaling.target={self.target} must be null or [rows,columns] in tokens")

    @classmethod
    def of(cls, head: int, theta: float, scaling: Mapping[str, Any]) -> "Rope":
        """From the key `model.rope_scaling`, which holds all other attributes."""
        known = {"rule", "trained", "target", "decouple", "exact"}
        if not isinstance(scaling, Mapping) or scaling.keys() != known:
            keys = ", ".join(sorted(known))
            raise ValueError(f"model.rope_scaling={scaling} must have the keys {keys}, and no others")
        return cls(head, theta, **scaling)

    def __call__(self, coordinates: Tensor, sizes: Tensor, per_token: Callable[[Tensor], Tensor]) -> Tensor:
        """(..., 1, d / 2, 2) float32 cosines and sines of tokens at coordinates (..., 2) in images of sizes (B, 2).

        `per_token` takes (B, n), one row per image, to what broadcasts against (..., n).
        """
        frequencies, factor = self.frequencies(sizes), self.factor(sizes)[:, None]
        if len(frequencies) > 1:
            frequencies = per_token(frequencies.flatten(1)).unflatten(-1, (2, -1))
            factor = per_token(factor)
        angles = (coordinates.float()[..., None] * frequencies).flatten(-2)  # (..., d / 2)
        if self.exact:
            waves = [angles.cos() * factor, angles.sin() * factor]
        else:
            angles = _rounded(angles)
            waves = [_rounded(_rounded(wave) * factor) for wave in (angles.cos(), angles.sin())]
        return torch.stack(waves, -1).unsqueeze(-3)

    def frequencies(self, sizes: Tensor) -> Tensor:
        """(R, 2, F) float32 angular frequencies of rows and columns."""
        lengths = self._lengths(sizes)
        if not self.decouple:
            lengths = lengths.amax(dim=1, keepdim=True).expand(-1, 2)
        s = (lengths / self.trained).clamp(min=1)[..., None]  # (R, 2, 1)
        return RULES[self.rule].frequencies(self, s).float().to(sizes.device)

    def factor(self, sizes: Tensor) -> Tensor:
        """(R,) float32, what cosine and sine are multiplied by, on queries and on keys: logits get its square."""
        return RULES[self.rule].factor(self, self._lengths(sizes)).float().to(sizes.device)

    def exponents(self, device: torch.device) -> Tensor:
        """(F,) float64, 2i / a."""
        return torch.arange(0, self.head // 2, 2, dtype=torch.float64, device=device) / (self.head // 2)

    def base(self, device: torch.device) -> Tensor:
        """(F,) float64, the frequencies of training."""
        return self.theta ** -self.exponents(device)

    def ramp(self, low: float, high: float, device: torch.device) -> Tensor:
        """(F,) float64 from 0 to 1 between the frequencies that turn `low` and `high` times along L0.

        As released: linear in the index, between whole indices kept inside [0, a - 1] (rope.py of FiT and NiT).
        """
        first, last = max(math.floor(self._index(low)), 0), min(math.ceil(self._index(high)), self.head // 2 - 1)
        end = last + 0.001 if first == last else last
        index = torch.arange(self.head // 4, dtype=torch.float64, device=device)
        return ((index - first) / (end - first)).clamp(0, 1)

    def _index(self, turns: float) -> float:
        """The index, a fraction, of the frequency that turns this many times along L0."""
        return self.head // 2 * math.log(self.trained / (2 * math.pi * turns)) / (2 * math.log(self.theta))

    def _lengths(self, sizes: Tensor) -> Tensor:
        """(R, 2) float64 L of rows and columns."""
        device = float64_device(sizes.device)
        if self.rule == "normal":
            return torch.full((1, 2), self.trained, dtype=torch.float64, device=device)
        if self.target is None:
            return double(sizes)
        axes = [torch.full((1,), length, dtype=torch.float64, device=device) for length in self.target]
        return torch.stack(axes, dim=1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent pairs of channels of x (..., H, d) in float32: (a, b) -> (a cos - b sin, b cos + a sin).

    As complex numbers, one operation instead of four; a compiler fuses the real ones, and knows no others.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., H, d / 2, 2)
    if torch.compiler.is_compiling():
        cos, sin = table.unbind(-1)
        turned = pairs * cos[..., None] + pairs.flip(-1) * torch.stack([-sin, sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2)


def head_size(width: int, heads: int) -> int:
    """Channels of a head that positions can turn."""
    if width % (4 * heads):
        raise ValueError(f"model.width={width} over model.heads={heads} must be a multiple of 4 for rotary positions")
    return width // heads


def row_major(n: Tensor, columns: Tensor | int) -> Tensor:
    """Numbers of tokens (...) in an image of so many columns -> (..., 2) their rows and columns."""
    return torch.stack([n // columns, n % columns], dim=-1)


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _plain(rope: Rope, s: Tensor) -> Tensor:
    return rope.base(s.device).expand(*s.shape[:-1], -1)


def _linear(rope: Rope, s: Tensor) -> Tensor:
    """Position interpolation: f / s."""
    return rope.base(s.device) / s


def _ntk(rope: Rope, s: Tensor) -> Tensor:
    """The base theta s^(a / (a - 2)), which leaves the highest frequency and divides the lowest by s."""
    a = rope.head // 2
    return (rope.theta * s ** (a / (a - 2))) ** -rope.exponents(s.device)


def _yarn(rope: Rope, s: Tensor) -> Tensor:
    kept = 1 - rope.ramp(32, 1, s.device)
    return torch.lerp(_linear(rope, s), _plain(rope, s), kept)


def _yarn_paper(rope: Rope, s: Tensor) -> Tensor:
    """As `_yarn`, linear in the number of turns r along L0: (r - 1) / (32 - 1), the formula of YaRN and VisionYaRN."""
    turns = rope.trained / (2 * math.pi) * rope.base(s.device)
    kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
    return torch.lerp(_linear(rope, s), _plain(rope, s), kept)


def _ntk_by_parts(rope: Rope, s: Tensor) -> Tensor:
    lower = torch.lerp(_linear(rope, s), _ntk(rope, s), 1 - rope.ramp(1.25, 0.75, s.device))
    return torch.lerp(lower, _plain(rope, s), 1 - rope.ramp(16, 2, s.device))


def _one(rope: Rope, lengths: Tensor) -> Tensor:
    return torch.ones_like(lengths[:, 0])


def _temperature(rope: Rope, lengths: Tensor) -> Tensor:
    """YaRN's 0.1 ln s + 1, with s of the longer side also where the axes are decoupled."""
    return 0.1 * (lengths.amax(dim=1) / rope.trained).clamp(min=1).log() + 1


def _by_side(rope: Rope, lengths: Tensor) -> Tensor:
    """The root of log_L0 (2 L) of the longer side; the doubling is in the released code."""
    return _log_ratio(2 * lengths.amax(dim=1), rope.trained)


def _by_area(rope: Rope, lengths: Tensor) -> Tensor:
    """The root of the logarithm of twice the tokens to the base of L0^2; the doubling is in the released code."""
    return _log_ratio(2 * lengths.prod(dim=1), rope.trained**2)


def _by_area_paper(rope: Rope, lengths: Tensor) -> Tensor:
    """The root of the logarithm of the tokens to the base of L0^2 (arXiv 2410.13925, eq. 15)."""
    return _log_ratio(lengths.prod(dim=1), rope.trained**2)


def _log_ratio(tokens: Tensor, base: int) -> Tensor:
    return (tokens.clamp(min=base).log() / math.log(base)).sqrt()


class Rule(NamedTuple):
    """How a rule changes frequencies, from s (R, 2, 1), and its factor, from L (R, 2)."""

    frequencies: Callable[[Rope, Tensor], Tensor]
    factor: Callable[[Rope, Tensor], Tensor]


RULES = {
    "normal": Rule(_plain, _one),
    "linear": Rule(_linear, _one),
    "ntk-aware": Rule(_ntk, _one),
    "ntk-aware-pro1": Rule(_ntk, _by_side),
    "ntk-aware-pro2": Rule(_ntk, _by_area),
    "ntk-aware-pro2-paper": Rule(_ntk, _by_area_paper),
    "ntk-by-parts": Rule(_ntk_by_parts, _one),
    "yarn": Rule(_yarn, _temperature),
    "yarn-paper": Rule(_yarn_paper, _temperature),
    "scale1": Rule(_plain, _by_side),
    "scale2": Rule(_plain, _by_area),
}
"""Names as in the released code of FiT and NiT; `-paper` follows the printed formula, scale1 and scale2 are NiT's."""
