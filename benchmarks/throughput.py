"""Speed of this machine at the shapes of training, each beside its rate of plain matrix products.

python -m benchmarks.throughput [--models nit_tiny,nit_s] [--tokens 4096] [--repeats 3] [--sections steps,layouts]

Writes results/throughput_<machine>_<date>.md.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.profiler import ProfilerActivity, profile

from benchmarks.image_sizes import image_sizes
from benchmarks.official_forms import CLASSES, PHASES, our_phases
from benchmarks.reference import nit as published_nit
from benchmarks.reference.parts import turn
from benchmarks.report import facts, table, write
from benchmarks.timing import Call, cpu_precisions, interleaved, medians, ratio
from genfound import build
from genfound.backbones.base import Backbone
from genfound.backbones.nit import coordinates
from genfound.batch import Batch
from genfound.config import compose
from genfound.data.images.views import flexible_size, native_size
from genfound.layers.attention import available_backends, packed_attention
from genfound.layers.expert_kernels import KERNELS
from genfound.layers.rope import Rope, apply_rope
from genfound.layouts.packed import Packed
from genfound.runtime import devices

Size = tuple[int, int]


def main() -> None:
    """Measure, print and write the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nit_tiny,nit_s")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    arguments = parser.parse_args()
    device = devices.device("auto")
    if device.type == "cpu":
        torch.set_num_threads(1)  # whose processor time is counted
    report = [facts()]
    with devices.float32_products("bf16-mixed", device):
        for name in arguments.sections.split(","):
            report.append("\n".join(SECTIONS[name](device, arguments)))
            print(report[-1], flush=True)
            file = write("throughput", report)  # whole so far, should time run out
    print(file)


def rates(device: torch.device, _: argparse.Namespace) -> list[str]:
    """Plain products: a large square, as for `perf/mfu`, and 4,096 tokens through the first layer of an MLP."""
    lines = table("Matrix products, 10^9 operations a second", ["precision", "square", "D = 384", "D = 1152"])
    for precision in precisions(device):
        with autocast(device, precision):
            found = [square_rate(device), *(product_rate(device, 4096, width, 4 * width) for width in (384, 1152))]
        lines.append(f"| {precision} | " + " | ".join(f"{rate / 1e9:,.0f}" for rate in found) + " |")
    return lines


def square_rate(device: torch.device) -> float:
    """Operations a second of a product whose size hides everything else."""
    side = 8192 if device.type == "cuda" else 1024
    return product_rate(device, side, side, side)


def product_rate(device: torch.device, rows: int, inner: int, outer: int) -> float:
    """Operations a second of (rows, inner) times (inner, outer) under the current autocast."""
    low = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if low else torch.float32
    x, weight = (torch.randn(n, inner, device=device, dtype=dtype) for n in (rows, outer))
    (took,) = medians(interleaved([lambda: linear(x, weight)], 5))
    return 2 * rows * inner * outer / took


def kernel_rate(device: torch.device) -> float:
    """Operations a second in the dtype in which single kernels are compared: bfloat16 on CUDA, else float32."""
    with autocast(device, "bf16" if device.type == "cuda" else "fp32"):
        return square_rate(device)


def attention(device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """Every backend on two packs, forward and backward, and how far its output is from that of the loop."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = available_backends(device.type, dtype)
    title = "Attention, forward and backward, ms (of the matmul rate, largest difference from loop)"
    lines, rate = table(title, ["pack", *names]), kernel_rate(device)
    for title, lengths in {
        "4 rows of 64..1024": [64, 256, 512, 1024],
        "24 rows of 64..324": [64, 144, 324] * 8,
    }.items():
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
        q, k, v = torch.randn(3, sum(lengths), 6, 64, device=device, dtype=dtype).requires_grad_().unbind()
        outputs = [packed_attention(q, k, v, bounds, max(lengths), name).float() for name in names]
        apart = [float((out - outputs[names.index("loop")]).detach().abs().max()) for out in outputs]
        calls = [_attend(q, k, v, bounds, max(lengths), name) for name in names]
        took = medians(interleaved(calls, arguments.repeats))
        operations = 3 * 4 * 6 * 64 * sum(length**2 for length in lengths)
        shares = [operations / each / rate for each in took]
        parts = zip(took, shares, apart, strict=True)
        cells = [f"{1e3 * each:.1f} ({share:.0%}, {off:.0e})" for each, share, off in parts]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, backend: str) -> Call:
    return lambda: torch.autograd.grad(
        packed_attention(q, k, v, bounds, longest, backend).float().sum(), (q, k, v), retain_graph=True
    )


def experts(device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """Eight experts of DiT-MoE, two of them for each token: each kernel and the published loop."""
    title = f"Eight experts, {arguments.tokens:,} tokens, forward and backward, ms (of the matmul rate)"
    lines, count = table(title, ["D", *KERNELS, "loop of the published code"]), 2 * arguments.tokens
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for width in (384, 1152):
        draw = torch.Generator(device).manual_seed(0)
        rows = torch.randn(count, width, device=device, dtype=dtype, generator=draw).requires_grad_()
        expert = torch.randint(8, (count,), device=device, generator=draw).sort().values
        ends = torch.bincount(expert, minlength=8).cumsum(0, dtype=torch.int32)
        shapes = (8, 8 * width, width), (8, width, 4 * width)
        stacks = [
            (torch.randn(shape, device=device, generator=draw) / 50).to(dtype).requires_grad_() for shape in shapes
        ]

        def loop(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, expert: Tensor = expert) -> Tensor:
            out = torch.zeros_like(rows)
            for number in range(8):
                mine = expert == number
                gate, up = (rows[mine] @ gate_up[number].T).chunk(2, dim=1)
                out[mine] = (silu(gate) * up) @ down[number].T
            return out

        def call(form: Callable[..., Tensor], given: list[Tensor] = [rows, ends, *stacks]) -> Call:  # noqa: B006
            inputs = [tensor for tensor in given if tensor.requires_grad]
            return lambda: torch.autograd.grad(form(*given).float().square().sum(), inputs)

        took = medians(interleaved([call(form) for form in (*KERNELS.values(), loop)], arguments.repeats))
        most = 3 * 2 * count * 12 * width**2 / kernel_rate(device)  # seconds at the rate of plain products
        lines.append(f"| {width} | " + " | ".join(f"{1e3 * each:.1f} ({most / each:.0%})" for each in took) + " |")
    return lines


def rope(device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """Rotary positions of native sizes: their table, and six heads of 64 turned by it, beside the published form's."""
    columns = ["tokens", "table", "published table", "turning", "published turning", "largest difference"]
    lines = table("Rotary positions, ms; turning forward and backward", columns)
    grids = default_grids("packed", arguments.tokens, 32, 1)
    batch = Packed(1).to_batch([torch.zeros(1, *grid) for grid in grids], torch.zeros(len(grids))).to(device)
    own, theirs = Rope(64, 10_000.0, "normal", 16, None, True, True), published_nit.Rope(64, 10_000.0)
    where, sizes = coordinates(batch, "row_major"), batch.sizes.tolist()
    tables = own(where, batch.sizes, batch.per_token), theirs(sizes, device)
    x = torch.randn(batch.slots, 6, 64, device=device, requires_grad=True)

    def both(form: Callable[..., Tensor], *given: Tensor) -> Call:
        return lambda: torch.autograd.grad(form(x, *given).sum(), x)

    calls = [lambda: own(where, batch.sizes, batch.per_token), lambda: theirs(sizes, device)]
    calls += [both(apply_rope, tables[0]), both(turn, *tables[1])]
    apart = float((apply_rope(x, tables[0]) - turn(x, *tables[1])).detach().abs().max())
    cells = [f"{1e3 * each:.2f}" for each in medians(interleaved(calls, 10 * arguments.repeats))]
    return [*lines, f"| {batch.slots:,} | {' | '.join(cells)} | {apart:.0e} |"]


def phases(device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """What the parts of an eager step of each model take, and what the products of two of them take of these."""
    columns = ["model", "precision", *PHASES, "loss and backward, of the matmul rate"]
    lines = table("Parts of a training step, ms", columns)
    for model, precision in itertools.product(arguments.models.split(","), precisions(device)):
        made = training(device, model, arguments.tokens, precision)
        took = medians(interleaved([made.phase] * len(PHASES), arguments.repeats))
        share = made.seconds(precision) / sum(took[:2])
        lines.append(f"| {model} | {precision} | {' | '.join(f'{1e3 * each:.1f}' for each in took)} | {share:.0%} |")
    return lines


def steps(device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """A training step of each model, eager and compiled."""
    columns = [
        "model",
        "parameters",
        "precision",
        "blocks",
        "ms",
        "images/s",
        "tokens/s",
        "of the matmul rate",
        "peak GB",
    ]
    lines = table(f"Training step of at most {arguments.tokens:,} tokens", columns)
    for name, precision in itertools.product(arguments.models.split(","), precisions(device)):
        for compiled in (False, True):
            torch._dynamo.reset()
            made = training(device, name, arguments.tokens, precision)
            net, batch = made.net, made.batch
            if compiled:
                net.compile_blocks()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            (took,) = medians(interleaved([made.step], arguments.repeats))
            real = batch.tokens[batch.real].double()
            share = made.seconds(precision) / took
            peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else "-"
            cells = [name, f"{sum(p.numel() for p in net.parameters()):,}", precision, ("eager", "compiled")[compiled]]
            cells += [f"{1e3 * took:.0f}", f"{len(real) / took:,.1f}", f"{float(real.sum()) / took:,.0f}"]
            cells += [f"{share:.0%}", peak]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def layouts(device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """The same images padded and packed; and packs of native sizes beside packs of equal ones."""
    columns = ["model, images", "fill when padded", "padded / packed, tokens", "padded / packed, time"]
    lines = table("Layouts, one training step of each in turn", columns)
    model = "fitv2_tiny" if device.type == "cpu" else "fitv2_xl"
    precision = precisions(device)[-1] if device.type == "cuda" else "fp32"
    native = default_grids("packed", arguments.tokens, 32, 2)
    cases = {"native": (native, max(h * w // 4 for h, w in native))}  # and the tokens to which each is padded
    for side in (256, 512):
        longest = (side // 16) ** 2
        images = image_sizes(max(arguments.tokens // longest, 2)).tolist()
        sizes = [flexible_size(height, width, 16, side) for height, width in images]
        cases[f"{side} pixels"] = [(h // 8, w // 8) for h, w in sizes], longest
    for name, (grids, longest) in cases.items():
        budgets = {"padded": longest, "packed": sum(h * w // 4 for h, w in grids)}
        both = [training(device, model, most, precision, grids, layout) for layout, most in budgets.items()]
        fill = both[1].batch.slots / both[0].batch.slots
        rounds = interleaved([made.step for made in both], arguments.repeats)
        lines.append(f"| {model}, {name} | {fill:.2f} | {1 / fill:.2f} | {ratio(rounds, 0, 1):.2f} |")
    return [*lines, "", _native_beside_equal(device, arguments, precision)]


def _native_beside_equal(device: torch.device, arguments: argparse.Namespace, precision: str) -> str:
    """Tokens a second of a pack of native sizes, over those of one of equal squares."""
    model = next((name for name in reversed(arguments.models.split(",")) if name.startswith("nit")), "nit_s")
    patch = compose.compose("train", [f"model={model}"])["model"]["patch_size"]
    native = default_grids("packed", arguments.tokens, 32, patch)
    side = max(math.isqrt(arguments.tokens // len(native)), 1)
    equal = [(side * patch, side * patch)] * (arguments.tokens // side**2)
    both = [training(device, model, arguments.tokens, precision, grids) for grids in (native, equal)]
    counts = [float(made.batch.tokens[made.batch.real].sum()) for made in both]
    rounds = interleaved([made.step for made in both], arguments.repeats)
    share = counts[0] / counts[1] / ratio(rounds, 0, 1)
    return f"{model}: packs of native sizes have {share:.0%} of the tokens a second of packs of {side} x {side} tokens."


def kernels(device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """What one step of the last model spends its time with."""
    name = arguments.models.split(",")[-1]
    made = training(device, name, arguments.tokens, precisions(device)[-1])
    if device.type == "cuda":
        made.net.compile_blocks()
    for _ in range(2):
        made.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        made.step()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    printed = found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)
    return [f"## One step of {name}", "", "```", printed, "```"]


SECTIONS = {
    "rates": rates, "attention": attention, "experts": experts, "rope": rope, "steps": steps, "layouts": layouts,
    "kernels": kernels, "phases": phases,
}  # fmt: skip


def precisions(device: torch.device) -> list[str]:
    """CUDA trains in bf16, the CPU in fp32, and in bf16 where it has the arithmetic."""
    return ["bf16"] if device.type == "cuda" else cpu_precisions()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Of a precision of `trainer.precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Training(NamedTuple):
    """A network, a batch for it, and its training by that batch, a whole step or one of `PHASES` at a time."""

    net: Backbone
    batch: Batch
    phase: Call

    def step(self) -> None:
        """All phases."""
        for _ in PHASES:
            self.phase()

    def seconds(self, precision: str) -> float:
        """What the products of a step take at the machine's rate of plain ones."""
        real = self.batch.tokens[self.batch.real].double()
        operations = 3 * self.net.flops().total(len(real), float(real.sum()), float((real**2).sum()))
        with torch.no_grad(), autocast(self.batch.x.device, precision):
            return operations / square_rate(self.batch.x.device)


def training(
    device: torch.device,
    model: str,
    tokens: int,
    precision: str,
    grids: list[Size] | None = None,
    layout: str | None = None,
) -> Training:
    """A network and latents of these sizes; else of those of its data, native ones up to the tokens, or squares."""
    config = compose.compose("train", [f"model={model}", *([f"layout={layout}"] if layout else [])])
    spec, patch, name = build.published_spec(config), config["model"]["patch_size"], config["layout"]["name"]
    grids = grids or default_grids(name, tokens, spec.stride, patch, config["data"]["size"])
    net = build.net(config, spec, CLASSES).to(device).train()
    draw = torch.Generator().manual_seed(0)
    latents = [torch.randn(spec.channels, height, width, generator=draw) for height, width in grids]
    static = {"packed": {"max_tokens": tokens, "max_images": len(latents)}, "padded": {"max_tokens": tokens}}
    made = build.sampling_layout(config, **static.get(name, {})).to_batch(latents, torch.arange(len(latents)) % CLASSES)
    batch = made.to(device)
    return Training(net, batch, partial(next, our_phases(config, net, batch, precision == "bf16")))


def default_grids(layout: str, tokens: int, stride: int, patch: int, pixels: int = 256) -> list[Size]:
    """Sizes of the latents of a step of at most so many tokens; squares of `pixels` a side in the dense layout."""
    if layout == "dense":
        side = pixels // stride
        return [(side, side)] * max(tokens // (side // patch) ** 2, 1)
    unit, grids, left = stride * patch, [], tokens
    for height, width in image_sizes(1000).tolist():
        h, w = (length // unit for length in native_size(height, width, unit, tokens if layout == "packed" else 256))
        if h * w <= left:
            grids.append((h * patch, w * patch))
            left -= h * w
    return grids


if __name__ == "__main__":
    main()
