"""Keys of [federation] in runs that are no federation."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedmira
from fedmira.config import dump_config, load_config, refuse_federation
from fedmira.errors import ConfigError
from fedmira.studies import compare_algorithms

WRITTEN = {"federation.nodes": 3, "federation.clients": ["a", "b"], "federation.wait_s": 120.0}


def test_every_written_key_that_differs_from_its_default_is_named_with_the_way_out() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_federation(load_config(settings=WRITTEN), load_config(settings=WRITTEN))
    clients, nodes = caught.value.problems
    assert clients.startswith('federation.clients = ["a", "b"]: ')
    assert nodes.startswith("federation.nodes = 3: ")
    assert "does not read it; leave it out, or train over Flower" in nodes


def test_a_section_that_is_written_out_in_full_passes(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(dump_config(load_config(settings=WRITTEN)), encoding="utf-8")
    config = load_config(path)
    refuse_federation(config)
    assert config.federation.nodes == 3


def test_defaults_and_a_config_without_the_section_pass() -> None:
    refuse_federation(load_config(), load_config(settings={"federation.nodes": 2}))


def test_run_and_compare_refuse_them_before_anything_is_made(tmp_path: Path) -> None:
    for call in (
        lambda: fedmira.run(settings={"federation.nodes": 3}, output=tmp_path / "run"),
        lambda: fedmira.compare(
            ["local"], settings={"federation.nodes": 3}, output=tmp_path / "runs"
        ),
        lambda: compare_algorithms(
            load_config(),
            ["local"],
            (0,),
            tmp_path / "variants",
            variants={"more": ["federation.nodes=3"]},
        ),
    ):
        with pytest.raises(ConfigError, match=r"federation\.nodes = 3: .* does not read it"):
            call()
    assert list(tmp_path.iterdir()) == []
