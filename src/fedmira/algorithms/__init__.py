"""Algorithms: how the adapters of a round are combined. One table from name to algorithm."""

from collections.abc import Callable, Mapping
from typing import Any

from fedmira.algorithms.base import Algorithm, Blend, Combined, Diagnostics, GradientHook, PlainClient, ServerState, Start, Trained
from fedmira.algorithms.context import AlgorithmContext
from fedmira.algorithms.ditto import Ditto, build_ditto
from fedmira.algorithms.fedalt import FedAlt, build_fedalt
from fedmira.algorithms.fedavg import FedAvg, build_fedavg
from fedmira.algorithms.fedex import FedEx, build_fedex
from fedmira.algorithms.fedfomo import FedFomo, build_fedfomo
from fedmira.algorithms.fedit_finetune import FedItFinetune, build_fedit_finetune
from fedmira.algorithms.fedkseed import FedKSeed, build_fedkseed
from fedmira.algorithms.fedprox import FedProx, build_fedprox
from fedmira.algorithms.flexlora import FlexLora, build_flexlora
from fedmira.algorithms.hetlora import HetLora, build_hetlora
from fedmira.algorithms.local import LocalOnly, build_local
from fedmira.algorithms.mira import Mira, build_mira
from fedmira.algorithms.mixing import Mixing, mixing_matrix
from fedmira.algorithms.share_factor import ShareFactor, build_share_factor
from fedmira.config.methods import AlgorithmSettings

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmContext",
    "Blend",
    "Combined",
    "Diagnostics",
    "Ditto",
    "FedAlt",
    "FedAvg",
    "FedEx",
    "FedFomo",
    "FedItFinetune",
    "FedKSeed",
    "FedProx",
    "FlexLora",
    "GradientHook",
    "HetLora",
    "LocalOnly",
    "Mira",
    "Mixing",
    "PlainClient",
    "ServerState",
    "ShareFactor",
    "Start",
    "Trained",
    "build",
    "mixing_matrix",
]

ALGORITHMS: Mapping[str, Callable[[Any, AlgorithmContext], Algorithm]] = {
    "local": build_local,
    "fedavg": build_fedavg,
    "fedit-finetune": build_fedit_finetune,
    "fedprox": build_fedprox,
    "ditto": build_ditto,
    "share-factor": build_share_factor,
    "flexlora": build_flexlora,
    "hetlora": build_hetlora,
    "fedex": build_fedex,
    "fedalt": build_fedalt,
    "fedfomo": build_fedfomo,
    "fedkseed": build_fedkseed,
    "mira": build_mira,
}
"""algorithm.name -> its builder, which takes the settings class of that name."""


def build(settings: AlgorithmSettings, context: AlgorithmContext) -> Algorithm:
    """The algorithm that [algorithm] asks for.

    Raises:
        ConfigError: its settings cannot work on this federation.
    """
    return ALGORITHMS[settings.name](settings, context)
