"""Comparisons repeat nothing that is finished, and continue what is not.

They count clients against local training.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedmira.config import Config
from fedmira.errors import ConfigError, RunError, RunFolderError
from fedmira.observers import Observer, RoundEvent, StartEvent
from fedmira.rounds import sample_clients
from fedmira.studies import Comparison, compare_algorithms
from small import CLIENTS, events_of, make_config, table_of

NAMES = ("local", "fedavg", "mira")


class PowerCut(BaseException):
    """Raised in the middle of a run."""


class Watch(Observer):
    """Notes which runs begin, and pulls the plug in round `cut[1]` of run `cut[0]`."""

    def __init__(self, cut: tuple[str, int] = ("", 0)) -> None:
        self.began: list[str] = []
        self.cut = cut

    def on_start(self, event: StartEvent) -> None:
        self.began.append(event.run.name)

    def on_round(self, event: RoundEvent) -> None:
        if (event.run.name, event.round) == self.cut:
            raise PowerCut


@pytest.fixture(scope="module")
def config(base_folder: Path, clients_folder: Path) -> Config:
    return make_config(
        base_folder,
        clients_folder,
        {"graph.kind": "category", "algorithm.coupling": 0.9, "rounds.count": 2},
    )


@pytest.fixture(scope="module")
def compared(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare_algorithms(
        config, NAMES, (0, 1), tmp_path_factory.mktemp("compare") / "all", [Watch()]
    )


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_algorithm_runs_with_every_seed_on_the_same_rows(compared: Comparison) -> None:
    assert list(compared.runs) == [
        "local-seed0",
        "fedavg-seed0",
        "mira-seed0",
        "local-seed1",
        "fedavg-seed1",
        "mira-seed1",
    ]
    for seed in (0, 1):
        bases = [
            [row["base_loss"] for row in table_of(compared.runs[f"{name}-seed{seed}"], "clients")]
            for name in NAMES
        ]
        assert bases[0] == bases[1] == bases[2], "equal test rows and an equal start"
    assert (
        json.loads((compared.runs["mira-seed1"] / "run.json").read_text(encoding="utf-8"))["seed"]
        == 1
    )
    assert "coupling = 0.9" in (compared.runs["mira-seed0"] / "config.toml").read_text(
        encoding="utf-8"
    )
    assert "coupling" not in (compared.runs["local-seed0"] / "config.toml").read_text(
        encoding="utf-8"
    )


def losses_of(folder: Path) -> dict[str, float]:
    return {row["client"]: float(row["after_align_loss"]) for row in table_of(folder, "clients")}


def test_figures_are_means_over_clients_and_seeds(compared: Comparison) -> None:
    losses = {name: losses_of(folder) for name, folder in compared.runs.items()}
    for row in compared.rows:
        runs = [losses[f"{row['method']}-seed{seed}"] for seed in (0, 1)]
        means = [sum(run.values()) / 5 for run in runs]
        assert row["seeds"] == 2
        assert row["test_loss"] == pytest.approx(sum(means) / 2, rel=1e-12)
        assert row["test_loss_spread"] == pytest.approx(
            abs(means[0] - means[1]) / math.sqrt(2), rel=1e-9
        )
        assert row["worst_tenth"] == pytest.approx(
            sum(max(run.values()) for run in runs) / 2, rel=1e-12
        )


def test_a_client_is_better_or_worse_beyond_two_percent_and_the_noise_of_two_seeds(
    compared: Comparison,
) -> None:
    losses = {name: losses_of(folder) for name, folder in compared.runs.items()}
    for row in compared.rows[1:]:
        better = worse = 0
        for client in CLIENTS:
            first, second = (
                losses[f"{row['method']}-seed{seed}"][client] - losses[f"local-seed{seed}"][client]
                for seed in (0, 1)
            )
            # of two values, the standard error is half their distance; t with one degree of freedom
            # is Cauchy: tan(0.475 pi) = 12.7
            margin = 0.02 * sum(losses[f"local-seed{seed}"][client] for seed in (0, 1)) / 2
            noise = max(math.tan(0.475 * math.pi) * abs(first - second) / 2, margin)
            better += (first + second) / 2 < -noise
            worse += (first + second) / 2 > noise
        assert (row["better_than_local"], row["equal_to_local"], row["worse_than_local"]) == (
            better,
            5 - better - worse,
            worse,
        )
    assert compared.rows[0]["better_than_local"] is None, "local is not held against itself"


def test_budgets_are_equal_and_counted(compared: Comparison) -> None:
    document = compared.figures.document()
    assert document["equal"] and document["problems"] == []
    sizes = {
        json.loads((folder / "adapters" / "index.json").read_text(encoding="utf-8"))["apple-1"][
            "parameters"
        ]
        for folder in compared.runs.values()
    }
    for row in document["algorithms"]:
        assert row["local_steps"] == 5 * 2 * 2, "five clients, two rounds, two steps"
        assert (
            row["response_tokens"] > 0
            and row["tokens"] >= row["response_tokens"]
            and row["equal_budget"]
        )
        assert {row["parameters_least"], row["parameters_most"]} == {
            row["trained_least"],
            row["trained_most"],
        } == sizes and min(sizes) > 0
    assert document["notes"] == [], "all three train whole adapters"
    for row in document["runs"]:
        rounds = table_of(compared.runs[f"{row['method']}-seed{row['seed']}"], "rounds")
        assert row["bytes_up"] == sum(int(line["bytes_up"]) for line in rounds)
        assert row["response_tokens"] == sum(
            event["response_tokens"]
            for event in events_of(compared.page.parent / row["folder"], "train")
        )
    assert len({(row["seed"], row["data_sha256"]) for row in document["runs"]}) == 2


def test_the_figures_are_on_disk_beside_the_page(compared: Comparison) -> None:
    folder = compared.page.parent
    assert compared.page == folder / "comparison.html" and compared.page.is_file()
    document = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert document == compared.figures.document() and document["algorithms"] == compared.rows
    names = {path.name for path in folder.iterdir() if path.is_file()}
    ends = (".html", ".json", ".csv", "-runs.csv", "-clients.csv", ".md")
    assert names == {"hashes.sha256", *(f"comparison{end}" for end in ends)}


def test_a_second_call_repeats_no_run(compared: Comparison, config: Config) -> None:
    before = {name: files_of(folder) for name, folder in compared.runs.items()}
    watch = Watch()
    again = compare_algorithms(config, NAMES, (0, 1), compared.page.parent, [watch])
    assert watch.began == [] and again.rows == compared.rows
    assert {name: files_of(folder) for name, folder in compared.runs.items()} == before


def test_an_interrupted_comparison_continues_where_it_stopped(
    compared: Comparison, config: Config, tmp_path: Path
) -> None:
    first = Watch(("fedavg-seed0", 1))
    with pytest.raises(PowerCut):
        compare_algorithms(config, NAMES, (0,), tmp_path / "all", [first])
    assert first.began == ["local-seed0", "fedavg-seed0"]
    done = files_of(tmp_path / "all" / "local-seed0")
    second = Watch()
    compare_algorithms(config, NAMES, (0,), tmp_path / "all", [second])
    assert (
        second.began == ["fedavg-seed0", "mira-seed0"]
        and files_of(tmp_path / "all" / "local-seed0") == done
    )
    for name in NAMES:
        assert table_of(tmp_path / "all" / f"{name}-seed0", "clients") == table_of(
            compared.runs[f"{name}-seed0"], "clients"
        )


def test_finished_runs_of_other_settings_are_not_taken_for_these(
    compared: Comparison, config: Config
) -> None:
    other = config.model_copy(update={"local": config.local.model_copy(update={"steps": 3})})
    with pytest.raises(
        RunFolderError,
        match="local-seed0: this run was made with other settings; choose another --output",
    ):
        compare_algorithms(other, NAMES, (0,), compared.page.parent, [Watch()])


def test_without_local_training_nothing_is_counted_against_it(
    compared: Comparison, config: Config
) -> None:
    found = compare_algorithms(config, ("mira",), (0, 1), compared.page.parent, [Watch()])
    assert found.figures.baselines == () and "better_than_local" not in found.rows[0]
    compare_algorithms(
        config, NAMES, (0, 1), compared.page.parent, [Watch()]
    )  # the files of all three again


def test_a_variant_is_a_method_of_its_own(
    compared: Comparison, config: Config, tmp_path: Path
) -> None:
    shutil.copytree(compared.page.parent, tmp_path / "all")
    watch = Watch()
    variants = {"loose": ["algorithm.coupling=0.1"], "all": ["graph.kind=uniform"]}
    found = compare_algorithms(
        config, NAMES, (0,), tmp_path / "all", [watch], variants=variants, reference="mira"
    )
    assert watch.began == ["loose-seed0", "all-seed0"]
    assert [row["method"] for row in found.rows] == [*NAMES, "loose", "all"] and found.rows[3][
        "algorithm"
    ] == "mira"
    assert found.figures.baselines == ("local", "mira") and found.figures.document()["equal"]
    assert (
        losses_of(found.runs["loose-seed0"])
        != losses_of(found.runs["mira-seed0"])
        != losses_of(found.runs["all-seed0"])
    )


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (
            {"long": ["local.steps=4"]},
            "variant 'long' changes local.steps: methods are compared on equal rows, base, "
            "rounds and local steps",
        ),
        (
            {"more": ["rounds.count=9", "data.train_fraction=0.7"]},
            "variant 'more' changes data, rounds",
        ),
        (
            {"often": ["evaluation.every=1"]},
            "variant 'often' changes evaluation.every: methods are compared on equal rows, "
            "base, rounds and local steps, evaluated alike",
        ),
        ({"kept": ["evaluation.select=best"]}, "variant 'kept' changes evaluation.select: "),
        (
            {"short": ["evaluation.max_new_tokens=2"]},
            "variant 'short' changes evaluation.max_new_tokens: ",
        ),
        ({"mira": ["graph.nearest=2"]}, "variant 'mira': must be a new name"),
        ({"a/b": ["graph.nearest=2"]}, "variant 'a/b': must be a new name"),
        ({"odd": ["graph.nearst=2"]}, "variant 'odd': "),
    ],
)
def test_variants_that_would_not_compare_are_refused(
    variants: dict[str, list[str]], message: str, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compare_algorithms(config, NAMES, (0,), tmp_path / "all", [Watch()], variants=variants)
    assert not (tmp_path / "all").exists()


def test_settings_that_one_method_needs_are_to_be_given_to_it_alone(
    config: Config, tmp_path: Path
) -> None:
    hint = '--variant "fedkseed=algorithm.name=fedkseed;KEY=VALUE"'
    with pytest.raises(ConfigError, match=re.escape(hint)):
        compare_algorithms(config, ("local", "fedkseed"), (0,), tmp_path / "all", [Watch()])
    with pytest.raises(ConfigError) as refused:
        compare_algorithms(config, ("local", "fedkseeds"), (0,), tmp_path / "all", [Watch()])
    assert "--variant" not in str(refused.value), "there is no such method to give settings to"


def test_finished_runs_with_other_seeds_are_named(config: Config, tmp_path: Path) -> None:
    compare_algorithms(config, ("local",), (0, 1), tmp_path / "all", [Watch()])
    found = compare_algorithms(config, ("local",), (1,), tmp_path / "all", [Watch()])
    assert found.figures.other_seeds == (0,) and "--seeds 0,1 adds them" in found.figures.left_out


def test_a_reference_must_be_one_of_the_methods(config: Config, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="reference 'ditto' is not among the compared methods; they are local, fedavg, mira",
    ):
        compare_algorithms(config, NAMES, (0,), tmp_path / "all", [Watch()], reference="ditto")
    assert not (tmp_path / "all").exists()


def test_rows_that_changed_since_a_run_are_refused_before_anything_trains(
    config: Config, clients_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "clients"
    shutil.copytree(clients_folder, rows)
    moved = config.model_copy(update={"data": config.data.model_copy(update={"path": str(rows)})})
    compare_algorithms(moved, ("local",), (0,), tmp_path / "all", [Watch()])
    file = rows / "apple-1" / "train.jsonl"
    file.write_text(
        "".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8"
    )
    watch = Watch()
    with pytest.raises(RunFolderError, match="local-seed0: the data changed since this run"):
        compare_algorithms(moved, ("local", "fedavg"), (0,), tmp_path / "all", [watch])
    assert watch.began == []


def test_whatever_cannot_work_is_said_of_all_methods_before_anything_trains(
    config: Config, tmp_path: Path
) -> None:
    """The graph file is read and the layers are looked for when a run is built.

    Here the two last methods have such problems.
    """
    watch = Watch()
    variants = {
        "elsewhere": ['adapter.targets=["nowhere"]'],
        "drawn": ["graph.kind=file", f"graph.path={tmp_path / 'none.json'}"],
    }
    with pytest.raises(ConfigError) as caught:
        compare_algorithms(
            config, ("local", "fedavg"), (0, 1), tmp_path / "all", [watch], variants=variants
        )
    assert [problem.split(" is no linear layer")[0] for problem in caught.value.problems[:1]] == [
        "elsewhere: adapter.targets: 'nowhere'"
    ]
    assert (
        len(caught.value.problems) == 2
        and caught.value.problems[1].startswith("drawn: ")
        and "none.json" in caught.value.problems[1]
    )
    assert watch.began == [] and not (tmp_path / "all").exists()


def test_a_problem_that_all_methods_have_is_said_once(config: Config, tmp_path: Path) -> None:
    long = config.model_copy(
        update={"data": config.data.model_copy(update={"max_length": 100_000})}
    )
    with pytest.raises(ConfigError, match="^local, mira: data.max_length is 100000, but") as caught:
        compare_algorithms(long, ("local", "mira"), (0, 1), tmp_path / "all", [Watch()])
    assert len(caught.value.problems) == 1


def test_rows_that_changed_since_a_run_of_a_later_seed_are_refused_before_anything_trains(
    config: Config, clients_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "clients"
    shutil.copytree(clients_folder, rows)
    moved = config.model_copy(update={"data": config.data.model_copy(update={"path": str(rows)})})
    compare_algorithms(moved, ("local",), (1,), tmp_path / "all", [Watch()])
    file = rows / "apple-1" / "train.jsonl"
    file.write_text(
        "".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8"
    )
    watch = Watch()
    with pytest.raises(RunFolderError, match="local-seed1: the data changed since this run"):
        compare_algorithms(moved, ("local", "fedavg"), (0, 1), tmp_path / "all", [watch])
    assert watch.began == []


@pytest.mark.parametrize("kind", ["other settings", "taken"])
def test_a_later_folder_that_is_in_the_way_is_found_before_anything_trains(
    kind: str, config: Config, tmp_path: Path
) -> None:
    folder, watch = tmp_path / "all" / "fedavg-seed0", Watch()
    if kind == "taken":
        folder.mkdir(parents=True)
        (folder / "letter.txt").write_text("dear diary", encoding="utf-8")
    else:  # a run that was stopped
        other = config.model_copy(update={"local": config.local.model_copy(update={"steps": 3})})
        with pytest.raises(PowerCut):
            compare_algorithms(
                other, ("fedavg",), (0,), tmp_path / "all", [Watch(("fedavg-seed0", 1))]
            )
    message = {
        "other settings": "this run was made with other settings",
        "taken": "the run folder exists already",
    }[kind]
    with pytest.raises(RunFolderError, match=f"fedavg-seed0: {message}"):
        compare_algorithms(config, ("local", "fedavg"), (0,), tmp_path / "all", [watch])
    assert watch.began == []


def test_the_rows_of_a_seed_are_read_once_for_all_methods(
    config: Config, clients_folder: Path, tmp_path: Path
) -> None:
    """They vanish once the first run has begun; the second method has them all the same."""
    rows = tmp_path / "clients"
    shutil.copytree(clients_folder, rows)
    moved = config.model_copy(update={"data": config.data.model_copy(update={"path": str(rows)})})

    class Removing(Watch):
        def on_start(self, event: StartEvent) -> None:
            super().on_start(event)
            shutil.rmtree(rows, ignore_errors=True)

    watch = Removing()
    compare_algorithms(moved, ("local", "fedavg"), (0,), tmp_path / "all", [watch])
    assert watch.began == ["local-seed0", "fedavg-seed0"]


def test_a_run_that_fails_leaves_the_others_compared(config: Config, tmp_path: Path) -> None:
    """The only edge joins two clients that are not drawn in the one round there is.

    So MIRA can pull nobody.
    """
    rounds = config.rounds.model_copy(update={"count": 1, "participation": 0.6})
    absent = sorted(set(CLIENTS) - set(sample_clients(sorted(CLIENTS), rounds, 0, 1)))
    document = {
        "clients": sorted(CLIENTS),
        "edges": [{"source": absent[0], "target": absent[1], "weight": 1.0}],
    }
    (tmp_path / "graph.json").write_text(json.dumps(document), encoding="utf-8")
    graph = config.graph.model_copy(update={"kind": "file", "path": str(tmp_path / "graph.json")})
    stuck = config.model_copy(update={"rounds": rounds, "graph": graph})
    watch = Watch()
    with pytest.raises(
        RunError,
        match=r"1 of 3 runs failed \(mira-seed0: .*no client was pulled.*; the others are "
        r"compared in .*comparison\.html",
    ):
        compare_algorithms(stuck, ("local", "mira", "fedavg"), (0,), tmp_path / "all", [watch])
    assert watch.began == ["local-seed0", "mira-seed0", "fedavg-seed0"]
    document = json.loads((tmp_path / "all" / "comparison.json").read_text(encoding="utf-8"))
    assert [row["algorithm"] for row in document["algorithms"]] == ["local", "fedavg"] and list(
        document["failures"]
    ) == ["mira-seed0"]
    assert "mira-seed0: this run failed" in (tmp_path / "all" / "comparison.html").read_text(
        encoding="utf-8"
    )


def test_when_every_run_fails_there_is_nothing_to_compare(config: Config, tmp_path: Path) -> None:
    hopeless = config.model_copy(
        update={"local": config.local.model_copy(update={"learning_rate": 1e38})}
    )
    with pytest.raises(
        RunError, match=r"2 of 2 runs failed \(local-seed0: round 1: none of 5 clients"
    ):
        compare_algorithms(hopeless, ("local", "mira"), (0,), tmp_path / "all", [Watch()])
    assert not (tmp_path / "all" / "comparison.json").exists()


def test_the_table_holds_the_rows_with_nan_where_nothing_was_measured(
    compared: Comparison,
) -> None:
    table, rows = compared.table, compared.rows
    assert list(table.columns) == list(rows[0]) and len(table) == len(rows)
    assert list(table["method"]) == [row["method"] for row in rows]
    for column in table.columns:
        for cell, row in zip(table[column], rows, strict=True):
            if row[column] is None:
                assert math.isnan(cell)
            else:
                assert cell == row[column] or cell != cell


def test_a_comparison_shows_its_losses_in_notebooks_with_all_text_escaped(
    compared: Comparison,
) -> None:
    shown = replace(compared, page=Path("<a&b>/comparison.html"))._repr_html_()
    for row in compared.rows:
        assert f"<td>{row['method']}</td>" in shown and f"<td>{row['test_loss']:.3f}</td>" in shown
    assert "<a&b>" not in shown and "&lt;a&amp;b&gt;/comparison.html" in shown
