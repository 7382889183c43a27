"""Draws from folders with diffusers alone, where genfound cannot load: `python folder_client.py CALLS.json OUT.pt`."""

import json
import sys
from pathlib import Path

sys.modules["genfound"] = sys.modules["einops"] = None  # type: ignore[assignment]
import torch  # noqa: E402
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler  # noqa: E402


def load(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(requests, out):
    drawn = {}
    for name, (folder, call) in json.loads(Path(requests).read_text()).items():
        pipe = load(folder)
        drawn[name] = torch.from_numpy(pipe(**call, output_type="np").images)
        drawn[f"{name} latents"] = pipe(**call, output_type="latent").images
        if name == "again":  # saved by diffusers, loaded again, in other schedulers and precision
            pipe.save_pretrained(f"{folder}_again")
            pipe = load(f"{folder}_again")
            drawn["saved again"] = torch.from_numpy(pipe(**call, output_type="np").images)
            pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
            drawn["other scheduler"] = torch.from_numpy(pipe(**call, output_type="np").images)
            half = load(folder, torch_dtype=torch.bfloat16)
            drawn["bfloat16"] = torch.from_numpy(half(**call, output_type="np").images)
            drawn["errors"] = [error_of(pipe, call | wrong) for wrong in WRONG]
    torch.save(drawn, out)


WRONG = [
    {"class_labels": ["wolf"]},
    {"class_labels": [7]},
    {"height": 15},
    {"output_type": "jpg"},
    {"latents": torch.zeros(1, 3, 16, 16)},
]


def error_of(pipe, call):
    try:
        pipe(**call)
    except ValueError as error:
        return str(error)
    return ""


main(*sys.argv[1:])
