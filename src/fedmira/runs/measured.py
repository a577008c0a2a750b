"""Losses that a run has measured, so that nobody is measured twice with the same adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmira.adapters import LazyAdapters
from fedmira.clients import Clients, LocalClients, OverWire, SplitName
from fedmira.messages import ClientId
from fedmira.metrics import TokenLoss

__all__ = ["Best", "Measured", "rows_here"]


@dataclass(frozen=True, slots=True)
class Best:
    """A client's best round by its own validation rows, with its test loss in that round.

    Attributes:
        round: its number.
        validation_loss: nats per response token of the client's validation rows.
        test_loss: nats per response token of its test rows; None where these are not looked at.
    """

    round: int
    validation_loss: float
    test_loss: float | None


@dataclass(frozen=True, slots=True)
class _Figure:
    """A loss, the content hash of the adapter that has it, and the loss of each row if known."""

    sha256: str
    loss: TokenLoss
    rows: tuple[float, ...] | None = None


class Measured:
    """Each client's last loss on its test and on its validation rows.

    A client whose adapter has the same content hash as then keeps it, bit for bit: such as one that
    has not trained since, where the method changes nobody else. What is remembered is part of the
    checkpoint, as a pass over fewer clients' rows rounds differently.

    Args:
        clients: who measures.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._known: dict[SplitName, dict[ClientId, _Figure]] = {"test": {}, "validation": {}}

    def losses(self, adapters: LazyAdapters, split: SplitName) -> dict[ClientId, TokenLoss]:
        """The loss of each given client's own adapter on its own rows.

        Args:
            adapters: by client id, with their hashes.
            split: which rows; clients without such rows are left out.
        """
        found = self._figures(adapters, split)
        return {client: figure.loss for client, figure in found.items()}

    def validation_rows(self, adapters: LazyAdapters) -> dict[ClientId, tuple[float, ...]]:
        """The summed loss of each validation row in nats; empty where rows are elsewhere.

        Args:
            adapters: by client id, with their hashes.
        """
        found = self._figures(adapters, "validation") if rows_here(self._clients) else {}
        return {client: figure.rows for client, figure in found.items() if figure.rows is not None}

    def as_json(self) -> dict[str, Any]:
        """What is remembered, for the checkpoint."""
        numbers: dict[str, int] = {}
        splits: dict[str, Any] = {
            split: {
                client: [
                    numbers.setdefault(figure.sha256, len(numbers)),
                    figure.loss.tokens,
                    figure.loss.total if figure.rows is None else list(figure.rows),
                ]
                for client, figure in known.items()
            }
            for split, known in self._known.items()
        }
        return {"hashes": list(numbers), **splits}

    def restore(self, document: Mapping[str, Any]) -> None:
        """Remember what a checkpoint holds, and nothing else.

        Args:
            document: of `as_json`, or empty.
        """
        hashes = document.get("hashes", [])
        for split, known in self._known.items():
            known.clear()
            for client, (number, tokens, values) in document.get(split, {}).items():
                known[client] = _figure(hashes[number], tokens, values)

    def _figures(self, adapters: LazyAdapters, split: SplitName) -> dict[ClientId, _Figure]:
        known = self._known[split]
        hashes = {client: str(adapters.hash_of(client)) for client in adapters}
        others = adapters.only(
            client
            for client, sha256 in hashes.items()
            if client not in known or known[client].sha256 != sha256
        )
        for client in others:
            known.pop(client, None)
        if others:
            known |= self._measured(others, split, hashes)
        return {client: known[client] for client in adapters if client in known}

    def _measured(
        self, adapters: LazyAdapters, split: SplitName, hashes: Mapping[ClientId, str]
    ) -> dict[ClientId, _Figure]:
        here = rows_here(self._clients)
        if here is None or split != "validation":
            found = self._clients.losses(adapters, split)
            return {client: _Figure(hashes[client], loss) for client, loss in found.items()}
        return {
            client: _figure(
                hashes[client], sum(len(row.response) for row in here.data[client].validation), rows
            )
            for client, rows in here.row_losses(adapters, split).items()
        }


def rows_here(clients: Clients) -> LocalClients | None:
    """The clients whose rows are in this process; None where they are on other machines.

    Args:
        clients: perhaps behind a wire.
    """
    inner = clients.inner if isinstance(clients, OverWire) else clients
    return inner if isinstance(inner, LocalClients) else None


def _figure(sha256: str, tokens: int, values: float | Sequence[float]) -> _Figure:
    """From a total, or from the loss of each row."""
    if isinstance(values, Sequence):
        return _Figure(sha256, TokenLoss(math.fsum(values), tokens), tuple(values))
    return _Figure(sha256, TokenLoss(values, tokens))
