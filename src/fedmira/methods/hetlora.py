"""Shared factors for clients of different rank.

Padded with zeros, averaged by the size of the updates, cut to each client's rank.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models"
(HetLoRA), arXiv 2401.06432. With [X | 0] the factor X of client k filled up with zeros to the
largest rank,

    A  <-  sum_k p_k [A_k | 0],   B  <-  sum_k p_k [B_k | 0]
    p_k = |B_k A_k| / sum_l |B_l A_l|       Frobenius norms
    client of rank r:   the first r rows of A and columns of B

The norms stand for the paper's sparsity weights; where all updates are zero, the weights are equal.
As in the paper factors are averaged as they are, whatever alpha / r a client applies to its own.
Directions that nobody of the round has stay as they are: the mean of nothing but padding would be A
= B = 0, of which neither ever gets a gradient again. The paper's clients also prune their rank as
they train, helped by a penalty on the norms of their last directions; here a client's rank is that
of its settings and there is no penalty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from fedmira.adapters import (
    Adapter,
    product_norm,
    replaced,
    weighted_sum,
)
from fedmira.adapters.low_rank import DOWN
from fedmira.config.methods import Need
from fedmira.messages import Reply
from fedmira.methods.base import Combined, ServerState
from fedmira.methods.parts.averaging import COMMON, CutToRank, by_rows
from fedmira.methods.parts.rank_split import RankSplit

__all__ = ["HetLora", "padded"]


def padded(adapter: Adapter, rank: int) -> dict[str, Tensor]:
    """The same update at a larger rank: zero rows below every A and zero columns beside every B.

    Args:
        adapter: LoRA factors.
        rank: at least the adapter's own.
    """
    return {
        name: pad(
            tensor,
            (0, 0, 0, rank - tensor.shape[0])
            if name.endswith(DOWN)
            else (0, rank - tensor.shape[1]),
        )
        for name, tensor in adapter.items()
    }


class HetLora(CutToRank):
    """The state holds one adapter of the largest rank."""

    name: ClassVar[str] = "hetlora"
    title: ClassVar[str] = "HetLoRA"
    uses_graph: ClassVar[bool] = False
    always_needs: ClassVar[Mapping[Need, str]] = {Need.FACTORS: ""}

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the padded factors.

        The directions that no client with a weight has stay as they are.
        """
        ordered, _ = by_rows(replies)
        adapters = [reply.payload.tensors["adapter"] for reply in ordered]
        norms = [product_norm(adapter) for adapter in adapters]
        total = sum(norms)
        weights = [norm / total if total else 1 / len(norms) for norm in norms]
        reached = max(
            self.context.ranks[reply.client_id]
            for reply, weight in zip(ordered, weights, strict=True)
            if weight
        )
        mean = weighted_sum(
            [padded(adapter, self.context.largest_rank) for adapter in adapters], weights
        )
        split = RankSplit(reached)
        shared = split.joined(split.trained(mean), split.frozen(state.adapters[COMMON]))
        return Combined(ServerState(replaced(state.adapters, {COMMON: shared}), state.numbers))
