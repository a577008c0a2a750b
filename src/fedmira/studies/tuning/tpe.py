"""Trials that Optuna's tree-structured Parzen estimator proposes; Optuna is an extra.

Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization". The study lies in an SQLite
file of its own in the folder of the search. Each proposal has a sampler with a seed of its own, so
that a search which was interrupted proposes what it would have proposed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmira.errors import ConfigError, RunFolderError
from fedmira.seeds import seed_for
from fedmira.studies.tuning.space import Searched, Space

__all__ = ["OptunaStudy", "check_optuna"]

_FILE = "optuna.sqlite3"
_NAME = "fedmira-tune"
_STARTUP = 5
"""Trials at random before the estimator proposes; fixed, so that a search may be made longer."""


def check_optuna() -> None:
    """Refuse where Optuna is not installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "tune: method 'tpe' needs Optuna, which is not installed; install it with: pip install "
            "'fedmira[tune]', or take --method halving or random"
        )


class OptunaStudy:
    """An Optuna study over a space.

    Args:
        output: the folder of the search, in which the study's file is kept.
        space: what is searched.
        seed: of the proposals.
        first: settings that are proposed first, or None.
    """

    def __init__(
        self, output: Path, space: Space, seed: int, first: Mapping[str, Any] | None
    ) -> None:
        # By name: the extra may be absent, and its types with it.
        self._optuna: Any = importlib.import_module("optuna")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._space, self._seed = space, seed
        path = output / _FILE
        self._study = self._optuna.create_study(
            storage=f"sqlite:///{path.resolve().as_posix()}",
            study_name=_NAME,
            direction="minimize",
            load_if_exists=True,
        )
        if first is not None and not self._study.get_trials(deepcopy=False):
            chosen = {
                each.key: each.values.index(first[each.key]) if each.values else first[each.key]
                for each in space.settings
            }
            self._study.enqueue_trial(chosen)

    def proposed(self, number: int) -> dict[str, Any]:
        """The values of a trial; those of one that was proposed before are kept.

        Args:
            number: from 1, one after the other.

        Raises:
            RunFolderError: the study's trials do not follow the search's.
        """
        trial = self._trial(number)
        found = {}
        for each in self._space.settings:
            name = each.key
            if each.values:
                found[name] = each.values[self._place(trial, each)]
            elif each.whole:
                found[name] = trial.suggest_int(name, each.low, each.high, log=each.log)
            else:
                found[name] = trial.suggest_float(name, each.low, each.high, log=each.log)
        return found

    def tell(self, number: int, loss: float) -> None:
        """What came of a trial; infinity for one that failed.

        Args:
            number: of the trial.
            loss: to be made small.
        """
        if self._study.get_trials(deepcopy=False)[number - 1].state.is_finished():
            return
        if math.isfinite(loss):
            self._study.tell(number - 1, loss)
        else:
            self._study.tell(number - 1, state=self._optuna.trial.TrialState.FAIL)

    def _trial(self, number: int) -> Any:
        """The study's trial, begun where it is not there yet."""
        samplers = self._optuna.samplers
        self._study.sampler = samplers.TPESampler(
            seed=seed_for(self._seed, "tpe", number) % 2**32, n_startup_trials=_STARTUP
        )
        known = self._study.get_trials(deepcopy=False)
        waiting = self._optuna.trial.TrialState.WAITING
        if len(known) >= number and known[number - 1].state != waiting:
            frozen = known[number - 1]
            return _Known(frozen) if frozen.state.is_finished() else self._again(frozen)
        trial = self._study.ask()
        if trial.number != number - 1:
            raise RunFolderError(
                f"{_FILE}: the study's next trial is {trial.number + 1}, and that of the search is "
                f"{number}; choose another --output"
            )
        return trial

    def _again(self, frozen: Any) -> Any:
        """A trial that was begun and not finished: what it was given stays, the rest is drawn."""
        return self._optuna.trial.Trial(self._study, frozen._trial_id)

    def _place(self, trial: Any, each: Searched) -> int:
        """The place of a value in its list; of numbers, near places are near values."""
        last = len(each.values) - 1
        if each.ordered and last:
            return int(trial.suggest_int(each.key, 0, last))
        return int(trial.suggest_categorical(each.key, list(range(last + 1))))


class _Known:
    """A finished trial, which answers with what it was given."""

    def __init__(self, frozen: Any) -> None:
        self._given: Mapping[str, Any] = frozen.params

    def suggest_int(self, name: str, *_: Any, **__: Any) -> int:
        return int(self._given[name])

    def suggest_float(self, name: str, *_: Any, **__: Any) -> float:
        return float(self._given[name])

    def suggest_categorical(self, name: str, *_: Any) -> int:
        return int(self._given[name])
