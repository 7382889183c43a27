from __future__ import annotations

import pytest
import torch

from genfound.layers.norm import NORMS, norm_layer

WEIGHTS = {"none": 0, "layernorm": 0, "w_layernorm": 1, "wb_layernorm": 2, "rmsnorm": 0, "w_rmsnorm": 1}


@pytest.mark.parametrize("name", NORMS)
def test_what_a_norm_keeps_and_learns(name: str) -> None:
    layer = norm_layer("norm", name, 24)
    assert len(list(layer.parameters())) == WEIGHTS[name]
    x = 3 + 2 * torch.randn(5, 24)
    out = layer(x)
    if "layernorm" in name:
        torch.testing.assert_close(out.mean(-1), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.var(-1, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    elif name == "none":
        assert torch.equal(out, x)
    else:
        torch.testing.assert_close(out.square().mean(-1), torch.ones(5), atol=1e-4, rtol=0)
        torch.testing.assert_close(out / out[:, :1], x / x[:, :1])


@pytest.mark.parametrize("name", ["layernorm", "w_layernorm", "rmsnorm", "w_rmsnorm"])
def test_eps_is_one_millionth(name: str) -> None:
    x = 1e-3 * torch.tensor([[1.0, -1.0]])
    expected = torch.tensor([[1.0, -1.0]]) * 0.5**0.5  # 1e-3 over the root of 1e-6 + 1e-6
    torch.testing.assert_close(norm_layer("norm", name, 2)(x), expected)


def test_eps_of_pytorch() -> None:
    x = 1e-3 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(norm_layer("norm", "wb_layernorm", 2)(x), torch.tensor([[1.0, -1.0]]) / 11**0.5)


@pytest.mark.parametrize("name", NORMS)
def test_half_precision_autocast_leaves_float32_alone(name: str) -> None:
    layer, x = norm_layer("norm", name, 24), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.float()(x))
        assert layer(x).dtype == torch.float32


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.q_norm=batchnorm is unknown; choose one of none, layernorm"):
        norm_layer("q_norm", "batchnorm", 8)
