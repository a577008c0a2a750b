"""Methods side by side: figures over clients and seeds in every file.

Inequality is said loudly, and so is who is better off than alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from fedmira.errors import ConfigError, RunFolderError
from fedmira.report import (
    Figures,
    read_run,
    write_comparison,
    write_report,
)
from fedmira.report.comparison import MOST_DRAWN, heat
from fedmira.report.comparison_figures import pools_of

Folders = Callable[..., Any]

NAMES = ("local", "fedavg", "mira")


def three_methods(run_folder: Folders, clients: int = 8) -> dict[str, dict[int, Any]]:
    """Two seeds each; under the second, every loss of MIRA is 1 % higher."""
    made = {
        name: {
            seed: run_folder(f"{name}-seed{seed}", clients=clients, algorithm=name)
            for seed in (0, 1)
        }
        for name in NAMES
    }
    for row in made["mira"][1].client_rows:
        row["after_align_loss"] *= 1.01
    return made


def compare(made: dict[str, dict[int, Any]], folder: Path, **more: Any) -> Figures:
    return write_comparison(
        {name: {seed: run.write() for seed, run in runs.items()} for name, runs in made.items()},
        folder,
        **more,
    )


def page_in(folder: Path) -> str:
    return (folder / "comparison.html").read_text(encoding="utf-8")


def table_in(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_figures_are_means_over_clients_and_spreads_over_seeds(
    run_folder: Folders, tmp_path: Path
) -> None:
    made = three_methods(run_folder)
    rows = {row["method"]: row for row in compare(made, tmp_path).method_rows}
    for name, runs in made.items():
        losses = [[row["after_align_loss"] for row in run.client_rows] for run in runs.values()]
        means = [fmean(values) for values in losses]
        assert rows[name]["seeds"] == 2
        assert rows[name]["test_loss"] == pytest.approx(fmean(means), rel=1e-12)
        assert rows[name]["test_loss_spread"] == pytest.approx(stdev(means), rel=1e-9, abs=1e-12)
        assert rows[name]["worst_tenth"] == pytest.approx(
            fmean(max(values) for values in losses), rel=1e-12
        )
        assert rows[name]["rouge_l"] == pytest.approx(
            fmean(run.statistics("rouge_l")["mean"] for run in runs.values()), rel=1e-12
        )
    assert rows["mira"]["difference_to_local"] == pytest.approx(
        rows["mira"]["test_loss"] - rows["local"]["test_loss"], rel=1e-9
    )
    assert (
        rows["mira"]["difference_to_local_low"]
        < rows["mira"]["difference_to_local"]
        < rows["mira"]["difference_to_local_high"]
    )
    assert rows["local"]["difference_to_local"] is None
    assert (
        sum(rows["mira"][f"{key}_local"] for key in ("better_than", "equal_to", "worse_than")) == 8
    )
    assert (
        rows["mira"]["local_steps"] == 7 * 8 * 20
        and rows["local"]["bytes_up"] == 0 < rows["mira"]["bytes_up"]
    )


def test_clients_are_counted_beyond_noise(run_folder: Folders, tmp_path: Path) -> None:
    made = {name: {0: run_folder(name, clients=8, algorithm=name)} for name in ("local", "mira")}
    factors = (0.9, 0.97, 0.985, 1.0, 1.015, 1.03, 1.1, 1.2)
    for factor, row, alone in zip(
        factors, made["mira"][0].client_rows, made["local"][0].client_rows, strict=True
    ):
        row["after_align_loss"] = factor * alone["after_align_loss"]
    row = compare(made, tmp_path).method_rows[1]
    assert (row["better_than_local"], row["equal_to_local"], row["worse_than_local"]) == (2, 3, 3)
    assert (row["below_local"], row["above_local"]) == (2, 3), "with one seed noise is not measured"
    assert row["test_loss_spread"] is None, "one seed has no spread"
    assert "With one seed noise is not measured" in page_in(
        tmp_path
    ) and "bold is beyond noise" not in page_in(tmp_path)


def test_clients_that_moved_by_much_are_counted_whatever_their_noise(
    run_folder: Folders, tmp_path: Path
) -> None:
    made = {
        name: {seed: run_folder(f"{name}-seed{seed}", clients=4, algorithm=name) for seed in (0, 1)}
        for name in ("local", "mira")
    }
    for seed, factors in (
        (0, (0.9, 0.9, 1.0, 1.0)),
        (1, (0.9, 1.02, 1.1, 1.0)),
    ):  # means 0.9, 0.96, 1.05, 1; only the first without noise
        for factor, row, alone in zip(
            factors, made["mira"][seed].client_rows, made["local"][seed].client_rows, strict=True
        ):
            alone["after_align_loss"] = 2.0
            row["after_align_loss"] = 2.0 * factor
    row = compare(made, tmp_path).method_rows[1]
    assert (row["better_than_local"], row["equal_to_local"], row["worse_than_local"]) == (1, 3, 0)
    assert (row["below_local"], row["above_local"]) == (2, 1)


def test_the_best_rounds_are_paired_for_themselves(run_folder: Folders, tmp_path: Path) -> None:
    made = {name: {0: run_folder(name, clients=4, algorithm=name)} for name in ("local", "mira")}
    for row, alone in zip(made["mira"][0].client_rows, made["local"][0].client_rows, strict=True):
        row["after_align_loss"], row["best_test_loss"] = (
            0.5 * alone["after_align_loss"],
            1.25 * alone["best_test_loss"],
        )
    row = compare(made, tmp_path).method_rows[1]
    best = [alone["best_test_loss"] for alone in made["local"][0].client_rows]
    assert row["better_than_local"] == 4 and row["best_worse_than_local"] == 4, (
        "a gain at the last round, a loss at the best"
    )
    assert (
        row["best_difference_to_local"] == pytest.approx(0.25 * fmean(best))
        and row["difference_to_local"] < 0
    )
    for text in (
        page_in(tmp_path).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"),
        (tmp_path / "comparison.md").read_text(encoding="utf-8"),
    ):
        assert "t each client's own best round" in text


def test_a_clients_validation_rows_name_its_method(run_folder: Folders, tmp_path: Path) -> None:
    made = {
        name: {seed: run_folder(f"{name}-seed{seed}", clients=3, algorithm=name) for seed in (0, 1)}
        for name in ("local", "mira")
    }
    shifts = {"apple": -0.5, "birch": 0.3, "cedar": -0.02}  # the last within its noise
    names = dict(zip(shifts, (row["client"] for row in made["mira"][0].client_rows), strict=True))
    for name, runs in made.items():
        for run in runs.values():
            run.validation_rows = [
                {
                    "client": names[client],
                    "row": row,
                    "tokens": 2,
                    "loss": 2 * (2.0 + 0.1 * row + (name == "mira") * (shift + 0.1 * (-1) ** row)),
                }
                for client, shift in shifts.items()
                for row in range(4)
            ]
    rows = {row["client"]: row for row in compare(made, tmp_path).client_rows}
    chosen = {
        client: (rows[name]["validation_choice"], rows[name]["validation_standing"])
        for client, name in names.items()
    }
    assert chosen == {
        "apple": ("mira", "better"),
        "birch": ("local", "no better"),
        "cedar": ("local", "cannot tell"),
    }
    assert "by its validation rows" in page_in(tmp_path)
    assert "local (cannot tell)" in page_in(tmp_path) and "90 % confidence" in page_in(tmp_path)


def test_without_rows_of_every_run_nothing_is_chosen(run_folder: Folders, tmp_path: Path) -> None:
    made = {name: {0: run_folder(name, clients=3, algorithm=name)} for name in ("local", "mira")}
    client = made["local"][0].client_rows[0]["client"]
    made["local"][0].validation_rows = [
        {"client": client, "row": row, "tokens": 2, "loss": 4.0} for row in range(5)
    ]
    rows = compare(made, tmp_path).client_rows
    assert {row["validation_choice"] for row in rows} == {None}
    assert "by its validation rows" not in page_in(tmp_path)


def test_finished_runs_with_other_seeds_are_said_to_be_left_out(
    run_folder: Folders, tmp_path: Path
) -> None:
    made = {
        name: {1: run_folder(f"{name}-seed1", clients=3, algorithm=name)}
        for name in ("local", "mira")
    }
    figures = compare(made, tmp_path, other_seeds=[0, 2])
    assert (
        figures.document()["other_seeds"] == [0, 2]
        and "--seeds 0,1,2 adds them" in figures.left_out
    )
    assert figures.left_out in page_in(tmp_path) and figures.left_out in (
        tmp_path / "comparison.md"
    ).read_text(encoding="utf-8")


def test_methods_stand_by_their_mean_loss_behind_the_baseline(
    run_folder: Folders, tmp_path: Path
) -> None:
    made = {
        name: {0: run_folder(name, clients=3, algorithm=name)}
        for name in ("fedavg", "local", "mira")
    }
    for name, loss in (("fedavg", 1.2), ("local", 1.5), ("mira", 1.1)):
        for row in made[name][0].client_rows:
            row["after_align_loss"] = loss
    compare(made, tmp_path)
    table = page_in(tmp_path).partition('<h2 id="methods">')[2].partition("</table>")[0]
    places = [table.index(f'<th scope="row">{name}') for name in ("local", "mira", "fedavg")]
    assert places == sorted(places)


def test_best_rounds_are_no_second_table_where_they_are_the_first(
    run_folder: Folders, tmp_path: Path
) -> None:
    made = {name: {0: run_folder(name, clients=4, algorithm=name)} for name in ("local", "mira")}
    for runs in made.values():
        runs[0].more_settings = '\n[evaluation]\nselect = "best"\n'
    figures = compare(made, tmp_path)
    assert figures.best_pairings == {} and not any(
        key.startswith("best_d") for key in figures.method_rows[1]
    )
    assert "Test loss per response token at each client&#39;s own best round" in page_in(tmp_path)


def test_every_file_holds_the_same_figures(run_folder: Folders, tmp_path: Path) -> None:
    figures = compare(three_methods(run_folder), tmp_path, reference="fedavg")
    document = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert document == figures.document()
    assert (
        document["equal"] is True
        and document["problems"] == []
        and document["baselines"] == ["local", "fedavg"]
    )
    for name, rows in (
        ("", document["algorithms"]),
        ("-runs", document["runs"]),
        ("-clients", document["clients"]),
    ):
        table = table_in(tmp_path, f"comparison{name}.csv")
        assert table == [
            {key: "" if value is None else str(value) for key, value in row.items()} for row in rows
        ]
    assert [(row["method"], row["seed"]) for row in document["runs"]] == [
        (name, seed) for name in NAMES for seed in (0, 1)
    ]
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    for row in document["algorithms"]:
        assert f"| {row['method']} | 2 | {row['test_loss']:.3f} |" in text
        assert f"| {row['method']} | 1,120 | 49,600 | 336,000 |" in text
    assert "UNEQUAL" not in text


def test_clients_stand_in_the_order_of_their_training_rows(
    run_folder: Folders, tmp_path: Path
) -> None:
    figures = compare(three_methods(run_folder), tmp_path)
    sizes = [row["train_rows"] for row in figures.client_rows]
    assert sizes == sorted(sizes) and len(set(sizes)) > 1
    found = figures.client_rows[0]
    assert found["mira_to_local"] == pytest.approx(
        found["mira_test_loss"] - found["local_test_loss"]
    )
    assert found["mira_against_local"] in ("better", "equal", "worse")


def test_the_page_shows_every_client_method_and_budget(run_folder: Folders, tmp_path: Path) -> None:
    made = three_methods(run_folder)
    write_report(made["mira"][1].write())
    paths = {
        name: {
            seed: run.folder if run.folder.exists() else run.write() for seed, run in runs.items()
        }
        for name, runs in made.items()
    }
    figures = write_comparison(paths, tmp_path / "deep" / "down")
    page = page_in(tmp_path / "deep" / "down")
    for row in figures.method_rows:
        assert f"{row['test_loss']:.3f}" in page and f"{row['worst_tenth']:.3f}" in page
    for row in figures.client_rows:
        assert all(f"{row[f'{name}_test_loss']:.3f}" in page for name in NAMES)
    assert 'href="../../mira-seed1/report.html">1</a>' in page
    assert page.count("href=") == 1  # the other runs have no report
    assert "algorithm.name" in page and "Equal terms" in page
    assert (
        page.count('class="heat-map"') == 1
        and page.count("against 1.") + page.count("against 2.") >= 8
    )


def test_a_reference_has_its_own_columns_and_heat_map(run_folder: Folders, tmp_path: Path) -> None:
    figures = compare(three_methods(run_folder), tmp_path, reference="fedavg")
    assert {"better_than_local", "better_than_fedavg"} <= set(figures.method_rows[0])
    assert "Each client against fedavg" in page_in(tmp_path)
    with pytest.raises(
        ConfigError, match="reference 'ditto' is not among the compared methods; they are local"
    ):
        write_comparison({"local": {0: tmp_path / "local-seed0"}}, tmp_path, reference="ditto")


def test_unequal_budgets_are_said_loudly_everywhere(run_folder: Folders, tmp_path: Path) -> None:
    made = three_methods(run_folder)
    for event in made["fedavg"][1].events:
        if event["event"] == "train":
            event["steps"] = 14
    document = compare(made, tmp_path).document()
    said = "fedavg, seed 1: other local steps: 2,240, and 1,120 under local"
    assert document["equal"] is False and document["problems"] == [said]
    assert [row["equal_budget"] for row in document["algorithms"]] == [True, False, True]
    page, text = page_in(tmp_path), (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert (
        "Unequal: these methods were not run on equal terms" in page
        and said in page
        and "Equal terms" not in page
    )
    assert "**UNEQUAL" in text and said in text and "| fedavg (UNEQUAL) |" in text


def test_methods_that_train_less_are_named_and_still_compare(
    run_folder: Folders, tmp_path: Path
) -> None:
    made = three_methods(run_folder)
    for run in made["fedavg"].values():
        run.trained_parameters = 21_504
    for run in made["mira"].values():
        run.trained_parameters = None  # of a run that did not write it down
    figures = compare(made, tmp_path)
    note = "fedavg trains 21,504 parameters of a client's adapter, local 43,008"
    document = figures.document()
    assert document["equal"] is True and document["notes"] == [note]
    assert [row["parameters_most"] for row in figures.method_rows] == [43_008] * 3
    assert [row["trained_most"] for row in figures.method_rows] == [43_008, 21_504, None]
    text, page = (tmp_path / "comparison.md").read_text(encoding="utf-8"), page_in(tmp_path)
    assert f"- {note}\n" in text and "| 43,008 | 21,504 | " in text and "| 43,008 | – | " in text
    assert (
        note.replace("'", "&#39;") in page
        and "Equal terms" in page
        and '<td class="number">21,504</td>' in page
    )


def test_clients_of_one_category_are_resampled_together_where_the_partition_makes_them(
    run_folder: Folders, tmp_path: Path
) -> None:
    found = {}
    for kind in ("task", "category"):
        made = {
            name: {0: run_folder(f"{kind}-{name}", clients=24, algorithm=name)}
            for name in ("local", "mira")
        }
        for runs in made.values():
            runs[0].more_settings = f'\n[data]\npartition = "{kind}"\n'
        found[kind] = compare(made, tmp_path / kind)
    said = {"task": "clients", "category": "categories with all their clients"}
    for kind, resampled in said.items():
        assert (
            found[kind].document()["interval"]["kind"] == f"percentile bootstrap over {resampled}"
        )
        assert f"resampling {resampled}. " in page_in(tmp_path / kind)
        assert f"interval over {resampled}. " in (tmp_path / kind / "comparison.md").read_text(
            encoding="utf-8"
        )
    alone, together = (found[kind].pairings["mira", "local"] for kind in said)
    assert alone.difference == together.difference and (alone.low, alone.high) != (
        together.low,
        together.high,
    )


def test_a_category_with_one_client_is_that_client(run_folder: Folders) -> None:
    several, single = run_folder("several", clients=2), run_folder("single", clients=1)
    several.more_settings = single.more_settings = '\n[data]\npartition = "category"\n'
    assert pools_of([read_run(several.write())]) == dict.fromkeys(several.names, "triage")
    assert pools_of([read_run(single.write())]) is None


def test_what_was_resampled_is_said_as_it_was(run_folder: Folders, tmp_path: Path) -> None:
    one = compare(
        {
            name: {0: run_folder(f"one-{name}", clients=3, algorithm=name)}
            for name in ("local", "mira")
        },
        tmp_path / "one",
    )
    two = compare(three_methods(run_folder), tmp_path / "two")
    assert (one.resampled, two.resampled) == ("clients", "clients and seeds")
    said = [
        (tmp_path / name / "comparison.md").read_text(encoding="utf-8") for name in ("one", "two")
    ]
    assert "mean over clients. " in said[0] and "interval over clients. " in said[0]
    assert (
        "mean over clients and seeds; ± is" in said[1]
        and "interval over clients and seeds. " in said[1]
    )


@pytest.mark.parametrize(
    ("excess", "expected"), [(0, 0), (0.01, 1), (0.04, 2), (0.09, 3), (0.2, 4), (0.3, 5)]
)
def test_heat_grows_with_the_excess_over_the_best(excess: float, expected: int) -> None:
    assert heat(2 * (1 + excess), 2.0) == expected


def test_runs_with_different_clients_are_said_to_be_unequal(
    run_folder: Folders, tmp_path: Path
) -> None:
    figures = compare(
        {"one": {0: run_folder("one", clients=3)}, "two": {0: run_folder("two", clients=4)}},
        tmp_path,
    )
    assert "two, seed 0: other clients: they are not the same" in figures.problems["two"]
    assert figures.baselines == () and "better than" not in page_in(
        tmp_path
    )  # no run trained alone


def test_of_many_clients_some_are_drawn_and_the_rest_is_said(
    run_folder: Folders, tmp_path: Path
) -> None:
    compare(
        {name: {0: run_folder(name, clients=250, algorithm=name)} for name in ("local", "mira")},
        tmp_path,
    )
    page = page_in(tmp_path)
    assert page.count("mira: ") == 84 <= MOST_DRAWN  # every third of 250
    assert "84 of 250 clients are shown, one of every 3" in page


def test_a_failed_run_is_named_and_its_cells_are_empty(run_folder: Folders, tmp_path: Path) -> None:
    failed = run_folder("failed", clients=4)
    failed.fail_early("out of memory")
    compare(
        {"good": {0: run_folder("good", clients=4)}, "bad": {0: failed}},
        tmp_path,
        failures={"worse-seed0": "out of luck"},
    )
    page = page_in(tmp_path)
    assert "bad, seed 0: this run failed." in page and "out of memory" in page
    assert (
        "worse-seed0: this run failed, and its method is left out." in page
        and "out of luck" in page
    )
    assert "nan" not in page.lower().replace("finance", "")


def test_titles_are_escaped(run_folder: Folders, tmp_path: Path) -> None:
    made = {"<script>x</script>": {0: run_folder("a b#c", clients=2)}}
    write_report(made["<script>x</script>"][0].write())
    write_comparison({"<script>x</script>": {0: tmp_path / "a b#c"}}, tmp_path)
    page = page_in(tmp_path)
    assert page.count("<script>") == 1
    assert 'href="a%20b%23c/report.html"' in page


def test_damage_of_all_folders_is_reported_together(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as raised:
        write_comparison({"one": {0: tmp_path / "one"}, "two": {0: tmp_path / "two"}}, tmp_path)
    assert len(raised.value.problems) == 2
    with pytest.raises(RunFolderError, match="no run to compare"):
        write_comparison({}, tmp_path)
