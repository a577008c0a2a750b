"""Evaluation of many clients reads few adapters at a time.

Each client gets what it gets alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.clients import CohortSettings, LocalClients
from fedmira.config import LocalSettings
from fedmira.data import ClientData, EncodedExample
from fedmira.model import (
    LoraKind,
    TargetModule,
    find_targets,
    start_adapter,
)
from tiny import draw_rows, tiny_base

CLIENTS = 130
AT_ONCE = 64


class OnDisk(Mapping[str, Adapter]):
    """Makes an adapter when it is asked for, and counts how many of those are still held."""

    def __init__(self, targets: list[TargetModule], clients: list[str]) -> None:
        self._targets, self._clients, self._made = targets, clients, weakref.WeakSet[Tensor]()
        self.most_held = self.reads = 0

    def __getitem__(self, client: str) -> Adapter:
        draw = torch.Generator().manual_seed(int(client))
        adapter = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in start_adapter(self._targets, 2, 0).items()
        }
        self._made.add(next(iter(adapter.values())))
        self.most_held, self.reads = max(self.most_held, len(self._made)), self.reads + 1
        return adapter

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)


@pytest.fixture(scope="module")
def measured() -> LocalClients:
    base = tiny_base()
    clients = {}
    for number in range(CLIENTS):
        rows = tuple(
            EncodedExample(row.prompt, row.response) for row in draw_rows(number % 3, 4, number, 6)
        )
        clients[str(number)] = ClientData(
            str(number), "task", "category", (), (), rows, ("",) * len(rows)
        )
    settings = CohortSettings(LocalSettings(), dict.fromkeys(clients, 2.0), 512)
    return LocalClients(
        None, LoraKind(base, find_targets(base.model, ()), alpha=4.0), clients, settings
    )


def test_losses_read_each_needed_adapter_once_and_hold_few(measured: LocalClients) -> None:
    adapters = OnDisk(list(measured.kind.targets), list(measured.data))
    losses = measured.losses(adapters)
    asked = [client for client, data in measured.data.items() if data.test]
    assert list(losses) == asked and adapters.reads == len(asked) and adapters.most_held <= AT_ONCE
    for client in asked[::20]:
        assert losses[client].total == pytest.approx(
            measured.losses({client: adapters[client]})[client].total, rel=1e-5
        )


def test_losses_of_single_rows_are_those_of_clients_with_that_row_alone(
    measured: LocalClients,
) -> None:
    adapters = OnDisk(list(measured.kind.targets), list(measured.data))
    found = measured.row_losses(adapters, "test")
    asked = [client for client, data in measured.data.items() if data.test]
    assert list(found) == asked and adapters.reads == len(asked) and adapters.most_held <= AT_ONCE
    for client in asked[::25]:
        data = measured.data[client]
        for row, loss in zip(data.test, found[client], strict=True):
            alone = replace(measured, data={client: replace(data, test=(row,))})
            one = alone.losses({client: adapters[client]})[client]
            assert loss == pytest.approx(one.total, rel=1e-5)
    assert measured.row_losses(adapters) == {}, "nobody has validation rows"


def test_generations_read_each_adapter_once_and_hold_few(measured: LocalClients) -> None:
    adapters = OnDisk(list(measured.kind.targets), list(measured.data))
    texts = measured.generations(adapters, 4)
    assert (
        list(texts) == list(measured.data)
        and adapters.reads == CLIENTS
        and adapters.most_held <= AT_ONCE
    )
    assert [len(found) for found in texts.values()] == [
        len(data.test) for data in measured.data.values()
    ]
    for client in list(texts)[1::20]:
        assert texts[client] == measured.generations({client: adapters[client]}, 4)[client]
