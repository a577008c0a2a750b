"""Rows that weigh by their advantage, as in ReAd (Zhang et al. 2024, arXiv 2405.14314).

The best policy that stays near that of the data is pi ~ pi_data exp(A / beta); imitating it is
training on the rows with these weights. A batch's loss is

    sum_i w_i l_i / sum_i w_i N_i        w_i = min(exp(A_i / beta), 20)

with l_i the summed loss of a row and N_i its response tokens, so that a batch is a step of the
usual size whatever the advantages of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmira.model.base.rows import Row
from fedmira.model.base.transfer import on_device
from fedmira.model.lora.branches import TokenLosses

__all__ = ["LARGEST_WEIGHT", "RowFactors", "row_weights", "step_weights"]

LARGEST_WEIGHT = 20.0
"""Most that a row weighs against one of advantage 0."""

_LEAST_LOG = -1e6  # a weight of 0 beside any other, and finite, so that differences are numbers


def row_weights(advantages: Sequence[float], temperature: float) -> list[float]:
    """The weights w_i of the rows of a batch, over the largest of them.

    Only their ratios count, and over the largest they neither overflow nor vanish all together.

    Args:
        advantages: A_i, finite.
        temperature: beta, above 0.
    """
    most = math.log(LARGEST_WEIGHT)
    logs = [min(max(advantage / temperature, _LEAST_LOG), most) for advantage in advantages]
    largest = max(logs)
    return [math.exp(each - largest) for each in logs]


def step_weights(
    advantages: Sequence[Sequence[float] | None],
    drawn: Mapping[int, Sequence[int]],
    temperature: float,
) -> dict[int, list[float]]:
    """Client -> the weights of its rows of a step, of the clients that weigh rows.

    Args:
        advantages: of the rows of each client, None where all weigh alike.
        drawn: client -> the numbers of its rows of this step.
        temperature: beta; 0 weighs all rows alike.
    """
    return {
        client: row_weights([own[index] for index in chosen], temperature)
        for client, chosen in drawn.items()
        for own in [advantages[client]]
        if temperature and own is not None
    }


class RowFactors:
    """What the tokens of each row of a step count, 1 on average over a client's tokens.

    Args:
        batches: client (position in the cohort) -> its rows of this step.
        weights: client -> weights of these rows; a client that is not there weighs all alike.
        device: where losses are.
    """

    def __init__(
        self,
        batches: Mapping[int, Sequence[Row]],
        weights: Mapping[int, Sequence[float]],
        device: torch.device,
    ) -> None:
        factors: list[float] = []
        first = [0] * (max(batches) + 1)
        for client, rows in batches.items():
            own = weights.get(client) or [1.0] * len(rows)
            tokens = [len(row.response) for row in rows]
            # Equal weights are 1 each, and their mean is 1 to the last bit.
            mean = sum(w * n for w, n in zip(own, tokens, strict=True)) / sum(tokens)
            first[client] = len(factors)
            factors += [weight / mean for weight in own]
        self._first = on_device(first, device)
        self._factors = on_device(factors, device, torch.float64)

    def of(self, losses: TokenLosses) -> Tensor:
        """The factor of each token, float64 [M]."""
        return self._factors[self._first[losses.clients] + losses.rows]
