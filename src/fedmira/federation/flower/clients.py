"""Clients on machines of their own, each a node that answers from its rows.

The nodes are asked over Flower's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from fedmira.adapters import Adapter
from fedmira.clients import Candidates, SplitName
from fedmira.data import ClientSummary
from fedmira.errors import WireError
from fedmira.federation.ends import ServerEnd
from fedmira.federation.flower.nodes import Nodes, Problem
from fedmira.messages import ClientId, Failure, Payload, Reply, Request
from fedmira.metrics import TEXT_METRICS, TokenLoss
from fedmira.shown import cut, plain
from fedmira.wire import (
    CHOICE,
    LONGEST_TEXT,
    LOSSES,
    SCORES,
    TRAIN,
    Encoded,
    Header,
    Line,
    encode,
    number,
    whole_number,
)

__all__ = ["FlowerClients"]

Result = TypeVar("Result")
_NODES_AT_ONCE = 64
_ADAPTER = "adapter"
_MOST_LOSS, _MOST_TOKENS = 1e6, 10**13
"""Nats a token, and tokens that are measured."""


class FlowerClients:
    """Sends each client's node its own request; nodes keep their private memories themselves.

    A client whose node does not answer a measurement is left out and told of by `unmeasured`.

    Args:
        nodes: of the federation.
        parties: what each client says of itself.
        end: this end of the lines to the clients.
        min_replies: before a round of which fewer nodes are connected, it waits for them.
        wait_s: how long it waits, in seconds.
    """

    def __init__(
        self,
        nodes: Nodes,
        parties: Mapping[ClientId, ClientSummary],
        end: ServerEnd,
        min_replies: int,
        wait_s: float,
    ) -> None:
        self._nodes = nodes
        self._parties = dict(parties)
        self._end = end
        self._min_replies = min_replies
        self._wait_s = wait_s
        self._unmeasured: list[Failure] = []

    @property
    def method(self) -> None:
        """Nodes have the client half of the method themselves."""
        return None

    @property
    def parties(self) -> Mapping[ClientId, ClientSummary]:
        """What each client says of itself."""
        return self._parties

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """What this end remembers of each line; of the clients' own memories it knows nothing."""
        return self._end.memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Takes these lines, empty or from a checkpoint."""
        self._end.restore(memories)

    def waiting(self) -> Mapping[ClientId, ClientSummary]:
        """What those say of themselves who may join, sorted by name; nobody is waited for."""
        return self._nodes.waiting()

    def admit(self, parties: Mapping[ClientId, ClientSummary]) -> None:
        """From now on these are clients too, with the rows that they have now.

        Args:
            parties: newcomers.
        """
        self._parties |= parties
        self._nodes.close(self._parties)

    def dismiss(self, clients: Sequence[ClientId]) -> None:
        """Takes back what `admit` did.

        Args:
            clients: that were admitted last.
        """
        self._parties = {name: of for name, of in self._parties.items() if name not in clients}
        self._nodes.close(self._parties)

    def turn_away(self, client: ClientId, reason: str) -> None:
        """Says to a newcomer why it cannot take part.

        Args:
            client: that waits.
            reason: in words.
        """
        self._nodes.turn_away(client, reason)

    def turned_away(self) -> Sequence[str]:
        """Why newcomers were turned away since this was asked last."""
        return self._nodes.turned_away()

    def unmeasured(self) -> list[Failure]:
        """Clients that could not be asked since this was called last, and why."""
        told, self._unmeasured = self._unmeasured, []
        return told

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """One reply or failure per request.

        A node that is not there, late, or answers nonsense is a failure.
        """
        chosen = [request.client_id for request in requests]
        self._nodes.gather(chosen, min(self._min_replies, len(chosen)), self._wait_s)
        messages = {request.client_id: self._end.send(request) for request in requests}
        answers = self._nodes.ask(TRAIN, messages, str(requests[0].round))
        return [
            self._end.lost(request, answer.stage, answer.reason)
            if isinstance(answer, Problem)
            else self._end.receive(request, answer)
            for request in requests
            for answer in (answers[request.client_id],)
        ]

    def losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "test"
    ) -> dict[ClientId, TokenLoss]:
        """The response loss of each given client's adapter on its rows of `split`.

        Clients without such rows are left out.
        """
        asked = [client for client in adapters if getattr(self._parties[client], f"{split}_rows")]
        messages = self._messages(
            asked, lambda client: {_ADAPTER: adapters[client]}, {"split": split}
        )
        most = (
            {client: getattr(self._parties[client], f"{split}_response_tokens") for client in asked}
            if split in ("test", "train")
            else {}
        )
        return self._ask(
            LOSSES, messages, lambda client, header: _read_loss(header, most.get(client))
        )

    def choose(self, clients: Sequence[ClientId], candidates: Candidates) -> dict[ClientId, float]:
        """The key of the candidate with the lowest loss on each client's validation rows.

        Clients with one candidate are left out.
        """
        keys = {client: tuple(candidates(client)) for client in clients}
        several = [client for client in clients if len(keys[client]) > 1]
        messages = self._messages(
            several, lambda client: {repr(key): of for key, of in candidates(client).items()}, {}
        )
        return self._ask(
            CHOICE, messages, lambda client, header: _read_choice(header, keys[client])
        )

    def score(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, dict[str, float]]:
        """The text metrics of each given client's answers to its test prompts."""
        messages = self._messages(
            list(adapters),
            lambda client: {_ADAPTER: adapters[client]},
            {"max_new_tokens": max_new_tokens},
        )
        return self._ask(
            SCORES,
            messages,
            lambda client, header: _read_scores(header),
        )

    def _messages(
        self,
        clients: Sequence[ClientId],
        parts: Callable[[ClientId], Mapping[str, Adapter]],
        header: Header,
    ) -> Iterator[dict[ClientId, Encoded]]:
        """The clients' messages, a few at a time, so that memory stays bounded."""
        for start in range(0, len(clients), _NODES_AT_ONCE):
            names = clients[start : start + _NODES_AT_ONCE]
            written = {
                client: encode(Payload(parts(client)), "float32", Line())[0] for client in names
            }
            yield {
                client: Encoded(message.arrays, {**message.header, **header})
                for client, message in written.items()
            }

    def _ask(
        self,
        kind: str,
        messages: Iterable[Mapping[ClientId, Encoded]],
        read: Callable[[ClientId, Header], Result],
    ) -> dict[ClientId, Result]:
        """What `read` finds in each answer; clients without a readable one are noted."""
        found: dict[ClientId, Result] = {}
        for batch in messages:
            answers = self._nodes.ask(kind, batch, "evaluation")
            for client in batch:
                answer = answers[client]
                try:
                    if isinstance(answer, Problem):
                        raise WireError(answer.reason)
                    found[client] = read(client, answer.header)
                except WireError as error:
                    told = plain(cut(str(error), LONGEST_TEXT))
                    self._unmeasured.append(Failure(client, 0, "evaluate", told))
        return found


def _read_loss(header: Header, most: int | None) -> TokenLoss:
    """A loss that a node measured.

    Args:
        header: of its answer.
        most: response tokens that the client said it has in this part; None where it said nothing.

    Raises:
        WireError: it is none, or one that cannot be.
    """
    tokens, total = whole_number(header, "tokens"), number(header, "total")
    if tokens == 0:
        raise WireError(
            "the node measured no response tokens, though it said that it has such rows"
        )
    if tokens > (_MOST_TOKENS if most is None else most):
        raise WireError(
            f"the node measured {str(tokens)[:40]} response tokens; at the start it said that it "
            f"has {_MOST_TOKENS if most is None else most}"
        )
    if math.isfinite(total) and abs(total) > _MOST_LOSS * tokens:
        raise WireError(
            f"the node measured {total / tokens:g} nats a token; must be at most {_MOST_LOSS:g}"
        )
    return TokenLoss(total, tokens)


def _read_scores(header: Header) -> dict[str, float]:
    """Every text metric of the table, as a node measured it; what it measured besides is left out.

    Raises:
        WireError: a metric is missing, which a node of another version may not know, or no number.
    """
    if absent := [name for name in TEXT_METRICS if name not in header]:
        raise WireError(
            f"the node sent no {' and no '.join(absent)}; it sent {', '.join(sorted(header))}. "
            "Its fedmira may be of another version: install the server's version there"
        )
    scores = {name: number(header, name) for name in TEXT_METRICS}
    for name, value in scores.items():
        if not 0 <= value <= 1:
            raise WireError(f"the node's {name} is {value:g}; must be from 0 to 1")
    return scores


def _read_choice(header: Header, keys: Sequence[float]) -> float:
    """The key that a node chose.

    Raises:
        WireError: it is none of those that it was offered.
    """
    chosen = number(header, "chosen")
    if chosen not in keys:
        raise WireError(f"the node chose {chosen!r}; it was offered {', '.join(map(repr, keys))}")
    return chosen
