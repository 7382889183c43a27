"""Normalisation over the last axis, by name; eps is 1e-6, but 1e-5 where PyTorch's own is wanted."""

from collections.abc import Callable

from torch import nn

from genfound.config.checks import one_of

EPS = 1e-6

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "layernorm": lambda width: nn.LayerNorm(width, eps=EPS, elementwise_affine=False),
    "w_layernorm": lambda width: nn.LayerNorm(width, eps=EPS, bias=False),
    "wb_layernorm": nn.LayerNorm,
    "rmsnorm": lambda width: nn.RMSNorm(width, eps=EPS, elementwise_affine=False),
    "w_rmsnorm": lambda width: nn.RMSNorm(width, eps=EPS),
}
"""Names as in FiT's released code (norms.py); `w_` has a weight; `wb_` also a bias, and the eps of PyTorch, 1e-5."""


def norm_layer(key: str, name: str, width: int) -> nn.Module:
    """The norm that a configuration key names, over `width` channels; input (..., width)."""
    return NORMS[one_of(f"model.{key}", name, NORMS)](width)
