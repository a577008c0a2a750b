"""Every verb as users call it.

A process, its exit code, one JSON document on stdout, people's text on stderr.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from small import CLIENTS, command, table_of

VERBS = (
    "run",
    "compare",
    "decide",
    "tune",
    "check",
    "evaluate",
    "generate",
    "export",
    "serve-config",
    "chat",
    "route",
    "merge",
    "compress",
    "align",
    "report",
    "presets",
)


def one_document(text: str) -> Any:
    """The JSON document that is the whole text."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_begins_with_the_verb(
    verb: str, fedmira: Callable[..., Any]
) -> None:
    ended = fedmira(verb, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"Example: fedmira {verb}" in " ".join(ended.out.split())
    if verb != "run":
        assert "--format" in ended.out


def test_help_names_every_verb(fedmira: Callable[..., Any]) -> None:
    ended = fedmira("--help")
    assert ended.code == 0 and all(verb in ended.out for verb in VERBS)


def test_run_prints_one_document_and_tells_its_progress_on_stderr(command_run: Any) -> None:
    document = one_document(command_run.ended.stdout)
    assert set(document) == {"folder", "report", "summary", "clients"}
    assert document["folder"] == str(command_run.folder) and Path(document["report"]).is_file()
    assert [row["client"] for row in document["clients"]] == sorted(CLIENTS)
    assert [str(row["after_align_loss"]) for row in document["clients"]] == [
        row["after_align_loss"] for row in table_of(command_run.folder, "clients")
    ]
    assert (
        "mira on 5 clients, 6 rounds" in command_run.ended.stderr
        and "round 6/6" in command_run.ended.stderr
    )
    assert "Traceback" not in command_run.ended.stderr and "Warning" not in command_run.ended.stderr


def test_evaluate_measures_what_run_reported(command_run: Any) -> None:
    ended = command("evaluate", command_run.folder, "--format", "json")
    assert ended.returncode == 0, ended.stderr
    reported = {row["client"]: row for row in table_of(command_run.folder, "clients")}
    for row in one_document(ended.stdout):
        assert row["test_loss"] == pytest.approx(
            float(reported[row["client"]]["after_align_loss"]), rel=1e-6
        )
        assert row["rouge_l"] == pytest.approx(float(reported[row["client"]]["rouge_l"]))


def test_generate_answers_as_one_document_or_as_the_bare_text(
    command_run: Any, fedmira: Callable[..., Any]
) -> None:
    ended = command(
        "generate", command_run.folder, "--client", "apple-1", "w4 w8", "--format", "json"
    )
    assert ended.returncode == 0, ended.stderr
    document = one_document(ended.stdout)
    assert (document["client"], document["prompt"]) == ("apple-1", "w4 w8") and isinstance(
        document["answer"], str
    )
    assert (
        fedmira("generate", command_run.folder, "--client", "apple-1", "w4 w8").out
        == document["answer"] + "\n"
    )


def test_check_counts_and_plans_and_trains_nothing(config_file: Path, tmp_path: Path) -> None:
    ended = command("check", config_file, "--set", "rounds.count=9", "--format", "json")
    assert ended.returncode == 0, ended.stderr
    document = one_document(ended.stdout)
    assert (
        set(document) == {"plan", "clients", "skipped", "notes"} and document["plan"]["rounds"] == 9
    )
    counts = {
        row["client_id"]: (row["train_rows"], row["validation_rows"], row["test_rows"])
        for row in document["clients"]
    }
    # 0.6, 0.2 and 0.2 of 14, 22, 10, 18 and 12 rows, test rounded first, then validation as a
    # quarter of what is left.
    assert counts == {
        "apple-1": (8, 3, 3),
        "apple-2": (13, 5, 4),
        "apple-3": (6, 2, 2),
        "birch-1": (10, 4, 4),
        "birch-2": (7, 3, 2),
    }


def test_cut_prompts_are_told_on_stderr_and_uncut_ones_are_not(
    config_file: Path, command_run: Any
) -> None:
    """A row has at least the 6 words of its instruction and 3 to answer, so none fits 8 tokens."""
    ended = command("check", config_file, "--set", "data.max_length=8", "--format", "json")
    assert ended.returncode == 0, ended.stderr
    total = sum(
        row[f"{part}_rows"]
        for row in one_document(ended.stdout)["clients"]
        for part in ("train", "validation", "test")
    )
    told = [line for line in ended.stderr.splitlines() if "lose their middle" in line]
    assert len(told) == 1 and told[0].startswith(f"{total} of {total} prompts lose their middle")
    assert "data.max_length (8 tokens; the longest has" in told[0] and told[0].endswith(
        "raise data.max_length"
    )
    assert "lose their middle" not in command_run.ended.stderr


def test_report_is_written_anew(command_run: Any) -> None:
    page = command_run.folder / "report.html"
    page.unlink()
    ended = command("report", command_run.folder, "--format", "json")
    assert ended.returncode == 0, ended.stderr
    assert one_document(ended.stdout) == {"report": str(page)} and page.is_file()


def test_presets_are_listed_with_what_they_are() -> None:
    ended = command("presets", "--format", "json")
    assert ended.returncode == 0 and ended.stderr == ""
    document = one_document(ended.stdout)
    assert {"mira-ni", "mira-paper-ni", "local-ni"} <= set(document) and all(
        text.endswith(".") for text in document.values()
    )


def test_compare_prints_a_row_per_algorithm_and_a_second_call_repeats_nothing(
    config_file: Path, tmp_path: Path, fedmira: Callable[..., Any]
) -> None:
    arguments = (
        "compare",
        config_file,
        "--algorithms",
        "local,fedavg,mira",
        "--set",
        "rounds.count=2",
        "--set",
        "graph.kind=category",
        "--output",
        tmp_path / "all",
        "--format",
        "json",
    )
    ended = command(*arguments)
    assert ended.returncode == 0, ended.stderr
    document = one_document(ended.stdout)
    assert [row["algorithm"] for row in document["algorithms"]] == [
        "local",
        "fedavg",
        "mira",
    ] and Path(document["report"]).is_file()
    runs = [
        path
        for path in (tmp_path / "all").rglob("*")
        if path.is_file() and path.parent != tmp_path / "all"
    ]
    before = {path: path.stat().st_mtime_ns for path in runs}
    again = fedmira(*arguments)
    assert again.code == 0 and one_document(again.out) == document
    assert {path: path.stat().st_mtime_ns for path in runs} == before


@pytest.mark.parametrize("verb", ["evaluate", "check", "presets", "compare", "run"])
def test_people_get_tables(
    verb: str, command_run: Any, fedmira: Callable[..., Any], tmp_path: Path
) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "evaluate": (command_run.folder,),
        "check": (command_run.config,),
        "presets": (),
        "compare": (
            command_run.config,
            "--algorithms",
            "local",
            "--set",
            "rounds.count=1",
            "--output",
            tmp_path / "all",
        ),
        "run": (
            command_run.config,
            "--set",
            "graph.kind=category",
            "--set",
            "rounds.count=2",
            "--output",
            tmp_path / "run",
        ),
    }
    expected = {
        "evaluate": "apple-1",
        "check": "largest degree|learned in the run",
        "presets": "mira-ni",
        "compare": "comparison.html",
        "run": "report.html",
    }
    ended = fedmira(verb, *arguments[verb])
    assert ended.code == 0, ended.err
    assert any(word in ended.out for word in expected[verb].split("|"))


def test_a_run_folder_in_runs_is_chosen_where_none_is_named(
    command_run: Any, fedmira: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = fedmira(
        "run",
        command_run.config,
        "--set",
        "graph.kind=uniform",
        "--set",
        "rounds.count=2",
        "--format",
        "json",
    )
    assert ended.code == 0, ended.err
    [folder] = (tmp_path / "runs").iterdir()
    assert (
        folder.name.startswith("mira-")
        and one_document(ended.out)["folder"] == f"runs/{folder.name}"
    )
