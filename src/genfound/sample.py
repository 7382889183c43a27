"""`python -m genfound.sample from=RUN labels=[0,diamond] size=[16,24]`: a grid with titles, and each image alone."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from genfound.config import checks, command_line, compose
from genfound.runtime import processes, run_directory
from genfound.runtime.files import visible

if TYPE_CHECKING:
    from genfound.sampling.requests import SampleRequest

LONGEST_CLASS = 80
"""Letters of a class name in that of a file."""


def _task(cfg: DictConfig) -> None:
    from genfound import build
    from genfound.checkpoints.load import hints_of, load
    from genfound.data.images.names import numbered
    from genfound.data.images.pixels import save_png
    from genfound.data.images.sets import GRID
    from genfound.runtime import devices
    from genfound.runtime.files import check_folder
    from genfound.runtime.progress import ProgressCounter
    from genfound.sampling.grid import save_grid
    from genfound.sampling.pipeline import Pipeline, as_composed
    from genfound.sampling.requests import requests_of
    from genfound.tokenizers import Undecodable

    processes.tune_malloc()
    config = compose.to_dict(cfg)
    checks.integer("batch", config["batch"], 1)
    checks.integer("seed", config["seed"], 0)
    chosen = command_line.user_overrides()
    out = Path(config["out"] or _default_out(Path(config["from"]), chosen))
    check_folder("out", out)
    loaded = load(config["from"], weights=config["weights"], trust=config["trust"], **hints_of(config))
    if isinstance(loaded.tokenizer, Undecodable):
        raise ValueError(loaded.tokenizer.reason)
    loaded.net.reposition(config["rope"])
    sizes = loaded.sizes if config["size"] is None else checks.image_sizes("size", config["size"])
    requests, titles = requests_of(loaded, config["labels"], config["prompts"], sizes, config["n"])
    device, how = devices.device(config["accelerator"]), as_composed(loaded.config, config)
    pipeline = Pipeline.from_config(how, build.objective(how), loaded.tokenizer, device, config["batch"])
    names = _file_names(requests, titles)
    _refuse_others(out, {*names, GRID})
    if numbered(loaded.class_names):
        drawn = dict.fromkeys(loaded.class_names[request.label] for request in requests)
        print(f"classes are named by numbers, and labels are these names: {', '.join(drawn)}", flush=True)
    images = pipeline(loaded.net.to(device), requests, config["seed"], ProgressCounter("images"))
    for name, image in zip(names, images, strict=True):
        save_png(out / name, image)
    save_grid(out / GRID, images, requests, titles)
    print(f"{len(images)} images and their grid: {out / GRID}")


def _file_names(requests: "Sequence[SampleRequest]", class_names: Sequence[str]) -> list[str]:
    classes = [re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:LONGEST_CLASS] for name in class_names]
    return [f"{r.number:05d}_{classes[r.label]}_{r.size[0]}x{r.size[1]}.png" for r in requests]


def _refuse_others(out: Path, names: set[str]) -> None:
    """Raise a ValueError if a folder holds images that are not about to be written anew."""
    others = sorted({file.name for file in visible(out, "*.png")} - names)
    if others:
        raise ValueError(f"out={out} holds other images ({others[0]}); choose another out=..., or remove them")


def _default_out(origin: Path, chosen: list[str]) -> Path:
    """In the run that is sampled from, or beside the file."""
    settings = [c for c in chosen if not c.startswith(("from=", "out="))]
    run = origin if origin.is_dir() else origin.parent.parent
    folder = run / "samples" if (run / "config.yaml").is_file() else origin.parent / f"{origin.stem}_samples"
    return folder / run_directory.run_name(settings)


def _origin(given: Mapping[str, Any]) -> Mapping[str, Any]:
    from genfound.checkpoints.load import config_of

    return config_of(given)


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "sample", _origin)


if __name__ == "__main__":
    main()
