"""Muon for matrices, AdamW for the rest: each parameter moves as under the optimizer of torch that it is given to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.modules.base import GenerativeModule
from genfound.modules.muon import Muon
from genfound.runtime import run_directory
from genfound.training import fit
from tests.cli.commands import TINY
from tests.helpers import composed, run_dir, small_nit, training_module

SETTINGS = {**composed("optimizer=muon")["optimizer"], "lr": 0.01, "weight_decay": 0.1, "momentum": 0.8}


def trained(**options: Any) -> tuple[GenerativeModule, torch.optim.Optimizer]:
    module = training_module(small_nit(), optimizer={**SETTINGS, **options})
    return module, module.configure_optimizers()


def gradients(module: GenerativeModule, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def weights(module: GenerativeModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.net.named_parameters()}


@pytest.mark.parametrize("parts", [["blocks"], ["attn.qkv", "fc1"]])
def test_matrices_move_by_muon_and_all_others_by_adamw(parts: list[str]) -> None:
    module, both = trained(matrices=parts)
    other, _ = trained()
    names = {name for name, p in other.net.named_parameters() if p.ndim == 2 and any(part in name for part in parts)}
    assert {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"} <= names
    assert not names & {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"}
    named = dict(other.net.named_parameters())
    same = {"lr": 0.01, "weight_decay": 0.1}
    muon = torch.optim.Muon([named[n] for n in names], momentum=0.8, adjust_lr_fn="match_rms_adamw", **same)
    rest = [p for name, p in named.items() if name not in names]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), eps=1e-6, fused=True, **same)
    for step in range(3):
        for each in (module, other):
            gradients(each, step)
        both.step()
        muon.step(), adamw.step()
    for name, value in weights(module).items():
        assert torch.equal(value, named[name]), name


def test_ns_steps_are_those_of_the_option() -> None:
    moved = []
    for steps in (1, 5):
        module, both = trained(ns_steps=steps)
        gradients(module, 0)
        both.step()
        moved.append(weights(module))
    differing = {name for name in moved[0] if not torch.equal(moved[0][name], moved[1][name])}
    assert differing == {name for name, value in moved[0].items() if value.ndim == 2 and name.startswith("blocks")}


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing() -> None:
    module, both = trained()
    gradients(module, 0)
    both.step()
    before, states = weights(module), [{k: v.clone() for k, v in s.items()} for s in both.state.values()]
    gradients(module, 1)
    next(module.net.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
    module.configure_gradient_clipping(both)
    both.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    for state, kept in zip(both.state.values(), states, strict=True):
        assert all(torch.equal(state[key], kept[key]) for key in kept)


def test_groups_keep_settings_of_their_own() -> None:
    module, _ = trained()
    first, *others = module.net.parameters()
    groups = [{"params": [first], "weight_decay": 0.7}, {"params": others}]
    module.parameter_groups = lambda: groups  # type: ignore[method-assign]
    found = module.configure_optimizers().param_groups
    assert sorted(group["weight_decay"] for group in found) == [0.1, 0.1, 0.7]
    assert sum(len(group["params"]) for group in found) == len(others) + 1


def test_the_schedule_reaches_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = Muon.step

    def noted(self: Muon, closure: Any = None) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(Muon, "step", noted)
    fit(run_dir(tmp_path, *TINY, "optimizer=muon", "optimizer.warmup_images=1000", "trainer.max_steps=3"))
    assert len(rates) == 3 and all(matrices == others for matrices, others in rates)
    assert rates[0][0] < rates[1][0] < rates[2][0]


def test_matrices_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.matrices=\['blocks', 'bias'\]: no parameter for it has bias"):
        trained(matrices=["blocks", "bias"])


def test_a_run_keeps_which_parameters_are_by_muon(tmp_path: Path) -> None:
    fit(run_dir(tmp_path, *TINY, "trainer.max_steps=1"))
    for wrong in (["optimizer=muon"], ["optimizer=muon", "optimizer.matrices=[attn]"]):
        config = composed(*TINY, *wrong, "trainer.max_steps=2", "allow_changes=true")
        run_directory.write_config(tmp_path, config, allow_changes=True)
        with pytest.raises(ValueError, match="optimizer: a run keeps the parameters of Muon and of AdamW"):
            fit(tmp_path)
