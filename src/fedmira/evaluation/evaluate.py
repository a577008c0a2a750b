"""Each client's own adapter on its own rows: loss per response token, and greedy generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from fedmira.adapters import Adapter
from fedmira.data import ClientData
from fedmira.evaluation.metrics import TokenLoss, text_scores
from fedmira.messages import ClientId
from fedmira.model import BaseModel, LoraBranch, Row, StackedAdapters, TargetModule, generate, response_losses, within_memory

__all__ = ["Evaluator"]

_CLIENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Evaluator:
    """Evaluates clients on one resident base model; no state, no randomness.

    Attributes:
        scales: alpha / rank of each client.
        token_budget: most token positions in one forward pass.
    """

    base: BaseModel
    targets: Sequence[TargetModule]
    clients: Mapping[ClientId, ClientData]
    scales: Mapping[ClientId, float]
    token_budget: int

    def losses(
        self, adapters: Mapping[ClientId, Adapter], split: Literal["test", "validation", "train"] = "test"
    ) -> dict[ClientId, TokenLoss]:
        """The response loss of each given client's adapter on its rows of `split`; clients without such rows are left out."""
        result: dict[ClientId, TokenLoss] = {}
        asked = [client for client in adapters if getattr(self.clients[client], split)]
        for names, branch in self._branches(asked, adapters):
            batches = [(i, getattr(self.clients[name], split)) for i, name in enumerate(names)]
            with torch.no_grad(), branch:
                sums, _ = within_memory(partial(self._sums, branch, batches), self.token_budget)
            for i, name in enumerate(names):
                result[name] = TokenLoss(sums[i], sum(len(row.response) for row in batches[i][1]))
        return result

    def _sums(self, branch: LoraBranch, batches: Sequence[tuple[int, Sequence[Row]]], budget: int) -> list[float]:
        """The sum of each batch's losses."""
        totals = torch.zeros(len(batches), dtype=torch.float64, device=self.base.device)
        for losses in response_losses(self.base, branch, batches, budget):
            totals.index_add_(0, losses.clients, losses.values.double())
        return totals.tolist()

    def generations(self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int) -> dict[ClientId, list[str]]:
        """Greedy continuations of each given client's test prompts, in the order of its test rows."""
        result: dict[ClientId, list[str]] = {}
        for names, branch in self._branches(list(adapters), adapters):
            prompts = [(i, row.prompt) for i, name in enumerate(names) for row in self.clients[name].test]
            with branch:
                found, _ = within_memory(partial(generate, self.base, branch, prompts, max_new_tokens), self.token_budget)
            texts = iter(found)
            for name in names:
                result[name] = [next(texts) for _ in self.clients[name].test]
        return result

    def text_scores(self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int) -> dict[ClientId, dict[str, float]]:
        """Rouge-L in both dialects and exact match of each given client's generations against its references."""
        texts = self.generations(adapters, max_new_tokens)
        return {client: text_scores(predictions, self.clients[client].references) for client, predictions in texts.items()}

    def _branches(self, clients: Sequence[ClientId], adapters: Mapping[ClientId, Adapter]) -> Iterator[tuple[list[ClientId], LoraBranch]]:
        """A few clients at a time with their adapters, which may be read from disk at this moment."""
        for start in range(0, len(clients), _CLIENTS_AT_ONCE):
            names = list(clients[start : start + _CLIENTS_AT_ONCE])
            scales = [self.scales[name] for name in names]
            stacked = StackedAdapters(self.targets, [adapters[name] for name in names], scales, self.base.device, trainable=False)
            yield names, LoraBranch(self.base.model, stacked)
