"""Observers: told what happens in a run, and able to stop it.

Trackers and progress are observers too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmira.observers.base import (
        ClientEvent,
        EndEvent,
        EvaluationEvent,
        JoinEvent,
        MeasuringEvent,
        Observer,
        RoundEvent,
        RunFacts,
        StartEvent,
        Stop,
    )
    from fedmira.observers.dispatch import Dispatcher, check_observers
    from fedmira.observers.early_stopping import EarlyStopping
    from fedmira.observers.mlflow import MLflow
    from fedmira.observers.named import TRACKERS, tracker
    from fedmira.observers.progress import Progress
    from fedmira.observers.tensorboard import TensorBoard
    from fedmira.observers.trackio import Trackio
    from fedmira.observers.wandb import WandB

__all__ = [
    "TRACKERS",
    "ClientEvent",
    "Dispatcher",
    "EarlyStopping",
    "EndEvent",
    "EvaluationEvent",
    "JoinEvent",
    "MLflow",
    "MeasuringEvent",
    "Observer",
    "Progress",
    "RoundEvent",
    "RunFacts",
    "StartEvent",
    "Stop",
    "TensorBoard",
    "Trackio",
    "WandB",
    "check_observers",
    "tracker",
]

_HOMES = {
    "Dispatcher": "dispatch",
    "EarlyStopping": "early_stopping",
    "MLflow": "mlflow",
    "Progress": "progress",
    "TRACKERS": "named",
    "TensorBoard": "tensorboard",
    "Trackio": "trackio",
    "WandB": "wandb",
    "check_observers": "dispatch",
    "tracker": "named",
}


def __getattr__(name: str) -> Any:
    """Import a name from its home when it is first used, to keep the package quick to import."""
    if name not in __all__:
        raise AttributeError(
            f"module 'fedmira.observers' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(import_module(f"fedmira.observers.{_HOMES.get(name, 'base')}"), name)
