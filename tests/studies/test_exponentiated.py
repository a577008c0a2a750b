"""Settings drawn client by client: the weights' arithmetic, and searches of a few rounds."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.config import Config
from fedmira.errors import ConfigError
from fedmira.experiment import build_experiment
from fedmira.model import BaseModel
from fedmira.observers import Observer, RoundEvent
from fedmira.studies import Search, tune_settings
from fedmira.studies.tuning.exponentiated import DISCOUNT, Armed, Divisor, Feedback, Weights
from small import adapter_bytes, call_main, events_of, make_config

SPACE = {"local.learning_rate": [1e-6, 0.02]}
DRAWN = Search(method="exponentiated", trials=2, seeds=(5,))
changes_of_arms = st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=2, max_size=6)


class PowerCut(BaseException):
    """Raised in the middle of a run."""


class Cut(Observer):
    """Cuts the power after a round."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_round(self, event: RoundEvent) -> None:
        if event.round == self.at:
            raise PowerCut


@pytest.fixture
def config(base_folder: Path, clients_folder: Path) -> Config:
    return make_config(base_folder, clients_folder, {"algorithm.name": "fedavg", "rounds.count": 6})


def evenly(changes: list[float]) -> list[Feedback]:
    """One client an arm, all of equal weight."""
    return [Feedback(arm, 1 / len(changes), change) for arm, change in enumerate(changes)]


def test_an_aggressive_step_from_two_equal_arms() -> None:
    """g = (1/2)(s - 0) / (1/2) = s, so z = sqrt(2 ln 2) (0.4, 0.1) / 0.4."""
    theta = Weights.of(2).after(evenly([-0.4, -0.1]), "aggressive").probabilities
    apart = math.sqrt(2 * math.log(2)) * 0.75
    assert theta[0] == pytest.approx(1 / (1 + math.exp(-apart)))
    assert theta == pytest.approx((0.70746, 0.29254), abs=5e-6)


@given(change=st.floats(-3, 3), arms=st.integers(1, 6))
def test_equal_changes_leave_all_arms_alike(change: float, arms: int) -> None:
    theta = Weights.of(arms).after(evenly([change] * arms), "adaptive").probabilities
    assert theta == pytest.approx([1 / arms] * arms)


@given(changes=changes_of_arms, data=st.data())
def test_arms_have_no_order(changes: list[float], data: st.DataObject) -> None:
    turn = data.draw(st.permutations(range(len(changes))))
    theta = Weights.of(len(changes)).after(evenly(changes), "auto").probabilities
    turned = Weights.of(len(changes)).after(evenly([changes[i] for i in turn]), "auto")
    assert turned.probabilities == pytest.approx([theta[i] for i in turn])
    assert sum(theta) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("divisor", "second"),
    [
        ("aggressive", 0.3),  # max |g| of the second round
        ("adaptive", math.sqrt(0.4**2 + 0.3**2)),
        ("auto", math.sqrt(2)),
        ("constant", 1.0),
    ],
)
def test_the_second_step_is_divided_as_asked(divisor: Divisor, second: float) -> None:
    """Equal changes of -0.4 leave both arms alike and the baseline at -0.4.

    With changes of -0.7 and -0.4 behind it, g = (-0.3, 0).
    """
    one = Weights.of(2).after(evenly([-0.4, -0.4]), divisor)
    assert one.baseline == pytest.approx(-0.4)
    two = one.after(evenly([-0.7, -0.4]), divisor)
    apart = two.logits[0] - two.logits[1]
    assert apart == pytest.approx(math.sqrt(2 * math.log(2)) * 0.3 / second)


def test_the_baseline_forgets() -> None:
    weights = Weights((0.0, 0.0), changes=(-1.0, -0.5, -0.2))
    expected = (-0.2 - 0.5 * DISCOUNT - 1.0 * DISCOUNT**2) / (1 + DISCOUNT + DISCOUNT**2)
    assert weights.baseline == pytest.approx(expected)


def test_an_arm_that_is_nearly_sure_is_drawn_alone() -> None:
    assert Weights((9.0, 0.0, 0.0)).probabilities == (1.0, 0.0, 0.0)
    assert min(Weights((2.0, 0.0, 0.0)).probabilities) > 0


def test_the_rate_that_learns_is_found(config: Config, base: BaseModel, tmp_path: Path) -> None:
    tuning = tune_settings(config, SPACE, DRAWN, tmp_path / "tuned", base=base)
    assert tuning.best == {"local.learning_rate": 0.02}
    document = tuning.document
    assert document["best"]["probability"] > 0.5 and document["best"]["loss"] is not None
    record = json.loads((tmp_path / "tuned" / "drawn-seed5.json").read_text(encoding="utf-8"))
    drawn = Counter(arm for each in record["rounds"] for arm in each["drawn"].values())
    clients = len(record["rounds"][0]["drawn"])
    assert [trial["drawn"] for trial in document["trials"]] == [drawn[0], drawn[1]]
    assert sum(drawn.values()) == 6 * clients and min(drawn.values()) > 0
    for each in record["rounds"]:
        assert sum(one["weight"] for one in each["told"]) == pytest.approx(1.0)
    assert {row["standing"] for row in tuning.rows} == {"chosen", "drawn"}
    page = tuning.page.read_text(encoding="utf-8")
    assert "not run by itself" in page and "Clients drew their settings" in page
    assert "other trials" not in page and "Every other trial" not in page


def test_no_run_of_a_search_sees_test_rows(config: Config, base: BaseModel, tmp_path: Path) -> None:
    tune_settings(config, SPACE, DRAWN, tmp_path / "tuned", base=base)
    folders = sorted((tmp_path / "tuned" / "trials").iterdir())
    assert [folder.name for folder in folders] == ["001-seed5", "drawn-seed5"]
    for folder in folders:
        assert all("test_loss" not in event for event in events_of(folder))
    notes = json.loads((folders[1] / "run.json").read_text(encoding="utf-8"))["notes"]
    assert any("drew the settings" in note for note in notes)


@pytest.mark.parametrize("name", ["fedavg", "local", "ditto", "fedkseed"])
def test_a_search_that_was_cut_goes_on_to_the_same_bytes(
    base_folder: Path, clients_folder: Path, base: BaseModel, tmp_path: Path, name: str
) -> None:
    """Also of methods whose clients keep a memory, which holds under every arm."""
    more: dict[str, Any] = {"fedkseed": {"local.optimizer": "zeroth-order"}}.get(name, {})
    settings = {"algorithm.name": name, "rounds.count": 4, **more}
    config = make_config(base_folder, clients_folder, settings)
    whole = tune_settings(config, SPACE, DRAWN, tmp_path / "whole", base=base)
    with pytest.raises(PowerCut):
        tune_settings(config, SPACE, DRAWN, tmp_path / "cut", [Cut(3)], base=base)
    again = tune_settings(config, SPACE, DRAWN, tmp_path / "cut", base=base)
    assert again.rows == whole.rows
    run = Path("trials") / "drawn-seed5"
    assert adapter_bytes(tmp_path / "cut" / run) == adapter_bytes(tmp_path / "whole" / run)
    for part in ("drawn-seed5.json", "trials.csv"):
        assert (tmp_path / "cut" / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()


def test_one_arm_trains_as_a_plain_run(config: Config, base: BaseModel, tmp_path: Path) -> None:
    """All draw the one with the rate of the config, so the run is the config's own."""
    from fedmira.experiment import run_experiment
    from fedmira.records import RecordedFolder

    plain = run_experiment(build_experiment(config, base), tmp_path / "plain")
    built = build_experiment(config, base)
    (tmp_path / "search").mkdir()
    armed = Armed.of(
        built.clients,  # type: ignore[arg-type]
        arms=[config.local],
        seed=config.seed,
        divisor="aggressive",
        folder=RecordedFolder(tmp_path / "search"),
        name="drawn.json",
    )
    run_experiment(replace(built, clients=armed), tmp_path / "drawn")
    assert plain.status == "finished"
    assert adapter_bytes(tmp_path / "drawn") == adapter_bytes(tmp_path / "plain")


def test_an_arm_that_diverges_is_left(config: Config, base: BaseModel, tmp_path: Path) -> None:
    config = config.model_copy(
        update={"local": config.local.model_copy(update={"max_grad_norm": 0.0})}
    )
    space = {"local.learning_rate": [0.02, 3e38]}
    tuning = tune_settings(config, space, DRAWN, tmp_path / "tuned", base=base)
    assert tuning.best == {"local.learning_rate": 0.02}
    record = json.loads((tmp_path / "tuned" / "drawn-seed5.json").read_text(encoding="utf-8"))
    bad = [one for each in record["rounds"] for one in each["told"] if one["arm"] == 1]
    assert bad and all(one["change"] >= 0 for one in bad)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"local.steps": [2, 4]}, "local.steps cannot be searched .* more steps change"),
        ({"algorithm.proximal": [0.1, 1.0]}, "algorithm.proximal .* one server, have it alike"),
        ({"local.learning_rate": [0.02]}, "one setting, and nothing to draw from"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_training(
    config: Config, base: BaseModel, tmp_path: Path, space: dict[str, Any], said: str
) -> None:
    from fedmira.config import with_algorithm

    if "algorithm.proximal" in space:
        config = with_algorithm(config, "fedprox")
    with pytest.raises(ConfigError, match=said):
        tune_settings(config, space, DRAWN, tmp_path / "tuned", base=base)
    assert not (tmp_path / "tuned").exists()


def test_a_compressed_wire_is_refused(
    base_folder: Path, clients_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    settings = {"algorithm.name": "fedavg", "engine.wire": "int8"}
    config = make_config(base_folder, clients_folder, settings)
    with pytest.raises(ConfigError, match="engine.wire is .int8.*set engine.wire"):
        tune_settings(config, SPACE, DRAWN, tmp_path / "tuned", base=base)


def test_the_command_searches_what_can_be_drawn(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """Without a space: the learning rate, and not what the server has."""
    from fedmira.config import dump_config

    config = make_config(base_folder, clients_folder, {"algorithm.name": "mira", "rounds.count": 2})
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config), encoding="utf-8")
    words = ["tune", str(file), "--method", "exponentiated", "--divisor", "adaptive"]
    ended = call_main(*words, "--output", str(tmp_path / "tuned"), "--format", "json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert list(document["space"]) == ["local.learning_rate"] and len(document["trials"]) == 5
    assert document["divisor"] == "adaptive"
    assert any("what clients can draw was searched" in note for note in document["notes"])
