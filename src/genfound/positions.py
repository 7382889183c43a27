"""Rotary positions of a trained network under another rule, e.g. for images larger than those of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from genfound.backbones.base import Backbone
from genfound.layers.rope import Rope


def reposition(net: Backbone, rope: Mapping[str, Any]) -> None:
    """Change the rule of a network's rotary positions.

    Args:
        net: the network.
        rope: attributes of its `Rope`; those that are `None` stay as they are.

    Raises:
        ValueError: the network has none, or an unknown rule.
    """
    given = {key: value for key, value in rope.items() if value is not None}
    if not given:
        return
    if not isinstance(getattr(net, "rope", None), Rope):
        raise ValueError(f"rope.{next(iter(given))}: {type(net).__name__} has no rotary positions")
    net.rope = replace(net.rope, **given)  # type: ignore[assignment,type-var]
