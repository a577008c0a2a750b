"""Writes a run's figures into MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fedmira.observers.base import EndEvent, StartEvent
from fedmira.observers.tracked import Tracker, needed

__all__ = ["MLflow"]

_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED"}


class MLflow(Tracker):
    """A run of an MLflow experiment; look at it with `mlflow ui --backend-store-uri ADDRESS`.

    Args:
        address: MLflow's tracking address: a database file, or a server.
        experiment: groups runs.
        per_client: write each client's losses too.

    Raises:
        ConfigError: mlflow is not installed.
    """

    def __init__(
        self,
        address: str = "sqlite:///mlflow.db",
        experiment: str = "fedmira",
        per_client: bool = False,
    ) -> None:
        super().__init__(per_client)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        self._mlflow, self._address, self._experiment = needed("mlflow"), address, experiment
        self._client: Any = None
        self._run = ""

    def begin(self, event: StartEvent) -> None:
        """Find the run that carries this run's id, or make one with its settings."""
        self._client = client = self._mlflow.MlflowClient(tracking_uri=self._address)
        found = client.get_experiment_by_name(self._experiment)
        group = found.experiment_id if found else client.create_experiment(self._experiment)
        earlier = client.search_runs([group], f"tags.fedmira_id = '{event.run.id}'")
        if earlier:
            self._run = earlier[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return
        tags = {"fedmira_id": event.run.id}
        self._run = client.create_run(group, tags=tags, run_name=event.run.name).info.run_id
        for key, value in event.run.config.items():
            client.log_param(self._run, key, value)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write each figure as a metric."""
        for name, value in figures.items():
            self._client.log_metric(self._run, name, value, step=step)

    def finish(self, event: EndEvent) -> None:
        """Set the status of MLflow's run, and our own as a tag."""
        self._client.set_tag(self._run, "fedmira_status", event.status)
        self._client.set_terminated(self._run, _STATUS.get(event.status, "FAILED"))
