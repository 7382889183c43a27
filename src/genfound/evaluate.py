"""`python -m genfound.evaluate from=RUN|CHECKPOINT|NPZ|FOLDER reference=...`: figures with their protocol."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from genfound.config import command_line, compose
from genfound.runtime import processes, run_directory


def _task(cfg: DictConfig) -> None:
    from genfound.evaluation.evaluator import evaluate_on_devices
    from genfound.evaluation.protocol import EvaluationRequest

    processes.tune_malloc()
    name = str(HydraConfig.get().runtime.choices["protocol"])
    evaluate_on_devices(EvaluationRequest(compose.to_dict(cfg), command_line.user_overrides(), name))


def main() -> None:
    """Console entry point."""
    command_line.hydra_main(_task, "evaluate", run_directory.read_config)


if __name__ == "__main__":
    main()
