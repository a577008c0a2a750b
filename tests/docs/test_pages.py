"""What README and the pages in docs/ refer to exists.

Commands and their settings, links, and what is made of the code.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fedmira.cli.main import app
from fedmira.config import Config, load_config

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


def commands() -> list[str]:
    """Command lines that begin with fedmira, in indented or fenced blocks.

    Those that show an error begin with a dollar sign.
    """
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    return [line.strip() for line in lines if re.match(r"( {4,})?fedmira [a-z]", line)]


def test_the_pages_hold_commands() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_that_the_command_line_understands(line: str) -> None:
    _, verb, *arguments = shlex.split(line, comments=True)
    context = typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # type: ignore[attr-defined]
    given = context.params
    assert isinstance(load_config(None, given.get("preset"), given.get("overrides") or []), Config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    targets = [
        target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target
    ]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_what_is_made_of_the_code_is_up_to_date() -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
