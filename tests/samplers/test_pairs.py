"""The matrix of objectives and samplers, as the command line composes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genfound import build
from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.config import compose
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest
from genfound.tokenizers import PixelTokenizer
from tests.helpers import SAMPLERS, composed

OBJECTIVES = sorted(file.stem for file in (Path(compose.config_dir()) / "objective").glob("*.yaml"))
FP32 = "trainer.precision=fp32"
LEGAL = {
    "gaussian": {"ddpm", "ddim", "ddim_ldm", "euler", "heun", "dopri5", "dpm_solver"},
    "flow": {"euler", "heun", "dopri5", "sde", "dpm_solver"},
}


class Plain(Backbone):
    """A velocity, or noise and variance, of tokens of four pixels."""

    layouts = ("packed",)
    time = "data0"
    token_spec = TokenSpec(3, 2)
    null_label = 10

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, batch: Batch, t: torch.Tensor) -> torch.Tensor:
        out = self.weight * batch.x + 0.1 * batch.expand(torch.cos(batch.y.float()))
        return torch.cat([out, out.tanh()][: self.outputs], dim=-1)  # a variance between its bounds


def test_every_sampler_has_an_option() -> None:
    for name in SAMPLERS:
        assert composed("model=nit_tiny", f"sampler={name}")["sampler"]["name"] == name
    assert set(SAMPLERS) == set().union(*LEGAL.values())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_legal_pairs_draw_and_others_are_refused(name: str, sampler: str) -> None:
    config = composed(
        "model=nit_tiny", f"objective={name}", f"sampler={sampler}", "guidance=cfg", "sampler.steps=4", FP32
    )
    family = "gaussian" if "Gaussian" in config["objective"]["_target_"] else "flow"
    if sampler not in LEGAL[family]:
        with pytest.raises(ValueError, match=rf"sampler={sampler} cannot sample objective={family}; choose sampler="):
            build.objective(config)
        return
    objective = build.objective(config)
    sampling = Pipeline.from_config(config, objective, PixelTokenizer(), torch.device("cpu"), 2)
    requests = [SampleRequest(label, (8, 12), label) for label in range(3)]
    images = sampling(Plain(2 if objective.learned_variance else 1).eval(), requests, seed=0)
    again = sampling(Plain(2 if objective.learned_variance else 1).eval(), requests[2:], seed=0)
    assert [image.shape for image in images] == [(8, 12, 3)] * 3
    assert len({image.tobytes() for image in images}) == 3
    if sampler != "dopri5":  # whose error norm is over the batch
        assert np.array_equal(images[2], again[0])
