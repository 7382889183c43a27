"""LDM: the U-Net, its loss, samples, first stages, and schedules; weights come from files as they are released."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import genfound
from genfound import build
from genfound.backbones.ldm import LDM
from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.checkpoints.load import LoadedModel
from genfound.checkpoints.official import ldm
from genfound.layouts import Dense
from genfound.modules.base import schedule
from genfound.objectives.gaussian import Gaussian, GaussianField
from genfound.runtime import checkpoint_io
from genfound.samplers import Sampler
from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.sd_vae import SDVAE
from genfound.tokenizers.vq_f4 import VQF4
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.gaussian import StepNoise
from tests.golden.fill import inputs, parameter, parameters, unit
from tests.helpers import composed, guidance_of, sampler_of

Fixture = Mapping[str, Any]

SOURCE = Path("official weights")
TOLD = {
    "in_channels", "out_channels", "model_channels", "num_res_blocks", "channel_mult", "attention_resolutions",
    "context_dim", "use_spatial_transformer", "transformer_depth", "num_classes", "use_scale_shift_norm",
    "resblock_updown", "conv_resample", "image_size",
}  # fmt: skip
"""Official arguments of the U-Net that its weights tell, or that it does not use."""

HEADS = ("num_heads", "num_head_channels", "use_new_attention_order")
WITHOUT_EFFECT: dict[str, Any] = {
    "dropout": 0,
    "dims": 2,
    "use_checkpoint": ...,
    "legacy": ...,
    "num_heads_upsample": -1,
}
"""Arguments that change no number, and the only value that they may have; `...`: any."""


def heads_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the U-Net that its weights do not tell."""
    known = {*TOLD, *HEADS, *WITHOUT_EFFECT}
    unlike = {key for key in WITHOUT_EFFECT.keys() & asked.keys() if WITHOUT_EFFECT[key] not in (asked[key], ...)}
    if unknown := (asked.keys() - known) | unlike:
        raise NotImplementedError(f"arguments {sorted(unknown)} of the U-Net")
    width = asked.get("num_head_channels", -1)
    return {
        "heads": asked.get("num_heads", 1),
        "head_width": None if width == -1 else width,
        "attention_order": "kinds" if asked.get("use_new_attention_order") else "heads",
    }


@adapter("ldm", "model")
@adapter("ldm", "model_option")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """The U-Net; a context of one vector is that of a class, and a longer one takes the place of the classes' table."""
    asked, given, weights = fixture["config"], inputs(fixture), parameters(fixture)
    context, y = given.get("context"), given.get("y", torch.zeros(len(given["x"]), dtype=torch.long))
    if context is not None:
        weights["cond_stage_model.embedding.weight"] = context[:, 0]
        y = torch.arange(len(context))
    told = ldm.official_options(weights)
    attended = sorted(factor for factor in asked["attention_resolutions"] if factor <= told["patch_size"])
    assert told["attention_resolutions"] == attended
    same = {"model_channels": "width", "num_res_blocks": "depth", "channel_mult": "channel_mult"}
    assert {theirs: told[ours] for theirs, ours in same.items()} == {theirs: asked[theirs] for theirs in same}
    usual = {key: value for key, value in composed("model=ldm_4")["model"].items() if key != "_target_"}
    net = LDM(**{**usual, **told, **heads_of(asked), "label_drop": 0.0})
    checkpoint_io.load_strict(net, ldm.from_official(weights), SOURCE)
    if context is not None and context.shape[1] > 1:
        net.cond_stage_model, y = nn.Identity(), context  # type: ignore[assignment]
    return {"out": net.eval()(dense(net, given["x"], y), given["timesteps"])}


def dense(net: LDM, x: Tensor, y: Tensor) -> Batch:
    return Dense(net.token_spec.patch_size).to_batch(list(x), y)


def loaded(fixture: Fixture) -> LoadedModel:
    """The three networks of a fixture, loaded from a file as it is released."""
    asked = fixture["config"]
    if (asked["conditioning_key"], asked["first_stage_key"]) != ("crossattn", "image") or asked["use_ema"]:
        raise NotImplementedError("another condition, or averages")
    process = process_of(asked["timesteps"], "linear", asked)
    state = parameters(fixture) | ldm.process_tables(process)
    assert {key: [asked["timesteps"]] for key, _ in fixture["buffers"]} == dict(fixture["buffers"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.ckpt"
        torch.save({"state_dict": state, "global_step": 1}, file)
        options = heads_of(asked["unet_config"]["params"])
        found = genfound.load(file, num_heads=options.pop("heads"), **options)
    assert isinstance(found.tokenizer, VQF4)
    assert found.net.null_label == asked["cond_stage_config"]["params"]["n_classes"] - 1
    return found


def process_of(steps: int, kind: str, ends: Mapping[str, Any], **options: Any) -> Gaussian:
    """The objective on a schedule of make_beta_schedule; ours scales the ends of `sqrt_linear`."""
    first, last = ends.get("linear_start", 1e-4), ends.get("linear_end", 2e-2)
    if kind == "sqrt_linear":
        first, last = first * steps / 1000, last * steps / 1000
    names = {"linear": "scaled_linear", "sqrt_linear": "linear", "sqrt": "sqrt", "cosine": "cosine"}
    if ends.get("cosine_s", 8e-3) != 8e-3:
        raise NotImplementedError("another offset of the cosine")
    released = {key: value for key, value in composed("model=ldm_4")["objective"].items() if key != "_target_"}
    betas = None if kind == "cosine" else [first, last]
    return Gaussian(**{**released, "timesteps": steps, "schedule": names[kind], "betas": betas, **options})


@adapter("ldm", "loss")
def loss(fixture: Fixture) -> Results:
    """Losses and gradients at given times and noise."""
    found, given = loaded(fixture), inputs(fixture)
    net, asked = found.net, fixture["config"]
    assert isinstance(net, LDM) and isinstance(found.objective, Gaussian)
    batch = dense(net, given["x_start"], given["labels"])
    part = (given["t"] + 0.5) / asked["timesteps"]
    losses = found.objective.loss_at(net, batch, part, given["noise"])
    total = losses.total.mean()
    total.backward()
    with_bound = process_of(asked["timesteps"], "linear", asked, elbo_weight=1.0)
    c = found.objective.process.on(batch.x.device).at(batch, given["t"])
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    with torch.no_grad():
        bound = with_bound.loss_at(net, batch, part, given["noise"]).terms["vb"]
        return {
            "c": net.cond_stage_model(given["labels"]),
            "uc": net.cond_stage_model(torch.full_like(given["labels"], net.null_label)),
            "eps_cond": net(dense(net, given["x_T"], given["labels"]), given["t"]),
            "q_sample": c.q_sample(given["x_T"], given["noise"]),
            "loss": total,
            "loss_simple": losses.terms["mse"].mean(),
            "loss_vlb": bound.mean(),
            **{f"gradients.{name}": value for name, value in ldm.to_official(gradients).items()},
        }


@adapter("ldm", "sample")
@torch.no_grad()
def sample(fixture: Fixture) -> Results:
    """DDIM with and without guidance, noise and codes; single steps of DDPM without guidance."""
    found, given, asked = loaded(fixture), inputs(fixture), fixture["sampler"]
    assert isinstance(found.net, LDM) and isinstance(found.objective, Gaussian)
    batch, shape = dense(found.net, given["x_T"], given["labels"]), given["x_T"].shape
    assert asked["null_class"] == found.net.null_label
    guided = guidance_of("cfg", scale=asked["scale"])
    released = found.config["sampler"]

    def draw(guidance: Any, **options: Any) -> list[Tensor]:
        walked: Sampler = build.sampler({"sampler": {**released, **options}})
        field, first = found.objective.field(found.net, guidance), list[Tensor]()
        assert isinstance(field, GaussianField) and isinstance(found.tokenizer, VQF4)
        codec = found.tokenizer
        field.quantise = lambda x, _: codec.quantise(x)
        x = walked(field, batch, walked.times(found.objective), StepNoise(shape), lambda _, b: first.append(b.x)).x
        return [x, first[0]]

    eta0, _ = draw(guided, steps=asked["S"])
    predicted = GaussianField.x0(found.objective.field(found.net, guided), batch, float(walk(found, asked["S"])[0]))
    eta_run = asked["eta_run"]
    return {
        "eta0_cfg": eta0,
        "eta0_cfg_pred_x0_first": predicted,
        "decoded": found.tokenizer.decode(eta0),
        "eta0_nocfg": draw(None, steps=asked["S"])[0],
        "eta_cfg_noise": draw(guided, steps=eta_run["S"], eta=eta_run["eta"])[0],
        "eta0_quantize_x0": draw(None, steps=asked["S"], quantize_x0=True)[0],
        **{
            name: ancestral(found, batch, int(name.rpartition("_t")[2]))
            for name in fixture["outputs"]
            if "p_sample" in name
        },
    }


def walk(found: LoadedModel, steps: int) -> Tensor:
    """The times of DDIM as released."""
    chosen: Sampler = build.sampler({"sampler": {**found.config["sampler"], "steps": steps}})
    return chosen.times(found.objective)


def ancestral(found: LoadedModel, batch: Batch, t: int) -> Tensor:
    """One step of DDPM, at the last one without noise."""
    field = found.objective.field(found.net)
    assert isinstance(field, GaussianField)
    reverse = field.mean_logvar(batch, float(t))
    noise = StepNoise(batch.x.shape).normal(0) if t else 0.0
    return reverse.mean + (0.5 * reverse.log_variance).exp() * noise


@adapter("ldm", "autoencoder")
@torch.no_grad()
def autoencoder(fixture: Fixture) -> Results:
    """First stages from a file of LDM."""
    state, images = parameters(fixture), inputs(fixture)["x"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.ckpt"
        torch.save({"state_dict": {**state, "scale_factor": torch.ones(())}}, file)
        options = {"weights": str(file), "precision": "fp32", "pixels_per_call": 2**20}
        quantised = "quantize.embedding.weight" in state
        codec: Autoencoder = VQF4(**options) if quantised else SDVAE(**options, posterior="sample")
    moments, mode = codec.moments(images), codec.encode(images)
    if isinstance(codec, VQF4):
        _, codebook_loss, (_, _, indices) = codec.model.quantize(moments)
        return {
            "encode": mode,
            "quantized": codec.quantise(mode),
            "indices": indices.flatten(),
            "codebook_loss": codebook_loss,
            "decode": codec.decode(mode),
            "decode_no_quant": codec.model.decode(moments, force_not_quantize=True).sample,
        }
    noise = torch.from_numpy(unit("noise.0", mode.shape))
    posterior = codec.model.encode(images).latent_dist
    drawn = codec.encode(images, noise)
    named = {"moments": posterior.parameters, "mode": mode, "std": posterior.std, "sample": drawn, "kl": posterior.kl()}
    return {**named, "decode": codec.decode(mode)}


@adapter("ldm", "schedule")
def schedules(fixture: Fixture) -> Results:
    """Tables of processes, the steps that DDIM keeps, averages with their warm-up, and learning rates."""
    config = fixture["config"]
    processes = [process_of(options["n_timestep"], kind, options) for kind, options in config["schedules"]]
    results: dict[str, Any] = {}
    for number, objective in enumerate(processes):
        tables, official = objective.process.tables, ldm.process_tables(objective)
        named = {**official, "betas": tables.betas, "alphas_cumprod": tables.alphas_cumprod}
        named["lvlb_weights"] = tables.vlb_weights
        results |= {f"{name}_{number}": value for name, value in named.items()}
    for case in fixture["ddim"]:
        _check_spacing(processes[0], case)
    steps = inputs(fixture)["lr_steps"].tolist()
    results["lr_linear"] = [_linear(config["LambdaLinearScheduler"], n) for n in steps]
    results["lr_cosine"] = [_cosine(config["LambdaWarmUpCosineScheduler"], n) for n in steps]
    return results | {"lit_ema": averages(**config["ema"])}


def _check_spacing(objective: Gaussian, case: Mapping[str, Any]) -> None:
    """The steps that are kept, and the signals at them and after them; sigma follows from these in every sampler."""
    spacing = {"uniform": "leading", "quad": "quadratic"}[case["method"]]
    times = sampler_of("ddim", steps=case["S"], spacing=spacing).times(objective)
    assert times.flip(0).tolist() == case["timesteps"]
    a = objective.process.respaced([int(t) for t in times.flip(0)]).tables.alphas_cumprod
    before = torch.cat([objective.process.tables.alphas_cumprod[:1], a[:-1]])
    sigma = case["eta"] * ((1 - before) / (1 - a) * (1 - a / before)).sqrt()
    for name, values in (("alphas", a), ("alphas_prev", before), ("sigmas", sigma)):
        entry = case[name]
        torch.testing.assert_close(
            values[:: entry["stride"]], torch.tensor(entry["values"]).double(), atol=2e-6, rtol=2e-5
        )


def _linear(asked: Mapping[str, Any], n: int) -> float:
    """In its cycle, each of which begins anew; the last step of one is not yet the next one's first."""
    ends = list(itertools.accumulate(asked["cycle_lengths"]))
    cycle = next(k for k, end in enumerate(ends) if n <= end)
    settings = {
        "schedule": "linear", "warmup_images": asked["warm_up_steps"][cycle], "lr": asked["f_max"][cycle],
        "min_lr": asked["f_min"][cycle], "warmup_start": asked["f_start"][cycle] / asked["f_max"][cycle],
    }  # fmt: skip
    since = n - ([0, *ends])[cycle]
    return settings["lr"] * schedule(settings, since, asked["cycle_lengths"][cycle])


def _cosine(asked: Mapping[str, Any], n: int) -> float:
    settings = {
        "schedule": "cosine", "warmup_images": asked["warm_up_steps"], "lr": asked["lr_max"],
        "min_lr": asked["lr_min"], "warmup_start": asked["lr_start"] / asked["lr_max"],
    }  # fmt: skip
    return float(settings["lr"]) * schedule(settings, n, asked["max_decay_steps"])


def averages(decay: float, updates: int) -> list[list[float]]:
    """Those of a small layer whose weights are replaced before each update."""
    net = nn.Linear(3, 2)
    named = list(net.named_parameters())
    fill(net, {name: parameter(name, p.shape) for name, p in named})
    module: Any = SimpleNamespace(trained=lambda: named)
    trainer: Any = SimpleNamespace(global_step=0)
    ema, rows = Ema([decay], warmup=True), []
    ema.on_train_start(trainer, module)
    for step in range(updates):
        fill(net, {name: unit(f"step.{step}.{name}", p.shape) for name, p in named})
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module)
        average = ema.averages[decay]
        rows.append([*average["weight"].flatten().tolist(), *average["bias"].tolist()])
    return rows


def fill(net: nn.Module, values: Mapping[str, Any]) -> None:
    net.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
