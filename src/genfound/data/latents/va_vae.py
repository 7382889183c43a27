"""LightningDiT's autoencoder by the statistics of its latents alone."""

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from genfound.data.latents.lightningdit import shard_files
from genfound.data.latents.published import checked_latents
from genfound.data.latents.safetensors_io import read_header, read_tensors
from genfound.runtime.files import atomic_write
from genfound.tokenizers import LatentSpec, Tokenizer, Undecodable

STATISTICS = "latents_stats.pt"
SAMPLED = 10_000
"""Statistics are those of at most so many latents."""


def statistics(root: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (1, C, 1, 1), of LightningDiT's latents; see its ImgLatentDataset.

    They lie in `latents_stats.pt`. Where that is absent it is made, of up to 10,000 latents in even steps, not
    mirrored; the deviation is the unbiased one. Where it cannot be written, it is made each time.
    """
    file = root / STATISTICS
    if not file.is_file():
        std, mean = _measured(root)
        with contextlib.suppress(OSError):
            atomic_write(file, lambda temporary: torch.save({"mean": mean, "std": std}, temporary))
        return mean, std
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        mean, std = found["mean"], found["std"]
        legal = mean.shape == std.shape == (1, mean.numel(), 1, 1) and bool(mean.isfinite().all() and (std > 0).all())
    except OSError:
        raise
    except Exception:  # pickles raise RuntimeError, EOFError, UnpicklingError and more
        legal = False
    if not legal:
        raise ValueError(f"{file} is damaged; remove it, and it is made anew from the shards beside it")
    return mean, std


def _measured(root: Path) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of a sample of all latents."""
    headers = {shard: read_header(shard).spans for shard in shard_files(root)}
    for shard, tensors in headers.items():
        if "latents" not in tensors:
            raise ValueError(f"{shard} has no latents; it is not LightningDiT's")
    spans = {shard: tensors["latents"] for shard, tensors in headers.items()}
    every = max(1, -(-sum(span.shape[0] for span in spans.values()) // SAMPLED))
    parts, skip = [], 0
    for shard, span in spans.items():
        chosen = torch.from_numpy(read_tensors(shard, {"latents": span})["latents"])[skip::every].float()
        parts.append(checked_latents(shard, chosen, ""))
        skip = (skip - span.shape[0]) % every
    return torch.std_mean(torch.cat(parts), dim=(0, 2, 3), keepdim=True)


class VAVAE(Undecodable, Tokenizer):
    """LightningDiT's autoencoder as its published latents know it: by their statistics, without its network.

    Latents of each channel are (h - mean) / std * multiplier, which is `latent_multiplier` of the official
    configuration. They can be trained on and drawn, not decoded. `weights` is a folder with `latents_stats.pt`, or with
    the shards that it is made of; `stride` are pixels per latent.
    """

    published = LatentSpec(channels=32, stride=16)
    online = False

    def __init__(self, *, weights: str, stride: int, multiplier: float) -> None:
        mean, std = statistics(Path(weights))
        self.shift, self.scale = mean[0], multiplier / std[0]
        reason = "VA-VAE's network is no part of genfound: images cannot be encoded, nor latents be decoded"
        super().__init__(LatentSpec(len(self.shift), stride), reason)
