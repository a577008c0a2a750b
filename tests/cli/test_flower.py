"""`fedmira flower init` writes an app folder from which the same config is read again."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedmira.config import (
    Config,
    dump_config,
    flattened,
    load_config,
    unflattened,
)
from fedmira.federation.policy import NodePolicy, is_own, read_policy
from small import call_main, make_config


def test_the_app_holds_the_config_and_names_both_halves(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        base_folder,
        clients_folder,
        {
            "adapter.ranks": {"apple-1": 2, "birch-2": 8},
            "federation.clients": ["apple-1", "birch-2"],
        },
    )
    file = tmp_path / "run.toml"
    file.write_text(dump_config(config), encoding="utf-8")
    ended = call_main(
        "flower",
        "init",
        tmp_path / "app",
        "--config",
        file,
        "--output",
        tmp_path / "out",
        "--set",
        "rounds.count=9",
    )
    assert ended.code == 0, ended.err
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["pyproject.toml"]
    app = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "flwr"
    ]["app"]
    assert app["components"] == {
        "serverapp": "fedmira.flower_app:server_app",
        "clientapp": "fedmira.flower_app:client_app",
    }
    settings = app["config"]
    assert (settings.pop("output"), settings.pop("resume"), settings.pop("simulation")) == (
        str(tmp_path / "out"),
        False,
        False,
    )
    own = dotted(settings.pop("server-only"))
    shared = dotted(settings)
    assert not [key for key in shared if is_own(key)], "no node is sent what is its own"
    assert {"data.source", "data.path", "model.base", "model.device"} <= set(own)
    assert unflattened({**shared, **own}) == load_config(file, None, ["rounds.count=9"])


def test_an_app_for_simulation_says_so_and_may_deal_rows_among_clients(tmp_path: Path) -> None:
    ended = call_main(
        "flower", "init", tmp_path / "app", "--simulation", "--set", "data.partition=category"
    )
    assert ended.code == 0, ended.err
    document = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text(encoding="utf-8"))
    assert document["tool"]["flwr"]["app"]["config"]["simulation"] is True
    assert document["project"]["dependencies"] == ["fedmira[flower-simulation]"]


def dotted(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested tables under dotted keys, as Flower reads them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        flat |= dotted(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "adapter.targets": ["q_proj", "v_proj"],
            "data.max_rows": [16, 0, 8],
            "federation.clients": ['odd "name"', "[brackets]"],
        },
        {"adapter.ranks": {"clinic-north": 8, "a b": 2}},
        {"algorithm.name": "fedavg", "data.column": "8", "data.split": "true"},
    ],
)
def test_a_flat_config_is_the_config_again(settings: dict[str, object]) -> None:
    config = make_config("bundled", "", {"data.source": "demo", **settings})
    flat = flattened(config)
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert unflattened(flat) == Config.model_validate(config.model_dump())


@pytest.mark.parametrize(
    ("folder", "problem"), [("taken", "exists already"), ("Not Right", "small letters")]
)
def test_a_folder_that_cannot_be_an_app_is_refused(
    folder: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    ended = call_main("flower", "init", tmp_path / folder)
    assert ended.code == 2 and problem in ended.err


def test_settings_that_need_all_rows_in_one_place_are_refused(tmp_path: Path) -> None:
    ended = call_main(
        "flower",
        "init",
        tmp_path / "app",
        "--set",
        "data.max_rows=[4, 8]",
        "--set",
        "data.partition=category",
    )
    assert (
        ended.code == 2
        and "data.max_rows is a list" in ended.err
        and "deals the rows of all clients" in ended.err
    )
    assert not (tmp_path / "app").exists()


def test_the_policy_of_a_node_is_strict_and_says_how_its_rows_are_read(
    clients_folder: Path, tmp_path: Path
) -> None:
    options = ["--set", "data.source=jsonl", "--set", f"data.path={clients_folder}"]
    options += ["--set", 'data.columns={output="Antwort"}', "--set", "rounds.count=2000"]
    ended = call_main("flower", "init", tmp_path / "rows", "--node", *options)
    assert ended.code == 0, ended.err
    path = tmp_path / "rows" / "policy.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    policy, default = read_policy(path), NodePolicy()
    assert (policy.data["source"], policy.data["path"]) == ("jsonl", str(clients_folder))
    assert policy.data["columns"]["output"] == "Antwort"
    assert policy.limits == default.limits.model_copy(update={"most_rounds": 2000})
    assert policy.tells == default.tells
    assert "limits.most_rounds is 2000" in ended.err
    again = call_main("flower", "init", tmp_path / "rows", "--node")
    assert again.code == 2 and "exists already and is never overwritten" in again.err
