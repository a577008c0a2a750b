"""Stops a run, or single clients, once a loss has stopped falling."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from fedmira.errors import ConfigError
from fedmira.observers.base import EvaluationEvent, JoinEvent, Observer, StartEvent, Stop

__all__ = ["EarlyStopping"]


class EarlyStopping(Observer):
    """Stops after `patience` evaluations in a row without improvement.

    >>> from fedmira.observers import EarlyStopping, EvaluationEvent, RunFacts
    >>> stopping = EarlyStopping(patience=1, metric="test_loss")
    >>> for number, loss in enumerate([2.0, 1.5, 1.6]):
    ...     event = EvaluationEvent(RunFacts("1", "first", {}), number, {}, {}, loss, None)
    ...     print(stopping.on_evaluation(event))
    None
    None
    Stop(reason='mean test_loss has not improved by more than 0 in 1 evaluations')

    Args:
        patience: evaluations without improvement that are allowed; at least 1.
        metric: mean over clients of which loss.
        min_delta: a loss counts as better once it is lower than the best by more than this.
        per_client: each client is judged by its own loss; one that has stopped is no longer asked
            to train while the others go on, and the run stops once all have. Clients without this
            loss are never stopped before the others.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        patience: int = 3,
        metric: Literal["validation_loss", "test_loss"] = "validation_loss",
        min_delta: float = 0.0,
        per_client: bool = False,
    ) -> None:
        if patience < 1:
            raise ConfigError(f"EarlyStopping: patience is {patience}; must be 1 or more")
        if metric not in ("validation_loss", "test_loss"):
            raise ConfigError(
                f"EarlyStopping: metric is {metric!r}; must be 'validation_loss' or 'test_loss'"
            )
        if not min_delta >= 0:
            raise ConfigError(f"EarlyStopping: min_delta is {min_delta}; must be 0 or more")
        self.patience, self.metric, self.min_delta = patience, metric, min_delta
        self.per_client = per_client
        self._best: dict[str, float] = {}
        self._waited: dict[str, int] = {}
        self._clients: tuple[str, ...] = ()

    def on_start(self, event: StartEvent) -> Stop | None:
        """Forget an earlier run, unless this one is resumed."""
        if not event.run.config.get("evaluation.every"):
            raise ConfigError(
                "EarlyStopping needs evaluations between rounds, and evaluation.every is 0; set "
                "it to 1 or more"
            )
        self._clients = event.clients
        if event.resumed is None:
            self._best, self._waited = {}, {}
        return None

    def on_join(self, event: JoinEvent) -> Stop | None:
        """Newcomers are judged as all others are; a mean over more clients is judged anew."""
        self._clients += event.clients
        self._best.pop("", None)
        self._waited.pop("", None)
        return None

    def on_evaluation(self, event: EvaluationEvent) -> Stop | None:
        """Judge the losses of this round."""
        if self.per_client:
            losses = event.validation if self.metric == "validation_loss" else event.test
            for client, loss in losses.items():
                if not self._is_over(client):
                    self._judge(client, loss)
            if self._clients and all(map(self._is_over, self._clients)):
                return Stop(f"{self.metric} of no client has {self._rule}")
            return None
        mean = getattr(event, self.metric)
        if mean is not None:
            self._judge("", mean)
        return Stop(f"mean {self.metric} has not {self._rule}") if self._is_over("") else None

    def resting(self) -> Collection[str]:
        """Clients whose own loss has stopped falling."""
        return [client for client in self._waited if client and self._is_over(client)]

    def state(self) -> Mapping[str, Any]:
        """Best losses and how long each has been waited for."""
        return {"best": self._best, "waited": self._waited} if self._best else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on waiting where the checkpoint was written."""
        self._best, self._waited = dict(state["best"]), dict(state["waited"])

    def _judge(self, name: str, loss: float) -> None:
        if math.isfinite(loss) and loss < self._best.get(name, math.inf) - self.min_delta:
            self._best[name], self._waited[name] = loss, 0
        else:
            self._waited[name] = self._waited.get(name, 0) + 1

    def _is_over(self, name: str) -> bool:
        return self._waited.get(name, 0) >= self.patience

    @property
    def _rule(self) -> str:
        return f"improved by more than {self.min_delta:g} in {self.patience} evaluations"
