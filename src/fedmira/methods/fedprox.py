"""FedAvg whose clients are held near the adapter that they were sent.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127. In every local
step client k follows

    grad f_k(w) + mu (w - w_t)          w_t the shared adapter of the round

and the server averages by training rows as FedAvg does. With mu = 0 it is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmira.config.methods import FedProxSettings
from fedmira.messages import Payload
from fedmira.methods.base import Start
from fedmira.methods.context import AlgorithmContext
from fedmira.methods.fedavg import FedAvg
from fedmira.methods.parts.averaging import require_one_rank
from fedmira.methods.parts.proximal import toward

__all__ = ["FedProx", "build_fedprox"]


@dataclass(frozen=True, slots=True)
class FedProx(FedAvg):
    """The server half is FedAvg's.

    Attributes:
        proximal: mu.
    """

    proximal: float

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the shared adapter and be pulled back to it."""
        shared = payload.tensors["adapter"]
        return Start(shared, toward(shared, self.proximal))


def build_fedprox(settings: FedProxSettings, context: AlgorithmContext) -> FedProx:
    """Check that one adapter fits all clients.

    Raises:
        ConfigError: clients differ in rank.
    """
    require_one_rank(settings.name, context)
    return FedProx(settings.proximal)
