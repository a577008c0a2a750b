"""Evaluation of many clients reads few adapters at a time.

Each client gets what it gets alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.clients import CohortSettings, LocalClients
from fedmira.clients.owners import dealt, owners_of
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


def positions_of(measured: LocalClients, adapters: Mapping[str, Adapter]) -> tuple[int, Any]:
    """Token positions that the base computes to measure these adapters, and the losses."""
    counted: list[int] = []

    def count(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        counted.append(options["input_ids"].numel())

    handle = measured.kind.base.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    losses = measured.losses(adapters)
    handle.remove()
    return sum(counted), losses


def test_clients_with_equal_adapters_share_beginnings_and_keep_their_losses(
    measured: LocalClients,
) -> None:
    opening = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24)
    names = [str(number) for number in range(12)]
    clients = {
        name: replace(
            measured.data[name],
            test=(EncodedExample((*opening, 30 + int(name)), (40, 41 + int(name) % 3)),),
        )
        for name in names
    }
    one = replace(measured, data=clients, at_once=3)
    common = OnDisk(list(measured.kind.targets), ["7"])["7"]
    apart, expected = positions_of(one, {name: dict(common) for name in names})
    together, found = positions_of(one, dict.fromkeys(names, common))
    assert apart == len(names) * (len(opening) + 2), "nothing is shared between adapters"
    assert together == len(opening) + len(names) * 2, "the opening once for all"
    assert list(found) == names
    for name in names:
        assert found[name].tokens == 2
        assert found[name].total == pytest.approx(expected[name].total, rel=1e-5)


def test_who_takes_turns_shares_nothing_with_others(measured: LocalClients) -> None:
    names = [str(number) for number in range(6) if measured.data[str(number)].test]
    common = OnDisk(list(measured.kind.targets), ["7"])["7"]
    alone = replace(measured, at_once=1)
    together = alone.losses(dict.fromkeys(names, common))
    assert together == {name: alone.losses({name: common})[name] for name in names}


def test_shares_of_owners_depend_on_owners_alone(measured: LocalClients) -> None:
    """Four clients have one adapter, of 40 tokens in all; two have one each, of 10 and 30."""
    lengths = {"a": 10, "b": 10, "c": 10, "d": 30, "e": 10, "f": 10}
    rows = {name: (EncodedExample((ord(name),) * (n - 1), (1,)),) for name, n in lengths.items()}
    common: Adapter = {}
    adapters: dict[str, Adapter] = {
        "a": common, "b": {}, "c": common, "d": {}, "e": common, "f": common
    }  # fmt: skip
    owners = owners_of(adapters, list(lengths), rows.__getitem__, dict.fromkeys(lengths, 1.0), 20)
    assert [[name for name, _ in owner.places] for owner in owners] == [
        ["a", "c"], ["e", "f"], ["b"], ["d"]
    ]  # fmt: skip
    assert [owner.tokens for owner in owners] == [20, 20, 10, 30]
    shares = [[owner.client for owner in share] for share in dealt(owners, 4, 20)]
    assert shares == [["a"], ["a"], ["b", "d"]], "a share is complete at 20 tokens"
    assert [len(share) for share in dealt(owners, 2, 1000)] == [2, 2]
    scaled = owners_of(adapters, ["a", "c"], rows.__getitem__, {"a": 1.0, "c": 2.0}, 20)
    assert [owner.client for owner in scaled] == ["a", "c"], "another scale is another update"
