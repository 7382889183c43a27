"""CLIP score (arXiv 2104.08718): how well images show their prompts, by a CLIP of local weights."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from genfound.data.images.sets import ImageSet
from genfound.layers.float64 import double
from genfound.runtime.transformers_models import require, transformers_class
from genfound.tokenizers.weights import locate

FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
TOGETHER = 64
"""Images of a call."""


class ClipScore:
    """The mean cosine of the embeddings of images and their prompts, as text-to-image papers state it (0.345 of NiT).

    Prompts are cut at the 77 tokens that CLIP reads. The library transformers computes it (that of torchmetrics,
    a hundred times as much, does not run with its present versions).

    Args:
        weights: name on the Hugging Face hub, such as openai/clip-vit-large-patch14, or a folder.

    Raises:
        FileNotFoundError: the weights are absent and cannot be downloaded.
        ValueError: they are damaged; transformers is not installed.
    """

    def __init__(self, weights: str, device: torch.device) -> None:
        folder = fetch(weights)
        with open(folder / FILES[1], "rb") as file:
            self.hash = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        try:
            model = transformers_class("CLIPModel").from_pretrained(folder, local_files_only=True).eval()
            self.processor = transformers_class("CLIPProcessor").from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of transformers, safetensors and tokenizers, which share no class of errors
            raise ValueError(f"clip_weights: {folder} is damaged: {' '.join(str(error).split())[:150]}") from None
        self.model, self.device = model.to(device), device
        longest = self.model.config.text_config.max_position_embeddings
        self.fitting = {"padding": True, "truncation": True, "max_length": longest}

    @torch.no_grad()
    def __call__(self, images: ImageSet, prompts: Sequence[str]) -> float:
        """Of images (height, width, 3) uint8 and the prompt of each."""
        total = 0.0
        for begin in range(0, len(prompts), TOGETHER):
            some = range(begin, min(begin + TOGETHER, len(prompts)))
            pictures = [torch.from_numpy(images[k]).permute(2, 0, 1) for k in some]
            words = self.processor(
                text=[prompts[k] for k in some], images=pictures, return_tensors="pt", **self.fitting
            )
            found = self.model(**words.to(self.device))  # embeddings of length 1
            total += float(double((found.image_embeds * found.text_embeds).sum(dim=-1)).sum())
        return total / len(prompts)


def fetch(weights: str) -> Path:
    """The folder of the weights, downloaded if they are not at hand."""
    require("clip_weights", "CLIP")
    return locate(weights, True, "clip_weights", FILES)
