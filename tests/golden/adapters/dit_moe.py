"""DiT-MoE: router, experts, network, sizes and upcycling."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genfound import build
from genfound.backbones.dit import position_table
from genfound.backbones.dit_moe import Block, DiTMoE, NormedAttention, active_parameters
from genfound.checkpoints.official import dit_moe
from genfound.layers.moe import Expert, MixtureOfExperts, Router, Routing, balance_loss
from genfound.modules.dit_moe import DiTMoEModule, upcycle
from genfound.objectives.base import TimeAdapter
from genfound.runtime import checkpoint_io
from genfound.tokenizers import LatentSpec
from tests.golden import fill
from tests.golden.adapters import Results, adapter, sizes_of
from tests.golden.adapters.dit import dense
from tests.helpers import composed, guidance_of

Fixture = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "mlp_ratio": 4, "class_dropout_prob": 0.1, "num_classes": 1000, "num_experts": 8, "num_experts_per_tok": 2,
    "pretraining_tp": 2, "learn_sigma": True, "use_flash_attn": False,
}  # fmt: skip
GATE = {"aux_loss_alpha": 0.01, "norm_topk_prob": False, "seq_aux": False}
PROCESS = {
    "timestep_respacing", "noise_schedule", "use_kl", "sigma_small", "predict_xstart", "learn_sigma",
    "rescale_learned_sigmas", "diffusion_steps",
}  # fmt: skip
RECIPE = PROCESS | {"ln", "steps", "optimizer", "ema_decay", "cfg_scale", "images_per_class"}
"""Keys beside the constructor's own."""

SOURCE = Path("official weights")


def settings(config: Mapping[str, Any], defaults: Mapping[str, Any], *beside: str) -> dict[str, Any]:
    """All arguments of an official constructor; what else the configuration holds must be known."""
    unknown = config.keys() - defaults.keys() - set(beside)
    if unknown:
        raise NotImplementedError(f"unknown arguments {sorted(unknown)}")
    return {**defaults, **{key: value for key, value in config.items() if key in defaults}}


def construct(config: Mapping[str, Any], flow: bool) -> DiTMoE:
    """The backbone for official constructor arguments; of `pretraining_tp` the result does not depend."""
    asked = settings(config, DEFAULTS, *RECIPE)
    return DiTMoE(
        **sizes_of(asked),
        label_drop=asked["class_dropout_prob"],
        activation_checkpointing=False,
        qk_norm="layernorm" if asked["use_flash_attn"] else "none",
        experts=asked["num_experts"],
        top_k=asked["num_experts_per_tok"],
        norm_topk=False,
        shared_experts=2,
        balance=0.01,
        balance_over="tokens",
        eval_gradients=False,
        learn_sigma=asked["learn_sigma"] and not flow,
        unused_half=asked["learn_sigma"] and flow,
    )


class Official:
    """The backbone with the weights of a fixture, and how its tensors are called officially.

    Args:
        fixture: the fixture.
        flow: whether it is a rectified flow, which ignores the second half of the output channels.
    """

    def __init__(self, fixture: Fixture, flow: bool = False) -> None:
        config = settings(fixture["config"], DEFAULTS, *RECIPE)
        self.net = construct(fixture["config"], flow)
        self.patch_size = config["patch_size"]
        self.grid = (config["input_size"] // self.patch_size,) * 2
        self.positions = position_table(*self.grid, config["hidden_size"])[None]
        weights = fill.parameters(fixture)
        for key, shape in fixture["buffers"]:
            assert key == "pos_embed" and list(self.positions.shape) == shape
            weights[key] = self.positions
        checkpoint_io.load_strict(self.net, dit_moe.from_official(weights), SOURCE)
        self.net.eval()
        self.drop = config["class_dropout_prob"]

    def outwards(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Tensors in official shapes."""
        official = dit_moe.to_official(state, self.patch_size, self.grid)
        return {f"{prefix}.{key}": tensor.clone() for key, tensor in official.items()}

    def gradients(self) -> dict[str, Tensor]:
        """All gradients."""
        return self.outwards({name: gradient(p) for name, p in self.net.named_parameters()}, "grad")

    def module(self, objective: Any, optimizer: Mapping[str, Any]) -> DiTMoEModule:
        """The training module."""
        return DiTMoEModule(self.net.train(), objective, optimizer, self.drop, seed=0, budget=1)


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def tensors(fixture: Fixture) -> dict[str, Tensor]:
    """The inputs that are tensors."""
    return {name: fill.tensor(entry) for name, entry in fixture["inputs"].items() if isinstance(entry, Mapping)}


@contextmanager
def routed(net: DiTMoE) -> Iterator[list[Tensor]]:
    """Collect the choices of each router, (tokens, k) in ascending order."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, routing: Routing) -> None:
        seen.append(routing.choices.flatten(0, 1).sort(dim=1).values)

    handles = [mixture.gate.register_forward_hook(hook) for mixture in net.mixtures]
    yield seen
    for handle in handles:
        handle.remove()


def fill_part(module: nn.Module, fixture: Fixture, name: str) -> None:
    """Official weights of a part of a block, which has this name in the whole network."""
    state = {f"{name}.{key}": value for key, value in fill.parameters(fixture).items()}
    stacked = dit_moe.stack_experts(state)
    checkpoint_io.load_strict(module, {key.removeprefix(f"{name}."): v for key, v in stacked.items()}, SOURCE)


@adapter("dit_moe", "gate")
def gate(fixture: Fixture) -> Results:
    """Scores, choices and weights of a router, its balance loss, and the gradients of both."""
    config = settings(fixture["config"], GATE, "embed_dim", "num_experts", "num_experts_per_tok")
    size = fixture["config"]
    router = Router(size["embed_dim"], size["num_experts"], size["num_experts_per_tok"], config["norm_topk_prob"])
    checkpoint_io.load_strict(router, fill.parameters(fixture), SOURCE)
    given = tensors(fixture)
    x = given["x"].requires_grad_()
    routing = router(x)
    aux = config["aux_loss_alpha"] * balance_loss(routing, "sequence" if config["seq_aux"] else "tokens")
    scores, choices, weights = (value.flatten(0, 1) for value in routing[:3])
    combine = torch.zeros_like(scores).scatter(1, choices, weights)
    results = {
        "scores": scores,
        "topk_idx_sorted": choices.sort(dim=1).values,
        "combine_weights": combine,
        "aux_loss": aux[None],
    }
    for name, value in (("aux", aux), ("combine", (combine * given["grad_out"]).sum())):
        d_weight, d_x = torch.autograd.grad(value, (router.weight, x), retain_graph=True)
        results |= {f"{name}_grad.weight": d_weight, f"{name}_grad.x": d_x}
    return results


@adapter("dit_moe", "moe")
def mixture(fixture: Fixture) -> Results:
    """The feed-forward part of a block in both modes, and gradients of its output together with its balance loss."""
    size = fixture["config"]
    own = ("embed_dim", "mlp_ratio", "num_experts", "num_experts_per_tok", "pretraining_tp", "n_shared_experts")
    config = settings(size, GATE, *own)
    module = MixtureOfExperts(
        width=size["embed_dim"],
        hidden=size["mlp_ratio"] * size["embed_dim"],
        experts=size["num_experts"],
        top_k=size["num_experts_per_tok"],
        normalise=config["norm_topk_prob"],
        shared_hidden=(size["n_shared_experts"] or 0) * size["embed_dim"],
        eval_gradients=False,
    )
    fill_part(module, fixture, "blocks.0.moe")
    given = tensors(fixture)
    x, upstream = given["x"].requires_grad_(), given["grad_out"]
    out_eval, _ = module.eval()(x)
    results = {"out_eval": out_eval, "eval_grad.x": torch.autograd.grad(out_eval, x, upstream)[0]}
    out, routing = module.train()(x)
    aux = config["aux_loss_alpha"] * balance_loss(routing, "sequence" if config["seq_aux"] else "tokens")
    results |= {"out_train": out, "tokens_per_expert": routing.counts.sum(dim=0), "aux_loss": aux[None]}
    main = (out * upstream).sum()
    for name, value in (("grad", main + aux), ("grad_x64", 64 * main + aux), ("aux_grad", aux)):
        results |= {f"{name}.{key}": tensor for key, tensor in part_gradients(module, x, value).items()}
    return results


def part_gradients(module: MixtureOfExperts, x: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Gradients of the input and of all weights, under the official names of the part."""
    named = dict(module.named_parameters())
    found = torch.autograd.grad(value, (x, *named.values()), retain_graph=True, materialize_grads=True)
    ours = {f"blocks.0.moe.{name}": tensor for name, tensor in zip(named, found[1:], strict=True)}
    theirs = dit_moe.unstack_experts(ours)
    return {"x": found[0]} | {key.removeprefix("blocks.0.moe."): tensor for key, tensor in theirs.items()}


@adapter("dit_moe", "expert_tp")
def expert(fixture: Fixture) -> Results:
    """One expert and its gradients."""
    config = settings(fixture["config"], {}, "hidden_size", "intermediate_size", "pretraining_tp") | fixture["config"]
    module = Expert(config["hidden_size"], config["intermediate_size"])
    checkpoint_io.load_strict(module, fill.parameters(fixture), SOURCE)
    given = tensors(fixture)
    x = given["x"].requires_grad_()
    out = module(x)
    out.backward(given["grad_out"])
    return {"out": out, "grad.x": x.grad} | {
        f"grad.{key}": gradient(parameter) for key, parameter in module.named_parameters()
    }


@adapter("dit_moe", "attention")
@torch.no_grad()
def attention(fixture: Fixture) -> Results:
    """Attention with normalised queries and keys, without and with their rounding to float16."""
    config = settings(fixture["config"], {"qkv_bias": True, "qk_norm": True}, "dim", "num_heads")
    if config != {"qkv_bias": True, "qk_norm": True}:
        raise NotImplementedError("attention without biases or norms")
    results = {}
    for name, half in (("out", False), ("out_qk_rounded", True)):
        module = NormedAttention(fixture["config"]["dim"], fixture["config"]["num_heads"], half)
        checkpoint_io.load_strict(module, fill.parameters(fixture), SOURCE)
        results[name] = module(tensors(fixture)["x"])
    return results


@adapter("dit_moe", "block")
@torch.no_grad()
def block(fixture: Fixture) -> Results:
    """One block; the SiLU before its modulation is computed once for all blocks, outside."""
    config, given = fixture["config"], tensors(fixture)
    net = construct({**config, "depth": 1, "num_classes": 1}, flow=False)
    module = net.blocks[0].eval()
    assert isinstance(module, Block)
    fill_part(module, fixture, "blocks.0")
    return {"out": module(given["x"], nn.functional.silu(given["c"]))[0]}


@adapter("dit_moe", "model")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """Output, guided output and choices of the experts."""
    given, official = tensors(fixture), Official(fixture)
    net, x, t, y = official.net, given["x"], given["t"], given["y"]
    with routed(net) as choices:
        out = net(dense(x, y, official.patch_size), t)
    guidance = {
        "name": "cfg", "scale": fixture["inputs"]["cfg_scale"], "interval": [0.0, 1.0], "channels": "first3",
        "doubled": True,
    }  # fmt: skip
    n = len(x) // 2
    halves = []
    for i in range(n):  # each image has its own time
        twice = dense(x[[i, i]], torch.tensor([int(y[i]), net.null_label or 0]), official.patch_size)
        halves.append(guidance_of(**guidance)(TimeAdapter(net), time_range=(0.0, 1000.0))(twice, float(t[i])))
    cfg = torch.stack(halves, dim=1).flatten(0, 1)
    return {"out": out, "cfg": cfg, "routing": torch.stack(choices), "pos_embed": official.positions}


@adapter("dit_moe", "sizes")
def sizes(fixture: Fixture) -> Results:
    """Parameters and multiply-accumulates of the named sizes at 256 pixels; what was published is repeated."""
    return {"rows": [size(row) for row in fixture["rows"]]}


def size(row: Mapping[str, Any]) -> dict[str, Any]:
    match = re.fullmatch(r"(\w+)/(\d+)-(\d+)E(\d+)A", row["name"])
    if match is None or row["variant"] not in ("timm", "flash"):
        raise NotImplementedError(f"a model {row['name']} with attention {row['variant']}")
    letter, patch, experts, active = match[1].lower(), *map(int, match.groups()[1:])
    first = {"s": "s_8e2a", "b": "b_8e2a", "l": "l_8e2a", "xl": "xl_8e2a", "g": "g_16e2a"}[letter]
    norm = {"timm": "none", "flash": "layernorm"}[row["variant"]]
    config = composed(
        f"model=dit_moe_{first}", f"model.patch_size={patch}", f"model.experts={experts}", f"model.top_k={active}",
        f"model.qk_norm={norm}", "model.learn_sigma=true",
    )  # fmt: skip
    with torch.device("meta"):
        net = build.net(config, LatentSpec(4, 8), 1000)
    assert isinstance(net, DiTMoE)
    width, depth, tokens = config["model"]["width"], len(net.blocks), (32 // patch) ** 2
    trainable, moe = sum(p.numel() for p in net.parameters()), net.mixtures[0]
    assert moe.shared_experts is not None
    linear, mixing = multiplications(net, tokens, width)
    return {
        "name": row["name"],
        "variant": row["variant"],
        "num_heads": config["model"]["heads"],
        "depth": depth,
        "hidden": width,
        "total": trainable + tokens * width,
        "trainable": trainable,
        "activated": active_parameters(net) + tokens * width,
        "per_expert": sum(p.numel() for p in moe.experts.parameters()) // experts,
        "shared": sum(p.numel() for p in moe.shared_experts.parameters()),
        "gmac_linear": round(linear / 1e9, 4),
        "gmac_attn": round(mixing / 1e9, 4),
        "published": row["published"],
    }


def multiplications(net: DiTMoE, tokens: int, width: int) -> tuple[int, int]:
    """Multiply-accumulates of an image: in matrices, of which some act once for an image, and in attention."""
    linear = 0
    for name, parameter in net.named_parameters():
        if ".experts." in name:
            top_k = net.mixtures[0].gate.top_k
            linear += tokens * top_k * parameter.numel() // len(parameter)
        elif parameter.ndim == 2 and "embedding_table" not in name:
            linear += parameter.numel() * (1 if "adaLN" in name or "t_embedder" in name else tokens)
    return linear, 2 * len(net.blocks) * tokens**2 * width


@adapter("dit_moe", "upcycle_keys")
def upcycling(fixture: Fixture) -> Results:
    """Where every tensor of an upcycled network comes from, found by its values."""
    config = settings(fixture["config"], DEFAULTS)
    grid = (config["input_size"] // config["patch_size"],) * 2
    source = {**fill.parameters(fixture), "pos_embed": position_table(*grid, config["hidden_size"])[None]}
    generator = torch.Generator().manual_seed(0)
    upcycled = upcycle(dit_moe.from_official(source), config["num_experts"], generator)
    checkpoint_io.load_strict(construct(config, flow=False), upcycled, SOURCE)
    target = dit_moe.to_official(upcycled, config["patch_size"], grid)
    return {"map": {key: origin(key, tensor, source) for key, tensor in target.items()}}


def origin(key: str, tensor: Tensor, source: Mapping[str, Tensor]) -> str:
    same = [name for name, other in source.items() if torch.equal(other, tensor)]
    if not same:
        return f"normal({tensor.mean().abs().item():.1f}, {tensor.std().item():.2f})".replace("0.0,", "0,")
    return key if key in same else same[0]
