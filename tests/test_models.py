"""What every model of conf/model/ must do; a new yaml file is found here by itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import genfound
from genfound import build
from genfound.alignment import from_config
from genfound.config import compose, options
from genfound.objectives.base import Losses
from genfound.tokenizers import LatentSpec
from genfound.training import fit
from tests.helpers import ALIGNED, composed, latents, run_dir, state_differences

FILES = sorted((Path(compose.config_dir()) / "model").glob("*.yaml"))
MODELS = [file.stem for file in FILES if "???" not in file.read_text()]
TINY = [name for name in MODELS if name.endswith("_tiny")]
SHORT = [
    "logger=jsonl", "trainer.log_every_n_steps=1", "callbacks.validation.every=1000000",
    "callbacks.validation.images=16", "budget.images=400",
    "callbacks.preview.every=1000000", "sampler.steps=2", "guidance=none", "optimizer.warmup_images=0",
    "sample.batch=4", "model.width=128", "model.depth=2",
]  # fmt: skip

NARROWER = {"ldm_tiny": ["model.width=32"]}
"""Of the first level; the coarsest of this U-Net is four times as wide, too wide for the others' learning rate."""


@pytest.mark.parametrize("model", MODELS)
def test_its_companions_fit_together(model: str) -> None:
    config = composed(f"model={model}")
    options.check(config)
    objective = build.objective(config)
    with torch.device("meta"):
        net = build.net(config, LatentSpec(4, 8), num_classes=7)
    assert config["layout"]["name"] in net.layouts
    assert net.null_label == 7
    assert objective.name in ("flow", "gaussian")
    assert sum(p.numel() for p in net.parameters()) > 1e6


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize(
    "objective", ["its own", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "gaussian"))]
)
@pytest.mark.parametrize("model", TINY)
def test_it_learns_and_resumes_exactly(model: str, objective: str, tmp_path: Path) -> None:
    choice = [f"model={model}", *([] if objective == "its own" else [f"objective={objective}"]), *SHORT]
    choice += NARROWER.get(model, [])
    straight = run_dir(tmp_path / "straight", *choice, "trainer.max_steps=10")
    fit(straight)
    values = losses(straight)
    assert len(values) == 10
    assert sum(values[-3:]) < 0.9 * sum(values[:3])
    for steps in (4, 10):
        fit(run_dir(tmp_path / "resumed", *choice, f"trainer.max_steps={steps}"))
    assert losses(tmp_path / "resumed") == values
    assert not state_differences(straight, tmp_path / "resumed")
    assert not genfound.load(tmp_path / "resumed").net.training


@pytest.mark.parametrize("model", [name for name in TINY if name != "ldm_tiny"])  # whose feature maps are not aligned
def test_alignment_and_activation_checkpointing_go_together(model: str) -> None:
    def gradients(*overrides: str) -> list[Tensor | None]:
        config = composed(f"model={model}", *ALIGNED, "alignment.depth=2", "model.depth=2", *overrides)
        net = build.net(config, LatentSpec(3, 1), num_classes=10)
        aligned = from_config.alignment(config, net)
        assert aligned is not None
        for number, parameter in enumerate(net.parameters()):  # those that begin as zeros would hide the blocks
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10
        batch = build.sampling_layout(config).to_batch(latents([(16, 16)] * 2, 3), torch.tensor([1, 2]))
        if net.text_width is not None:
            batch = batch.with_text([torch.ones(3, net.text_width)] * 2, net.text_tokens)
        with aligned.watching(net.train(), batch):
            losses = Losses(net(batch, torch.tensor([0.3, 0.6])).square().mean().expand(2), torch.zeros(2))
        assert aligned._hidden is not None
        seen = torch.linspace(-1, 1, 32).expand(*aligned._hidden.shape[:-1], 32)
        aligned.added(losses, replace(batch, features=(seen,))).total.sum().backward()
        return [parameter.grad for parameter in (*net.parameters(), *aligned.parameters())]

    pairs = zip(gradients(), gradients("model.activation_checkpointing=true"), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs if one is not None or other is not None)


OFFICIAL = sorted((Path(compose.config_dir()) / "experiment/official").glob("*.yaml"))


@pytest.mark.parametrize("file", [*FILES, *OFFICIAL], ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_whatever_it_sets_is_set(file: Path) -> None:
    """Nothing that is composed later takes it back."""
    group = "model" if file.parent.name == "model" else "experiment"
    name = file.stem if group == "model" else f"official/{file.stem}"
    own = compose.flatten({key: value for key, value in compose.read_yaml(file).items() if key != "defaults"})
    whole = compose.flatten(composed(f"{group}={name}", resolve=False))
    assert {key: whole.get(key) for key in own} == own
