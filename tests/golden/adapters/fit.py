"""FiT and FiTv2: the network, its guided output, sizes, initialisation and partial fine-tuning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genfound.backbones.fit import FiT
from genfound.batch import Batch
from genfound.checkpoints.official.fit import from_official
from genfound.layers.tokens import from_tokens
from genfound.layouts import Packed
from genfound.objectives.base import TimeAdapter
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter, sizes_of
from tests.golden.fill import inputs, parameters, tensor
from tests.helpers import guidance_of

Fixture = Mapping[str, Any]

SOURCE = Path("official weights")

DEFAULTS: dict[str, Any] = {
    "context_size": 256, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": True, "use_sit": False,
    "use_checkpoint": False, "use_swiglu": False, "use_swiglu_large": False, "rel_pos_embed": "rope",
    "norm_type": "layernorm", "q_norm": None, "k_norm": None, "qk_norm_weight": False, "qkv_bias": True,
    "ffn_bias": True, "adaln_type": "normal", "adaln_lora_dim": None, "rope_theta": 10_000.0,
    "custom_freqs": "normal", "max_pe_len_h": None, "max_pe_len_w": None, "decouple": False, "ori_max_pe_len": None,
    "online_rope": False, "add_rel_pe_to_v": False, "time_shifting": 1, "finetune": None, "ignore_keys": None,
    "abs_pos_embed": None, "pretrain_ckpt": None,
}  # fmt: skip


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Official constructor arguments, all of them."""
    unknown = config.keys() - DEFAULTS.keys()
    if unknown or config.get("abs_pos_embed") is not None:
        raise NotImplementedError(f"unknown arguments {sorted(unknown or ['abs_pos_embed'])}")
    return DEFAULTS | dict(config)


def build(config: Mapping[str, Any], clamp_time: bool) -> FiT:
    """The backbone that official constructor arguments ask for."""
    asked = arguments(config)
    if asked["adaln_type"] != "lora":
        asked["adaln_lora_dim"] = None
    return FiT(
        **sizes_of(asked),
        ffn=ffn_kind(asked),
        norm=norm_name(asked["norm_type"]),
        q_norm=norm_name(asked["q_norm"], asked["qk_norm_weight"]),
        k_norm=norm_name(asked["k_norm"], asked["qk_norm_weight"]),
        qkv_bias=asked["qkv_bias"],
        ffn_bias=asked["ffn_bias"],
        adaln=asked["adaln_type"],
        adaln_rank=asked["adaln_lora_dim"],
        positions=positions(asked["rel_pos_embed"]),
        rope_theta=asked["rope_theta"],
        rope_scaling=scaling(asked),
        rope_on_values=asked["add_rel_pe_to_v"],
        time="data1" if asked["use_sit"] else "index",
        time_shifting=asked["time_shifting"],
        clamp_time=clamp_time,
        label_drop=asked["class_dropout_prob"],
        learn_sigma=asked["learn_sigma"],
        attention="auto",
        activation_checkpointing=asked["use_checkpoint"],
    )


def ffn_kind(asked: Mapping[str, Any]) -> str:
    if not asked["use_swiglu"]:
        return "mlp"
    return "swiglu_large" if asked["use_swiglu_large"] else "swiglu"


def norm_name(official: str | None, weighted: bool = False) -> str:
    return {"": "none", None: "none", "layernorm": "w_layernorm" if weighted else "layernorm"}.get(official, official)


def positions(official: str | None) -> str:
    """xpos is rope in the official code."""
    return "rope" if official in ("rope", "xpos") else "none"


def scaling(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Our rule of positions for official arguments; every rule but normal has its lengths, or takes each image's."""
    rule, trained = asked["custom_freqs"].lower(), asked["ori_max_pe_len"]
    target = [asked["max_pe_len_h"], asked["max_pe_len_w"]]
    if rule != "normal" and (trained is None or (None in target and not asked["online_rope"])):
        raise NotImplementedError(f"custom_freqs={rule} without lengths")
    fixed = None if asked["online_rope"] or None in target else target
    return {"rule": rule, "trained": trained or 16, "target": fixed, "decouple": asked["decouple"], "exact": True}


def clamped(fixture: Fixture) -> bool:
    """Whether the network embeds times above 1 as 1, as released; other fixtures say so in name and words."""
    return "noclamp" not in fixture["name"] and "clamp on t removed" not in fixture["what"]


def official(fixture: Fixture, config: Mapping[str, Any]) -> FiT:
    """The backbone with the official weights of a fixture."""
    net = build(config, clamped(fixture))
    checkpoint_io.load_strict(net, from_official(parameters(fixture)), SOURCE)
    return net.eval()


def trainable(net: FiT, parts: Sequence[str]) -> set[str]:
    """What partial fine-tuning trains, as `optimizer.trainable` does: the names that contain one of `parts`."""
    return {name for name in net.state_dict() if any(part in name for part in parts)}


def by_row(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Between official tokens and (B, N, P): FiT v1 has the channels before the tokens."""
    return x if config.get("use_sit") else x.transpose(1, 2)


def check_grid(grid: Tensor, sizes: Tensor) -> None:
    """Rows of (column, row) must number images row by row; padding may hold anything."""
    for places, image in zip(grid, sizes, strict=True):
        sides = [(h, w) for h, w in image.tolist() if h * w]
        listed = [[[n % w, n // w] for n in range(h * w)] for h, w in sides]
        wanted = torch.tensor([place for one in listed for place in one]).T
        if not torch.equal(places[:, : wanted.shape[1]], wanted):
            raise NotImplementedError("a grid that is not row by row")


def to_batch(given: Mapping[str, Tensor], x: Tensor) -> Batch:
    """Padded rows (B, N, P), one image each."""
    check_grid(given["grid"], given["size"])
    return Batch(x, given["y"], given["size"][:, 0], torch.ones(len(x), dtype=torch.bool), given["mask"] != 0)


def packed_rows(net: FiT, given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Rows of several images, numbered 1, 2, ... in the mask, by which the official code multiplies its output."""
    check_grid(given["grid"], given["size"])
    owners = [i for i, image in enumerate(given["size"]) for h, w in image.tolist() if h * w]
    sizes = [(h, w) for image in given["size"].tolist() for h, w in image if h * w]
    real = given["mask"] != 0
    patch = net.token_spec.patch_size
    pieces = x[real].split([h * w for h, w in sizes])
    latents = [from_tokens(piece, h, patch) for piece, (h, _) in zip(pieces, sizes, strict=True)]
    batch = Packed(patch).to_batch(latents, given["y"][owners])
    moved = net(batch, given["t"][owners])
    out = x.new_zeros(*x.shape[:2], moved.shape[1])
    out[real] = moved
    return out * given["mask"][..., None]


@adapter("fit", "model")
@adapter("fit", "model_option")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """The network's output for padded or packed rows."""
    config, given = fixture["config"], inputs(fixture)
    net, x = official(fixture, config), by_row(given["x"], config)
    if given["size"].shape[1] == 1:
        return {"out": by_row(net(to_batch(given, x), given["t"]), config)}
    return {"out": by_row(packed_rows(net, given, x), config)}


@adapter("fit", "model_cfg")
@torch.no_grad()
def guided_forward(fixture: Fixture) -> Results:
    """The guided output, image by image because each has its own time; the null half keeps its own rest."""
    config, given = fixture["config"], cfg_inputs(fixture)
    net, x = official(fixture, config), by_row(given["x"], config)
    guidance = {"name": "cfg", "scale": given["cfg_scale"], "interval": [0.0, 1.0], "channels": "first3"}
    if given["scale_pow"] and net.time != "data1":
        raise NotImplementedError("a guidance scale that follows the time, with integer steps")
    if given["scale_pow"]:
        guidance |= {"schedule": "power_cosine", "power": given["scale_pow"]}
    n = len(x) // 2
    assert (given["y"][n:] == net.null_label).all()
    first, second = [], []
    for i in range(n):
        assert given["t"][n + i] == given["t"][i]
        row = {key: given[key][i : i + 1] for key in ("t", "y", "grid", "mask", "size")}
        batch = to_batch(row, x[i : i + 1])
        t = 1 - float(row["t"]) if net.time == "data1" else float(row["t"])
        first.append(guidance_of(**guidance)(TimeAdapter(net, 1.0))(batch, t))
        null = net(replace(batch, y=given["y"][n : n + 1]), row["t"])
        count = 3 * net.token_spec.patch_size**2
        second.append(torch.cat([first[-1][..., :count], null[..., count:]], dim=-1))
    return {"out": by_row(torch.cat(first + second), config)}


def cfg_inputs(fixture: Fixture) -> dict[str, Any]:
    """Tensors, and the plain numbers of the call."""
    entries = {"scale_pow": 0.0} | fixture["inputs"]
    return {name: tensor(entry) if isinstance(entry, Mapping) else entry for name, entry in entries.items()}


@adapter("fit", "sizes")
def sizes(fixture: Fixture) -> Results:
    """Exact parameter counts, names and shapes, and multiply-accumulates for 256 tokens."""
    return {name: size(config) for name, config in fixture["config"].items()}


def size(config: Mapping[str, Any]) -> dict[str, Any]:
    with FakeTensorMode(), torch.no_grad():
        net = build(config, clamp_time=False)
        entries = sorted((key, list(value.shape)) for key, value in net.state_dict().items())
        side = 16 * net.token_spec.patch_size
        one = torch.ones(1, dtype=torch.long)
        batch = Batch(torch.zeros(1, net.token_spec.channels, side, side), one, torch.full((1, 2), 16), one > 0)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # counts matrix products
            net(batch, torch.zeros(1))
    asked = arguments(config)
    if asked["finetune"] not in (None, "partial"):
        raise NotImplementedError(f"finetune={asked['finetune']}")
    trained = net.state_dict().keys() if asked["finetune"] is None else trainable(net, asked["ignore_keys"])
    lines = "\n".join(f"{key}:{','.join(map(str, shape))}" for key, shape in entries)
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable": sum(p.numel() for name, p in net.named_parameters() if name in trained),
        "state_dict_entries": len(entries),
        "sha1_of_sorted_key_shape_lines": hashlib.sha1(lines.encode()).hexdigest(),
        "gmacs_batch1_256_tokens": round(counter.get_total_flops() / 2e9, 2),
    }


@adapter("fit", "init", notes=("kind",))
def initialisation(fixture: Fixture) -> Results:
    """The law of every parameter, from one network; the laws are names, which are compared here."""
    net = build(fixture["config"], clamp_time=False)
    net.initialise(Rng(0))
    laws = {key: law(value) for key, value in net.state_dict().items()}
    assert laws == fixture["outputs"]["kind"]["values"]
    return {}


def law(value: Tensor) -> str:
    """The name of an initial distribution."""
    constant = {0.0: "zeros", 1.0: "ones"}.get(value.flatten()[0].item())
    if constant and (value == value.flatten()[0]).all():
        return constant
    bound = (6 / sum(value.shape)) ** 0.5
    uniform = 0.95 * bound < value.abs().max() <= bound * (1 + 1e-6)
    if uniform and abs(value.std() * 3**0.5 / bound - 1) < 0.05:
        return "xavier_uniform"
    return f"normal_std_{value.std().item():.2f}"


@adapter("fit", "finetune_keys", notes=("loaded_keys", "trainable_keys"))
def partial_finetuning(fixture: Fixture) -> Results:
    """What partial fine-tuning trains; the lists are names, which are compared here."""
    config = {**fixture["config"]}
    net = build(config, clamp_time=False)
    trained = trainable(net, config["ignore_keys"])
    wanted = fixture["outputs"]["trainable_keys"]["values"]
    assert sorted(trained) == sorted(wanted)
    frozen = net.state_dict().keys() - set(wanted)
    assert sorted(frozen) == sorted(fixture["outputs"]["loaded_keys"]["values"])
    return {}
