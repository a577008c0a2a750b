"""Writes a run's figures into a local Trackio project."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fedmira.observers.base import EndEvent, StartEvent
from fedmira.observers.tracked import Tracker, needed

__all__ = ["Trackio"]


class Trackio(Tracker):
    """A run of a Trackio project on this machine; look at it with `trackio show`.

    Nothing leaves the machine: no Space is given, and telemetry of Gradio and of the Hub is off.

    Args:
        project: groups runs.
        per_client: write each client's losses too.

    Raises:
        ConfigError: trackio is not installed.
    """

    def __init__(self, project: str = "fedmira", per_client: bool = False) -> None:
        super().__init__(per_client)
        # Read by these libraries when they are imported.
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        self._trackio, self._project = needed("trackio"), project

    def begin(self, event: StartEvent) -> None:
        """Open the project's run of this name, or go on with it."""
        self._trackio.init(
            project=self._project,
            name=f"{event.run.name}-{event.run.id[:8]}",
            config=dict(event.run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures of a round."""
        self._trackio.log(dict(figures), step=step)

    def finish(self, event: EndEvent) -> None:
        """Wait until all is written."""
        self._trackio.finish()
