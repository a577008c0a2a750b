"""Writes a run's figures as TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmira.observers.base import EndEvent, StartEvent
from fedmira.observers.tracked import Tracker, needed

__all__ = ["TensorBoard"]


class TensorBoard(Tracker):
    """Event files in a folder for each run; look at them with `tensorboard --logdir FOLDER`.

    Args:
        folder: holds a folder for each run, named as the run's.
        per_client: write each client's losses too.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path = "tensorboard", per_client: bool = False) -> None:
        super().__init__(per_client)
        needed("tensorboard")
        self._folder = Path(folder)
        self._writer: Any = None

    def begin(self, event: StartEvent) -> None:
        """Open an event file; TensorBoard drops what an earlier part wrote after its checkpoint."""
        from torch.utils.tensorboard import SummaryWriter

        after = event.resumed + 1 if event.resumed is not None else None
        self._writer = SummaryWriter(str(self._folder / event.run.name), purge_step=after)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write each figure as a scalar."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, event: EndEvent) -> None:
        """Write out and close the file."""
        self._writer.close()
