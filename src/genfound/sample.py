"""`python -m genfound.sample from=RUN labels=[0,diamond] size=[16,24]`: a labelled grid, and each image alone."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig

from genfound import checks, command_line, launch, paths

FEW = 10


def _task(cfg: DictConfig) -> None:
    from genfound import build
    from genfound.data.pictures import save_png
    from genfound.loading import load
    from genfound.positions import reposition
    from genfound.reporting.grid import save_grid
    from genfound.reporting.progress import Counter
    from genfound.sampling import Sampling, make_requests, run_or_chosen
    from genfound.tokenizers import Absent

    launch.keep_freed_memory()
    config = paths.plain(cfg)
    loaded = load(config["from"], weights=config["weights"], **config["hints"])
    if isinstance(loaded.tokenizer, Absent):
        raise ValueError(loaded.tokenizer.reason)
    reposition(loaded.net, config["rope"])
    chosen = command_line.chosen()
    settings = {group: run_or_chosen(group, loaded.config, config, chosen) for group in ("sampler", "guidance")}
    labels = list(range(min(len(loaded.class_names), FEW))) if config["labels"] is None else config["labels"]
    sizes = loaded.sizes if config["size"] is None else checks.sizes("size", config["size"])
    requests = make_requests(labels if isinstance(labels, list) else [labels], sizes, config["n"], loaded.class_names)
    device = build.device(config["accelerator"])
    how = {**loaded.config, **settings, "sample": {"uint8": config["uint8"] or loaded.config["sample"]["uint8"]}}
    objective = build.objective(how)
    sampling = Sampling.of(how, objective, loaded.tokenizer, device, config["batch"], config["precision"])

    out = Path(config["out"] or _default_out(Path(config["from"]), chosen))
    images = sampling.draw(loaded.net.to(device), requests, config["seed"], Counter("images"))
    for image, request in zip(images, requests, strict=True):
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", loaded.class_names[request.label])
        save_png(out / f"{request.number:05d}_{name}_{request.size[0]}x{request.size[1]}.png", image)
    save_grid(out / "grid.png", images, requests, loaded.class_names)
    print(f"{len(images)} images and their grid: {out / 'grid.png'}")


def _default_out(origin: Path, chosen: list[str]) -> Path:
    """In the run that is sampled from, or beside the file."""
    settings = [c for c in chosen if not c.startswith(("from=", "out="))]
    run = origin if origin.is_dir() else origin.parent.parent
    folder = run / "samples" if (run / "config.yaml").is_file() else origin.parent / f"{origin.stem}_samples"
    return folder / paths.run_name(settings)


def main() -> None:
    """Console entry point."""
    command_line.entry(_task, "sample")


if __name__ == "__main__":
    main()
