"""Training steps beside those of the published code: equal numbers first, then processor time.

python -m benchmarks.official_forms [--repeats 5] [--precision fp32,bf16] [--families nit,dit,fit,dit_moe]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import metrics

from benchmarks.image_sizes import image_sizes
from benchmarks.reference import dit, dit_moe, fit, nit
from benchmarks.reference.parts import update_average
from benchmarks.report import facts, table, write
from benchmarks.timing import cpu_precisions, interleaved, medians, ratio
from genfound import build
from genfound.backbones.base import Backbone
from genfound.backbones.dit_moe import DiTMoE
from genfound.batch import Batch
from genfound.config import compose
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.runtime import fsdp
from genfound.runtime.processes import tune_malloc
from genfound.tokenizers import LatentSpec

CLASSES = 1000
TOKENS = 1024
"""Of a step; four images of 256 pixels at a stride of 8 and patches of 2."""

Call = Callable[[nn.Module, Batch, Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """A network of ours and its published form.

    Attributes:
        overrides: of conf/train.yaml.
        reference: the published form, from the model's settings and the channels of its output.
        call: its output for a batch of ours, shaped as ours.
    """

    overrides: tuple[str, ...]
    reference: Callable[[dict[str, Any], int], nn.Module]
    call: Call


def _call_nit(net: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    tokens = int(batch.tokens[batch.real].sum())
    return net(batch.x[:tokens, :, None, None], t[batch.real], batch.y[batch.real], batch.sizes[batch.real])


def _call_dit(net: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    return net(batch.x, t, batch.y)


def _call_fit(net: nn.Module, batch: Batch, t: Tensor) -> Tensor:
    assert batch.mask is not None
    number = torch.arange(batch.mask.shape[1])
    columns = batch.sizes[:, 1:]
    return net(batch.x, t, batch.y, torch.stack([number // columns, number % columns], dim=1), batch.mask)


def _dit(m: dict[str, Any], out: int) -> nn.Module:
    return dit.DiT(32, 4, 2, m["width"], m["depth"], m["heads"], CLASSES, out)


def _dit_moe(m: dict[str, Any], out: int) -> nn.Module:
    sizes = {key: m[key] for key in ("width", "depth", "heads", "experts")}
    return dit_moe.DiTMoE(side=32, channels=4, patch=2, classes=CLASSES, out=out, **sizes)


FAMILIES = {
    "nit": Family(
        ("model=nit_s",),
        lambda m, out: nit.NiT(32, 1, m["width"], m["depth"], m["heads"], CLASSES, m["rope_theta"]),
        _call_nit,
    ),
    "dit": Family(("model=dit_s",), _dit, _call_dit),
    "fit": Family(
        ("model=fitv2_b", "model.width=384", "model.depth=12", "model.heads=6", "model.adaln_rank=96"),
        lambda m, out: fit.FiT(16, m["width"], m["depth"], m["heads"], m["adaln_rank"], CLASSES),
        _call_fit,
    ),
    "dit_moe": Family(("model=dit_moe_s_8e2a",), _dit_moe, _call_dit),
}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default=",".join(cpu_precisions()))
    parser.add_argument("--families", default=",".join(FAMILIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tune_malloc()  # as a training does; both forms gain from it
    names = arguments.families.split(",")
    lines = table(
        f"Training step of {TOKENS:,} tokens beside the published form, one thread",
        ["model", "precision", "ours, s", "published form, s", "ratio", "largest difference"],
    )
    for name, precision in itertools.product(names, arguments.precision.split(",")):
        lines.append(row(FAMILIES[name], precision, arguments.repeats))
        print(lines[-1], flush=True)
        write("official_forms", [facts(), "\n".join(lines)])  # whole so far, should time run out
    way = "Ten guided Euler steps of NiT, four images of 16 x 16 tokens, of which 0.7 of the way is guided"
    lines += ["", *table(way, ["ours, s", "published form, s", "ratio", "largest difference"])]
    lines.append(sampling(arguments.repeats))
    lines += ["", *table("Generated kernels of a compiled block, both passes", ["model", "ours", "published form"])]
    lines += [compiled(FAMILIES[name]) for name in names if name != "dit_moe"]
    print(*lines, write("official_forms", [facts(), "\n".join(lines)]), sep="\n")


def compiled(family: Family) -> str:
    """A line of the third table; a loop over experts is no single graph."""
    net, theirs, batch = pair(family, compose.compose("train", (*family.overrides, "model.depth=2")))
    t = torch.linspace(0.1, 0.9, len(batch.y))
    counts = [kernels(net, lambda: net(batch, t)), kernels(theirs, lambda: family.call(theirs, batch, t))]
    return f"| {family.overrides[0].partition('=')[2]} | {counts[0]} | {counts[1]} |"


def kernels(net: nn.Module, call: Callable[[], Tensor]) -> int:
    """Generated for a block, whose code is that of all."""
    torch._dynamo.reset()
    metrics.reset()
    for block in net.blocks:  # type: ignore[union-attr]
        block.compile()
    call().square().sum().backward()
    return metrics.generated_kernel_count


def row(family: Family, precision: str, repeats: int) -> str:
    """A line of the table."""
    config = compose.compose("train", family.overrides)
    net, theirs, batch = pair(family, config)
    difference = largest_difference(net, theirs, family.call, batch)
    bf16 = precision == "bf16"
    steps = [our_step(config, net, batch, bf16), their_step(theirs, family.call, batch, bf16)]
    rounds = interleaved([partial(next, step) for step in steps], repeats)
    return f"| {family.overrides[0].partition('=')[2]} | {precision} | {cells(rounds)} | {difference:.0e} |"


def cells(rounds: list[list[float]]) -> str:
    """Medians of ours and of the published form, and of their ratio."""
    ours, published = medians(rounds)
    return f"{ours:.3f} | {published:.3f} | {ratio(rounds, 1, 0):.2f}"


@torch.no_grad()
def sampling(repeats: int) -> str:
    """A line of the second table."""
    config = compose.compose("train", ("model=nit_s", "sampler=euler", "sampler.steps=10", "guidance=cfg_nit"))
    net, theirs, _ = pair(FAMILIES["nit"], config)
    rng = torch.Generator().manual_seed(1)
    latents = [torch.randn(32, 16, 16, generator=rng) for _ in range(4)]
    batch = build.sampling_layout(config).to_batch(latents, torch.arange(4))
    objective, sampler = build.objective(config), build.sampler(config)
    field, times = objective.field(net.eval(), build.guidance(config)), sampler.times(objective)

    def ours() -> Tensor:
        return sampler(field, batch, times, None).x

    def published() -> Tensor:
        x, sizes, null = batch.x.double()[..., None, None], batch.sizes, torch.full((4,), CLASSES)
        for t, following in itertools.pairwise(times.tolist()):
            guided = 0 <= t <= 0.7
            copies = 2 if guided else 1
            y = torch.cat([batch.y, null]) if guided else batch.y
            times_now = torch.full((4 * copies,), t)
            v = theirs(torch.cat([x] * copies).float(), times_now, y, sizes.repeat(copies, 1)).double()
            if guided:
                conditional, unconditional = v.chunk(2)
                v = unconditional + 2.25 * (conditional - unconditional)
            x = x + (following - t) * v[..., None, None]
        return x[..., 0, 0].float()

    difference = (ours() - published()).abs().max() / batch.x.abs().max()
    rounds = interleaved([ours, published], repeats)
    return f"| {cells(rounds)} | {difference:.0e} |"


def pair(family: Family, config: dict[str, Any]) -> tuple[Backbone, nn.Module, Batch]:
    """Ours and the published form with the same weights, none of them zero, and a batch."""
    patch, name = config["model"]["patch_size"], config["layout"]["name"]
    spec = LatentSpec(32, 32) if patch == 1 else LatentSpec(4, 8)
    net = build.net(config, spec, CLASSES).train()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.02)
    out = net.state_dict()["final_layer.linear.bias"].numel() // patch**2
    theirs = family.reference(config["model"], out).train()
    state, shapes = dit_moe.separate(net.state_dict()), theirs.state_dict()
    theirs.load_state_dict({key: value.reshape(shapes[key].shape).clone() for key, value in state.items()})
    latents = [torch.randn(spec.channels, height, width, generator=rng) for height, width in SIZES[name]()]
    labels = torch.randint(CLASSES, (len(latents),), generator=rng)
    static = {"packed": {"max_tokens": TOKENS, "max_images": len(latents)}, "padded": {"max_tokens": 256}}
    return net, theirs, build.sampling_layout(config, **static.get(name, {})).to_batch(latents, labels)


def native_sizes() -> list[tuple[int, int]]:
    """Latents of ImageNet's images at a stride of 32, together `TOKENS`; the last is one row that fills up."""
    sizes: list[tuple[int, int]] = []
    left = TOKENS
    for height, width in (image_sizes(1000) // 32).tolist():
        if height * width >= left:
            return [*sizes, (1, left)]
        sizes.append((height, width))
        left -= height * width
    raise ValueError(f"fewer than {TOKENS} tokens")


SIZES: dict[str, Callable[[], list[tuple[int, int]]]] = {
    "packed": native_sizes,
    "dense": lambda: [(32, 32)] * 4,
    "padded": lambda: [(32, 32), (28, 32), (24, 40), (32, 24)],
}
"""Height and width of the latents of a step, for each layout."""


PHASES = ("loss", "backward", "clip", "AdamW", "average")
"""Of a step of ours, in their order."""


def our_phases(config: dict[str, Any], net: Backbone, batch: Batch, bf16: bool = False) -> Iterator[None]:
    """Steps as `GenerativeModule` and Lightning do them, one of `PHASES` at a time."""
    objective = build.objective(config)
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0, fused=True)
    average = [p.detach().clone() for p in parameters]
    for step in itertools.count():
        with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=bf16):
            losses = objective.loss(net, batch, Rng(0, "train", step))
        weights = image_weight(batch.tokens, objective.weight) * batch.real
        loss = (weights * losses.total).sum() / weights.sum()
        if isinstance(net, DiTMoE):
            assert net.balances is not None
            loss = loss + net.balances.sum()
        yield
        loss.backward()
        yield
        fsdp.clip(parameters, 1.0, fsdp.total_norm(p.grad for p in parameters if p.grad is not None))
        yield
        optimizer.step()
        optimizer.zero_grad()
        yield
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)
        yield


def our_step(config: dict[str, Any], net: Backbone, batch: Batch, bf16: bool = False) -> Iterator[None]:
    """The same, a whole step at a time."""
    return itertools.islice(our_phases(config, net, batch, bf16), len(PHASES) - 1, None, len(PHASES))


def their_step(net: nn.Module, call: Call, batch: Batch, bf16: bool = False) -> Iterator[None]:
    """Mean squared error at random times, backward, clip, AdamW, averages one by one."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0)
    average = [p.detach().clone() for p in net.parameters()]
    while True:
        noise = torch.randn_like(batch.x)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = call(net, replace(batch, x=batch.x + noise), torch.rand(len(batch.y)))
        channels = noise.shape[1] if batch.layout == "dense" else noise.shape[-1]
        target = noise[: len(out)]
        loss = (out.narrow(1 if batch.layout == "dense" else -1, 0, channels) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, net.parameters(), 0.9999)
        yield


def largest_difference(ours: nn.Module, theirs: nn.Module, call: Call, batch: Batch) -> float:
    """Over the largest number of the output."""
    t = torch.linspace(0.1, 0.9, len(batch.y))
    with torch.no_grad():
        a, b = ours(batch, t), call(theirs, batch, t)
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":
    main()
