"""Trials of a search: runs that see no test row, held and continued, and their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from fedmira.clients import LocalClients
from fedmira.config import Config, with_settings
from fedmira.data import ObjectRows, ReadRows
from fedmira.errors import ConfigError, MachineError, RunError
from fedmira.experiment import build_experiment, held_after, start_experiment
from fedmira.model import BaseModel
from fedmira.observers import Observer
from fedmira.records import RecordedFolder
from fedmira.report import Run, read_run
from fedmira.runs import RunFolder
from fedmira.studies.ground import CommonGround, PlannedRun
from fedmira.studies.tuning.exponentiated import NOTE, Armed, Divisor

__all__ = ["At", "Trial", "Trials"]

At = Literal["last", "best"]
"""At which round a client's validation loss counts: the last, or its own best one so far."""

_FOLDER = "trials"
_MOST_NAMED = 5

Losses = dict[int, dict[str, float]]
"""Seed -> client -> validation loss."""


@dataclass
class Trial:
    """Settings that are tried.

    Attributes:
        number: from 1, in the order in which they were drawn.
        values: dotted key -> value.
        losses: round -> seed -> client -> validation loss, where all clients have one.
        problem: why there are no losses, or "".
        failures: how often a client failed in a round, and kept the adapter that it had.
        probability: where clients draw settings, how likely these are in the end; the mean over
            seeds.
        drawn: how often they were drawn.
    """

    number: int
    values: Mapping[str, Any]
    losses: dict[int, Losses] = field(default_factory=dict)
    problem: str = ""
    failures: int = 0
    probability: float | None = None
    drawn: int = 0

    @property
    def rounds(self) -> int:
        """The last round that it was measured after with all seeds; 0 where that is none."""
        return max(self.losses, default=0)

    def loss(self, rounds: int) -> float:
        """Mean over seeds of the mean over clients after a round; infinity where it failed."""
        means = self._means(rounds)
        return math.inf if self.problem or not means else fmean(means)

    def document(self, seeds: Sequence[int], status: str) -> dict[str, Any]:
        """What is known of it, ready for JSON.

        Args:
            seeds: of its runs.
            status: "chosen", "finished", "dropped", "failed" or "begun".
        """
        means = self._means(self.rounds)
        drawn = {"probability": self.probability, "drawn": self.drawn}
        return {
            **(drawn if self.probability is not None else {}),
            "number": self.number,
            "values": dict(self.values),
            "status": status,
            "problem": self.problem,
            "failures": self.failures,
            "rounds": self.rounds,
            "loss": fmean(means) if means and not self.problem else None,
            "spread": stdev(means) if len(means) > 1 and not self.problem else None,
            "folders": {str(seed): f"{_FOLDER}/{_folder_of(self.number, seed)}" for seed in seeds},
            "losses": {
                str(rounds): {str(seed): found for seed, found in of.items()}
                for rounds, of in self.losses.items()
            },
        }

    def _means(self, rounds: int) -> list[float]:
        return [fmean(found.values()) for found in self.losses.get(rounds, {}).values()]


def _folder_of(number: int, seed: int) -> str:
    """The name of a trial's run folder."""
    return f"{number:03d}-seed{seed}"


class Trials:
    """Runs trials with each seed, up to a round, from wherever they are.

    Args:
        config: that all trials share; its test rows are set aside.
        seeds: of the runs of each trial.
        output: the folder of the search.
        at: which of a client's losses counts.
        observers: watch the runs.
        base: one that is loaded already.
        rows: of clients that were given as objects, or what was read already for one of the seeds.
        turns: whether trials follow one another, so that the rows of all seeds stay in memory.
    """

    def __init__(
        self,
        config: Config,
        seeds: Sequence[int],
        output: Path,
        at: At,
        observers: Sequence[Observer] = (),
        base: BaseModel | None = None,
        rows: ObjectRows | ReadRows | None = None,
        *,
        turns: bool = False,
    ) -> None:
        self._config, self._seeds, self._output, self._at = config, list(seeds), output, at
        self._observers = observers
        self._given = base, rows, len(self._seeds) if turns else 1
        self._ground: CommonGround | None = None

    def config_of(self, values: Mapping[str, Any]) -> Config:
        """The config of a trial, without its seed.

        Raises:
            ConfigError: the values do not go together.
        """
        try:
            return with_settings(self._config, {**values, "evaluation.rouge": False})
        except ConfigError as error:
            told = ", ".join(f"{key} = {value!r}" for key, value in values.items())
            raise ConfigError(
                [f"the trial {told}: {problem}" for problem in error.problems]
            ) from error

    def check(self, trials: Sequence[Trial]) -> None:
        """Read all rows, and build what settings can spoil, of those that are not at their end.

        Raises:
            InputError: something in a trial cannot work, or a client has no validation rows.
        """
        rounds = self._config.rounds.count
        runs = [run for seed in self._seeds for trial in trials for run in [self._run(trial, seed)]]
        unfinished = [run for run in runs if not run.is_held(rounds)]
        if not unfinished:
            return
        self._ground = self._ground or self._made_ground(runs)
        for run in {run.config.seed: run for run in unfinished}.values():
            self._check_rows(run.config)
        self._ground.check(unfinished)

    def bring(self, trials: Sequence[Trial], rounds: int) -> None:
        """Run trials up to a round with every seed, and note their losses.

        What is there already is not run again. A trial that fails says so and is left out.

        Args:
            trials: whose `losses` and `problem` are set.
            rounds: the round that they are held after.

        Raises:
            RunError: a file could not be written.
        """
        found: dict[int, Losses] = {trial.number: {} for trial in trials}
        failures = dict.fromkeys(found, 0)
        for seed in self._seeds:
            for trial in trials:
                if trial.problem:
                    continue
                run = self._run(trial, seed)
                trial.problem = "" if run.is_held(rounds) else self._train(run, rounds)
                if not trial.problem:
                    ended = read_run(run.folder)
                    losses, trial.problem = _measured(ended, rounds, self._at)
                    found[trial.number][seed] = losses
                    failures[trial.number] += _failures(ended, rounds)
        for trial in trials:
            trial.failures = failures[trial.number]
            if not trial.problem:
                trial.losses[rounds] = found[trial.number]

    def explore(self, trials: Sequence[Trial], divisor: Divisor) -> None:
        """Run the whole once with every seed, each client drawing one of the trials in each round.

        What is there already is not run again, and a run that was cut short goes on.

        Args:
            trials: whose `probability` and `drawn` are set.
            divisor: of the steps of their weights.

        Raises:
            RunError: a run failed.
        """
        arms = [self.config_of(trial.values).local for trial in trials]
        found = []
        for seed in self._seeds:
            run = _TrialRun(
                "the search",
                self._output / _FOLDER / f"drawn-seed{seed}",
                self.config_of({}).model_copy(update={"seed": seed}),
            )
            if self._ground is None:
                self._ground = self._made_ground([run])
            experiment = build_experiment(
                run.config, self._ground.base, run.folder, self._ground.dataset(run.config)
            )
            clients = experiment.clients
            assert isinstance(clients, LocalClients)
            record = RecordedFolder(self._output)
            armed = Armed.of(
                clients,
                arms=arms,
                seed=seed,
                divisor=divisor,
                folder=record,
                name=f"drawn-seed{seed}.json",
            )
            if not run.is_finished():
                notes = (*experiment.notes, NOTE)
                experiment = replace(experiment, clients=armed, notes=notes)
                start_experiment(experiment, run.folder, self._observers, resume=run.is_begun)
            found.append((armed.weights_before(run.config.rounds.count + 1), armed.counts()))
        for place, trial in enumerate(trials):
            trial.probability = fmean(weights.probabilities[place] for weights, _ in found)
            trial.drawn = sum(counts[place] for _, counts in found)

    def _run(self, trial: Trial, seed: int) -> _TrialRun:
        return _TrialRun(
            f"trial {trial.number}",
            self._output / _FOLDER / _folder_of(trial.number, seed),
            self.config_of(trial.values).model_copy(update={"seed": seed}),
        )

    def _train(self, run: _TrialRun, rounds: int) -> str:
        """Run or continue it; why that failed, or ""."""
        if self._ground is None:
            self._ground = self._made_ground([run])
        experiment = build_experiment(
            run.config, self._ground.base, run.folder, self._ground.dataset(run.config)
        )
        try:
            start_experiment(
                experiment, run.folder, self._observers, resume=run.is_begun, until=rounds
            )
        except MachineError:  # no settings would help
            raise
        except RunError as error:  # other settings are still worth trying
            return f"seed {run.config.seed}: {error}"
        return ""

    def _made_ground(self, runs: Sequence[PlannedRun]) -> CommonGround:
        base, rows, kept = self._given
        parent = self._output / _FOLDER
        known = {path.name.partition("-seed")[0] for path in parent.glob("*-seed*")}
        folders = {
            name: {seed: parent / f"{name}-seed{seed}" for seed in self._seeds}
            for name in known | {run.folder.name.partition("-seed")[0] for run in runs}
        }
        return CommonGround(self._config.model, folders, base, rows, tested=False, kept=kept)

    def _check_rows(self, config: Config) -> None:
        """All clients must have validation rows.

        Raises:
            ConfigError: some have none.
        """
        assert self._ground is not None
        clients = self._ground.dataset(config).clients
        without = [client.client_id for client in clients if not client.validation]
        if without:
            named = ", ".join(without[:_MOST_NAMED]) + (" ..." if without[_MOST_NAMED:] else "")
            raise ConfigError(
                f"tune: {len(without)} of {len(clients)} clients have no validation rows ({named}),"
                " and nothing else may be tuned on; set data.validation_fraction above 0, such as "
                "0.2, or add validation files"
            )


@dataclass(frozen=True, slots=True)
class _TrialRun(PlannedRun):
    """A trial's run with a seed."""

    def is_held(self, rounds: int) -> bool:
        """Whether it is at that round or further, or an observer ended it.

        Raises:
            RunFolderError: it was made with other settings, or its folder holds something else.
        """
        if self.is_finished():
            return True
        if not self.is_begun:
            return False
        document = RunFolder(self.folder).run_json()
        done = document.get("rounds_done", 0)
        if document.get("status") != "stopped" or not isinstance(done, int):
            return False
        own = document.get("error") == held_after(done, self.config.rounds.count)
        return done >= rounds or not own


def _measured(run: Run, rounds: int, at: At) -> tuple[dict[str, float], str]:
    """Client -> validation loss up to a round, and what is wrong with them, or ""."""
    clients = run.provenance.get("data", {}).get("clients", [])
    evaluated = [
        event for event in run.events if event.kind == "evaluate" and event.round <= rounds
    ]
    last = max((event.round for event in evaluated), default=-1)
    losses: dict[str, float] = {}
    for event in evaluated:
        loss = event.numbers.get("validation_loss")
        if loss is not None and (at == "best" or event.round == last):
            losses[event.client] = min(loss, losses.get(event.client, math.inf))
    missing = [client for client in clients if client not in losses]
    if missing or not losses:
        return losses, (
            f"seed {run.provenance.get('seed')}: {len(missing)} of {len(clients)} clients have no "
            f"finite validation loss after round {last} ({', '.join(missing[:_MOST_NAMED])})"
        )
    return losses, ""


def _failures(run: Run, rounds: int) -> int:
    """How often a client failed up to a round."""
    return sum(event.kind == "failure" and event.round <= rounds for event in run.events)
