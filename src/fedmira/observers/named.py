"""Trackers by the names that the command line knows."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fedmira.errors import ConfigError
from fedmira.observers.base import Observer

__all__ = ["TRACKERS", "tracker"]

TRACKERS: Mapping[str, str] = {
    "tensorboard": "TensorBoard",
    "trackio": "Trackio",
    "wandb": "WandB",
    "mlflow": "MLflow",
}
"""Name, which is also that of its module and of its library -> its class."""


def tracker(name: str, where: str = "") -> Observer:
    """A tracker with its usual settings.

    Args:
        name: a key of `TRACKERS`.
        where: its first argument: TensorBoard's folder, the project of Trackio or W&B, or MLflow's
            address.

    Raises:
        ConfigError: the name is not known, or the library is not installed.
    """
    if name not in TRACKERS:
        raise ConfigError(f"there is no tracker {name!r}; they are {', '.join(TRACKERS)}")
    made: Any = getattr(import_module(f"fedmira.observers.{name}"), TRACKERS[name])
    observer: Observer = made(where) if where else made()
    return observer
