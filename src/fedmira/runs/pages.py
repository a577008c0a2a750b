"""The page of a run, which names the settings that differ from the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedmira.config import Config
from fedmira.report import write_report

__all__ = ["default_settings", "write_page"]


def write_page(run_folder: Path) -> Path:
    """Write report.html into a run folder, over an older one.

    Args:
        run_folder: of a run that finished, failed or is still running.

    Returns:
        The path of the page.

    Raises:
        RunFolderError: the folder or a needed file is missing, or a file is damaged.
    """
    return write_report(run_folder, default_settings)


def default_settings(algorithm: str) -> dict[str, Any]:
    """The settings of a run with this algorithm that chooses nothing else, as nested sections.

    An algorithm that this version does not know, or that cannot do without some setting, has no
    settings of its own here, so all that a run has of them counts as chosen.

    Args:
        algorithm: its name in the run's config.
    """
    defaults: dict[str, Any] = Config().model_dump(mode="json")
    usual = defaults["algorithm"]["name"]
    if algorithm == usual:
        return defaults
    try:
        chosen = Config.model_validate({"algorithm": {"name": algorithm}}).model_dump(mode="json")
        own = chosen["algorithm"]
    except ValidationError:
        own = {}
    return defaults | {"algorithm": own | {"name": usual}}
