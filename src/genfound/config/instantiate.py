"""What Hydra builds of the options of a group: checked first, and with complaints in a line."""

import functools
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from hydra.errors import InstantiationException

from genfound.config import targets
from genfound.config.compose import PARTIAL, TARGET


def instantiate(group: str, options: Mapping[str, Any], trust: Sequence[str], **extra: Any) -> Any:
    """Build what the options of a group describe, after its targets were checked; see `targets.resolved`.

    Raises:
        ValueError: the target does not exist, may not be built, or does not take these options.
    """
    return _call(group, targets.resolved(group, options, trust), extra)


def partial(group: str, options: Mapping[str, Any], trust: Sequence[str]) -> functools.partial[Any]:
    """What the options of a group describe, to be called later with more arguments; see `instantiate`."""
    checked = {**targets.resolved(group, options, trust), PARTIAL: True}
    bound: functools.partial[Any] = hydra.utils.instantiate(checked, _convert_="all")
    try:
        inspect.signature(bound.func).bind_partial(**bound.keywords)
    except TypeError as error:
        raise ValueError(f"{group}: {error}") from None
    return bound


def instantiate_own(key: str, options: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Any:
    """Build a part of the command's own composition, trusted as it is; of what is given it gets what it names.

    Raises:
        ValueError: the target does not exist, or does not take these options.
    """
    try:
        target = pkgutil.resolve_name(options[TARGET])
    except (KeyError, ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key} cannot be built: {'no ' if isinstance(error, KeyError) else ''}{error}") from None
    named = inspect.signature(target).parameters
    return _call(key, options, {name: value for name, value in (given or {}).items() if name in named})


def _call(key: str, options: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """What Hydra instantiates, with complaints about the arguments in a line."""
    try:
        bound = hydra.utils.instantiate({**options, PARTIAL: True}, _convert_="all")
        return bound(**extra)
    except (ImportError, InstantiationException) as error:
        raise ValueError(f"{key}: {error}") from None
    except TypeError as error:
        name = str(getattr(bound.func, "__name__", ""))
        if str(error).startswith((f"{name}.__init__()", f"{name}()")):
            raise ValueError(f"{key}: {error}") from None
        raise
