"""Spaces of settings: what is refused before training, what is drawn, and what lies on an edge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.config import (
    METHODS,
    Config,
    load_config,
    method_class,
    with_method,
    with_settings,
)
from fedmira.errors import ConfigError
from fedmira.methods import Local
from fedmira.studies.tuning.halving import stage_rounds, stage_sizes
from fedmira.studies.tuning.space import (
    Searched,
    Space,
    default_space,
    draw,
    edge_notes,
    foreign_keys,
    read_space,
)

CONFIG = load_config(overrides=["algorithm.name=mira"])


class Half(Local):
    pull: float = 0.5


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("seed", [1, 2], "give the seeds of each trial with --seeds"),
        ("data.train_fraction", [0.5], "would choose the test rows"),
        ("data.max_rows", [8], "would choose the test rows"),
        ("model.base", ["bundled"], "tune each base for itself"),
        ("rounds.count", [5], "set it in the config"),
        ("evaluation.select", ["best"], "would move the yardstick"),
        ("engine.recompute", [True], "it is about machines"),
        ("algorithm.name", ["local"], "tune each with --algorithms"),
        ("local.learning_rat", [0.1], "did you mean local.learning_rate?"),
        ("locl.steps", [1], "unknown key; searched are keys of [adapter]"),
        ("algorithm.coupling", [0.5, 2.0], "algorithm.coupling = 2.0: must be 1 or less"),
        ("local.steps", {"low": 0, "high": 3}, "local.steps = 0: must be 1 or more"),
        ("local.steps", {"low": 3, "high": 3}, "low must be below high"),
        ("local.steps", {"low": 3}, "a range has the numbers low and high"),
        ("local.learning_rate", {"low": 0.0, "high": 1.0, "log": True}, "low must be above 0"),
        ("local.steps", [], "must be a list of at least one value"),
        ("local.steps", 5, "must be a list of at least one value"),
        ("local.steps", [2, 3, 2], "names 2 twice"),
    ],
)
def test_what_may_not_be_searched_is_refused_with_the_next_step(
    key: str, values: Any, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_space({key: values}, CONFIG)
    assert key in str(caught.value) and said in str(caught.value)


def test_all_problems_of_a_space_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read_space({"seed": [1], "local": {"steps": [0]}, "graph.nearest": [0, 2]}, CONFIG)
    assert [problem.split()[1] for problem in caught.value.problems] == [
        "graph.nearest",
        "local.steps",
        "seed",
    ]


def test_a_file_and_a_mapping_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(
        '"algorithm.coupling" = [1.0, 0.5]\n'
        "[local]\nsteps = [4, 2]\nlearning_rate = {low = 1e-3, high = 1e-1, log = true}\n",
        encoding="utf-8",
    )
    given: dict[str, Any] = {
        "algorithm": {"coupling": [0.5, 1.0]},
        "local.steps": [2, 4],
        "local.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    }
    assert read_space(path, CONFIG) == read_space(given, CONFIG)
    path.write_text("local.steps = [1, ", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_space(path, CONFIG)
    with pytest.raises(ConfigError, match="there is no such space file"):
        read_space(tmp_path / "other.toml", CONFIG)


def test_the_usual_space_is_around_the_config_and_holds_it() -> None:
    for name in ("local", "fedavg", "fedprox", "ditto", "mira", "two-level", "share-factor"):
        config = load_config(
            overrides=[f"algorithm.name={name}", "local.learning_rate=0.01"],
        )
        space = default_space(config)
        assert space.settings[0] == Searched(
            "local.learning_rate", (0.0025, 0.005, 0.01, 0.02, 0.04)
        )
        assert space.present(config) is not None
        assert {each.key.removeprefix("algorithm.") for each in space.settings[1:]} == set(
            config.algorithm.searched
        )
        for each in space.settings:
            for value in each.values:
                with_settings(config, {each.key: value})


def test_the_usual_space_leaves_out_what_another_setting_replaces() -> None:
    """Mira's coupling has no effect beside a server step, and would remove it."""
    config = load_config(overrides=["algorithm.name=mira", "algorithm.server_step=0.1"])
    assert [each.key for each in default_space(config).settings] == ["local.learning_rate"]


lists = st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True).map(tuple)
spaces = st.builds(
    lambda steps, low, width, log: Space(
        (
            Searched("local.steps", steps),
            Searched("local.learning_rate", low=low, high=low * width, log=log),
        )
    ),
    lists,
    st.floats(1e-5, 1.0),
    st.floats(1.5, 100.0),
    st.booleans(),
)


@given(space=spaces, count=st.integers(1, 12), seed=st.integers(0, 99))
def test_draws_lie_in_the_space_differ_and_begin_alike(space: Space, count: int, seed: int) -> None:
    found = draw(space, count, seed, None)
    assert len(found) == count
    assert all(each.holds(point[each.key]) for point in found for each in space.settings)
    assert all(point not in found[:place] for place, point in enumerate(found))
    assert draw(space, count + 3, seed, None)[:count] == found


def test_all_points_of_a_small_space_are_drawn_once() -> None:
    space = Space((Searched("a", (1, 2, 3)), Searched("b", ("x", "y"))))
    found = draw(space, 20, 0, {"a": 2, "b": "y"})
    assert found[0] == {"a": 2, "b": "y"}
    assert sorted((point["a"], point["b"]) for point in found) == [
        (a, b) for a in (1, 2, 3) for b in ("x", "y")
    ]


def test_whole_ranges_give_whole_numbers_as_often_as_each_other() -> None:
    (each,) = read_space({"local.steps": {"low": 1, "high": 4}}, CONFIG).settings
    values = [each.at((place + 0.5) / 400) for place in range(400)]
    assert {value: values.count(value) for value in set(values)} == dict.fromkeys(range(1, 5), 100)


def test_log_ranges_go_by_factors() -> None:
    each = Searched("local.learning_rate", low=1e-4, high=1e-2, log=True)
    assert math.isclose(each.at(0.5), 1e-3)


def test_edges_are_said_with_what_lies_beyond() -> None:
    space = Space(
        (
            Searched("algorithm.coupling", (0.25, 0.5, 1.0)),
            Searched("graph.kind", ("uniform", "category")),
            Searched("local.learning_rate", low=1e-4, high=1e-2, log=True),
            Searched("local.steps", (2, 4, 8)),
        )
    )
    best = {
        "algorithm.coupling": 1.0,
        "graph.kind": "uniform",
        "local.learning_rate": 1.2e-4,
        "local.steps": 4,
    }
    first, second = edge_notes(space, CONFIG, best)
    assert first.startswith("algorithm.coupling = 1.0 lies on the edge")
    assert "nothing beyond" in first, "a coupling is at most 1"
    assert "local.learning_rate = 0.00012" in second and "with lower values" in second
    assert (
        edge_notes(space, CONFIG, best | {"algorithm.coupling": 0.5, "local.learning_rate": 1e-3})
        == []
    )


def test_keys_of_other_methods_are_told_apart() -> None:
    space = {"algorithm": {"coupling": [1.0], "proximal": [0.1]}, "graph.nearest": [2]}

    def of(name: str) -> set[str]:
        return set(foreign_keys(space, load_config(overrides=[f"algorithm.name={name}"])))

    assert of("mira") == {"algorithm.proximal"}
    assert of("fedavg") == {"algorithm.coupling", "algorithm.proximal", "graph.nearest"}
    fedavg = load_config(overrides=["algorithm.name=fedavg"])
    found = read_space(space | {"local.steps": [1]}, fedavg, sorted(of("fedavg")))
    assert [each.key for each in found.settings] == ["local.steps"]
    assert "left out" in found.notes[0]


def test_settings_of_a_method_object_are_searched_too() -> None:
    config = with_method(Config(), Half(pull=0.25))
    space = read_space({"algorithm.pull": [0.25, 0.75]}, config)
    assert space.present(config) == {"algorithm.pull": 0.25}
    changed = with_settings(config, {"algorithm.pull": 0.75, "local.steps": 2})
    assert changed.algorithm == Half(pull=0.75) and changed.local.steps == 2
    with pytest.raises(ConfigError, match="pul"):
        read_space({"algorithm.pul": [0.25]}, config)


def test_nine_settings_at_rate_three_leave_three_and_then_one() -> None:
    assert stage_sizes(9, 3) == [9, 3, 1]
    assert stage_rounds(20, 3, 3) == [3, 7, 20], "ceil(20 / 9), ceil(20 / 3), 20"


@given(trials=st.integers(2, 200), rate=st.integers(2, 6))
def test_each_stage_keeps_one_of_rate_rounded_up(trials: int, rate: int) -> None:
    sizes = stage_sizes(trials, rate)
    assert sizes[0] == trials and sizes[-1] == 1
    assert all(
        later == math.ceil(size / rate) for size, later in zip(sizes, sizes[1:], strict=False)
    )


@pytest.mark.parametrize(("trials", "rate"), [(1, 3), (9, 1)])
def test_halving_that_drops_nothing_is_refused(trials: int, rate: int) -> None:
    with pytest.raises(ConfigError, match="both must be 2 or more"):
        stage_sizes(trials, rate)


def test_stages_need_rounds_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"after rounds 1, 1, 2; .* set rounds.count higher"):
        stage_rounds(2, 3, 3)


def test_the_page_has_the_usual_space_of_every_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    written = {row[0].strip("| `"): row[1].removesuffix(" |") for row in rows}
    for name in METHODS:
        searched = method_class(name).searched
        told = "; ".join(
            f"`{key}` {', '.join(map(str, values))}" for key, values in searched.items()
        )
        assert written.get(name, "") == told
