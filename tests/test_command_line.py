from __future__ import annotations

import pytest
import torch

from genfound import command_line


def test_a_device_without_memory_is_one_line_with_the_keys_that_help() -> None:
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB. See documentation for Memory Management"
    with pytest.raises(command_line.USER_ERRORS) as caught, command_line.frugal("train"):
        raise torch.OutOfMemoryError(reason)
    message = str(caught.value)
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB -- ") and "\n" not in message
    for key in ("data.max_tokens", "data.batch_size", "model.activation_checkpointing=true", "sample.batch"):
        assert key in message


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), command_line.frugal("train"):
        raise RuntimeError("shapes differ")
