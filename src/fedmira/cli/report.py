"""fedmira report: write the page of a run again."""

from __future__ import annotations

from fedmira.cli.options import Format, FormatOption, RunPath
from fedmira.cli.screen import print_json, tell

__all__ = ["report"]


def report(run: RunPath, format: FormatOption = Format.text) -> None:
    """Write report.html from a run folder.

    Example: fedmira report runs/first
    """
    from fedmira.runs import write_page

    page = write_page(run)
    if format is Format.json:
        print_json({"report": str(page)})
        return
    tell(f"report: {page}")
