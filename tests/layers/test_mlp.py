from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, silu

from genfound.layers.mlp import feed_forward


@pytest.mark.parametrize(("kind", "hidden"), [("mlp", 72), ("swiglu", 48), ("swiglu_large", 72)])
@pytest.mark.parametrize("bias", [True, False])
def test_widths_and_biases(kind: str, hidden: int, bias: bool) -> None:
    net = feed_forward(kind, 24, 3, bias)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    first = ["fc1"] if kind == "mlp" else ["fc1_g", "fc1_x"]
    expected = {f"{name}.weight": (hidden, 24) for name in first} | {"fc2.weight": (24, hidden)}
    if bias:
        expected |= {f"{name}.bias": (hidden,) for name in first} | {"fc2.bias": (24,)}
    assert shapes == expected
    assert net(torch.randn(2, 5, 24)).shape == (2, 5, 24)


def test_swiglu_without_biases_has_about_the_parameters_of_the_mlp() -> None:
    counts = [sum(p.numel() for p in feed_forward(kind, 24, 4, False).parameters()) for kind in ("mlp", "swiglu")]
    assert counts[0] == counts[1] == 8 * 24**2


def test_formulas() -> None:
    x = torch.randn(7, 24)
    net = feed_forward("swiglu", 24, 4, True)
    torch.testing.assert_close(net(x), net.fc2(silu(net.fc1_g(x)) * net.fc1_x(x)))
    net = feed_forward("mlp", 24, 4, True)
    torch.testing.assert_close(net(x), net.fc2(gelu(net.fc1(x), approximate="tanh")))


def test_a_fused_swiglu_is_the_same_with_the_rows_of_its_gate_first() -> None:
    x, net, fused = torch.randn(7, 24), feed_forward("swiglu", 24, 3, True), feed_forward("swiglu_fused", 24, 3, True)
    assert {name: tuple(p.shape) for name, p in fused.named_parameters()} == {
        "w12.weight": (96, 24), "w12.bias": (96,), "w3.weight": (24, 48), "w3.bias": (24,),
    }  # fmt: skip
    own = net.state_dict()
    state = {f"w12.{kind}": torch.cat([own[f"fc1_g.{kind}"], own[f"fc1_x.{kind}"]]) for kind in ("weight", "bias")}
    fused.load_state_dict({**state, "w3.weight": own["fc2.weight"], "w3.bias": own["fc2.bias"]})
    torch.testing.assert_close(fused(x), net(x))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model\.ffn=geglu is unknown; choose mlp, swiglu, swiglu_large or swiglu_fused"
    ):
        feed_forward("geglu", 24, 4, True)
