"""FedAvg whose clients are held near the adapter that they were sent.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127. In every local
step client k follows

    grad f_k(w) + mu (w - w_t)          w_t the shared adapter of the round

and the server averages by training rows as FedAvg does. With mu = 0 it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedmira.config.section import setting
from fedmira.messages import Payload
from fedmira.methods.base import Start
from fedmira.methods.fedavg import FedAvg
from fedmira.methods.parts.proximal import toward

__all__ = ["FedProx"]


class FedProx(FedAvg):
    """The server half is FedAvg's."""

    name: ClassVar[str] = "fedprox"
    title: ClassVar[str] = "FedProx"
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"proximal": (0.001, 0.01, 0.1, 1.0)}
    proximal: float = setting(
        0.01,
        ge=0,
        help="mu, the pull of a client's local steps towards the shared adapter. 0 is `fedavg`",
    )

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the shared adapter and be pulled back to it."""
        shared = payload.tensors["adapter"]
        return Start(shared, toward(shared, self.proximal))
