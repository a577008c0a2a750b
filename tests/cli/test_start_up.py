"""Starting is quick, and nothing calls out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fedmira
from small import environment

HEAVY = ("torch", "transformers", "peft", "datasets", "numpy")

NO_NETWORK = """
import socket, sys

def refuse(*arguments, **options):
    raise AssertionError(f"something calls out: {arguments}")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = refuse
from fedmira.cli import main
main()
"""


def python(code: str, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    variables = {
        name: value for name, value in environment().items() if not name.startswith("HF_")
    } | more
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=variables,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "code",
    [
        "import fedmira",
        "from fedmira.cli import main",
        "import sys; sys.argv = ['fedmira', '--help']\ntry:\n    from fedmira.cli import "
        "main; main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['fedmira', 'presets']\ntry:\n    from fedmira.cli import "
        "main; main()\nexcept SystemExit: pass",
    ],
    ids=["import fedmira", "import fedmira.cli", "fedmira --help", "fedmira presets"],
)
def test_the_heavy_libraries_wait_until_they_are_needed(code: str) -> None:
    ended = python(
        f"{code}\nimport sys; print('loaded:', *[name for name in {HEAVY!r} if name in "
        "sys.modules], file=sys.stderr)"
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[-1].strip() == "loaded:"


@pytest.mark.parametrize("verb", ["run", "check", "compare --algorithms local"])
def test_a_wrong_row_is_told_before_anything_heavy_is_loaded(tmp_path: Path, verb: str) -> None:
    (tmp_path / "north.jsonl").write_text('{"question": "2+2?"}\n' * 12, encoding="utf-8")
    ended = python(
        "import sys\nfrom fedmira.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    print('ended', end.code, *[name for name in ('torch', 'transformers', 'peft') if name "
        "in sys.modules])",
        *verb.split(),
        *("--set", "data.source=jsonl", "--set", f"data.path={tmp_path}"),
        *("--set", "model.base=a-base-that-is-nowhere"),
    )
    assert ended.stdout == "ended 2\n"
    assert "north.jsonl, lines 1 to 12" in ended.stderr and "answer" in ended.stderr


def test_a_wrong_setting_is_told_before_the_rows_are_read(tmp_path: Path) -> None:
    ended = python(
        "from fedmira.cli import main; main()",
        *("check", "--set", "data.source=jsonl", "--set", f"data.path={tmp_path / 'nowhere'}"),
        *("--set", "rounds.count=0"),
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: rounds.count = 0") and "nowhere" not in ended.stderr


def test_the_demo_runs_without_a_network(tmp_path: Path) -> None:
    """The bundled base and the demo data, with every way out of the process blocked.

    No variable asks for that.
    """
    settings = (
        "data.clients=3",
        "rounds.count=2",
        "local.steps=1",
        "local.batch_size=2",
        "data.max_rows=4",
        "data.test_rows=2",
        "evaluation.max_new_tokens=2",
    )
    overrides = [part for setting in settings for part in ("--set", setting)]
    overrides += ["--set", "graph.kind=uniform"]
    ended = python(
        NO_NETWORK,
        "run",
        *overrides,
        "--output",
        tmp_path / "run",
        HF_HOME=str(tmp_path / "empty-cache"),
    )
    assert ended.returncode == 0, ended.stderr
    assert "calls out" not in ended.stderr and (tmp_path / "run" / "report.html").is_file()


def test_the_version_is_printed() -> None:
    ended = python("from fedmira.cli import main; main()", "--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"fedmira {fedmira.__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fedmira", "--version"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=True,
    )
    assert ended.stdout.startswith("fedmira ")
