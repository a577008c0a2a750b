"""The commands and Python blocks of README and of some pages run, in their order, on made-up data.

Only sizes are cut down.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedmira.api
from fedmira.studies import answer
from fedmira.studies.saved import reload_adapters
from small import call_main, write_clients

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```|((?:^    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)
PLACES = ("NI", "BASE", "DATA")
"""Variables that the reader is asked to set."""
SMALL: dict[str, Any] = {
    "data.clients": 4,
    "data.max_rows": 8,
    "data.test_rows": 2,
    "graph.kind": "uniform",  # so few steps tell a learned graph nothing
    "rounds.count": 2,
    "local.steps": 1,
    "local.batch_size": 2,
    "evaluation.max_new_tokens": 2,
}


def write_tasks(folder: Path) -> None:
    """Four tasks of 24 rows in the format of Natural Instructions."""
    folder.mkdir()
    for number, verb in enumerate(("Repeat", "Reverse", "Shout", "Count"), start=1):
        draw = random.Random(number)
        words = [
            " ".join(
                draw.choice(("red", "green", "blue", "grey")) + str(draw.randrange(99))
                for _ in range(3)
            )
            for _ in range(24)
        ]
        rows = [
            {"id": f"{verb}-{i}", "input": text, "output": [text.upper()]}
            for i, text in enumerate(words)
        ]
        document = {"Definition": [f"{verb} the words."], "Categories": [verb], "Instances": rows}
        (folder / f"task{number:03d}_{verb.lower()}.json").write_text(
            json.dumps(document), encoding="utf-8"
        )


def expanded(line: str, before: list[str]) -> list[str]:
    """The words of a command line as bash hands them over, after the assignments before it."""
    script = "\n".join(["set -eu", *before, f"printf '%s\\0' {line.partition('   #')[0]}"])
    ended = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={**os.environ}
    )
    return ended.stdout.split("\0")[:-1]


def run_command(words: list[str]) -> None:
    """`fedmira ...`, made small where it trains from settings."""
    place = Path(words[2]) if len(words) > 2 else Path()
    finished = any((place / name).is_file() for name in ("comparison.json", "config.toml"))
    trains = words[1] in ("run", "compare") or (words[1] == "decide" and not finished)
    if trains and "--resume" not in words:
        small = dict(SMALL)
        if "algorithm.name=local" in words:
            del small["graph.kind"]  # it uses no graph, and a graph is an error then
        words = [
            *words,
            *(part for key, value in small.items() for part in ("--set", f"{key}={value}")),
        ]
    elif words[1] == "check":
        words = [*words, "--set", "data.clients=4"]
    if words[1] == "chat":
        sys.stdin = io.StringIO("w1 w2\n")
    ended = call_main(*words[1:])
    assert ended.code == 0, f"{' '.join(words)}: {ended.err}"
    assert ended.out


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository's root, with what README's variables stand for."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    write_tasks(tmp_path / "ni")
    write_clients(tmp_path / "clients", {"north": 12, "south": 12, "west": 12, "east": 12})
    monkeypatch.chdir(tmp_path)
    full = fedmira.api.run

    def small(config: dict[str, Any] | None = None, **more: Any) -> Any:
        sizes = dict(SMALL)
        if "clients" in more:  # three, and methods without a graph
            del sizes["data.clients"], sizes["graph.kind"]
        settings = {**(config or {}), **more.pop("settings", {}), **sizes}
        return full(settings=settings, **more)

    monkeypatch.setattr(fedmira.api, "run", small)
    return tmp_path


def follow(page: Path, workplace: Path) -> list[str]:
    """Run the blocks of a page in their order.

    The verbs of the commands, and "python" for each Python block.
    """
    places = {
        "NI": workplace / "ni",
        "BASE": ROOT / "src" / "fedmira" / "bundled" / "base",
        "DATA": workplace / "clients",
    }
    assignments: list[str] = []
    ran: list[str] = []
    for python, indented in BLOCK.findall(page.read_text(encoding="utf-8")):
        if python:
            exec(compile(python, page.name, "exec"), {"__name__": "page"})
            ran.append("python")
        for line in (line.strip() for line in indented.splitlines()):
            name = re.match(r"([A-Z]+)=", line)
            if name:
                assignments.append(f"{name[1]}={places[name[1]]}" if name[1] in PLACES else line)
            elif line.startswith("fedmira "):
                run_command(expanded(line, assignments))
                ran.append(line.split()[1])
    return ran


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks transformers for it
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)  # README opens a file in one line
def test_everything_in_the_readme_runs_in_its_order(workplace: Path) -> None:
    (workplace / "my-clients").symlink_to(workplace / "clients")
    assert follow(ROOT / "README.md", workplace) == ["decide", "python"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks transformers for it
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)  # the page opens a file in one line
def test_the_first_steps_can_be_gone_as_they_are_written(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", sys.stdin)  # put back behind the conversations
    ran = follow(ROOT / "docs" / "first-steps.md", workplace)
    wanted = {"run", "check", "compare", "decide", "chat", "evaluate", "generate", "python"}
    assert wanted <= set(ran)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8000


@pytest.mark.slow
def test_the_way_to_a_decision_can_be_gone_as_it_is_written(workplace: Path) -> None:
    ran = follow(ROOT / "docs" / "deciding.md", workplace)
    assert ran == ["check", "decide", "compare", "decide", "evaluate", "generate"]
    decided = workplace / "runs" / "decided"
    with (decided / "decision.csv").open(encoding="utf-8", newline="") as file:
        taken = {line["client"]: line["choice"] for line in csv.DictReader(file)}
    assert sorted(taken) == sorted(
        path.name for path in (decided / "adapters").iterdir() if path.is_dir()
    )
    known = {"local", "flexlora", "two-level", "local + flexlora", "local + two-level"}
    assert set(taken.values()) <= known


def test_the_code_for_plain_peft_answers_as_fedmira_does(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fedmira.api.run({}, output=Path("runs/from-python"))
    capsys.readouterr()
    assert follow(ROOT / "docs" / "python.md", workplace) == ["python", "python"]
    *told, sha256 = capsys.readouterr().out.splitlines()
    instruction = "Read the patient note and name the department that should see the patient."
    run = Path("runs/from-python")
    assert "\n".join(told) == answer(
        reload_adapters(run), "clinic-north", "Ada reports dizziness since Monday.", instruction, 64
    )
    assert (
        sha256
        == json.loads((run / "adapters" / "index.json").read_text(encoding="utf-8"))[
            "clinic-north"
        ]["base_sha256"]
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["own_data.py", str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples" / "own_data.py"), run_name="__main__")
    assert "loads with plain PEFT" in capsys.readouterr().out
