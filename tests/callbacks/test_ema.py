from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.config.options import ema_decays
from tests.helpers import composed, training_module


class Toy(Backbone):
    null_label = None

    def __init__(self, names: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in names})
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        return batch.x


class Training:
    """A module and the two facts about the trainer that the callback looks at."""

    def __init__(
        self,
        *decays: float,
        names: tuple[str, ...] = ("a", "b"),
        step: int = 0,
        checkpoint: dict[str, Any] | None = None,
    ) -> None:
        self.net = Toy(names)
        self.module = training_module(self.net)
        self.trainer: Any = SimpleNamespace(global_step=step, is_global_zero=True)
        self.ema = Ema(decays)
        if checkpoint is not None:
            self.ema.on_load_checkpoint(self.trainer, self.module, checkpoint)
        self.ema.on_train_start(self.trainer, self.module)

    def set(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.net.weights.values():
                parameter.fill_(value)

    def micro_batch(self, value: float | None = None) -> None:
        """The end of a micro-batch; with a value, of one after which the optimizer stepped."""
        if value is not None:
            self.set(value)
            self.trainer.global_step += 1
        self.ema.on_train_batch_end(self.trainer, self.module, None, None, 0)


def test_the_official_convention() -> None:
    training = Training(0.9)
    for value, expected in ((0.9, 0.99), (0.8, 0.971), (0.7, 0.9439)):
        training.micro_batch(value)
        for average in training.ema.averages[0.9].values():
            torch.testing.assert_close(average, torch.full((2,), expected))


def test_warm_up_lets_go_of_the_first_weights() -> None:
    """Decays of 2/11, 3/12 and, where that would be more than its own, 0.28."""
    training = Training(0.28)
    training.ema.warmup = True
    for value, expected in ((0.0, 2 / 11), (4.0, 2 / 11 / 4 + 3), (1.0, 0.28 * (2 / 11 / 4 + 3) + 0.72)):
        training.micro_batch(value)
        torch.testing.assert_close(training.ema.averages[0.28]["weights.a"], torch.full((2,), expected))


@pytest.mark.parametrize(
    ("wanted", "warmup"), [([], True), (["ema.warmup=false"], False), (["optimizer=adamw_nit"], False)]
)
def test_warm_up_is_that_of_the_recipe_unless_it_is_set(wanted: list[str], warmup: bool) -> None:
    ema = Ema()
    parts = SimpleNamespace(config=composed(*wanted))
    ema.setup(SimpleNamespace(datamodule=SimpleNamespace(parts=parts)), training_module(Toy()), "fit")  # type: ignore[arg-type]
    assert ema.warmup is warmup and len(ema.decays or ()) == 1


@pytest.mark.parametrize(
    ("wanted", "decays"), [([], [0.9999, 0.9996]), (["ema.decays=[0.9]"], [0.9]), (["ema.decays=[]"], [])]
)
def test_a_recipe_may_have_several_decays(wanted: list[str], decays: list[float]) -> None:
    assert ema_decays(composed("model=jit_b", *wanted)) == decays


def test_it_starts_as_a_copy_of_the_initial_weights() -> None:
    training = Training(0.9)
    training.set(5.0)
    assert list(training.ema.averages[0.9]) == ["weights.a", "weights.b"]  # nothing frozen
    assert all((average == 1).all() for average in training.ema.averages[0.9].values())


def test_accumulated_micro_batches_count_once() -> None:
    training = Training(0.9)
    for _ in range(3):
        training.micro_batch()
    training.micro_batch(0.9)
    training.micro_batch()
    torch.testing.assert_close(training.ema.averages[0.9]["weights.a"], torch.full((2,), 0.99))


def test_several_decays() -> None:
    training = Training(0.5, 0.0, 1.0)
    training.micro_batch(0.0)
    training.micro_batch(4.0)
    values = [training.ema.averages[d]["weights.b"][0].item() for d in (0.5, 0.0, 1.0)]
    assert values == [2.25, 4.0, 1.0]


def test_averages_are_float32_and_see_small_changes() -> None:
    training = Training(0.9999)
    training.net.to(torch.bfloat16)
    training.ema.on_train_start(training.trainer, training.module)
    training.micro_batch(0.5)
    average = training.ema.averages[0.9999]["weights.a"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((2,), 1 - 0.5e-4), atol=1e-7, rtol=0)


def test_within_the_context_the_network_is_the_first_average() -> None:
    training = Training(0.9, 0.5)
    training.micro_batch(0.0)
    with pytest.raises(KeyError), training.ema.ema_weights(training.module):
        torch.testing.assert_close(training.net.weights["a"].detach(), torch.full((2,), 0.9))
        raise KeyError
    assert (training.net.weights["a"] == 0).all()
    torch.testing.assert_close(training.ema.averages[0.9]["weights.a"], torch.full((2,), 0.9))


def test_without_decays_the_context_changes_nothing() -> None:
    training = Training()
    with training.ema.ema_weights(training.module):
        assert (training.net.weights["a"] == 1).all()


def test_a_checkpoint_brings_the_averages_back() -> None:
    training, checkpoint = Training(0.9, 0.5), {"state_dict": {"net.weights.a": "live"}}
    training.micro_batch(0.9)
    training.micro_batch(0.8)
    training.ema.on_save_checkpoint(training.trainer, training.module, checkpoint)
    assert checkpoint["state_dict"] == {"net.weights.a": "live"}
    assert list(checkpoint["ema"]) == ["0.9", "0.5"]
    resumed = Training(0.9, 0.5, step=2, checkpoint=checkpoint)
    resumed.micro_batch()  # not a step of its own
    for other in (training, resumed):
        other.micro_batch(0.7)
        torch.testing.assert_close(other.ema.averages[0.9]["weights.a"], torch.full((2,), 0.9439))


def test_a_decay_that_the_checkpoint_lacks_is_named() -> None:
    training, checkpoint = Training(0.9), {}
    training.ema.on_save_checkpoint(training.trainer, training.module, checkpoint)
    with pytest.raises(ValueError, match=r"ema\.decays=\[0\.9, 0\.99\], but the checkpoint has only 0\.9"):
        Training(0.9, 0.99, checkpoint=checkpoint)


def test_averages_of_another_network_are_refused() -> None:
    training, checkpoint = Training(0.9), {}
    training.ema.on_save_checkpoint(training.trainer, training.module, checkpoint)
    with pytest.raises(ValueError, match="belong to other parameters"):
        Training(0.9, names=("a", "c"), checkpoint=checkpoint)
