"""Discrete diffusion of T steps: the moments of q(x_t | x_0) and q(x_{t-1} | x_t, x_0), in tables and formulas.

Tables are computed in float64 and rounded to float32 where they are used, as the official code does.
The names are those of Ho et al. 2020 and Nichol & Dhariwal 2021.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from genfound.batch import Batch


@dataclass(frozen=True)
class Tables:
    """One number for each step, (T,); or, from `at`, for each image, broadcastable against `batch.x`."""

    timesteps: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    alphas_cumprod_next: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    log_betas: Tensor
    fixed_large_variance: Tensor
    fixed_large_log_variance: Tensor
    vlb_weights: (
        Tensor  # of the squared error of the noise in the variational bound; at the first step as at the second
    )

    @classmethod
    def of(cls, betas: Tensor, timesteps: Tensor) -> "Tables":
        """All tables of a process, float64."""
        a = (1 - betas).cumprod(0)
        a_prev, a_next = torch.cat([a.new_ones(1), a[:-1]]), torch.cat([a[1:], a.new_zeros(1)])
        variance = betas * (1 - a_prev) / (1 - a)  # 0 at the first step
        positive = torch.cat([variance[1:2] if len(betas) > 1 else betas, variance[1:]])
        large = torch.cat([positive[:1], betas[1:]])
        in_bound = betas**2 / (2 * positive * (1 - betas) * (1 - a))
        return cls(
            timesteps=timesteps.double(),
            betas=betas,
            alphas_cumprod=a,
            alphas_cumprod_prev=a_prev,
            alphas_cumprod_next=a_next,
            sqrt_alphas_cumprod=a.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - a).sqrt(),
            log_one_minus_alphas_cumprod=(1 - a).log(),
            sqrt_recip_alphas_cumprod=(1 / a).sqrt(),
            sqrt_recipm1_alphas_cumprod=(1 / a - 1).sqrt(),
            posterior_variance=variance,
            posterior_log_variance_clipped=positive.log(),
            posterior_mean_coef1=betas * a_prev.sqrt() / (1 - a),
            posterior_mean_coef2=(1 - a_prev) * (1 - betas).sqrt() / (1 - a),
            log_betas=betas.log(),
            fixed_large_variance=large,
            fixed_large_log_variance=large.log(),
            vlb_weights=torch.cat([in_bound[1:2] if len(betas) > 1 else in_bound, in_bound[1:]]),
        )

    def at(self, batch: Batch, step: Tensor) -> "Tables":
        """The numbers of each image's own step (B,)."""
        return Tables(**{f.name: batch.expand(getattr(self, f.name)[step]) for f in fields(self)})

    def q_sample(self, x0: Tensor, noise: Tensor) -> Tensor:
        """x_t from data and noise."""
        return self.sqrt_alphas_cumprod * x0 + self.sqrt_one_minus_alphas_cumprod * noise

    def x0_from_noise(self, x_t: Tensor, noise: Tensor) -> Tensor:
        """The data that gave x_t with this noise."""
        return self.sqrt_recip_alphas_cumprod * x_t - self.sqrt_recipm1_alphas_cumprod * noise

    def noise_from_x0(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """The noise that gave x_t from this data."""
        return (self.sqrt_recip_alphas_cumprod * x_t - x0) / self.sqrt_recipm1_alphas_cumprod

    def posterior_mean(self, x0: Tensor, x_t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0)."""
        return self.posterior_mean_coef1 * x0 + self.posterior_mean_coef2 * x_t


class Process:
    """T noising steps, of variances betas (T,) float64.

    The network is told `timesteps` (T,) int64, their numbers in the process that was trained; `None` is 0 .. T-1.
    """

    def __init__(self, betas: Tensor, timesteps: Tensor | None = None) -> None:
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self.tables = Tables.of(betas, self.timesteps)
        self._resident: dict[torch.device, Tables] = {}
        self._numbers = {int(t): step for step, t in enumerate(self.timesteps)}

    def __len__(self) -> int:
        return len(self.timesteps)

    def on(self, device: torch.device) -> Tables:
        """The tables in float32 on a device, copied there once."""
        if device not in self._resident:
            moved = {f.name: getattr(self.tables, f.name).float().to(device) for f in fields(Tables)}
            self._resident[device] = Tables(**moved)
        return self._resident[device]

    def step(self, timestep: float) -> int:
        """The number of the step of which the network is told `timestep`."""
        return self._numbers[int(timestep)]

    def log_signal(self, t: float) -> tuple[float, float]:
        """log alpha_bar and its slope at any real t from -1 (data) to T-1: a monotone cubic through the table.

        Its slope at a step is the harmonic mean of those of both sides (Fritsch & Butland 1984), so it is smooth.
        """
        step = min(max(math.ceil(t), 0), len(self) - 1)
        before, here, after = (self._increment(k) for k in (step - 1, step, step + 1))
        left, right = 2 * before * here / (before + here), 2 * here * after / (here + after)
        s = t - (step - 1)
        square, cube = 3 * here - 2 * left - right, left + right - 2 * here
        start = math.log(float(self.tables.alphas_cumprod_prev[step]))
        return start + s * (left + s * (square + s * cube)), left + s * (2 * square + s * 3 * cube)

    def _increment(self, step: int) -> float:
        """By how much log alpha_bar falls at a step; outside the process as at its ends."""
        return math.log1p(-float(self.tables.betas[min(max(step, 0), len(self) - 1)]))

    def timestep_of(self, ratio: Tensor) -> Tensor:
        """The real timesteps at which sigma / alpha has these values (any shape, float64).

        Between two steps log(t + 1) is linear in the ratio's logarithm. Ratios beyond the ends are those of the ends.
        """
        a = self.tables.alphas_cumprod
        found = np.interp(ratio.log().cpu(), ((1 - a) / a).log() / 2, self.timesteps.double().log1p())
        return torch.from_numpy(np.expm1(found)).to(ratio.device)

    def respaced(self, timesteps: Sequence[int]) -> "Process":
        """The shorter process with the same q(x_t | x_0) at these timesteps of this one, in rising order."""
        kept = torch.tensor([self.step(t) for t in timesteps])
        a = self.tables.alphas_cumprod[kept]
        return Process(1 - a / torch.cat([a.new_ones(1), a[:-1]]), self.timesteps[kept])


StepSpec = int | str | Sequence[int]
"""How many steps to keep: 250; "10,10,10" or [10, 10, 10], so many of each third; or "ddim50", a whole stride."""


def linear(steps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Ho et al. 2020: evenly spaced; the ends are those of 1,000 steps, scaled for other numbers of steps."""
    scale = 1000 / steps
    return torch.linspace(first * scale, last * scale, steps, dtype=torch.float64)


def scaled_linear(steps: int, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Rombach et al. 2022: roots of the variances rise evenly; without ends between those of Stable Diffusion."""
    return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2


def sqrt(steps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """LDM's `sqrt`: roots of evenly spaced numbers."""
    return torch.linspace(first, last, steps, dtype=torch.float64) ** 0.5


def cosine(steps: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17: the signal's share of the variance falls like a squared cosine."""

    def share(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - share((i + 1) / steps) / share(i / steps), 0.999) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear, "scaled_linear": scaled_linear, "sqrt": sqrt, "cosine": cosine,
}  # fmt: skip
"""Betas of (number of steps, first, last), but of `cosine`, which has no ends."""


def space_timesteps(sections: StepSpec, steps: int) -> list[int]:
    """The kept steps in rising order; respace.py:space_timesteps of the official DiT and ADM.

    Several sections divide the process into equal parts, the first ones longer by one where it does not
    divide; each keeps evenly spaced steps, with its first and last one.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        return _strided(_whole(sections.removeprefix("ddim"), sections), steps)
    pieces = [sections] if isinstance(sections, int) else sections.split(",") if isinstance(sections, str) else sections
    counts = [_whole(piece, sections) for piece in pieces]
    kept, start = list[int](), 0
    for i, count in enumerate(counts):
        length = steps // len(counts) + (i < steps % len(counts))
        if not 0 <= count <= length:
            raise ValueError(f"sampler.steps={sections}: {count} steps cannot be chosen from {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed and rounded as the official code does
        start += length
    if not kept:
        raise ValueError(f"sampler.steps={sections} must be at least 1")
    return kept


def leading_timesteps(sections: StepSpec, steps: int, quadratic: bool = False) -> list[int]:
    """LDM's kept steps in rising order (util.py:make_ddim_timesteps), which begin at 1 as the data has no noise at 0.

    Every steps // count-th one, and so more than `count` where that does not divide; or, `quadratic`, as many, up to
    four fifths.
    """
    count = sections if isinstance(sections, int) else 0
    if not 1 <= count <= steps:
        raise ValueError(f"sampler.steps={sections} must be a number from 1 to {steps} with this sampler.spacing")
    if quadratic:
        return [int(root**2) + 1 for root in np.linspace(0, (0.8 * steps) ** 0.5, count)]
    kept = [step + 1 for step in range(0, steps, steps // count)]
    if kept[-1] >= steps:
        fewer = next(c for c in range(count, 0, -1) if (steps - 1) // (steps // c) * (steps // c) + 1 < steps)
        raise ValueError(
            f"sampler.steps={count}: with sampler.spacing=leading its last step would be {kept[-1]}, beyond the "
            f"{steps - 1} of objective.timesteps={steps}; the nearest number below is {fewer}"
        )
    return kept


def _strided(count: int, steps: int) -> list[int]:
    for kept in (range(0, steps, stride) for stride in range(1, steps)):
        if len(kept) == count:
            return list(kept)
    raise ValueError(f"sampler.steps=ddim{count}: no whole stride gives {count} of {steps} steps")


def _whole(piece: int | str, sections: StepSpec) -> int:
    try:
        return int(piece)
    except ValueError:
        known = "write a number, one per section (10,10,10) or ddim50"
        raise ValueError(f"sampler.steps={sections} is unknown; {known}") from None
