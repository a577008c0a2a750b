"""Which method's adapter each client should take, from what runs wrote of validation rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from fedmira.metrics import Judgement, judge
from fedmira.report.records import Run

__all__ = ["judgements"]

_Rows: TypeAlias = Mapping[tuple[int, int], tuple[int, float]]
"""(seed, number of the row) -> its response tokens, and their summed loss in nats."""


def judgements(methods: Mapping[str, Mapping[int, Run]], own: str) -> dict[str, Judgement]:
    """Client -> what the rule of `fedmira.metrics.gate` says, over the rows of all seeds.

    Clients whose validation rows not every run of every method has written are left out.

    Args:
        methods: method -> seed -> run.
        own: the method that trains alone.
    """
    found = {name: _by_client(runs) for name, runs in methods.items()}
    common = set.intersection(*(set(clients) for clients in found.values()))
    told: dict[str, Judgement] = {}
    for client in found[own]:
        if client not in common:
            continue
        tokens = {place: count for place, (count, _) in found[own][client].items()}
        losses = {name: clients[client] for name, clients in found.items()}
        if any(
            {place: count for place, (count, _) in rows.items()} != tokens
            for rows in losses.values()
        ):
            continue
        values = {name: [loss for _, loss in rows.values()] for name, rows in losses.items()}
        told[client] = judge(values, list(tokens.values()), own)
    return told


def _by_client(runs: Mapping[int, Run]) -> dict[str, _Rows]:
    """Client -> its validation rows, of all seeds one after the other."""
    clients: dict[str, dict[tuple[int, int], tuple[int, float]]] = {}
    for seed, run in sorted(runs.items()):
        for row in run.validation:
            if row.row is not None and row.tokens is not None:
                loss = math.inf if row.loss is None else row.loss
                clients.setdefault(row.client, {})[seed, int(row.row)] = int(row.tokens), loss
    return {client: dict(sorted(rows.items())) for client, rows in clients.items()}
