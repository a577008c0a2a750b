"""What the base gives on the same rows is read back, and measured anew where anything differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.adapters import Adapter
from fedmira.clients import BaseLosses, CohortSettings, InTurn, LocalClients
from fedmira.config import LocalSettings
from fedmira.data import ClientData, EncodedExample
from fedmira.model import LoraKind, find_targets, start_adapter
from tiny import draw_rows, tiny_base

NAMES = [f"client-{number}" for number in range(5)]


@pytest.fixture(scope="module")
def plain() -> LocalClients:
    """Clients without a cache, two of which have half of the others' rank."""
    base = tiny_base()
    clients = {
        name: ClientData(
            name,
            "task",
            "category",
            (),
            (),
            tuple(EncodedExample(row.prompt, row.response) for row in draw_rows(3, 6, place, 5)),
            ("",) * 3,
        )
        for place, name in enumerate(NAMES)
    }
    settings = CohortSettings(
        LocalSettings(), {name: 2.0 + (name > NAMES[2]) for name in NAMES}, 256
    )
    return LocalClients(
        None, LoraKind(base, find_targets(base.model, ()), alpha=4.0), clients, settings, at_once=2
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDMIRA_CACHE", str(tmp_path))
    return tmp_path / "base_losses"


def starts(clients: LocalClients, seed: int = 0) -> dict[str, Adapter]:
    targets = clients.kind.targets
    return {
        name: start_adapter(targets, 2 if name > NAMES[2] else 4, seed) for name in NAMES
    }  # every one another object


def counted(clients: LocalClients, adapters: dict[str, Adapter]) -> tuple[int, Any, list[str]]:
    """Passes that were made, the losses, and what was read, with a cache as a new run has it."""
    passes: list[int] = []
    handle = clients.kind.base.model.base_model.register_forward_pre_hook(
        lambda *_: passes.append(1)
    )
    cache = BaseLosses()
    losses = replace(clients, base_losses=cache).losses(adapters)
    handle.remove()
    return len(passes), losses, cache.read


def test_the_second_run_reads_what_the_first_measured_to_the_bit(
    plain: LocalClients, folder: Path
) -> None:
    first, measured, said = counted(plain, starts(plain))
    assert first > 0 and said == [] and len(list(folder.iterdir())) == 1
    again, read, said = counted(plain, starts(plain, seed=1))
    assert (again, said) == (0, ["test"]), "another draw of A is the same base, as B is zero"
    assert read == measured and list(read) == NAMES
    for name, loss in plain.losses(starts(plain)).items():
        assert measured[name].total == pytest.approx(loss.total, rel=1e-5)
        assert measured[name].tokens == loss.tokens


def other_rows(clients: LocalClients) -> LocalClients:
    one = clients.data[NAMES[0]]
    first, *others = one.test
    changed = EncodedExample(first.prompt, (first.response[0] + 1, *first.response[1:]))
    return replace(
        clients, data={**clients.data, one.client_id: replace(one, test=(changed, *others))}
    )


def other_base(clients: LocalClients) -> LocalClients:
    assert isinstance(clients.kind, LoraKind)
    return replace(
        clients, kind=replace(clients.kind, base=replace(clients.kind.base, sha256="another"))
    )


OTHERS: dict[str, Callable[[LocalClients], LocalClients]] = {
    "rows": other_rows,
    "base": other_base,
    "budget": lambda one: replace(one, settings=replace(one.settings, token_budget=64)),
    "shares": lambda one: replace(one, at_once=3),
    "threads": lambda one: replace(one, crew=InTurn(torch.get_num_threads() + 1)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_the_bits_depend_on_is_measured_anew(
    what: str, plain: LocalClients, folder: Path
) -> None:
    counted(plain, starts(plain))
    passes, _, said = counted(OTHERS[what](plain), starts(plain))
    assert passes > 0 and said == []
    assert len(list(folder.iterdir())) == 2


def test_trained_adapters_are_never_looked_up(plain: LocalClients, folder: Path) -> None:
    counted(plain, starts(plain))
    adapters = starts(plain)
    name = next(name for name in adapters[NAMES[3]] if name.endswith("lora_B.weight"))
    adapters[NAMES[3]] = {
        **adapters[NAMES[3]],
        name: torch.full_like(adapters[NAMES[3]][name], 0.5),
    }
    passes, losses, said = counted(plain, adapters)
    assert passes > 0 and said == [] and len(list(folder.iterdir())) == 1
    base = plain.losses(starts(plain))
    assert losses[NAMES[3]].total != pytest.approx(base[NAMES[3]].total, rel=1e-4)


def test_a_damaged_file_is_named_and_made_anew(
    plain: LocalClients, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, measured, _ = counted(plain, starts(plain))
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(content.replace(b".", b"1", 1))
    passes, losses, said = counted(plain, starts(plain))
    assert passes > 0 and said == [] and losses == measured
    assert path.name in caplog.text and "measured again" in caplog.text
    assert path.read_bytes() == content


def test_nothing_is_kept_where_the_cache_is_off(
    plain: LocalClients, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMIRA_CACHE", "off")
    for _ in range(2):
        passes, _, said = counted(plain, starts(plain))
        assert passes > 0 and said == []
    assert not folder.exists()
