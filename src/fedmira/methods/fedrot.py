"""FedAvg over factors that were turned towards each other before they are averaged.

Zhang et al. 2026, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", arXiv
2602.23638. The same update has many factors, (B Q)(Q^T A) = B A for every orthogonal Q, and factors
of clients that learned the same in different ones cancel in the mean. With A_w, B_w the factors
that the round began with, module by module,

    M_k  =  B_k^T B_w + A_k A_w^T  =  U S V^T        r x r
    R_k  =  U V^T        of all orthogonal R the nearest [B_k; A_k^T] R to [B_w; A_w^T]
    A    <-  sum_k n_k / n  R_k^T A_k,    B  <-  sum_k n_k / n  B_k R_k

so that no client's product changes. In round 1 B_w is zero and A_w the common start, which alone
then says where to turn to; as clients begin at A_w, little is turned. The authors' code does not
turn in that round, takes A and B for the reference in turns (`aligned_by = "turns"` does both), and
can go part of the way from no rotation to R_k, which is left out. It turns at the client and we at
the server, which has all that is needed: messages are FedAvg's either way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmira.adapters import Adapter, modules, replaced, weighted_sum
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.config.methods import Need
from fedmira.config.section import setting
from fedmira.messages import Reply
from fedmira.methods.base import Combined, Diagnostics, ServerState
from fedmira.methods.fedavg import SHARED, FedAvg
from fedmira.methods.parts.averaging import by_rows

__all__ = ["FedRot", "turned"]

Factor = Literal["A", "B"]


def turned(
    adapter: Adapter, reference: Adapter, aligned_by: Sequence[Factor] = ("A", "B")
) -> tuple[dict[str, Tensor], float]:
    """The same products in factors as near to the reference's as a rotation can bring them.

    >>> import torch
    >>> from fedmira.methods.fedrot import turned
    >>> names = "q.lora_A.weight", "q.lora_B.weight"
    >>> start = dict(zip(names, (torch.eye(2), torch.eye(2))))
    >>> swapped = dict(zip(names, (torch.eye(2).flip(0), torch.eye(2).flip(1))))
    >>> turned(swapped, start)[0][names[0]]
    tensor([[1., 0.],
            [0., 1.]])

    Args:
        adapter: LoRA factors.
        reference: others of the same shapes.
        aligned_by: the factors whose distances are made small.

    Returns:
        The adapter, and how far it was turned: the root mean square over modules of
        |R - identity| / sqrt(r), from 0 to 2.
    """
    there, result, squares = modules(reference), {}, []
    for module, (down, up) in modules(adapter).items():
        old_down, old_up = (factor.double() for factor in there[module])
        own_down, own_up, rank = down.double(), up.double(), down.shape[0]
        fit = torch.zeros(rank, rank, dtype=torch.float64)
        if "A" in aligned_by:
            fit += own_down @ old_down.T
        if "B" in aligned_by:
            fit += own_up.T @ old_up
        left, _, right = torch.linalg.svd(fit)
        rotation = left @ right
        result[module + DOWN] = (rotation.T @ own_down).to(down.dtype)
        result[module + UP] = (own_up @ rotation).to(up.dtype)
        squares.append(float((rotation - torch.eye(rank)).square().sum()) / rank)
    return {name: result[name] for name in adapter}, math.sqrt(sum(squares) / len(squares))


class FedRot(FedAvg):
    """The state holds one adapter, "shared", with which every client starts and is evaluated."""

    name: ClassVar[str] = "fedrot"
    title: ClassVar[str] = "FedRot-LoRA"
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.FACTORS: ""}
    aligned_by: Literal["both", "turns"] = setting(
        "both",
        help=(
            "the factors that are brought near to the shared ones. `turns`: as in the authors' "
            "code one of them a round, here A in even rounds and B in odd ones, and none in "
            "round 1"
        ),
    )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Turn the replies' factors towards the shared ones and average them by training rows."""
        reference, factors = state.adapters[SHARED], self._factors(replies[0].round)
        ordered, weights = by_rows(replies)
        adapters: list[Adapter] = [reply.payload.tensors["adapter"] for reply in ordered]
        figures: dict[str, Mapping[str, float]] = {}
        for place, reply in enumerate(ordered) if factors else ():
            adapters[place], angle = turned(adapters[place], reference, factors)
            figures[reply.client_id] = {"turned": angle}
        after = replaced(state.adapters, {SHARED: weighted_sum(adapters, weights)})
        return Combined(ServerState(after, state.numbers), Diagnostics(clients=figures))

    def _factors(self, round_number: int) -> tuple[Factor, ...]:
        """What decides about the rotations of a round."""
        if self.aligned_by == "both":
            return ("A", "B")
        if round_number == 1:
            return ()
        return ("A",) if round_number % 2 == 0 else ("B",)
