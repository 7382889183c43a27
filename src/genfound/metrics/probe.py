"""A small classifier of a data set: features and labels where Inception's weights are absent or mean little.

Its figures are named after it (`fd_probe`, `accuracy_probe`) and are never an FID. The same images and the same
seed give the same probe, so that two runs on one data set share it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, relu

from genfound.data.images.sets import ImageSet
from genfound.metrics.extractor import full_precision, tensors_hash, to_tensor
from genfound.runtime.files import atomic_write, digest

SIDE, WIDTH = 32, 64
IMAGES, EPOCHS, BATCH, RATE, SEED = 4096, 6, 64, 3e-3, 0
HELD_OUT = 1000
RECIPE = (SIDE, WIDTH, IMAGES, EPOCHS, BATCH, RATE)


class ProbeNet(nn.Module):
    """Four convolutions, a global average, a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        channels = (3, WIDTH // 2, WIDTH, WIDTH, WIDTH)
        shapes = zip(channels[:-1], channels[1:], (2, 2, 1, 2), strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding=1) for a, b, stride in shapes)
        self.norms = nn.ModuleList(nn.GroupNorm(8, out) for out in channels[1:])
        self.head = nn.Linear(WIDTH, classes)

    def maps(self, x: Tensor, layers: int) -> Tensor:
        """(B, 3, h, w) in [-1, 1] -> (B, 64, h / 4, w / 4) after three convolutions; other channels after fewer."""
        for conv, norm in list(zip(self.convs, self.norms, strict=True))[:layers]:
            x = relu(norm(conv(x)))
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 32, 32) in [-1, 1] -> pool (B, 64), logits (B, classes)."""
        pool = self.maps(x, len(self.convs)).mean(dim=(2, 3))
        return pool, self.head(pool)


class Probe:
    """A trained probe; `accuracy` is the share of held-out images that it recognises, `None` where there are none."""

    name = "probe"
    width = WIDTH

    def __init__(self, net: ProbeNet, accuracy: float | None, device: torch.device) -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.accuracy = accuracy
        self.device = device
        self.hash = tensors_hash(net.state_dict())

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """See `Extractor`."""
        with full_precision(self.device):
            pool, logits = self.net(_inputs(images).to(self.device))
        return {"pool": pool.cpu(), "logits": logits.cpu()}

    def save(self, file: Path) -> None:
        """Write the probe, whole or not at all."""
        state = {key: value.cpu().contiguous() for key, value in self.net.state_dict().items()}
        note = {"probe": json.dumps({"accuracy": self.accuracy})}
        atomic_write(file, lambda temporary: save_file(state, temporary, note))

    @classmethod
    def load(cls, file: Path, device: torch.device) -> Self:
        """Read a probe."""
        if not file.is_file():
            raise FileNotFoundError(f"extractor_weights={file} is not there; a run leaves its probe-*.safetensors")
        try:
            with safe_open(file, "pt") as opened:
                accuracy = json.loads((opened.metadata() or {})["probe"])["accuracy"]
                state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            with torch.random.fork_rng(devices=[]):
                net = ProbeNet(len(state["head.bias"]))
            net.load_state_dict(state)
        except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{file} is damaged or is not a probe: {str(error).splitlines()[0][:150]}") from None
        return cls(net, accuracy, device)


def probe_key(fingerprint: str, classes: int, seed: int = SEED) -> str:
    """Names the probe of a data set."""
    return digest(repr((fingerprint, classes, (*RECIPE, seed))))


def train_probe(images: ImageSet, held_out: ImageSet, classes: int, seed: int = SEED) -> Probe:
    """Train on the first 4,096 images of a fixed random order; under a minute on a CPU.

    One thread of the CPU does it, so that the probe is the same everywhere. The images are labelled, and the accuracy
    is measured on `held_out`, which may be empty.
    """
    if images.labels is None:
        raise ValueError("extractor=probe needs labelled images to learn from")
    inputs, labels = _data(images, IMAGES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ProbeNet(classes)
    cpu = torch.device("cpu")
    accuracy = None
    with torch.enable_grad(), full_precision(cpu), _one_thread():
        _fit(net, inputs, labels)
        if len(held_out):
            inputs, labels = _data(held_out, HELD_OUT)
            with torch.no_grad():
                accuracy = float((net.eval()(inputs)[1].argmax(dim=1) == labels).double().mean())
    return Probe(net, accuracy, cpu)


def is_guessing(accuracy: float, labels: np.ndarray) -> bool:
    """Whether an accuracy on held-out images of these labels says little more than their commonest class.

    That is so up to three standard errors above its share, and never beyond half the way from there to 1.
    """
    guess = float(np.bincount(labels).max()) / len(labels)
    error = (guess * (1 - guess) / min(len(labels), HELD_OUT)) ** 0.5
    return accuracy <= guess + min(3 * error, (1 - guess) / 2)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(net: ProbeNet, inputs: Tensor, labels: Tensor) -> None:
    """Adam with a linear warmup and decay."""
    steps = EPOCHS * -(-len(inputs) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-4)
    draw = torch.Generator().manual_seed(SEED)
    batches = (rows for _ in range(EPOCHS) for rows in torch.randperm(len(inputs), generator=draw).split(BATCH))
    for step, rows in enumerate(batches):
        factor = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        optimizer.param_groups[0]["lr"] = RATE * factor
        optimizer.zero_grad()
        cross_entropy(net(inputs[rows])[1], labels[rows]).backward()
        optimizer.step()


def _data(images: ImageSet, most: int) -> tuple[Tensor, Tensor]:
    """What the network sees of the first images of a fixed random order, and their labels."""
    assert images.labels is not None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:most].tolist()
    return torch.cat([_inputs([images[number]]) for number in order]), torch.from_numpy(images.labels[order])


def _inputs(images: Sequence[np.ndarray]) -> Tensor:
    """Images of any sizes -> (B, 3, 32, 32) in [-1, 1]."""
    resized = [interpolate(to_tensor(image).float(), (SIDE, SIDE), mode="bilinear", antialias=True) for image in images]
    return torch.cat(resized) / 127.5 - 1
