"""Times of training and of sampling, in float64, as parts of the way from data (0) to noise (1)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import integer, interval, number, one_of
from genfound.layers.float64 import double
from genfound.objectives.interpolants import Interpolant
from genfound.rng import Rng

TimeLaw = Callable[[Rng, int, torch.device], Tensor]
"""(rng, n, device that has float64) -> (n,)."""

Shift = float | str
"""Of times: a factor, or `auto`; see `shift_factor`."""

REFERENCE_SIZE = 4096
"""Numbers in a latent that `auto` does not shift: 32 x 32 x 4 (RAE, arXiv 2510.11690)."""


def uniform(mean: float, std: float, path: Interpolant) -> TimeLaw:
    """U[0, 1), which has no parameters."""
    return lambda rng, n, device: rng.uniform("time", (n,), device).double()


def logit_normal(mean: float, std: float, path: Interpolant) -> TimeLaw:
    """logit(t) ~ N(mean, std^2); Esser et al. 2024, and NiT's exp(n) / (1 + exp(n))."""
    return lambda rng, n, device: torch.sigmoid(rng.normal("time", (n,), device).double() * std + mean)


def log_normal(mean: float, std: float, path: Interpolant) -> TimeLaw:
    """log(sigma / alpha) ~ N(mean, std^2), EDM's law of noise levels on any path (Karras et al. 2022)."""

    def draw(rng: Rng, n: int, device: torch.device) -> Tensor:
        ratio = torch.exp(rng.normal("time", (n,), device).double() * std + mean)
        return path.time_of(ratio) / path.end

    return draw


TIME_LAWS: dict[str, Callable[[float, float, Interpolant], TimeLaw]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "log_normal": log_normal,
}


def time_law(
    name: str, mean: float, std: float, path: Interpolant, window: Sequence[float] | None, share: float
) -> TimeLaw:
    """The law that the keys `time`, `time_mean`, `time_std`, `time_window` and `time_window_share` describe."""
    number("objective.time_mean", mean)
    number("objective.time_std", std, 0)
    law = TIME_LAWS[one_of("objective.time", name, TIME_LAWS)](mean, std, path)
    return law if window is None else windowed(name, law, window, share)


MOST_DRAWS = 1000
"""How often a window is tried before it is held to be all but empty."""


def windowed(name: str, law: TimeLaw, window: Sequence[float], share: float) -> TimeLaw:
    """The law inside [low, high], for this share of the micro-batches (LightningDiT's partial training).

    A uniform law is squeezed into the window; of another one as many draws are made as it takes.
    """
    low, high = interval("objective.time_window", window)
    if not 0 <= low < high <= 1:
        raise ValueError(f"objective.time_window={list(window)} must be [low, high] with 0 <= low < high <= 1")
    number("objective.time_window_share", share, 0, 1)

    def draw(rng: Rng, n: int, device: torch.device) -> Tensor:
        if share < 1 and rng.uniform("time_window", (1,)).item() >= share:
            return law(rng, n, device)
        if name == "uniform":
            return low + (high - low) * law(rng, n, device)
        found: list[Tensor] = []
        for attempt in range(MOST_DRAWS):
            t = law(rng if attempt == 0 else rng.at("redraw", attempt), n, device)
            found.append(t[(t >= low) & (t <= high)])
            if sum(map(len, found)) >= n:
                return torch.cat(found)[:n]
        raise ValueError(f"objective.time_window={list(window)} is hardly ever met by objective.time={name}")

    return draw


def shifted(t: Tensor, factor: Tensor | float) -> Tensor:
    """s t / (1 + (s - 1) t): towards noise for s > 1 (Esser et al. 2024, eq. 23; LightningDiT's 0.3 is s = 1 / 0.3)."""
    return factor * t / (factor * t + (1 - t))


def shift_factor(key: str, setting: Shift, batch: Batch) -> Tensor | float:
    """A number as it is; `auto` as (B,): sqrt(numbers in the latent / 4096), so larger latents see more noise."""
    if check_shift(key, setting) == "auto":
        return (double(batch.numbers(batch.x)) / REFERENCE_SIZE).sqrt()
    return float(setting)


def check_shift(key: str, shift: Shift) -> Shift:
    """The setting of a shift."""
    try:
        return shift if shift == "auto" else number(key, shift, 0, above=True)
    except ValueError:
        raise ValueError(f"{key}={shift} must be a positive number or auto") from None


def shifted_grid(times: Tensor, setting: Shift, batch: Batch) -> Tensor:
    """A sampling grid with its inner points shifted; its ends stay."""
    factor = shift_factor("sampler.shift", setting, batch)
    if isinstance(factor, Tensor):
        factors = factor[batch.real.to(factor.device)].unique().tolist()
        if len(factors) != 1:
            raise ValueError("sampler.shift=auto needs images of one size in a batch; set a number")
        factor = factors[0]
    if factor == 1:
        return times
    start, end = times[0], times[-1]
    return end + (start - end) * shifted((times - end) / (start - end), factor)


def time_grid(steps: int, start: float, end: float) -> Tensor:
    """(steps + 1,) float64 equidistant times."""
    integer("sampler.steps", steps, 1)
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)
