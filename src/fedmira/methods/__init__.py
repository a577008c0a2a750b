"""How adapters are combined: a file for each method, and one table from name to method."""

from fedmira.methods.base import (
    Algorithm,
    Blend,
    Combined,
    Diagnostics,
    GradientHook,
    PlainClient,
    ServerState,
    Start,
    Trained,
)
from fedmira.methods.context import AlgorithmContext
from fedmira.methods.ditto import Ditto
from fedmira.methods.fedalt import FedAlt
from fedmira.methods.fedavg import FedAvg
from fedmira.methods.fedex import FedEx
from fedmira.methods.fedfomo import FedFomo
from fedmira.methods.fedit_finetune import FedItFinetune
from fedmira.methods.fedkseed import FedKSeed
from fedmira.methods.fedprox import FedProx
from fedmira.methods.flexlora import FlexLora
from fedmira.methods.hetlora import HetLora
from fedmira.methods.local import LocalOnly
from fedmira.methods.mira import Mira
from fedmira.methods.parts.mixing import Mixing, mixing_matrix
from fedmira.methods.registry import ALGORITHMS, build
from fedmira.methods.share_factor import ShareFactor

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
