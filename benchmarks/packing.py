"""How full packs are, how even the work of eight ranks is, and how fast packing is.

python -m benchmarks.packing [--images 200000]

Sizes follow `benchmarks.image_sizes`, in the order of a training: one pass of a seeded permutation.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.image_sizes import token_counts
from benchmarks.lpfhp import BestFit, assign, costs, fill, lpfhp
from benchmarks.report import facts, write
from genfound.data.packing.batch_plan import Plan
from genfound.data.packing.budget import max_images
from genfound.data.packing.order import Order
from genfound.data.packing.packer import LOOKAHEAD, Batcher, Packer

RANKS, WIDTH = 8, 1152
BUDGETS = (8192, 16_384, 65_536)
Tokens = Callable[[int], int]
Make = Callable[[Tokens, int, int], Batcher]


def main() -> None:
    """Run all benchmarks and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    images = parser.parse_args().images
    sections = [facts()]
    for view, count in {"native": images, "mixed": images // 3}.items():
        sections.append("\n".join(table(count, view)))
        print(sections[-1], flush=True)
    print(write("packing", sections))


def table(images: int, view: str) -> list[str]:
    """All packers on the sizes of a view."""
    tokens = token_counts(images, view)
    mean = f"{tokens.mean():.1f} tokens on average, at most {tokens.max():,}"
    lines = [f"## {view}: {len(tokens):,} images, {mean}", ""]
    columns = ["budget", "packer", "fill", "emptiest pack", "images a pack"]
    columns += ["slowest of 8 ranks, by chance", "matched", "images/s of processor time"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for budget in BUDGETS:
        lines.append(streaming_row(tokens, budget, "arrival order, gaps closed exactly", Packer))
        best_fit = functools.partial(BestFit, lookahead=LOOKAHEAD)
        lines.append(streaming_row(tokens, budget, "arrival order, greedy best fit", best_fit))
        lines.append(offline_row(tokens, budget))
    return lines


def streaming_row(tokens: np.ndarray, budget: int, name: str, make: Make) -> str:
    """A packer that sees images one after another."""
    order, limit = Order(len(tokens), 0), max_images(tokens, budget)
    ordered = tokens[[order[k] for k in range(len(tokens))]].tolist()
    packer, packs, count = make(lambda k: ordered[k % len(ordered)], budget, limit), [], 0
    begin = time.process_time()
    while count < len(ordered):
        packs.append(packer.take())
        count += len(packs[-1])
    rate = count / (time.process_time() - begin)
    grouper = make(lambda k: int(tokens[order[k]]), budget, limit)
    plan = Plan(order, tokens, grouper, RANKS, "token", seed=0)
    steps = [
        [tokens[list(m.indices)].tolist() for m in step] for step in itertools.islice(plan.steps(), len(packs) // 8)
    ]
    return row(budget, name, [[ordered[k % len(ordered)] for k in pack] for pack in packs], steps, f"{rate:,.0f}")


def offline_row(tokens: np.ndarray, budget: int) -> str:
    """NiT's packs, made from all sizes at once, and matched by cost like ours."""
    begin = time.process_time()
    lengths = tokens.tolist()
    packs = [[lengths[i] for i in pack] for pack in assign(lpfhp(lengths, budget, budget), lengths)]
    rate = len(lengths) / (time.process_time() - begin)
    shuffled = [packs[i] for i in np.random.default_rng(0).permutation(len(packs))]
    cost = costs(shuffled, WIDTH)
    size = min(Packer.window, len(packs) // RANKS * RANKS)
    windows = [sorted(range(i, i + size), key=cost.__getitem__) for i in range(0, len(packs) - size + 1, size)]
    steps = [[shuffled[k] for k in window[i : i + RANKS]] for window in windows for i in range(0, size, RANKS)]
    return row(budget, "LPFHP, offline (NiT)", shuffled, steps, f"{rate:,.0f}")


def row(budget: int, name: str, packs: list[list[int]], steps: Sequence[list[list[int]]], rate: str) -> str:
    """A line of the table: packs as they come, and as steps of eight ranks."""
    share, images = fill(packs, budget), [len(pack) for pack in packs]
    whole = len(packs) // RANKS * RANKS
    chance = slowest(costs(packs[:whole], WIDTH).reshape(-1, RANKS))
    matched = slowest(np.stack([costs(step, WIDTH) for step in steps]))
    return (
        f"| {budget:,} | {name} | {share.mean():.4%} | {share.min():.2%} | {np.mean(images):.0f} "
        f"({min(images)} to {max(images)}) | {chance:.3f} | {matched:.3f} | {rate} |"
    )


def slowest(cost: np.ndarray) -> float:
    """(steps, ranks) costs -> the largest of a step over the mean, on average over steps."""
    return float((cost.max(axis=1) / cost.mean(axis=1)).mean())


if __name__ == "__main__":
    main()
