"""One client's rows, read alone, are those that it has in the whole federation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedmira.data import load_clients, load_own
from fedmira.errors import DataError
from small import CLIENTS, make_config
from tiny import tiny_tokenizer


@pytest.mark.parametrize(
    "settings", [{}, {"data.sample_fraction": 0.9, "data.max_rows": 5, "data.test_rows": 2}]
)
def test_the_rows_are_those_of_the_whole_federation(
    settings: dict[str, object], clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config("bundled", clients_folder, settings)
    everybody = {
        client.client_id: client
        for client in load_clients(config.data, 7, tiny_tokenizer()).clients
    }
    for name in CLIENTS:
        shutil.copytree(clients_folder / name, tmp_path / name / name)
        alone = config.data.model_copy(update={"path": str(tmp_path / name), "clients": 3})
        assert (
            load_own(alone, 7, tiny_tokenizer(), name)
            == load_own(config.data, 7, tiny_tokenizer(), name)
            == everybody[name]
        )


def test_a_single_client_is_taken_whatever_it_is_called(
    clients_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(clients_folder / "apple-1", tmp_path / "here" / "rows")
    config = make_config("bundled", tmp_path / "here")
    own = load_own(config.data, 0, tiny_tokenizer(), "north")
    elsewhere = load_own(
        make_config("bundled", clients_folder).data, 0, tiny_tokenizer(), "apple-1"
    )
    assert own.client_id == "north" and sorted(
        own.train + own.validation + own.test, key=repr
    ) == sorted(elsewhere.train + elsewhere.validation + elsewhere.test, key=repr)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "holds 5 clients, and none is called 'cedar'"),
        ({"data.partition": "dirichlet"}, "deals the rows of all clients"),
        ({"data.max_rows": [3, 4]}, "data.max_rows is a list"),
    ],
)
def test_what_needs_the_other_clients_is_refused(
    settings: dict[str, object], problem: str, clients_folder: Path
) -> None:
    with pytest.raises(DataError, match=problem):
        load_own(
            make_config("bundled", clients_folder, settings).data, 0, tiny_tokenizer(), "cedar"
        )
