"""genfound in a plain Lightning script: any trainer, logger and callback of Lightning."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import genfound
from genfound.callbacks.ema import Ema

PAGE = Path(__file__).parents[1] / "docs/lightning.md"
SMALL = ["data.holdout=32", "data.num_workers=0", "model.width=32", "model.depth=1", "model.heads=1"]
PACKED = [*SMALL, "data.max_tokens=256"]
DENSE = [*SMALL, "data.batch_size=8"]
FAMILIES = {
    "DiTModule": ["model=dit_tiny", *DENSE],
    "SiTModule": ["model=sit_tiny", *DENSE],
    "FiTModule": ["model=fitv2_tiny", *PACKED, "model.adaln_rank=8"],
    "NiTModule": ["model=nit_tiny", *PACKED],
    "DiTMoEModule": ["model=dit_moe_tiny", *DENSE],
    "LightningDiTModule": ["model=lightningdit_tiny", *DENSE],
    "JiTModule": ["model=jit_tiny", *PACKED],
    "DiGModule": ["model=dig_tiny", *DENSE],
    "DiMModule": ["model=dim_tiny", *SMALL[:-1], "data.batch_size=8"],
    "LDMModule": ["model=ldm_tiny", *DENSE, "model.context_width=16"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_trainer_trains_resumes_exactly_and_validates(name: str, tmp_path: Path) -> None:
    options, kind = FAMILIES[name], getattr(genfound, name)

    def fitted(steps: int, ckpt_path: Path | None = None) -> tuple[lightning.Trainer, Any, Any]:
        trainer = lightning.Trainer(
            max_steps=steps, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            callbacks=[Ema([0.5]), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)],
        )  # fmt: skip
        module, data = kind.from_config(options), genfound.GenerativeDataModule.from_config(options)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return trainer, module, data

    trainer, straight, data = fitted(4)
    assert type(straight) is kind and straight.images_seen > 0
    _, resumed, _ = fitted(4, tmp_path / "step=2.ckpt")
    assert resumed.images_seen == straight.images_seen
    pairs = zip(straight.net.parameters(), resumed.net.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    (metrics,) = trainer.validate(straight, data, verbose=False)
    assert metrics.keys() == {"val/loss", "val/velocity_mse", "val/loss_ema", "val/velocity_mse_ema"}
    assert metrics["val/loss"] > 0 and metrics["val/loss"] != metrics["val/loss_ema"]


@pytest.mark.slow
def test_the_script_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(PAGE.read_text().split("```python\n")[1].split("```")[0], {})
    files = (tmp_path / f"curves/version_{i}/metrics.csv" for i in range(2))
    first, second = (list(csv.DictReader(file.read_text().splitlines())) for file in files)
    assert len([line for line in first if line["train/loss"]]) == 4
    assert any(float(line["lr-AdamW"] or 0) > 0 for line in first)
    assert [float(line["val/loss_ema"]) > 0 for line in second if line.get("val/loss_ema")] == [True]


def test_a_module_refuses_the_model_of_another_family() -> None:
    with pytest.raises(ValueError, match="NiTModule trains NiT; this model is DiT: choose model="):
        genfound.NiTModule.from_config(["model=dit_tiny"])


def test_a_global_step_that_the_trainer_does_not_make_is_refused(tmp_path: Path) -> None:
    options = [*FAMILIES["NiTModule"], "batch.packs=4"]
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"batch\.packs asks for 4 micro-batches.*this trainer makes 1"):
        trainer.fit(genfound.NiTModule.from_config(options), genfound.GenerativeDataModule.from_config(options))
