"""One shared adapter that nobody sends: clients and server exchange seeds and one number for each.

Qin et al. 2024, "Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes", arXiv 2312.06353. Clients train by slopes along random
directions z_j that are made from a few candidate seeds j (`local.optimizer = "zeroth-order"`). All
steps of a round then are one number per seed, c_kj, and

    c_j  <-  c_j + sum_k n_k / n  c_kj         over the clients of the round
    w     =  w_0 + sum_j c_j z_j

where the paper writes c_j = -lr G_j. It tunes all parameters of the base; here w is the adapter,
and the start w_0 is drawn by everybody from the run's seed. Seeds are drawn evenly (FedKSeed, not
its variant Pro).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedmira.adapters import Adapter, replaced
from fedmira.adapters.directions import moved_along, movement, summed_movements
from fedmira.config.methods import Need
from fedmira.errors import RunError
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import (
    Combined,
    Method,
    ServerState,
    Trained,
)
from fedmira.methods.parts.averaging import by_rows
from fedmira.methods.parts.partly_sent import PartlySent

__all__ = ["FedKSeed"]

_START, _SHARED = "start", "shared"


class FedKSeed(Method):
    """The state holds all coefficients so far.

    The adapter beside them is what they make of the start, to the bit.

    A run in one process hands the adapter over, so that each client need not make it again; bytes
    are counted for seeds and numbers.
    """

    name: ClassVar[str] = "fedkseed"
    title: ClassVar[str] = "FedKSeed"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.MOVEMENTS: ""}

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The start that all clients have in common, and no coefficient."""
        start = next(iter(starts.values()))
        return ServerState({_START: start, _SHARED: start}, movement({}))

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """All coefficients so far."""
        return PartlySent({"adapter": state.adapters[_SHARED]}, sent={"movement": state.numbers})

    @property
    def returned(self) -> tuple[str, ...]:
        """The seeds of a client's steps, with the coefficient of each."""
        return ("movement",)

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Add the clients' coefficients, weighted by training rows, and make the adapter anew."""
        ordered, weights = by_rows(replies)
        numbers = summed_movements(
            [state.numbers, *(reply.payload.tensors["movement"] for reply in ordered)],
            [1.0, *weights],
        )
        return Combined(
            ServerState(
                replaced(state.adapters, {_SHARED: moved_along(state.adapters[_START], numbers)}),
                numbers,
            )
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The shared adapter, whoever the client is."""
        return state.adapters[_SHARED]

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send seeds and numbers.

        Raises:
            RunError: local training left none.
        """
        if trained.movement is None:
            raise RunError(
                "fedkseed sends movements along random directions; set local.optimizer to "
                '"zeroth-order"'
            )
        sent = {"movement": trained.movement}
        return PartlySent({"adapter": trained.adapter, **sent}, sent=sent), None
