"""The table of methods: from the name in [algorithm] to what builds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedmira.config import AlgorithmSettings
from fedmira.methods.base import Algorithm
from fedmira.methods.context import AlgorithmContext
from fedmira.methods.ditto import build_ditto
from fedmira.methods.fedalt import build_fedalt
from fedmira.methods.fedavg import build_fedavg
from fedmira.methods.fedex import build_fedex
from fedmira.methods.fedfomo import build_fedfomo
from fedmira.methods.fedit_finetune import build_fedit_finetune
from fedmira.methods.fedkseed import build_fedkseed
from fedmira.methods.fedprox import build_fedprox
from fedmira.methods.flexlora import build_flexlora
from fedmira.methods.hetlora import build_hetlora
from fedmira.methods.local import build_local
from fedmira.methods.mira import build_mira
from fedmira.methods.share_factor import build_share_factor

__all__ = ["ALGORITHMS", "build"]

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
