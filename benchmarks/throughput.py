"""Speed of this machine: attention backends, training steps, packing. Writes results/<device>_<date>.md.

python benchmarks/throughput.py [--models nit_tiny,nit_s] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import datetime
import functools
import platform
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from genfound import build
from genfound.callbacks.throughput import matmul_rate
from genfound.config import compose
from genfound.layers.attention import available_backends, packed_attention
from genfound.layouts import Packed
from genfound.loggers.provenance import provenance
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.runtime import devices
from genfound.tokenizers import LatentSpec

REPEATS = 5


def main() -> None:
    """Run all benchmarks and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nit_tiny,nit_s")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    device = devices.device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {"device": name, "threads": str(torch.get_num_threads()), **provenance()}
    sections = [
        "# Throughput\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        attention_table(device),
        training_table(device, arguments.models.split(","), arguments.tokens),
    ]
    report = "\n\n".join(sections) + "\n"
    date = datetime.datetime.now(datetime.UTC).date()
    file = Path(__file__).parent / "results" / f"{name.replace(' ', '_').replace('/', '_')}_{date}.md"
    file.write_text(report)
    print(report, file, sep="\n")


def attention_table(device: torch.device) -> str:
    """Forward and backward of every backend on two packs, against the reference loop."""
    lines = ["## Attention, forward and backward, ms", "", "| pack | " + " | ".join(_backends(device)) + " |"]
    lines.append("|---" * (1 + len(_backends(device))) + "|")
    for name, lengths in {"4 rows of 64..1024": [64, 256, 512, 1024], "24 rows of 64..324": [64, 144, 324] * 8}.items():
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v = torch.randn(3, sum(lengths), 6, 64, device=device, dtype=dtype).requires_grad_().unbind()
        steps = [functools.partial(_attend, q, k, v, bounds, max(lengths), backend) for backend in _backends(device)]
        cells = [f"{1e3 * best(step, device):.1f}" for step in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, backend: str) -> None:
    out = packed_attention(q, k, v, bounds, longest, backend)
    torch.autograd.grad(out.float().sum(), (q, k, v))


def _backends(device: torch.device) -> list[str]:
    return available_backends(device.type, torch.bfloat16)


def training_table(device: torch.device, models: list[str], tokens: int) -> str:
    """One full training step (loss, backward, AdamW) on one pack of mixed sizes."""
    lines = [
        f"## Training step, one pack of {tokens:,} tokens", "",
        "| model | parameters | precision | ms | tokens/s | of the matmul rate |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for model in models:
        for precision in ("fp32", "bf16"):
            lines.append(training_row(device, model, tokens, precision))
    return "\n".join(lines)


def training_row(device: torch.device, model: str, tokens: int, precision: str) -> str:
    """A line of `training_table`."""
    with hydra.initialize_config_dir(compose.config_dir(), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("train", [f"model={model}"]), resolve=True)
    assert isinstance(config, dict)
    spec = LatentSpec(config["model"]["channels"] or 32, 32)
    net = build.net({**config, "layout": {"name": "packed"}}, spec, 1000).to(device)
    objective = build.objective(config)
    patch = config["model"]["patch_size"]
    sides = [8, 11, 15, 16]
    latents = [torch.randn(spec.channels, a * patch, b * patch) for a in sides for b in sides]
    counts = np.cumsum([a * b for a in sides for b in sides])
    latents = (latents * (tokens // int(counts[-1]) + 1))[: max(int(np.searchsorted(counts, tokens)), 1)]
    layout = Packed(patch, max(tokens, sum(z[0].numel() // patch**2 for z in latents)), len(latents))
    batch = layout.to_batch(latents, torch.zeros(len(latents), dtype=torch.long)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        with autocast:
            losses = objective.loss(net, batch, Rng(0, "bench"))
        weights = image_weight(batch.tokens, "token") * batch.real
        ((weights * losses.total).sum() / weights.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = best(step, device)
    parameters = sum(p.numel() for p in net.parameters())
    with torch.no_grad(), autocast:
        rate = matmul_rate(device)
    images = batch.tokens[batch.real].double()
    flops = net.flops().total(len(images), float(images.sum()), float((images**2).sum()))
    share = 3 * flops / seconds / rate
    size = int(batch.slots)
    return f"| {model} | {parameters:,} | {precision} | {1e3 * seconds:.0f} | {size / seconds:,.0f} | {share:.0%} |"


def best(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    times = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


if __name__ == "__main__":
    main()
