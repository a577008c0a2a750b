"""Each client's own adapter on its own rows: loss per response token, and greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedmira.adapters import Adapter
from fedmira.clients.evaluation import SplitName
from fedmira.data import ClientData, ClientSummary, summary_of
from fedmira.messages import ClientId, Failure
from fedmira.metrics import TokenLoss, text_scores
from fedmira.model import AdapterKind, Contender

__all__ = ["Evaluator"]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates clients on one resident base model; no state, no randomness.

    Attributes:
        kind: the adapters, on their base.
        scales: of each client's adapter.
        token_budget: most token positions in one forward pass.
        at_once: clients whose adapters are in memory together.
    """

    kind: AdapterKind
    clients: Mapping[ClientId, ClientData]
    scales: Mapping[ClientId, float]
    token_budget: int
    at_once: int = 64

    @cached_property
    def parties(self) -> Mapping[ClientId, ClientSummary]:
        """What each client says of itself."""
        return {name: summary_of(client) for name, client in self.clients.items()}

    def unmeasured(self) -> list[Failure]:
        """None: all rows are here."""
        return []

    def losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "test"
    ) -> dict[ClientId, TokenLoss]:
        """The response loss of each given client's adapter on its rows of `split`.

        Clients without such rows are left out.
        """
        result: dict[ClientId, TokenLoss] = {}
        asked = [client for client in adapters if getattr(self.clients[client], split)]
        for names in self._in_turns(asked):
            rows = [getattr(self.clients[name], split) for name in names]
            scales = [self.scales[name] for name in names]
            sums = self.kind.losses(
                [adapters[name] for name in names], scales, rows, self.token_budget
            )
            for name, total, of_client in zip(names, sums, rows, strict=True):
                result[name] = TokenLoss(total, sum(len(row.response) for row in of_client))
        return result

    def chosen(
        self, clients: Sequence[ClientId], candidates: Callable[[ClientId], Mapping[float, Adapter]]
    ) -> dict[ClientId, float]:
        """The key of the candidate with the lowest loss on each client's validation rows.

        Clients with one candidate are left out.

        Args:
            candidates: of a client; of equals the first is taken, and without validation rows the
                last.
        """
        result: dict[ClientId, float] = {}
        for names in self._in_turns(clients):
            found = {name: several for name in names if len(several := candidates(name)) > 1}
            contenders = [
                Contender(list(of.values()), self.scales[name], self.clients[name].validation)
                for name, of in found.items()
            ]
            choices = self.kind.choose(contenders, self.token_budget)
            result |= {
                name: list(of)[choice.index]
                for (name, of), choice in zip(found.items(), choices, strict=True)
            }
        return result

    def generations(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, list[str]]:
        """Greedy continuations of each given client's test prompts, in the order of its test rows."""
        result: dict[ClientId, list[str]] = {}
        for names in self._in_turns(list(adapters)):
            prompts = [
                (i, row.prompt) for i, name in enumerate(names) for row in self.clients[name].test
            ]
            scales = [self.scales[name] for name in names]
            found = self.kind.generate(
                [adapters[name] for name in names],
                scales,
                prompts,
                max_new_tokens,
                self.token_budget,
            )
            texts = iter(found)
            for name in names:
                result[name] = [next(texts) for _ in self.clients[name].test]
        return result

    def text_scores(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, dict[str, float]]:
        """Rouge-L in both dialects and exact match of each given client's generations against its references."""
        texts = self.generations(adapters, max_new_tokens)
        return {
            client: text_scores(predictions, self.clients[client].references)
            for client, predictions in texts.items()
        }

    def _in_turns(self, clients: Sequence[ClientId]) -> Iterator[list[ClientId]]:
        """A few clients at a time, so that the memory for their adapters stays bounded."""
        for start in range(0, len(clients), self.at_once):
            yield list(clients[start : start + self.at_once])
