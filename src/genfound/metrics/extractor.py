"""What turns images into features: one interface, two extractors."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor

from genfound.layers.initial import whole
from genfound.metrics.inception import SIDE, InceptionV3
from genfound.metrics.resize import tf1_resize
from genfound.runtime import checkpoint_io
from genfound.runtime.devices import float32_products
from genfound.runtime.files import atomic_write

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SOURCES = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
PATIENCE = 30
"""Seconds for a server to answer."""

COUNTED = "num_batches_tracked"


def download(folder: Path) -> Path:
    """The file of Inception's public weights in a folder, downloaded if it is not there, and read once to check it.

    Raises:
        ValueError: it cannot be downloaded, or is damaged.
    """
    file, cpu = folder / WEIGHTS, torch.device("cpu")
    if file.is_file():
        Inception(file, cpu)
        return file
    print(f"downloading {SOURCES[0]}", flush=True)
    try:
        answer = urlopen(SOURCES[0], timeout=PATIENCE)
    except OSError as error:
        raise ValueError(f"{SOURCES[0]} cannot be downloaded: {error}; inception=false does without it") from None

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as out:
            shutil.copyfileobj(answer, out)
        Inception(temporary, cpu)

    with answer:
        atomic_write(file, save)
    return file


class Extractor(Protocol):
    """Images -> features, each image's own whatever the others are."""

    name: str  # `inception` or `probe`
    hash: str  # of its weights
    width: int  # number of pool features

    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Images (height, width, 3) uint8 of any sizes -> `pool`, `logits`, perhaps `spatial`; float32, on the CPU."""


class Inception:
    """InceptionV3 with the public weights of a file, in full float32; a FileNotFoundError says where to get them."""

    name = "inception"
    width = 2048

    def __init__(self, weights: str | Path, device: torch.device) -> None:
        file = Path(weights)
        if not file.is_file():
            raise FileNotFoundError(
                f"extractor_weights={file} is not there; download {WEIGHTS} from {SOURCES[0]} "
                f"(or {SOURCES[1]}, the same tensors) and give its path"
            )
        state = checkpoint_io.read(file)
        with torch.device("meta"):  # no random number is drawn
            net = InceptionV3()
        counters = {key: torch.tensor(0) for key in net.state_dict() if key.endswith(COUNTED)}
        checkpoint_io.load_strict(net, {**state, **counters}, file)  # not all files have them
        self.hash = tensors_hash({k: v for k, v in net.state_dict().items() if k not in counters})
        self.net, self.device = net.to(device), device

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """See `Extractor`."""
        resized = [tf1_resize(to_tensor(image).to(self.device), SIDE, SIDE) for image in images]
        with full_precision(self.device):
            outputs = self.net(torch.cat(resized))
        return {name: value.float().cpu() for name, value in outputs._asdict().items()}


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 as it says, also where training has switched to less."""
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with exact, float32_products("32-true", device), torch.autocast(device.type, enabled=False):
        yield


def to_tensor(image: np.ndarray) -> Tensor:
    """(height, width, 3) uint8 -> (1, 3, height, width) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the names, shapes and values of tensors; of sharded ones in all processes together."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        values = whole(tensors[name].detach())
        tensor = values.to("cpu", copy=True).contiguous()  # numpy fixes the size of what it views
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()
