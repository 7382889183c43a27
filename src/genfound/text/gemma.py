"""Gemma 3, whose 1B model is the text encoder of NiT for text (arXiv 2506.03131, appendix A)."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genfound.config.checks import integer, one_of
from genfound.runtime.transformers_models import complete, require, transformers_class
from genfound.text.base import TextEncoder
from genfound.tokenizers.weights import locate

FILES = ("config.json", "model.safetensors", "tokenizer.json")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Gemma3(TextEncoder):
    """A hidden state of a Gemma 3 of text, as the library transformers computes it, of each token of a caption.

    Its own tokenizer begins a caption with a token of its own. Attention is causal, so no token knows what follows it.

    Args:
        weights: name on the Hugging Face hub, or a folder.
        width, tokens: E and L, see `TextEncoder`.
        layer: which hidden state, from the end: -1 is the last, after the norm; others are not normalised.
        precision: of the network, `bf16` or `fp32`.

    Raises:
        FileNotFoundError: the weights are absent and cannot be downloaded.
        ValueError: they are damaged, or of another width; transformers is not installed.
    """

    def __init__(self, *, weights: str, width: int, tokens: int, layer: int, precision: str) -> None:
        integer("text_encoder.tokens", tokens, 1)
        dtype = DTYPES[one_of("text_encoder.precision", precision, DTYPES)]
        folder = self.fetch(weights)
        assert folder is not None
        model_class, file = transformers_class("Gemma3TextModel"), folder
        try:
            model, info = model_class.from_pretrained(
                folder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
            file = folder / FILES[2]
            self.tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
        except Exception as error:  # of transformers, safetensors and tokenizers, which share no class of errors
            raise ValueError(f"{file} is damaged: {' '.join(str(error).split())[:150]}") from None
        self.model = complete(model, info, f"the weights in {folder}").eval().requires_grad_(False)
        config = self.model.config
        if config.hidden_size != width:
            raise ValueError(f"text_encoder.width={width}, but {folder} has {config.hidden_size}; set it so")
        if not -config.num_hidden_layers - 1 <= layer <= -1:
            raise ValueError(f"text_encoder.layer={layer} must be from {-config.num_hidden_layers - 1} to -1")
        self.width, self.tokens, self.layer = width, tokens, layer

    @classmethod
    def fetch(cls, weights: str | None, download: bool = True) -> Path | None:
        """See `TextEncoder`; of the hub the configuration, the weights in one file, and the tokenizer."""
        require("text_encoder", cls.__name__)
        return locate(str(weights), download, "text_encoder.weights", FILES)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        """See `TextEncoder`; in the precision of the network."""
        ids = [torch.tensor(self.tokenizer.encode(caption).ids[: self.tokens]) for caption in captions]
        padded = pad_sequence(ids, batch_first=True).to(device)  # on the right
        mask = pad_sequence([torch.ones_like(own) for own in ids], batch_first=True).to(device)
        with torch.autocast(device.type, enabled=False):
            model = self.model.to(device)
            states = model(padded, attention_mask=mask, output_hidden_states=self.layer != -1, use_cache=False)
        hidden = states.last_hidden_state if self.layer == -1 else states.hidden_states[self.layer]
        return [row[: len(own)] for row, own in zip(hidden, ids, strict=True)]
