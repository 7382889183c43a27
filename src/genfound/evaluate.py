"""`python -m genfound.evaluate from=RUN|CHECKPOINT|NPZ|FOLDER reference=...`: figures with their protocol."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from genfound.config import command_line, compose
from genfound.runtime import processes


def _task(cfg: DictConfig) -> None:
    from genfound.evaluation.evaluator import evaluate_on_devices
    from genfound.evaluation.protocol import EvaluationRequest

    processes.tune_malloc()
    name = str(HydraConfig.get().runtime.choices["protocol"])
    evaluate_on_devices(EvaluationRequest(compose.to_dict(cfg), command_line.user_overrides(), name))


def _origin(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    from genfound.checkpoints.load import config_of
    from genfound.evaluation.provenance import is_images

    return None if is_images(Path(str(given["from"]))) else config_of(given)


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "evaluate", _origin)


if __name__ == "__main__":
    main()
