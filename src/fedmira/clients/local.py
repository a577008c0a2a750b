"""Clients whose rows are in this process, on one resident base model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedmira.adapters import Adapter
from fedmira.clients.base import Candidates, SplitName
from fedmira.clients.cohort import Cohort, CohortSettings
from fedmira.clients.references import References
from fedmira.data import ClientData, ClientSummary, summary_of
from fedmira.messages import ClientId, Failure, Payload, Reply, Request
from fedmira.methods import Method
from fedmira.metrics import TokenLoss, text_scores
from fedmira.model import AdapterKind, Contender
from fedmira.storage import remembered

__all__ = ["LocalClients"]


@dataclass(eq=False)
class LocalClients:
    """Trains and measures a few clients side by side; more take turns, with equal results.

    Memories stay where `restore` put them: a `MemoryTable` keeps those of clients that do not train
    on disk.

    Attributes:
        method: whose client half they run; None where nobody will train.
        kind: the adapters, on their base.
        data: the rows of each client.
        settings: how they train, the scale of each client's adapter, and the most tokens in one
            pass.
        at_once: clients whose adapters and moments are in memory together.
        references: where losses and answers are to lean on the clients' training rows.
    """

    method: Method | None
    kind: AdapterKind
    data: Mapping[ClientId, ClientData]
    settings: CohortSettings
    at_once: int = 64
    references: References | None = None
    _memories: Mapping[ClientId, Payload] = field(default_factory=dict)

    @cached_property
    def parties(self) -> Mapping[ClientId, ClientSummary]:
        """What each client says of itself."""
        return {name: summary_of(client) for name, client in self.data.items()}

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """The clients' private memories as they are now."""
        return self._memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Takes these memories, and keeps later ones in a mapping of the same kind."""
        self._memories = memories

    def unmeasured(self) -> list[Failure]:
        """Nobody: all rows are here."""
        return []

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Trains the requested clients and stores what they keep for themselves."""
        assert self.method is not None, "these clients have no method to train by"
        cohort = Cohort(self.method, self.kind, self.data, self.settings)
        answers: list[Reply | Failure] = []
        for start in range(0, len(requests), self.at_once):
            part = requests[start : start + self.at_once]
            before = {
                request.client_id: self._memories[request.client_id]
                for request in part
                if request.client_id in self._memories
            }
            after: dict[ClientId, Payload] = {}
            for request, (answer, memory) in zip(part, cohort.work(part, before), strict=True):
                if memory is not None and memory is not before.get(request.client_id):
                    after[request.client_id] = memory
                answers.append(answer)
            self._memories = remembered(self._memories, after)
        return answers

    def losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "test"
    ) -> dict[ClientId, TokenLoss]:
        """The response loss of each given client's own adapter on its own rows."""
        result: dict[ClientId, TokenLoss] = {}
        asked = [client for client in adapters if getattr(self.data[client], split)]
        for names in self._in_turns(asked):
            rows = [getattr(self.data[name], split) for name in names]
            scales = [self.settings.scales[name] for name in names]
            if self.references is not None:
                for name, scale, of_client in zip(names, scales, rows, strict=True):
                    found = self.references.losses(
                        self.data[name], adapters[name], scale, of_client
                    )
                    tokens = sum(len(row.response) for row in of_client)
                    result[name] = TokenLoss(math.fsum(found), tokens)
                continue
            # No name holds the adapters, so that they are gone before the next ones are read.
            sums = self.kind.losses(
                [adapters[name] for name in names], scales, rows, self.settings.token_budget
            )
            for name, total, of_client in zip(names, sums, rows, strict=True):
                result[name] = TokenLoss(total, sum(len(row.response) for row in of_client))
        return result

    def row_losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "validation"
    ) -> dict[ClientId, list[float]]:
        """The summed response loss of each row of each given client, in nats, in their order.

        Rows do not leave the machine that they are on, and neither do figures of single rows: other
        clients than these do not offer it.

        Args:
            adapters: by client id; each is read once.
            split: which rows; clients without such rows are left out.
        """
        result: dict[ClientId, list[float]] = {}
        for names in self._in_turns([name for name in adapters if getattr(self.data[name], split)]):
            found = self.kind.row_losses(
                [adapters[name] for name in names],
                [self.settings.scales[name] for name in names],
                [getattr(self.data[name], split) for name in names],
                self.settings.token_budget,
            )
            result |= dict(zip(names, found, strict=True))
        return result

    def choose(self, clients: Sequence[ClientId], candidates: Candidates) -> dict[ClientId, float]:
        """The candidate with the lowest loss on each client's validation rows."""
        result: dict[ClientId, float] = {}
        for names in self._in_turns(clients):
            found = {name: several for name in names if len(several := candidates(name)) > 1}
            contenders = [
                Contender(list(of.values()), self.settings.scales[name], self.data[name].validation)
                for name, of in found.items()
            ]
            choices = self.kind.choose(contenders, self.settings.token_budget)
            result |= {
                name: list(of)[choice.index]
                for (name, of), choice in zip(found.items(), choices, strict=True)
            }
        return result

    def generations(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, list[str]]:
        """Greedy answers to each given client's test prompts, in the order of its test rows.

        Args:
            adapters: by client id; each is read once.
            max_new_tokens: longest answer in tokens.
        """
        result: dict[ClientId, list[str]] = {}
        if self.references is not None:
            return {
                name: self.references.answers(
                    self.data[name],
                    adapter,
                    self.settings.scales[name],
                    [row.prompt for row in self.data[name].test],
                    max_new_tokens=max_new_tokens,
                    budget=self.settings.token_budget,
                )
                for name, adapter in adapters.items()
            }
        for names in self._in_turns(list(adapters)):
            prompts = [
                (i, row.prompt) for i, name in enumerate(names) for row in self.data[name].test
            ]
            found = self.kind.generate(
                [adapters[name] for name in names],
                [self.settings.scales[name] for name in names],
                prompts,
                max_new_tokens,
                self.settings.token_budget,
            )
            texts = iter(found)
            for name in names:
                result[name] = [next(texts) for _ in self.data[name].test]
        return result

    def score(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, dict[str, float]]:
        """The text metrics of each given client's answers against its references."""
        texts = self.generations(adapters, max_new_tokens)
        return {
            client: text_scores(predictions, self.data[client].references)
            for client, predictions in texts.items()
        }

    def _in_turns(self, clients: Sequence[ClientId]) -> Iterator[list[ClientId]]:
        """A few clients at a time, so that the memory for their adapters stays bounded."""
        for start in range(0, len(clients), self.at_once):
            yield list(clients[start : start + self.at_once])
