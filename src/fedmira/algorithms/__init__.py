"""Algorithms: how the adapters of a round are combined. One table from name to algorithm."""

from collections.abc import Callable, Mapping
from typing import Any

from fedmira.algorithms.base import Algorithm, Combined, Diagnostics, GradientHook, PlainClient, ServerState, Start, Trained
from fedmira.algorithms.context import AlgorithmContext
from fedmira.algorithms.fedavg import FedAvg, build_fedavg
from fedmira.algorithms.local import LocalOnly, build_local
from fedmira.algorithms.mira import Mira, build_mira
from fedmira.algorithms.mixing import Mixing, mixing_matrix
from fedmira.config.schema import AlgorithmSettings

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmContext",
    "Combined",
    "Diagnostics",
    "FedAvg",
    "GradientHook",
    "LocalOnly",
    "Mira",
    "Mixing",
    "PlainClient",
    "ServerState",
    "Start",
    "Trained",
    "build",
    "mixing_matrix",
]

ALGORITHMS: Mapping[str, Callable[[Any, AlgorithmContext], Algorithm]] = {
    "local": build_local,
    "fedavg": build_fedavg,
    "mira": build_mira,
}
"""algorithm.name -> its builder, which takes the settings class of that name."""


def build(settings: AlgorithmSettings, context: AlgorithmContext) -> Algorithm:
    """The algorithm that [algorithm] asks for.

    Raises:
        ConfigError: its settings cannot work on this federation.
    """
    return ALGORITHMS[settings.name](settings, context)
