"""FiT and FiTv2: losses over padded rows, and samples of small networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts import Padded
from genfound.objectives.base import Net
from genfound.rng import Rng
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dit import Draws
from tests.golden.adapters.fit import by_row, cfg_inputs, official, to_batch
from tests.golden.adapters.gaussian import diffusion, respaced, sections
from tests.golden.adapters.sit_transport import flow, solver, stochastic
from tests.golden.fill import tensor, unit
from tests.helpers import SAMPLERS, guidance_of, times_of

Fixture = Mapping[str, Any]

WHOLE_STEPS = {"p_sample_loop": "ddpm", "ddim_sample_loop": "ddim"}
"""The official samplers of FiT v1, named at the end of a fixture's source."""


def masked_inputs(fixture: Fixture) -> dict[str, Tensor]:
    """All tensors of a loss; those with `times_mask` are 0 in padding."""
    entries = {name: dict(entry) for name, entry in fixture["inputs"].items() if name != "draws"}
    masked = [name for name, entry in entries.items() if entry.pop("times_mask", False)]
    given = {name: tensor(entry) for name, entry in entries.items()}
    real = (given["mask"] != 0).float()
    for name in masked:
        tokens_last = given[name].shape[-1] == real.shape[1]
        given[name] = given[name] * (real[:, None] if tokens_last else real[..., None])
    return given


class Transport(Rng):
    """The draws of FiTv2's transport, whose times run backwards: noise first, then the time."""

    def __init__(self, names: Sequence[tuple[str, Sequence[int]]]) -> None:
        super().__init__(0)
        (self.noise, _), (self.time, _) = names

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        if purpose == "time":
            return -torch.from_numpy(unit(self.time, shape))
        return torch.from_numpy(unit(self.noise, shape))

    def uniform(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return 1 - (torch.from_numpy(unit(self.time, shape)) / (2 * 3**0.5) + 0.5).double()


class Watched:
    """A network whose last call is kept."""

    def __init__(self, net: Net, time: str) -> None:
        self.net, self.time = net, time

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        self.x, self.t = batch.x, t
        self.out = self.net(batch, t)
        return self.out


@adapter("fit", "loss")
def loss(fixture: Fixture) -> Results:
    """The loss of FiT v1 or v2."""
    return _whole_steps(fixture) if "diffusion" in fixture["config"] else _transport(fixture)


def _transport(fixture: Fixture) -> Results:
    given, config = masked_inputs(fixture), dict(fixture["config"]["transport"])
    law = {"uniform": "uniform", "lognorm": "logit_normal"}[config.pop("snr_type")]
    objective, net = flow(config, time=law), official(fixture, fixture["config"]["network"])
    watched = Watched(net, net.time)
    losses = objective.loss(watched, to_batch(given, given["x1"]), Transport(fixture["inputs"]["draws"]))
    losses.total.mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {
        "t": watched.t,
        "xt": watched.x,
        "pred": watched.out,
        "loss": losses.total,
        "loss_mean": losses.total.mean(),
        **{f"grad.{name}": gradient for name, gradient in gradients.items()},
    }


def _whole_steps(fixture: Fixture) -> Results:
    """The bound is officially a mean over padding too, where images are 0, over the share of real tokens."""
    objective, given = respaced(fixture["config"]["diffusion"]), masked_inputs(fixture)
    x, noise, output = (given[name].transpose(1, 2) for name in ("x_start", "noise", "model_output"))
    batch, draws = to_batch(given, x), Draws(time=(given["t"] + 0.5) / len(objective.process), noise=noise)
    terms = objective.loss(lambda batch, t: output, batch, draws).terms
    if "vb" in terms:
        assert batch.mask is not None
        everything = replace(batch, mask=torch.ones_like(batch.mask))
        share = batch.mask.float().mean(dim=1)
        terms |= {"vb": objective.loss(lambda batch, t: output, everything, draws).terms["vb"] / share}
    return {**terms, "loss": torch.stack(list(terms.values())).sum(0)}


class RowNoise:
    """The noise of each step; FiT v1 has the channels before the tokens."""

    def __init__(self, shape: Sequence[int], config: Mapping[str, Any]) -> None:
        self.shape, self.config = list(shape), config

    def normal(self, step: int) -> Tensor:
        return by_row(torch.from_numpy(unit(f"noise.{step}", self.shape)), self.config)


@adapter("fit", "sample")
def sample(fixture: Fixture) -> Results:
    """The official sampling procedure, whose state holds every image twice."""
    config, given, net = fixture["config"], sampling_inputs(fixture), official(fixture, fixture["config"]["network"])
    start = torch.cat([given["z"], given["z"]])
    batch = to_batch(given, by_row(start, config["network"]))
    n = len(given["z"])
    assert (given["y"][n:] == net.null_label).all()
    schedule = {"schedule": "power_cosine", "power": given["scale_pow"]} if given["scale_pow"] else {}
    around = guidance_of("cfg", scale=given["cfg_scale"], channels="first3", doubled=True, **schedule)
    if "diffusion" in config:
        objective: Any = diffusion(config["diffusion"], clip=False)
        name, steps, options = WHOLE_STEPS[fixture["source"].rpartition(".")[2]], sections(config["diffusion"]), {}
    else:
        transport = {key: value for key, value in config["transport"].items() if key != "snr_type"}
        asked, objective = dict(config["sampler"]), flow(transport)
        name = "sde" if asked["sampling_method"][0].isupper() else "dopri5"
        options = stochastic(asked) if name == "sde" else solver(asked)
        if options.pop("reverse", False):
            raise NotImplementedError("a sample in reverse")
        steps = options.pop("steps")
    noise = RowNoise(start.shape, config["network"])
    out = SAMPLERS[name](objective.field(net, around), batch, times_of(name, objective, steps), noise, **options)
    final = by_row(out.x, config["network"])
    first = replace(out, **{key: getattr(out, key)[:n] for key in ("x", "y", "sizes", "real", "mask")})
    latent = Padded(net.token_spec.patch_size).to_latents(first.x, first)  # sizes may differ
    return {"final": final, "latent": latent}


def sampling_inputs(fixture: Fixture) -> dict[str, Any]:
    """Tensors and plain numbers; notes, draws and kept timesteps follow from the rest."""
    entries = {key: value for key, value in fixture["inputs"].items() if key not in ("draws", "timestep_map")}
    entries["z"] = {key: value for key, value in entries["z"].items() if key != "note"}
    return cfg_inputs({"inputs": entries})
