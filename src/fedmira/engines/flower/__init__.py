"""A federation whose clients are on machines of their own, over Flower; the only folder that imports flwr.

The names below are imported when they are first used: what answers a message on a node needs none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmira.engines.flower.engine import FlowerEngine
    from fedmira.engines.flower.evaluation import FlowerEvaluation
    from fedmira.engines.flower.nodes import Grid, Nodes

__all__ = ["FlowerEngine", "FlowerEvaluation", "Grid", "Nodes"]

_HOMES = {"FlowerEngine": "engine", "FlowerEvaluation": "evaluation", "Grid": "nodes", "Nodes": "nodes"}


def __getattr__(name: str) -> Any:
    """Import a name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
