"""Controls are added to a comparison, and found among its methods by their settings."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedmira
from fedmira.errors import ConfigError
from fedmira.model import BaseModel
from fedmira.studies import plan_methods
from fedmira.studies.controls import controls_of, with_controls
from small import make_config


def test_each_method_is_followed_by_its_controls(base_folder: Path, clients_folder: Path) -> None:
    config = make_config(base_folder, clients_folder)
    plans = with_controls(plan_methods(config, ["local", "two-level", "mira"]))
    assert list(plans) == [
        *("local", "two-level", "two-level-alone", "two-level-common", "two-level-shuffled"),
        *("mira", "mira-shuffled"),
    ]
    alone = plans["two-level-alone"].algorithm
    assert (alone.coupling, alone.common_rank) == (0.0, 0)  # type: ignore[attr-defined]
    assert plans["mira-shuffled"].graph.shuffled and not plans["mira"].graph.shuffled
    assert controls_of(plans) == {
        "two-level": "two-level-alone",
        "two-level-common": "two-level-alone",
    }


def test_a_control_is_known_by_its_settings(base_folder: Path, clients_folder: Path) -> None:
    config = make_config(base_folder, clients_folder)
    own = {
        "half": ["algorithm.name=two-level", "algorithm.coupling=0.5"],
        "nothing": ["algorithm.name=two-level", "algorithm.coupling=0", "algorithm.common_rank=0"],
    }
    plans = plan_methods(config, ["two-level"], own)
    assert controls_of(plans) == {"two-level": "nothing", "half": "nothing"}
    assert controls_of(plan_methods(config, ["local", "two-level"])) == {}
    with pytest.raises(ConfigError, match="none of local, fedavg has a control"):
        with_controls(plan_methods(config, ["local", "fedavg"]))
    taken = plan_methods(config, ["mira"], {"mira-shuffled": ["algorithm.name=fedavg"]})
    with pytest.raises(ConfigError, match="'mira-shuffled' is the name of a control"):
        with_controls(taken)


def test_a_safeguard_has_the_control_that_has_nothing_to_decline(
    base_folder: Path, clients_folder: Path
) -> None:
    config = make_config(base_folder, clients_folder)
    guarded = {"guarded": ["algorithm.name=two-level", "algorithm.safeguard=true"]}
    assert controls_of(plan_methods(config, ["local", "two-level"], guarded)) == {}
    plans = with_controls(plan_methods(config, ["two-level"], guarded))
    assert controls_of(plans)["guarded"] in ("two-level-alone", "guarded-alone")
    assert not plans["guarded-alone"].algorithm.safeguard  # type: ignore[attr-defined]


def test_a_control_that_does_not_go_with_a_method_is_none(
    base_folder: Path, clients_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything trains where controls are asked for; no error where they are not."""
    plans = plan_methods(make_config(base_folder, clients_folder), ["local", "two-level"])
    impossible = {"alone": {"algorithm.coupling": -1.0}}
    monkeypatch.setattr(type(plans["two-level"].algorithm), "controls", impossible)
    assert controls_of(plans) == {}
    with pytest.raises(ConfigError, match=r"two-level-alone: .*coupling"):
        with_controls(plans)


def test_a_comparison_with_controls_says_what_sharing_gains(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {"rounds.count": 2, "graph.kind": "category", "local.steps": 1}
    config = make_config(base_folder, clients_folder, settings)
    found = fedmira.compare(
        ["local", "two-level"], config=config, controls=True, base=base, output=tmp_path / "all"
    )
    rows = {row["method"]: row for row in found.rows}
    assert rows["two-level"]["control"] == "two-level-alone"
    assert rows["two-level"]["sharing_gain"] == pytest.approx(
        rows["two-level"]["test_loss"] - rows["two-level-alone"]["test_loss"]
    )
    assert rows["local"]["sharing_gain"] is None
