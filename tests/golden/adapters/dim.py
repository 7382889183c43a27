"""DiM: the selective scan in every form, the orders of tokens, the network, its initial values and loss.

Official steps are counted from 1, and log(1 ... N) of a state is its A_log.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.dim import CONDITIONS, Block, DiM, Place, resized, scan_orders
from genfound.checkpoints.official.dim import from_official, official_options, to_official
from genfound.layers import ssm
from genfound.layers.frames import Frame, Framed
from genfound.layers.scans import ORDERS
from genfound.objectives.gaussian import Gaussian
from genfound.objectives.process import scaled_linear
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dit import Draws, _All, dense, module_of
from tests.golden.fill import inputs, parameters
from tests.helpers import composed

Fixture = Mapping[str, Any]
Config = Mapping[str, Any]

SOURCE = Path("official weights")
FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_single", "no_ff": True, "rms": True, "use_a4m_adapter": True, "is_extra_tokens": True,
    "encoder_start_blk_id": 1, "is_absorb": False, "pattern_type": "base", "mamba_type": "enc",
    "pos_encoding_type": "learnable", "drop_path_rate": 0.0, "is_random_patterns": False,
    "is_align_exchange_q_kv": False, "mlp_time_embed": False, "dropout": 0.0,
    "sub_sequence_schedule": ["reverse_single", "layerwise_cross"], "extra_len": 2, "is_proj_in": False,
}  # fmt: skip
INERT = {
    "activation_fn", "attention_bias", "norm_elementwise_affine", "use_bidirectional_rnn", "nested_order", "use_conv1d",
    "num_2d_enc_dec_layers", "sequence_schedule", "kv_as_one_token_idx", "multi_times", "stage_index",
}  # fmt: skip
READ = {
    "num_attention_heads", "attention_head_dim", "patch_size", "sample_size", "num_layers", "in_channels",
    "out_channels", "num_embeds_ada_norm", "mamba_d_state", "mamba_d_conv", "mamba_expand", "is_uconnect",
    "use_pad_token", "pad_token_schedules", "use_adapter_modules", "scan_pattern_len", "num_patches", "is_skip_tune",
    "skip_tune_param", "is_freeu", "freeu_param", "forward_kwargs",
}  # fmt: skip
PADS = {"lateral": "lateral", "rho_pad": "cycled"}


def model_of(config: Config) -> dict[str, Any]:
    """Keys of `model` for official constructor arguments; what has no effect in the released path is left out."""
    odd = {key: value for key, value in config.items() if key in FIXED and value != FIXED[key]}
    unknown = config.keys() - FIXED.keys() - INERT - READ
    if odd or unknown or config.get("forward_kwargs", {}).keys() - {"use_pos_inteplot"}:
        raise NotImplementedError(f"arguments {odd or sorted(unknown) or config['forward_kwargs']}")
    own = {key: v for key, v in composed("experiment=official/dim", "model=dim_l")["model"].items() if key[0] != "_"}
    pads = next((PADS[name] for name in config["pad_token_schedules"] if name in PADS), "none")
    return {
        **own, "channels": config["in_channels"], "num_classes": config["num_embeds_ada_norm"],
        "patch_size": config["patch_size"], "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"], "states": config["mamba_d_state"], "conv": config["mamba_d_conv"],
        "expand": config["mamba_expand"], "table": table_of(config), "smooth": config["use_adapter_modules"],
        "pad": pads if config["use_pad_token"] else "none", "long_skips": config["is_uconnect"],
        "directions": max(config["scan_pattern_len"], 0) + 1,
        "learn_sigma": config["out_channels"] > config["in_channels"],
        "skip_tune": config["skip_tune_param"] if config.get("is_skip_tune") else None,
        "freeu": config["freeu_param"] if config.get("is_freeu") else None, "bf16_inputs": False,
    }  # fmt: skip


def table_of(config: Config) -> list[int]:
    """Rows and columns of the largest grid that is registered; of a number of tokens it is the squarest."""
    counts = config.get("num_patches", (config["sample_size"] // config["patch_size"]) ** 2)
    count = max(counts) if isinstance(counts, list) else counts
    return [count // int(count**0.5), int(count**0.5)]


def official(fixture: Fixture) -> DiM:
    """The backbone with the official weights of a fixture, whose options its shapes tell too."""
    model, weights = model_of(fixture["config"]), parameters(fixture)
    told = official_options(weights)
    assert {key: model[key] for key in told} == told
    net = DiM(**model)
    checkpoint_io.load_strict(net, from_official(weights), SOURCE)
    return net.eval()


def labels(net: DiM, given: Mapping[str, Tensor]) -> Tensor:
    assert net.null_label is not None
    return given.get("y", torch.full((len(given["x"]),), net.null_label))


@adapter("dim", "selective_scan")
def scan(fixture: Fixture) -> Results:
    """Outputs, gradients and the last state, of every form; tokens after the last one, without a step, read it."""
    given, weights, strong = inputs(fixture), parameters(fixture), fixture["config"]["strong"]
    states, found = fixture["config"]["d_state"], list[dict[str, Tensor]]()
    for form in ("reference", "chunked"):
        leaves = {key: value.clone() for key, value in {**given, **weights}.items() if key != "cotangent"}
        if strong:
            leaves["delta"] *= 3
            leaves["A_log"] += torch.arange(1, states + 1).log()
        for leaf in leaves.values():
            leaf.requires_grad_()
        u, delta, z, b, c = (leaves[key] for key in ("u", "delta", "z", "B", "C"))
        ask = torch.eye(states).expand(len(u), states, states)
        rows = [nn.functional.pad(u, (0, states)), nn.functional.pad(delta, (0, states), value=-1e4)]
        rows.append(nn.functional.pad(z, (0, states), value=1.0))
        more = (nn.functional.pad(b, (0, states)), torch.cat([c, ask], dim=2))
        a = -leaves["A_log"].exp()
        out = ssm.selective_scan(*rows, a, *more, leaves["D"], leaves["delta_bias"], form)
        out, last = out.split([u.shape[2], states], dim=2)
        (out * given["cotangent"]).sum().backward()
        grads = {f"grad.{key}": leaf.grad for key, leaf in leaves.items()}
        found.append({"out": out, "last_state": last / torch.ones(()).sigmoid(), **grads})  # type: ignore[dict-item]
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=1e-5 * value.detach().abs().max().item(), rtol=0)
    return found[1]


@adapter("dim", "scan_order")
def orders(fixture: Fixture) -> Results:
    """The patterns of networks of several depths, or the tokens that each block of one sees."""
    config = fixture["config"]
    if "num_layers" not in config:
        names = dict(zip(ORDERS, (0, -2, 1, -1), strict=True))
        shapes = {key: [int(part.lstrip("layersn")) for part in key.split("_")] for key in fixture["outputs"]}
        return {key: [names[order] for order in scan_orders(d, n + 1)] for key, (d, n) in shapes.items()}
    tiny = {"width": 8, "depth": config["num_layers"], "table": [config["height"], config["width"]]}
    own = {key: v for key, v in composed("model=dim_l")["model"].items() if key[0] != "_"}
    more = {"conv": config["pad_token_len"], "directions": config["scan_pattern_len"] + 1}
    net = DiM(**{**own, **tiny, **more, "channels": 1, "num_classes": 1, "learn_sigma": False})
    count = fixture["outputs"]["block0"]["shape"][0]
    found: dict[str, Tensor] = {}
    for i, block in enumerate(net.blocks):  # a recurrence that gives nothing leaves the numbers of the tokens
        block.attn1.out_proj.weight.data.zero_()
        block.skip_linear = None
        block.register_forward_hook(lambda _, given, out, i=i: found.update({f"block{i}": out[0, :, 0].long()}))
    with torch.no_grad():
        framed = net.framed(dense(torch.zeros(1, 1, *(2 * n for n in tiny["table"])), torch.zeros(1), 2))
        net.run_blocks(torch.arange(count).float().expand(8, -1).mT[None], torch.zeros(1, 24), framed)
    return found


@adapter("dim", "part")
@torch.no_grad()
def part(fixture: Fixture) -> Results:
    """A mixer, its convolution, a block, the frame of an image, the conditions, positions, or a schedule."""
    config, given = fixture["config"], inputs(fixture)
    kinds = {
        "d_model": mixer, "channels": convolution, "stage_index": block, "height": frame, "patch_size": conditions,
        "from": positions, "n_timestep": schedule, "schedule": continuous,
    }  # fmt: skip
    return next(run for key, run in kinds.items() if key in config)(fixture, config, given)


def mixer(fixture: Fixture, config: Config, given: Mapping[str, Tensor]) -> Results:
    layer = ssm.Mamba(config["d_model"], config["d_state"], config["d_conv"], config["expand"], "auto")
    checkpoint_io.load_strict(layer, parameters(fixture), SOURCE)
    return {"out": layer(given["x"])}


def convolution(fixture: Fixture, config: Config, given: Mapping[str, Tensor]) -> Results:
    layer = ssm.Mamba(config["channels"], 1, config["width"], 1, "auto")
    weights = {key.removeprefix("conv1d."): value for key, value in parameters(fixture).items()}
    checkpoint_io.load_strict(layer.conv1d, weights, SOURCE)
    return {"out": nn.functional.silu(layer.conv1d(given["x"])[..., : given["x"].shape[2]])}


def block(fixture: Fixture, config: Config, given: Mapping[str, Tensor]) -> Results:
    width, seen = config["dim"], list[Tensor]()
    mixing = ssm.Mamba(width, config["mamba_d_state"], config["mamba_d_conv"], config["mamba_expand"], "auto")
    layer = Block(width, mixing, config["is_skip"])
    checkpoint_io.load_strict(layer, parameters(fixture), SOURCE)
    layer.norm1["norm"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    twice = 1 if config["is_skip"] else 2  # without a skip the official block alone adds what comes in to itself again
    found, calls = {}, {"": given["hidden"] + twice * given["residual"], "first_block_": given["hidden"]}
    for name, x in calls.items():
        if f"{name}out" in fixture["outputs"]:
            batch = dense(torch.zeros(len(x), 1, 1, 1), torch.zeros(len(x)), 1)
            out = layer(x, given["modulation"], Place(batch, None, None), given.get("skip"))
            found |= {f"{name}out": out - seen[-1], f"{name}residual_out": seen[-1]}
    return found


def frame(fixture: Fixture, config: Config, given: Mapping[str, Tensor]) -> Results:
    cycled = "rho_pad" in config["pad_token_schedules"]
    count, x = config["mamba_d_conv"] if config["use_pad_token"] else 0, given["x"]
    layer = Frame(config["dim"], count, cycled, smooth=True)
    checkpoint_io.load_strict(layer, parameters(fixture), SOURCE)
    batch = dense(torch.zeros(len(x), 1, config["height"], config["width"]), torch.zeros(len(x)), 1)
    framed = Framed(batch, 1, count, CONDITIONS + count)
    return {
        "prepared": layer(x[:, :CONDITIONS], x[:, CONDITIONS:], framed),
        "finalized": layer.image(given["sequence"] + given["residual"], framed),
    }


def conditions(fixture: Fixture, config: Config, given: Mapping[str, Tensor]) -> Results:
    net, seen = DiM(**model_of(config)), dict[str, Tensor]()
    checkpoint_io.load_strict(net, {**net.state_dict(), **parameters(fixture)}, SOURCE)
    net.adaln_single.emb.register_forward_hook(lambda _, given, out: seen.update(embedding=out))
    net.adaln_single.register_forward_hook(lambda _, given, out: seen.update(modulation=out))
    net.a4m_adapter.register_forward_pre_hook(lambda _, given: seen.update(tokens=given[0]))
    net.additional_embed.data.zero_()
    side = config["sample_size"]
    x = torch.zeros(len(given["t"]), config["in_channels"], side, side)
    net(dense(x, given["y"], config["patch_size"]), given["t"] - 1)
    time, label = seen["tokens"][:, :2].unbind(1)
    found = {"modulation": seen["modulation"], "adaln_embedding": seen["embedding"]}
    return {**found, "time_token": time, "class_token": label}


def positions(fixture: Fixture, config: Config, given: Mapping[str, Tensor]) -> Results:
    return {"out": resized(given["table"], tuple(config["from"]), tuple(config["to"]))}


def schedule(fixture: Fixture, config: Config, given: Mapping[str, Tensor]) -> Results:
    assert (config["linear_start"], config["linear_end"]) == (0.00085, 0.012)
    tables, step = process().process.tables, given["n"] - 1
    signal = tables.alphas_cumprod[step]
    betas, noise = tables.betas[step], 1 - signal
    return {"betas": betas, "cum_alphas": signal, "cum_betas": noise, "snr": signal / noise}


def continuous(fixture: Fixture, config: Config, given: Mapping[str, Tensor]) -> Results:
    steps = (given["t"].double() * 1000 - 1).tolist()
    field = process().field(lambda batch, t: batch.x)
    levels = torch.tensor([field.level(t) for t in steps], dtype=torch.float64)
    alpha, sigma = levels.unbind(1)
    inverse = (field.time_of(sigma / alpha) + 1) / 1000
    return {"log_alpha": alpha.log(), "sigma": sigma, "lambda": (alpha / sigma).log(), "inverse": inverse}


def process() -> Gaussian:
    """DiM's objective."""
    options = {key: v for key, v in composed("objective=gaussian_dim")["objective"].items() if key[0] != "_"}
    objective = Gaussian(**options)
    assert torch.equal(objective.process.tables.betas, scaled_linear(1000))
    return objective


@adapter("dim", "model")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """The output of the network, and the tokens before, between and after its blocks."""
    given, net, found = inputs(fixture), official(fixture), dict[str, Tensor]()
    for i, layer in enumerate(net.blocks):
        layer.register_forward_hook(lambda _, given, out, i=i: found.update({f"block{i}": out}))
    net.a4m_adapter.register_forward_hook(lambda _, given, out: found.update(prepared=out))
    net.norm_out["norm"].register_forward_pre_hook(lambda _, given: found.update(finalized=given[0]))
    found["out"] = net(dense(given["x"], labels(net, given), net.token_spec.patch_size), given["t"] - 1)
    return found


@adapter("dim", "loss", notes=("no_grad_keys",))
def loss(fixture: Fixture) -> Results:
    """The loss of each image, and gradients of the mean."""
    given, net, objective = inputs(fixture), official(fixture).train(), process()
    draws = Draws(time=(given["n"] - 0.5) / 1000, noise=given["eps"], label_drop=torch.ones(len(given["n"])))
    losses = module_of(net, objective, {}).evaluate(dense(given["x0"], given["y"], net.token_spec.patch_size), draws)
    losses.total.mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert sorted(set(dict(net.named_parameters())) - set(grads)) == sorted(fixture["no_grad_keys"])
    moved = to_official(grads, net.token_spec.patch_size, (0, 0))
    norm = nn.utils.get_total_norm(grads.values())
    return {"loss": losses.total, "total_grad_norm": norm[None], **{f"grad.{key}": v for key, v in moved.items()}}


@adapter("dim", "init", notes=_All())
def initialisation(fixture: Fixture) -> Results:
    """Mean, spread and largest value of every parameter, within what the number of elements allows."""
    net = DiM(**model_of(fixture["config"]))
    net.initialise(Rng(0))
    ours = to_official(net.state_dict(), net.token_spec.patch_size, (0, 0))
    for key, entry in fixture["outputs"].items():
        mean, spread, most = entry["values"]
        value = ours[key].detach().double()
        if spread == 0:
            assert abs(value - mean).max() < 1e-6, key
            continue
        assert abs(value.mean() - mean) < 7 * 1.42 * spread / value.numel() ** 0.5, key  # both are of one draw
        assert abs(value.std(correction=0) / spread - 1) < 7 / value.numel() ** 0.5, key
        assert 0.8 < value.abs().max() / most < 1.25, key
    return {}
