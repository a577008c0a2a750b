"""Comparisons repeat nothing that is finished, continue what is not, and count clients against local training."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from federation import CLIENTS, make_config, table_of
from fedmira.comparison import Comparison, compare_algorithms
from fedmira.config import Config
from fedmira.errors import RunError, RunFolderError
from fedmira.rounds import sample_clients

NAMES = ("local", "fedavg", "mira")


class PowerCut(Exception):
    """Raised in the middle of a run."""


class Watch:
    """Notes which runs begin, and pulls the plug in round `cut[1]` of run `cut[0]`."""

    def __init__(self, cut: tuple[str, int] = ("", 0)) -> None:
        self.began: list[str] = []
        self.cut = cut

    @contextmanager
    def __call__(self, name: str, rounds: int) -> Iterator[Any]:
        self.began.append(name)

        def progress(what: str, figures: Mapping[str, Any]) -> None:
            if what == "round" and (name, figures["round"]) == self.cut:
                raise PowerCut

        yield progress


@pytest.fixture(scope="module")
def config(base_folder: Path, clients_folder: Path) -> Config:
    return make_config(base_folder, clients_folder, {"graph.kind": "category", "algorithm.coupling": 0.9, "rounds.count": 2})


@pytest.fixture(scope="module")
def compared(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare_algorithms(config, NAMES, (0, 1), tmp_path_factory.mktemp("compare") / "all", Watch())


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_algorithm_runs_with_every_seed_on_the_same_rows(compared: Comparison) -> None:
    assert list(compared.runs) == ["local-seed0", "fedavg-seed0", "mira-seed0", "local-seed1", "fedavg-seed1", "mira-seed1"]
    for seed in (0, 1):
        bases = [[row["base_loss"] for row in table_of(compared.runs[f"{name}-seed{seed}"], "clients")] for name in NAMES]
        assert bases[0] == bases[1] == bases[2], "equal test rows and an equal start"
    assert json.loads((compared.runs["mira-seed1"] / "run.json").read_text(encoding="utf-8"))["seed"] == 1
    assert "coupling = 0.9" in (compared.runs["mira-seed0"] / "config.toml").read_text(encoding="utf-8")
    assert "coupling" not in (compared.runs["local-seed0"] / "config.toml").read_text(encoding="utf-8")


def test_figures_are_means_over_clients_and_seeds(compared: Comparison) -> None:
    losses = {
        name: {row["client"]: float(row["after_align_loss"]) for row in table_of(folder, "clients")}
        for name, folder in compared.runs.items()
    }
    for row in compared.rows:
        runs = [losses[f"{row['algorithm']}-seed{seed}"] for seed in (0, 1)]
        assert row["seeds"] == 2
        assert row["test_loss"] == pytest.approx(sum(sum(run.values()) / 5 for run in runs) / 2, rel=1e-12)
        assert row["worst_tenth"] == pytest.approx(sum(max(run.values()) for run in runs) / 2, rel=1e-12)
        ratios = [run[client] / losses[f"local-seed{seed}"][client] for seed, run in enumerate(runs) for client in run]
        assert (row["better_than_local"], row["worse_than_local"]) == (
            sum(ratio < 0.98 for ratio in ratios),
            sum(ratio > 1.02 for ratio in ratios),
        )
    assert (compared.rows[0]["better_than_local"], compared.rows[0]["worse_than_local"]) == (0, 0)


def test_the_figures_are_on_disk_beside_the_page(compared: Comparison) -> None:
    folder = compared.page.parent
    assert compared.page == folder / "comparison.html" and compared.page.is_file()
    assert json.loads((folder / "comparison.json").read_text(encoding="utf-8")) == compared.rows
    with (folder / "comparison.csv").open(encoding="utf-8", newline="") as file:
        assert [{key: str(value) for key, value in row.items()} for row in compared.rows] == list(csv.DictReader(file))


def test_a_second_call_repeats_no_run(compared: Comparison, config: Config) -> None:
    before = {name: files_of(folder) for name, folder in compared.runs.items()}
    watch = Watch()
    again = compare_algorithms(config, NAMES, (0, 1), compared.page.parent, watch)
    assert watch.began == [] and again.rows == compared.rows
    assert {name: files_of(folder) for name, folder in compared.runs.items()} == before


def test_an_interrupted_comparison_continues_where_it_stopped(compared: Comparison, config: Config, tmp_path: Path) -> None:
    first = Watch(("fedavg-seed0", 1))
    with pytest.raises(PowerCut):
        compare_algorithms(config, NAMES, (0,), tmp_path / "all", first)
    assert first.began == ["local-seed0", "fedavg-seed0"]
    done = files_of(tmp_path / "all" / "local-seed0")
    second = Watch()
    compare_algorithms(config, NAMES, (0,), tmp_path / "all", second)
    assert second.began == ["fedavg-seed0", "mira-seed0"] and files_of(tmp_path / "all" / "local-seed0") == done
    for name in NAMES:
        assert table_of(tmp_path / "all" / f"{name}-seed0", "clients") == table_of(compared.runs[f"{name}-seed0"], "clients")


def test_finished_runs_of_other_settings_are_not_taken_for_these(compared: Comparison, config: Config) -> None:
    other = config.model_copy(update={"local": config.local.model_copy(update={"steps": 3})})
    with pytest.raises(RunFolderError, match="local-seed0: this run was made with other settings; choose another --output"):
        compare_algorithms(other, NAMES, (0,), compared.page.parent, Watch())


def test_without_local_training_nothing_is_counted_against_it(compared: Comparison, config: Config) -> None:
    rows = compare_algorithms(config, ("mira",), (0, 1), compared.page.parent, Watch()).rows
    assert set(rows[0]) == {"algorithm", "seeds", "test_loss", "worst_tenth"}


def test_a_run_that_fails_leaves_the_others_compared(config: Config, tmp_path: Path) -> None:
    """The only edge joins two clients that are not drawn in the one round there is, so MIRA can pull nobody."""
    rounds = config.rounds.model_copy(update={"count": 1, "participation": 0.6})
    absent = sorted(set(CLIENTS) - set(sample_clients(sorted(CLIENTS), rounds, 0, 1)))
    document = {"clients": sorted(CLIENTS), "edges": [{"source": absent[0], "target": absent[1], "weight": 1.0}]}
    (tmp_path / "graph.json").write_text(json.dumps(document), encoding="utf-8")
    graph = config.graph.model_copy(update={"kind": "file", "path": str(tmp_path / "graph.json")})
    stuck = config.model_copy(update={"rounds": rounds, "graph": graph})
    watch = Watch()
    with pytest.raises(
        RunError, match=r"1 of 3 runs failed \(mira-seed0: .*no client was pulled.*; the others are compared in .*comparison\.html"
    ):
        compare_algorithms(stuck, ("local", "mira", "fedavg"), (0,), tmp_path / "all", watch)
    assert watch.began == ["local-seed0", "mira-seed0", "fedavg-seed0"]
    rows = json.loads((tmp_path / "all" / "comparison.json").read_text(encoding="utf-8"))
    assert [row["algorithm"] for row in rows] == ["local", "fedavg"] and (tmp_path / "all" / "comparison.html").is_file()


def test_when_every_run_fails_there_is_nothing_to_compare(config: Config, tmp_path: Path) -> None:
    hopeless = config.model_copy(update={"local": config.local.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(RunError, match=r"2 of 2 runs failed \(local-seed0: round 1: none of 5 clients"):
        compare_algorithms(hopeless, ("local", "mira"), (0,), tmp_path / "all", Watch())
    assert not (tmp_path / "all" / "comparison.json").exists()
