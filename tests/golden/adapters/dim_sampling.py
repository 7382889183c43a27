"""DiM: DPM-Solver with guidance, and guidance of larger images by smaller ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import TimeAdapter
from genfound.rng import Rng
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dim import Fixture, official, process
from tests.golden.adapters.dit import dense
from tests.golden.fill import inputs
from tests.helpers import SAMPLERS, guidance_of

SOLVER = {"steps", "scale", "predict_x0", "eps", "T", "order", "skip_type", "method"}
UPSAMPLING = {"m", "scale", "ug_theta", "ug_eta", "ug_T"}


def split(fixture: Fixture, keys: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of these keys, and a fixture without them."""
    config = fixture["config"]
    rest = {key: value for key, value in config.items() if key not in keys}
    return {key: value for key, value in config.items() if key in keys}, {**fixture, "config": rest}


class Watched:
    """A network that keeps the official times at which it is asked."""

    def __init__(self, net: Any) -> None:
        self.net, self.token_spec, self.null_label = net, net.token_spec, net.null_label
        self.times: list[float] = []

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        self.times.append(t[0].item() + 1)
        out: Tensor = self.net(batch, t)
        return out


@adapter("dim", "sample")
@torch.no_grad()
def sample(fixture: Fixture) -> Results:
    """The official sampling procedure; its guidance counts from 0."""
    asked, rest = split(fixture, SOLVER)
    fixed = {"eps": 0.001, "T": 1.0, "skip_type": "time_uniform", "method": "fast"}
    if {key: asked[key] for key in fixed} != fixed:
        raise NotImplementedError(f"a solver {asked}")
    net, given, objective = Watched(official(rest)), inputs(fixture), process()
    around = guidance_of("cfg", scale=1 + max(asked["scale"], 0), interval=[0.0, 1.0])
    options = {"order": asked["order"], "predicts": "data" if asked["predict_x0"] else "noise"}
    times = objective.times(asked["steps"], SAMPLERS["dpm_solver"].needs)
    batch = dense(given["z"], given["y"], net.token_spec.patch_size)
    out = SAMPLERS["dpm_solver"](objective.field(net, around), batch, times, Rng(0), **options)  # type: ignore[arg-type]
    return {"network_times": net.times, "out": out.x}


@adapter("dim", "upsample_guidance")
@torch.no_grad()
def upsample(fixture: Fixture) -> Results:
    """Guided noise at continuous times, and the times of the small image."""
    asked, rest = split(fixture, UPSAMPLING)
    net, given, found = official(rest), inputs(fixture), dict[str, Any]()
    assert asked["ug_T"] == 1
    options = {"factor": asked["m"], "strength": asked["ug_theta"], "share": asked["ug_eta"]}
    around: Any = guidance_of("upsample", scale=1 + asked["scale"], **options)
    guided = around(process().adapt(net), time_range=process().time_range)
    batch = dense(given["x"], given["y"], net.token_spec.patch_size)
    for name in fixture["outputs"]:
        what, _, time = name.partition("_")
        t = 1000 * float(time) - 1
        found[name] = [(guided.earlier(t) + 1) / 1000] if what == "tau" else guided(batch, t)
    assert isinstance(guided.net, TimeAdapter)
    return found
