"""Where base and rows of a run lay when it was made, for whoever takes it up elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmira.config import Config
from fedmira.errors import RunFolderError

__all__ = ["where_they_lay"]


def where_they_lay(config: Config, run: Mapping[str, Any]) -> Config:
    """The config with the folders that run.json says, where they are still there.

    config.toml keeps paths as they were written; relative ones begin at the folder where the run
    was started.

    Args:
        config: as config.toml has it; it stays as it is.
        run: what run.json holds.

    Raises:
        RunFolderError: the base was a folder that is there no more.
    """
    changed = {}
    for section, key, block in (("model", "base", "base"), ("data", "path", "data")):
        written = getattr(getattr(config, section), key)
        place = run.get(block, {}).get("location")
        # An absolute path says itself where to look, also to somebody who has changed it.
        relative = not Path(written).expanduser().is_absolute()
        if relative and isinstance(place, str) and place != written and Path(place).exists():
            changed[section] = getattr(config, section).model_copy(update={key: place})
        elif (
            section == "model"
            and isinstance(place, str)
            and Path(place).is_absolute()
            and not Path(written).expanduser().exists()
        ):
            raise RunFolderError(
                f"model.base {written!r} was the folder {place} when the run was made, which is "
                "not there; put it back, or run from a folder in which it is found"
            )
    return config.model_copy(update=changed)
