"""Files of weights, ours and those of the official repositories: what they hold, without running code.

flat                       DiT-XL-2-256x256.pt, SiT-XL-2-256.pt, NiT's and FiT's releases (.safetensors, .bin)
{"ema", "model", ...}      training checkpoints of DiT, SiT and DiT-MoE; `args` holds their arguments
{"model_ema1", ...}        those of JiT, whose first average is taken
{"state_dict", ...}        Lightning and others, LDM
folder                     accelerate: two sets of weights, in an order that depends on the repository
"""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from genfound.runtime import checkpoint_io, run_directory
from genfound.runtime.files import atomic_write
from genfound.tokenizers.ldm import BESIDE_WEIGHTS

State = Mapping[str, Tensor]

OUTER = ("ema", "model_ema1", "model", "state_dict")
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
ACCELERATE = (("model.safetensors", "model_1.safetensors"), ("pytorch_model.bin", "pytorch_model_1.bin"))
OURS, KEPT = "genfound", "official."

FORMAT = run_directory.FORMAT
"""Of the files that this version writes; `format_1` knows what was called otherwise before."""


class CheckpointFile(NamedTuple):
    """State dicts by outer key ("" of a flat one, `first` and `second` of a folder), and the script's arguments."""

    states: Mapping[str, State]
    args: Mapping[str, Any]

    def choose(self, weights: str, path: Path, ema_first: bool = False) -> State:
        """The averaged (`ema`) or live (`raw`) weights; whichever there are, if there is only one set."""
        in_file = [*OUTER, ""] if weights == "ema" else ["model", "state_dict", ""]
        in_folder = ["first", "second"] if ema_first == (weights == "ema") else ["second", "first"]
        for name in (*in_file, *in_folder):
            if name in self.states:
                return self.states[name]
        raise ValueError(f"{path} holds only averaged weights; load it with weights=ema")


def read(path: Path) -> CheckpointFile:
    """Open a file or an accelerate folder of weights."""
    if path.is_dir():
        return CheckpointFile(_folder(path), {})
    if not path.is_file():
        raise FileNotFoundError(f"there is no run {path}, nor a file of that name")
    if _is_safetensors(path):
        return CheckpointFile({"": strip_prefixes(checkpoint_io.read_safetensors(path), path)}, {})
    with open(path, "rb") as file:
        if file.read(64).lstrip()[:5].lower() in (b"<!doc", b"<html"):
            raise ValueError(f"{path} is a web page; download the file itself (/resolve/ instead of /blob/ on the hub)")
    content = checkpoint_io.read(path, BESIDE_WEIGHTS)
    args = content.get("args", {})
    outer = {key: content[key] for key in OUTER if isinstance(content.get(key), Mapping)}
    states = {key: strip_prefixes(state, path) for key, state in (outer or {"": content}).items()}
    return CheckpointFile(states, dict(vars(args)) if isinstance(args, Namespace) else {})


def ours(path: Path) -> dict[str, Any] | None:
    """What `write` noted in a file of ours; `None` for any other file."""
    if not path.is_file() or not _is_safetensors(path):
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            note = (file.metadata() or {}).get(OURS)
        return None if note is None else dict(json.loads(note))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: what genfound has noted in it cannot be read ({error})") from None


def write(
    path: Path, state: State, note: Mapping[str, Any] | None = None, content: Callable[[State], Any] = dict
) -> None:
    """Write a state dict, whole or not at all: .safetensors, with a note where it is ours; or `content` of it."""
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    if path.suffix != ".safetensors":
        checkpoint_io.save(content(tensors), path)
        return
    metadata = {"format": "pt"} if note is None else {"format": "pt", OURS: json.dumps(note)}
    atomic_write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


def strip_prefixes(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """A state dict without the prefixes of compiled and distributed modules."""
    wrong = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if wrong or not state:
        raise ValueError(f"{path} holds no state dict" + (f": {wrong[0]} is not the name of a tensor" if wrong else ""))
    tensors = dict(state)
    while prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _folder(path: Path) -> dict[str, State]:
    for names in ACCELERATE:
        found = [path / name for name in names if (path / name).is_file()]
        if found:
            opened = (read(file).choose("ema", file) for file in found)
            return dict(zip(("first", "second"), opened, strict=False))
    wanted = " or ".join(first for first, _ in ACCELERATE)
    raise FileNotFoundError(
        f"{path} is not a run directory (no config.yaml), nor a folder of accelerate (no {wanted}) or of diffusers "
        "(no model_index.json)"
    )


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then a JSON header."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"
