"""Time and memory of the figures of 50,000 samples with Inception's 2,048 features, on this machine's CPU.

`python benchmarks/frechet.py` prints one line per part; `frechet`, `shares` or `all`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from genfound.metrics.frechet import Moments, frechet_distance
from genfound.metrics.inception_score import adm_score
from genfound.metrics.precision_recall import manifold, precision_recall

SAMPLES, REFERENCES, WIDTH = 50_000, 10_000, 2048


def features(count: int, seed: int) -> Tensor:
    """Correlated features of one sign, as after a ReLU."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, 256, generator=torch.Generator().manual_seed(0)) / 16
    out = torch.empty(count, WIDTH)
    for rows in out.split(5000):
        rows.copy_(
            torch.randn(len(rows), 256, generator=draw) @ mixing.T + 0.3 * torch.randn(rows.shape, generator=draw)
        )
    return out.relu_()


def timed(what: str, work: Callable[[], object]) -> None:
    """Print the seconds of a part, and the largest memory of the process until then."""
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {seconds:.1f} s, {peak:.2f} GiB at most, {result}", flush=True)


def main() -> None:
    """Measure what the command line names."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    samples = features(SAMPLES, 1)
    if wanted in ("frechet", "all"):
        reference = Moments.of(features(REFERENCES, 2)).gaussian()
        timed("frechet distance", lambda: round(frechet_distance(Moments.of(samples).gaussian(), reference), 6))
        timed("inception score", lambda: adm_score(samples[:, :1008], 5000).mean)
    if wanted in ("shares", "all"):
        real = features(REFERENCES, 2)
        timed("precision and recall", lambda: precision_recall(manifold(real, [3]), manifold(samples, [3])))


if __name__ == "__main__":
    main()
