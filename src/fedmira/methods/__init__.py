"""How adapters are combined: a file for each method, and what all methods are made of.

The table of names is `fedmira.config.methods.METHODS`. The names below are imported when they are
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmira.config.methods import Need
    from fedmira.config.section import setting
    from fedmira.methods.base import (
        Blend,
        Combined,
        Diagnostics,
        GradientHook,
        Method,
        ServerState,
        Settle,
        Start,
        Trained,
    )
    from fedmira.methods.cgc_lora import CgcLora
    from fedmira.methods.context import MethodContext
    from fedmira.methods.ditto import Ditto
    from fedmira.methods.fedalt import FedAlt
    from fedmira.methods.fedavg import FedAvg
    from fedmira.methods.feddpa import FedDpa
    from fedmira.methods.fedex import FedEx
    from fedmira.methods.fedfomo import FedFomo
    from fedmira.methods.fedit_finetune import FedItFinetune
    from fedmira.methods.fedkseed import FedKSeed
    from fedmira.methods.fedlease import FedLease
    from fedmira.methods.fedprox import FedProx
    from fedmira.methods.fedrot import FedRot
    from fedmira.methods.flexlora import FlexLora
    from fedmira.methods.flora import Flora
    from fedmira.methods.fola import Fola
    from fedmira.methods.gossip import Gossip
    from fedmira.methods.hetlora import HetLora
    from fedmira.methods.local import Local
    from fedmira.methods.lora_fair import LoraFair
    from fedmira.methods.mira import Mira
    from fedmira.methods.mtlora import MtLora
    from fedmira.methods.parts.mixing import Mixing, mixing_matrix
    from fedmira.methods.rolora import RoLora
    from fedmira.methods.scaffold import Scaffold
    from fedmira.methods.server_optimizer import FedOpt
    from fedmira.methods.share_factor import ShareFactor
    from fedmira.methods.two_level import TwoLevel

_HOMES = {
    "Blend": "fedmira.methods.base",
    "CgcLora": "fedmira.methods.cgc_lora",
    "Combined": "fedmira.methods.base",
    "Diagnostics": "fedmira.methods.base",
    "Ditto": "fedmira.methods.ditto",
    "FedAlt": "fedmira.methods.fedalt",
    "FedAvg": "fedmira.methods.fedavg",
    "FedDpa": "fedmira.methods.feddpa",
    "FedEx": "fedmira.methods.fedex",
    "FedFomo": "fedmira.methods.fedfomo",
    "FedItFinetune": "fedmira.methods.fedit_finetune",
    "FedKSeed": "fedmira.methods.fedkseed",
    "FedLease": "fedmira.methods.fedlease",
    "FedOpt": "fedmira.methods.server_optimizer",
    "FedProx": "fedmira.methods.fedprox",
    "FedRot": "fedmira.methods.fedrot",
    "FlexLora": "fedmira.methods.flexlora",
    "Flora": "fedmira.methods.flora",
    "Fola": "fedmira.methods.fola",
    "Gossip": "fedmira.methods.gossip",
    "GradientHook": "fedmira.methods.base",
    "HetLora": "fedmira.methods.hetlora",
    "Local": "fedmira.methods.local",
    "LoraFair": "fedmira.methods.lora_fair",
    "Method": "fedmira.methods.base",
    "MethodContext": "fedmira.methods.context",
    "Mira": "fedmira.methods.mira",
    "Mixing": "fedmira.methods.parts.mixing",
    "MtLora": "fedmira.methods.mtlora",
    "Need": "fedmira.config.methods",
    "RoLora": "fedmira.methods.rolora",
    "Scaffold": "fedmira.methods.scaffold",
    "ServerState": "fedmira.methods.base",
    "Settle": "fedmira.methods.base",
    "ShareFactor": "fedmira.methods.share_factor",
    "Start": "fedmira.methods.base",
    "Trained": "fedmira.methods.base",
    "TwoLevel": "fedmira.methods.two_level",
    "mixing_matrix": "fedmira.methods.parts.mixing",
    "setting": "fedmira.config.section",
}

__all__ = [
    "Blend",
    "CgcLora",
    "Combined",
    "Diagnostics",
    "Ditto",
    "FedAlt",
    "FedAvg",
    "FedDpa",
    "FedEx",
    "FedFomo",
    "FedItFinetune",
    "FedKSeed",
    "FedLease",
    "FedOpt",
    "FedProx",
    "FedRot",
    "FlexLora",
    "Flora",
    "Fola",
    "Gossip",
    "GradientHook",
    "HetLora",
    "Local",
    "LoraFair",
    "Method",
    "MethodContext",
    "Mira",
    "Mixing",
    "MtLora",
    "Need",
    "RoLora",
    "Scaffold",
    "ServerState",
    "Settle",
    "ShareFactor",
    "Start",
    "Trained",
    "TwoLevel",
    "mixing_matrix",
    "setting",
]


def __getattr__(name: str) -> Any:
    """Imports a name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
