"""FedAvg over factors whose mean B is corrected towards the mean of the clients' products.

Bian et al. 2025, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", ICCV 2025, arXiv 2411.14961. With p_k = n_k / n, A and B the means of the clients'
factors and R what they miss of the mean of products,

    R   =  sum_k p_k B_k A_k - B A
    dB  =  R A^T (A A^T + lambda I)^-1         argmin over D of  |R - D A|^2 + lambda |D|^2
    A  <-  A,   B  <-  B + dB

and every client begins its next round with A and B + dB. The paper measures the distance of R and D
A by a cosine and solves it by steps of gradient descent; with the squared norm it has this closed
form. What of R lies outside of A's row space stays lost; the log's `truncation` is its norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedmira.adapters import modules, replaced, sum_norm, weighted_sum
from fedmira.adapters.low_rank import UP
from fedmira.config.methods import Need
from fedmira.config.section import setting
from fedmira.messages import Reply
from fedmira.methods.base import Combined, Diagnostics, ServerState
from fedmira.methods.fedavg import SHARED, FedAvg
from fedmira.methods.parts.averaging import by_rows

__all__ = ["LoraFair"]


class LoraFair(FedAvg):
    """The state holds one adapter, as FedAvg's; only the server's step differs."""

    name: ClassVar[str] = "lora-fair"
    title: ClassVar[str] = "LoRA-FAIR"
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.FACTORS: ""}
    correction_penalty: float = setting(
        0.01,
        gt=0,
        help=(
            "lambda, what a correction of B costs, beside the squared singular values of A (those "
            "of PEFT's start are about 1/3). Large values correct nothing, which is `fedavg`"
        ),
    )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the factors by training rows and correct B."""
        ordered, weights = by_rows(replies)
        adapters = [reply.payload.tensors["adapter"] for reply in ordered]
        mean = weighted_sum(adapters, weights)
        parts = [modules(adapter) for adapter in adapters]
        for module, means in modules(mean).items():
            factors = [part[module] for part in parts]
            mean[module + UP] = self._corrected(means, factors, weights)
        scale = self.context.scale(self.context.clients[0])  # that of all clients
        missed = sum_norm([*adapters, mean], [*weights, -1.0], [scale] * (len(adapters) + 1))
        return Combined(
            ServerState(replaced(state.adapters, {SHARED: mean}), state.numbers),
            Diagnostics(round={"truncation": missed}),
        )

    def _corrected(
        self,
        mean: tuple[Tensor, Tensor],
        factors: Sequence[tuple[Tensor, Tensor]],
        weights: Sequence[float],
    ) -> Tensor:
        """B + dB of one module, in float64 until the end; no full matrix is formed.

        Args:
            mean: A and B.
            factors: A_k and B_k of each client.
            weights: p_k.
        """
        down, up = (factor.to(torch.float64) for factor in mean)
        square = down @ down.T
        missed = -up @ square  # R A^T
        for (own_down, own_up), weight in zip(factors, weights, strict=True):
            across = own_down.to(torch.float64) @ down.T
            missed += weight * (own_up.to(torch.float64) @ across)
        penalty = self.correction_penalty * torch.eye(len(square), dtype=torch.float64)
        step: Tensor = torch.linalg.solve(square + penalty, missed.T).T
        return (up + step).to(mean[1].dtype)
