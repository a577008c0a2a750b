"""One shared update for clients of different rank, averaged as a product.

It is cut to each client's rank.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources" (FlexLoRA), arXiv 2402.11505. With W the mean of the clients' updates and W = U S
V^T its singular value decomposition,

    W  <-  sum_k n_k / n  alpha / r_k  B_k A_k                  over the clients of the round
    client of rank r:   A = V_r^T,   B = U_r S_r / (alpha / r)

so that alpha / r  B A is the nearest to W of that rank.

The matrix W is never formed: the decomposition is that of the stacked factors (two thin QR
decompositions and a small core). What no client could hold is not kept, so the server stores W cut
to the largest rank; cutting it further for a client gives the same factors as cutting W at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedmira.adapters import (
    Adapter,
    mix,
    replaced,
)
from fedmira.adapters.low_rank import UP
from fedmira.config.methods import Need
from fedmira.messages import ClientId, Reply
from fedmira.methods.base import Combined, Diagnostics, ServerState
from fedmira.methods.parts.averaging import COMMON, CutToRank, by_rows

__all__ = ["FlexLora"]


class FlexLora(CutToRank):
    """The state holds one adapter of the largest rank, its directions ordered by strength."""

    name: ClassVar[str] = "flexlora"
    title: ClassVar[str] = "FlexLoRA"
    uses_graph: ClassVar[bool] = False
    always_needs: ClassVar[Mapping[Need, str]] = {
        Need.FACTORS: "",
        Need.FRESH_MOMENTS: (
            "algorithm.name = 'flexlora': the averaged product gets new factors, to whose entries "
            "the old moments do not belong; set local.optimizer_state = 'fresh'"
        ),
    }

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the products by training rows; where nobody moved, A stays and B is zero."""
        context, before, largest = self.context, state.adapters[COMMON], self.context.largest_rank
        ordered, weights = by_rows(replies)
        adapters = [reply.payload.tensors["adapter"] for reply in ordered]
        scales = [context.scale(reply.client_id) for reply in ordered]
        mixed = mix(
            adapters, weights, scales, largest, context.scale_of(largest), before, split="flex"
        )
        diagnostics = Diagnostics(round={"truncation": mixed.tail})
        return Combined(
            ServerState(replaced(state.adapters, {COMMON: mixed.adapter}), state.numbers),
            diagnostics,
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The strongest directions of the shared update, as many as the client's rank.

        They are at the client's scale alpha / r.
        """
        cut, rank, largest = (
            CutToRank.adapter_for(self, state, client),
            self.context.ranks[client],
            self.context.largest_rank,
        )
        if rank == largest:
            return cut
        return {
            name: tensor * (rank / largest) if name.endswith(UP) else tensor
            for name, tensor in cut.items()
        }
