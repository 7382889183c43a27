"""A new run from the weights of another model."""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from genfound.checkpoints.load import open_official, read_ours
from genfound.checkpoints.official import projectors
from genfound.checkpoints.official.families import FAMILIES
from genfound.modules.base import GenerativeModule
from genfound.runtime import checkpoint_io

TABLES = ("embedding_table.weight", "label_emb.weight", "cond_stage_model.embedding.weight")
"""How the names of tables of classes end; DiM has two."""


def initialise(module: GenerativeModule, path: Path, trust: Collection[str] = ()) -> list[str]:
    """Start a new network from trained weights, averaged ones where there are any.

    A label table of another number of classes stays as it was initialised; `GenerativeModule.starting_weights` says
    what else a family can start from. Nothing is copied where the weights are not of this architecture.

    Args:
        module: holds the network.
        path, trust: see `load`.

    Returns:
        What is not as in the file, in lines for the user.
    """
    net = module.net
    found, remarks = read_ours(path, None, trust), [f"starting from the weights of {path}"]
    if found is None:
        official = open_official(path, "ema", "sit" if type(net).__module__.endswith(".sit") else "dit")
        state, projecting = FAMILIES[official.family].ours(official.state), projectors.from_official(official.state)
    else:
        state, projecting = dict(found.state), projectors.from_official(found.kept)
    state, more = module.starting_weights(state)
    remarks += more
    own = net.state_dict()
    if tables := other_tables(own, state):
        rows = f"{path} has {len(state[tables[0]])} rows, this model {len(own[tables[0]])}"
        remarks.append(f"  the label table is new: {rows}")
        state |= {name: own[name] for name in tables}
    checkpoint_io.load_strict(net, state, path)
    if module.alignment is not None:
        shapes = {name: tensor.shape for name, tensor in projecting.items()}
        own_shapes = {name: tensor.shape for name, tensor in module.alignment.state_dict().items()}
        if shapes == own_shapes:
            module.alignment.load_state_dict(projecting)
        else:
            remarks.append("  the projectors of the alignment are new")
    return remarks


def other_tables(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Tables of classes of which another model has another number of rows."""
    common = [name for name in own if name.endswith(TABLES) and name in state]
    return [name for name in common if len(own[name]) != len(state[name])]
