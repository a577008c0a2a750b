"""Writes a run's figures for Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedmira.observers.base import EndEvent, StartEvent
from fedmira.observers.tracked import Tracker, needed

__all__ = ["WandB"]


class WandB(Tracker):
    """A run of a W&B project, kept on this machine until `wandb sync` or `mode="online"`.

    Args:
        project: groups runs.
        folder: where W&B keeps its files.
        mode: "offline" sends nothing; "online" sends while the run goes on.
        per_client: write each client's losses too.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(
        self,
        project: str = "fedmira",
        folder: str | Path = "wandb-runs",
        mode: Literal["offline", "online"] = "offline",
        per_client: bool = False,
    ) -> None:
        super().__init__(per_client)
        self._wandb, self._project = needed("wandb"), project
        self._folder, self._mode = Path(folder), mode
        self._run: Any = None

    def begin(self, event: StartEvent) -> None:
        """Open a run with the id of the run folder, so that parts of one run belong together."""
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = self._wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        self._run = self._wandb.init(
            project=self._project,
            dir=str(self._folder),
            mode=self._mode,
            id=event.run.id,
            name=event.run.name,
            config=dict(event.run.config),
            resume="allow" if self._mode == "online" else None,
            settings=settings,
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures of a round."""
        self._run.log(dict(figures), step=step)

    def finish(self, event: EndEvent) -> None:
        """Close the run; one that failed is marked so."""
        self._run.finish(exit_code=1 if event.status == "failed" else 0)
