"""The projectors of an alignment under the names of the released checkpoints.

REPA and NiT save REPA's MLP, as `projectors.<number>.<layer>` and `projector.<layer>`; iREPA a linear layer or a
convolution as `projectors.<number>.projection_layer`, and its MLP as `projectors.<number>.projection_layer.<layer>`.
"""

from collections.abc import Mapping

from torch import Tensor

HEADS = ("projectors", "projector")


def is_projector(name: str) -> bool:
    """Whether a tensor of a released checkpoint is of a projector."""
    return name.partition(".")[0] in HEADS


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projectors of a released state dict under the names of `Alignment`; nothing if there are none."""
    ours = {}
    for name in filter(is_projector, state):
        head, *parts = name.split(".")
        number = "0" if head == "projector" else parts.pop(0)
        if parts[0] == "projection_layer":
            parts.pop(0)
            if len(parts) == 1 and state[name.rpartition(".")[0] + ".weight"].ndim == 2:
                parts.insert(0, "0")  # a linear layer alone, which is the first of one
        ours[".".join(["projectors", number, *parts])] = state[name]
    return ours


def to_official(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The inverse of `from_official` for the repository of a family; an MLP is written as REPA's."""
    theirs = {}
    for name, tensor in state.items():
        head, number, *parts = name.split(".")
        alone = f"{head}.{number}.2.weight" not in state
        if family == "nit" and number == "0" and not alone:
            theirs[".".join(["projector", *parts])] = tensor
        elif alone:
            theirs[f"{head}.{number}.projection_layer.{parts[-1]}"] = tensor
        else:
            theirs[name] = tensor
    return theirs
