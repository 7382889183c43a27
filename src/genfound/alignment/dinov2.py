"""DINOv2 (arXiv 2304.07193), REPA's teacher."""

import json
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import interpolate

from genfound.alignment import vit
from genfound.runtime.transformers_models import complete, from_state, transformers_class

KINDS = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
"""`model_type` of a config.json -> the name of its classes in transformers."""

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}


class DINOv2(vit.VisionTransformer):
    """The normalised patch tokens of DINOv2, with or without registers, at 14 pixels per token (REPA's utils.py)."""

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def load(self, weights: str) -> Any:
        """From the hub, a folder, or random."""
        folder = self.fetch(weights)
        if folder is None:
            return from_state("Dinov2WithRegisters", TINY, None)
        try:
            kind = KINDS[json.loads((folder / "config.json").read_text())["model_type"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder / 'config.json'} does not describe a DINOv2") from None
        model_class = transformers_class(f"{kind}Model")
        try:
            model, info = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} is damaged: {str(error).splitlines()[0][:150]}") from None
        return complete(model, info, f"the weights in {folder}")

    def resampled(self, table: Tensor, rows: int, columns: int) -> Tensor:
        """Bicubic with antialiasing (timm's resample_abs_pos_embed, which REPA calls)."""
        return interpolate(table, (rows, columns), mode="bicubic", antialias=True)
