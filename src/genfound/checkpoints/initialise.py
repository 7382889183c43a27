"""A new run from the weights of another model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from genfound.backbones.base import Backbone
from genfound.checkpoints.load import _open, _ours
from genfound.checkpoints.official.families import FAMILIES
from genfound.modules import dit_moe
from genfound.rng import Rng
from genfound.runtime import checkpoint_io

LABELS, ROUTER = "y_embedder.embedding_table.weight", "blocks.0.mlp.router.weight"


def initialise(net: Backbone, path: Path, seed: int, trust: Collection[str] = ()) -> list[str]:
    """Start a new network from trained weights, averaged ones where there are any.

    A label table of another number of classes stays as it was initialised; a DiT-MoE
    of one expert becomes one of several, whose routers are drawn from the seed.

    Args:
        net: the network.
        path, trust: see `load`.
        seed: of the run.

    Returns:
        What is not as in the file, in lines for the user.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the weights are not of this architecture; nothing has been copied then.
    """
    family = type(net).__module__.rpartition(".")[2]
    found, remarks = _ours(path, None, trust), [f"starting from the weights of {path}"]
    if found is None:
        official = _open(path, "ema", "sit" if family == "sit" else "dit")
        origin, state = official.family, FAMILIES[official.family].ours(official.state)
    else:
        origin, state = str(found.config["model"]["_target_"]).split(".")[-2], dict(found.state)
    own = net.state_dict()
    if family == "dit_moe" and (origin != family or len(state[ROUTER]) != len(own[ROUTER])):
        state = dit_moe.upcycle(state, len(own[ROUTER]), Rng(seed, "upcycle").generator("routers"))
        remarks.append("  every expert begins as a copy of the one in the file; the routers are new")
    if LABELS in state and len(state[LABELS]) != len(own[LABELS]):
        remarks.append(f"  the label table is new: {path} has {len(state[LABELS])} rows, this model {len(own[LABELS])}")
        state[LABELS] = own[LABELS]
    checkpoint_io.load_strict(net, state, path)
    return remarks
