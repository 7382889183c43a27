"""What launchers leave in the environment of a command."""

from collections.abc import Mapping, MutableMapping

LAUNCH = "GENFOUND_LAUNCH"
"""Of processes that genfound starts: a folder that exists as long as their group."""

PARENT = "GENFOUND_PARENT"
"""Of processes that genfound starts: the number of the one that has started them."""

SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NPROCS",
         "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")  # fmt: skip

RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
         "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK",
         "JSM_NAMESPACE_LOCAL_RANK")  # fmt: skip

PREFIXES = ("TORCHELASTIC_", "PET_")
"""What torchrun, Slurm and MPI tell their processes; PET_ are torchrun's own options."""

LAUNCHERS = (("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
             ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))  # fmt: skip
"""Of torchrun, srun and MPI: a variable that only their processes have, and the one of how many there are."""


def copies(environment: Mapping[str, str]) -> tuple[str, int]:
    """The variable with which a launcher says that it has started this command so many times; 1 if none has."""
    if LAUNCH not in environment:
        for own, size in LAUNCHERS:
            count = environment.get(size, "")
            if own in environment and count.isdecimal() and int(count) > 1:
                return size, int(count)
    return "", 1


def forget_inherited(environment: MutableMapping[str, str]) -> list[str]:
    """Remove what a launcher may have left in an environment; `NAME=value` of what speaks of several processes."""
    known = (*SIZES, *RANKS, "MASTER_ADDR", "MASTER_PORT", "ROLE_NAME", LAUNCH, PARENT)
    names = {name for name in environment if name in known or name.startswith(PREFIXES)}
    values = {name: environment.pop(name) for name in sorted(names)}
    alone = dict.fromkeys(SIZES, "1") | dict.fromkeys(RANKS, "0")
    return [f"{name}={value}" for name, value in values.items() if alone.get(name, value) != value]
