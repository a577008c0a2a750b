"""A built experiment, run from its first round or continued from its last checkpoint."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedmira.config import dump_config, flattened, load_config
from fedmira.errors import (
    AlignmentError,
    FedmiraError,
    MachineError,
    RunError,
    RunFolderError,
)
from fedmira.experiment.build import Experiment
from fedmira.experiment.export import check_export
from fedmira.experiment.newcomers import with_those_who_wait, without_edges
from fedmira.experiment.privacy import client_noise
from fedmira.methods import ServerState
from fedmira.model import count_steps
from fedmira.observers import EndEvent, Observer, RunFacts, StartEvent
from fedmira.privacy import ClientNoise
from fedmira.records import machine_errors, told
from fedmira.rounds import Grown, Screen, run_rounds
from fedmira.runs import (
    Checkpoint,
    CheckpointFolder,
    Provenance,
    Recorder,
    Result,
    RunFolder,
    write_results,
)
from fedmira.storage import AdapterTable, MemoryTable

__all__ = ["held_after", "resume_experiment", "run_experiment", "start_experiment"]

_log = logging.getLogger(__name__)


def run_experiment(
    experiment: Experiment,
    output: Path,
    observers: Sequence[Observer] = (),
    until: int | None = None,
) -> Result:
    """Run from round 1 into a new run folder.

    However the run ends, run.json says how, and the adapters of its last checkpoint are saved.

    Args:
        experiment: what `build_experiment` gave.
        output: the run folder, new or empty.
        observers: are told what happens; one that returns a `Stop` ends the run, whose result then
            has the status "stopped". Such a run can be resumed to its full length.
        until: a round, from 1, after which the run is held: it is evaluated and has the status
            "stopped". Schedules are those of the full length, so that a run that goes on from
            there is, to the bit, one that was never held.

    Raises:
        RunFolderError: the folder is taken.
        RunError: the run failed; what was computed is in the folder.
    """
    folder = RunFolder.create(output, dump_config(experiment.config))
    with machine_errors(), folder.locked(), experiment.at_work():
        return _run(experiment, folder, observers, until)


def resume_experiment(
    experiment: Experiment,
    output: Path,
    observers: Sequence[Observer] = (),
    until: int | None = None,
) -> Result:
    """Continue the run in `output` from its last checkpoint; its config must be the experiment's.

    Args:
        experiment: built from the same settings, with `resumed` set to the folder.
        output: the folder of the run.
        observers: as for `run_experiment`.
        until: as for `run_experiment`; a later round than the one it was held after.

    Raises:
        RunFolderError: there is no such run, or it was made with other settings, base or data.
        RunError: the run failed.
    """
    folder = RunFolder.reopen(output)
    with machine_errors():
        folder.make_parts()
    if not _made_with(experiment, output / "config.toml"):
        raise RunFolderError(
            f"{output}: this run was made with other settings; --resume continues it as it "
            "was: leave the config and --set away"
        )
    with machine_errors(), folder.locked(), experiment.at_work():
        return _run(experiment, folder, observers, until)


def start_experiment(
    experiment: Experiment,
    output: Path,
    observers: Sequence[Observer] = (),
    *,
    resume: bool,
    until: int | None = None,
) -> Result:
    """Runs from round 1 into a new run folder, or continues the run that is there.

    Args:
        experiment: built for this run; where it is resumed, with the folder's token budget.
        output: the run folder.
        observers: are told what happens, and may stop the run.
        resume: whether to continue.
        until: as for `run_experiment`.

    Raises:
        RunFolderError: the folder is taken, or holds no such run to be continued.
        RunError: the run failed; what was computed is in the folder.
    """
    start = resume_experiment if resume else run_experiment
    return start(experiment, output, observers, until)


def held_after(until: int, rounds: int) -> str:
    """Why a run that was held is no further; stands in run.json.

    Args:
        until: the round after which it was held.
        rounds: how many it has in all.
    """
    return f"held after round {until} of {rounds}, as asked; a resume goes on from there"


def _run(
    experiment: Experiment,
    folder: RunFolder,
    observers: Sequence[Observer],
    until: int | None = None,
) -> Result:
    """Go on from the folder's checkpoint, or from the start in one that has none."""
    checkpoints, before = CheckpointFolder(folder.checkpoint), folder.run_json()
    identity = str(before.get("id") or uuid.uuid4().hex)
    recorder = Recorder(
        config=experiment.config,
        folder=folder,
        algorithm=experiment.algorithm,
        clients=experiment.clients,
        checkpoints=checkpoints,
        facts=RunFacts(identity, folder.path.name, flattened(experiment.config)),
        observers=observers,
        spent_seconds=float(before.get("wall_seconds", 0.0)),
        until=until,
    )
    provenance = Provenance(recorder, experiment.ground, before)
    provenance.check_same_ground()
    checkpoint = checkpoints.load(folder.lost_lines)
    part = _Part(experiment, recorder, provenance)
    try:
        checkpoints.tidy(checkpoint)
        state = part.train(checkpoint)
        result = part.save(state)
    except OSError as error:
        raise part.cut_short(error) from error
    except BaseException as error:
        part.save_what_there_is(error)
        raise
    try:
        return part.end(result)
    except OSError as error:
        raise part.cut_short(error) from error
    except KeyboardInterrupt as error:
        part.save_what_there_is(error)
        raise


def _made_with(experiment: Experiment, path: Path) -> bool:
    """Whether a config.toml has the experiment's settings.

    One of an older version lacks newer keys, which have their defaults.
    """
    wanted = dump_config(experiment.config)
    return path.read_text(encoding="utf-8") == wanted or dump_config(load_config(path)) == wanted


class _Part:
    """One part of a run, from its start or a checkpoint to its end, whatever that is."""

    def __init__(self, experiment: Experiment, recorder: Recorder, provenance: Provenance) -> None:
        self._experiment, self._recorder, self._provenance = experiment, recorder, provenance
        self._clients = list(experiment.ranks)
        self._totals: dict[str, float] = {}

    def train(self, checkpoint: Checkpoint | None) -> ServerState:
        """Run the rounds after a checkpoint, or all of them; the last state.

        Raises:
            RunError: a round failed, or alignment pulled nobody.
        """
        experiment, recorder = self._experiment, self._recorder
        config, store = experiment.config, recorder.checkpoints.store
        if checkpoint is not None:
            recorder.restore(checkpoint)
        self._provenance.write("running")
        memories = checkpoint.memories if checkpoint else MemoryTable(store, {})
        experiment.clients.restore(memories)
        if checkpoint is None:
            recorder.folder.cut_back({})
        self._tell_start(checkpoint)
        if checkpoint is None:
            start = experiment.algorithm.initial_state(experiment.starts)
            state = replace(start, adapters=AdapterTable.of(store, start.adapters))
            recorder.begin(state)
        else:
            state = checkpoint.state
        if recorder.watchers.stop is not None:
            return state
        state = run_rounds(
            experiment.algorithm,
            experiment.clients,
            state,
            self._clients,
            config.rounds.model_copy(update={"count": self._last}),
            config.seed,
            recorder.on_round,
            first_round=checkpoint.round + 1 if checkpoint else 1,
            resting=recorder.watchers.resting,
            screen=_screen(experiment),
            admit=None if experiment.door is None else self._admit,
        )
        still = self.stopped is None and experiment.algorithm.aligns and not recorder.ever_moved
        if still and experiment.graph.learned:
            recorder.note_nobody_related()
        elif still and not recorder.watchers.resting():  # whoever trains may have nobody else
            raise AlignmentError(
                f"{config.algorithm.name}: alignment is on, yet in {config.rounds.count} "
                "rounds no client was pulled: the graph "
                "has no edge between clients that trained; run more rounds or choose "
                "another graph.kind"
            )
        return state

    def _admit(self, number: int, state: ServerState) -> Grown | None:
        """Takes in who waits at the door before a round; the checkpoint of the last one has them.

        So a run that is cut short goes on with them, as if nobody had interrupted it.
        """
        experiment, recorder = self._experiment, self._recorder
        grown, newcomers = with_those_who_wait(experiment, number)
        assert experiment.door is not None, "asked where there is a door"
        recorder.warn(number, [*experiment.door.turned_away(), *without_edges(grown, newcomers)])
        if not newcomers:
            return None
        state = grown.algorithm.joined(state, grown.starts, list(newcomers))
        experiment.door.admit(newcomers)
        try:
            starts = {client: grown.starts[client] for client in newcomers}
            recorder.admit(number, grown.algorithm, state, starts)
        except BaseException:
            experiment.door.dismiss(list(newcomers))
            recorder.algorithm = experiment.algorithm
            raise
        self._experiment, self._clients = grown, list(grown.ranks)
        self._provenance.stand_on(grown.ground)
        self._provenance.write("running")
        return Grown(grown.algorithm, self._clients, state, _screen(grown))

    @property
    def _last(self) -> int:
        """The last round of this part."""
        until, count = self._recorder.until, self._experiment.config.rounds.count
        return count if until is None else min(until, count)

    @property
    def stopped(self) -> str | None:
        """Why the run ended before its last round, or None where it has not."""
        stop, count = self._recorder.watchers.stop, self._experiment.config.rounds.count
        done = self._recorder.round_done
        if done < count and stop is not None:
            return stop.reason
        return held_after(done, count) if self._last <= done < count else None

    def save(self, state: ServerState) -> Result:
        """Write adapters and tables of the last state."""
        generate = self._experiment.config.evaluation.rouge
        ground, ranks = self._experiment.ground, self._experiment.ranks
        self._totals = dict(self._experiment.algorithm.totals(state))
        result = write_results(self._recorder, ground, ranks, state, generate=generate)
        return replace(result, status="finished" if self.stopped is None else "stopped")

    def end(self, result: Result) -> Result:
        """Say in run.json and to the observers how the run ended.

        Raises:
            RunError: clients diverged, or a saved adapter is another one in plain PEFT.
        """
        export, problem = check_export(self._experiment, self._recorder.folder, result)
        wrong = _divergence(result) or problem
        status, reason = ("failed", wrong) if wrong else (result.status, self.stopped)
        self._provenance.write(
            status,
            error=reason,
            rounds_done=self._recorder.round_done,
            clients=len(self._clients),
            summary=result.summary,
            export=export,
            **({"method": self._totals} if self._totals else {}),
        )
        self._tell_end(status, reason, result)
        if wrong:
            raise RunError(wrong)
        return result

    def cut_short(self, error: OSError) -> RunError:
        """What to raise where the run's files could not be written or read any more.

        What still can be saved is.
        """
        failure = _unwritten(error, self._recorder.folder.path)
        self.save_what_there_is(failure)
        return failure

    def save_what_there_is(self, error: BaseException) -> None:
        """Save the last checkpoint's adapters, and say why the run ended.

        After an interrupt from the keyboard nothing is measured, as somebody is waiting.

        What cannot be written any more, such as on a full disk, is a line in the log.
        """
        interrupted = isinstance(error, KeyboardInterrupt)
        status = "interrupted" if interrupted else "failed"
        reason = "interrupted from the keyboard" if interrupted else _told(error)
        recorder, experiment, result = self._recorder, self._experiment, None
        done: dict[str, object] = {}
        try:
            last = recorder.checkpoints.load()
            if last is not None:
                recorder.return_to(last)
                ground, ranks = experiment.ground, experiment.ranks
                result = write_results(
                    recorder,
                    ground,
                    ranks,
                    last.state,
                    generate=False,
                    measure=not interrupted,
                )
                done["rounds_done"] = last.round
        except (OSError, FedmiraError) as problem:
            _log.warning("the last adapters could not be saved: %s", problem)
        try:
            self._provenance.write(status, error=reason, **done, clients=len(self._clients))
        except (OSError, FedmiraError) as problem:
            _log.warning("run.json and the report could not be written: %s", problem)
        self._tell_end(status, reason, result)

    def _tell_start(self, checkpoint: Checkpoint | None) -> None:
        recorder = self._recorder
        event = StartEvent(
            run=recorder.facts,
            clients=tuple(self._clients),
            rounds=self._experiment.config.rounds.count,
            folder=recorder.folder.path,
            resumed=checkpoint.round if checkpoint else None,
        )
        recorder.watchers.tell(event)

    def _tell_end(self, status: str, reason: str | None, result: Result | None) -> None:
        recorder, summary = self._recorder, result.summary if result else {}
        recorder.watchers.tell(
            EndEvent(recorder.facts, status, reason, summary, recorder.folder.path)
        )


def _screen(experiment: Experiment) -> Screen | ClientNoise:
    """What the server holds replies against, or the noise that hides them from each other."""
    plan = experiment.privacy
    if plan is not None and plan.kind == "client":
        return client_noise(experiment.config, plan)
    config, ranks = experiment.config, experiment.ranks
    rows = {client: party.train_rows for client, party in experiment.parties.items()}
    return Screen(
        config.server,
        rows,
        {client: count_steps(count, config.local) for client, count in rows.items()},
        {client: experiment.kind.scale(rank) for client, rank in ranks.items() if rank},
        begins_elsewhere=experiment.algorithm.begins_elsewhere,
        squared_parts=experiment.algorithm.squared_parts,
    )


def _told(error: BaseException) -> str:
    """An error's own words; with its kind, where it is none of fedmira's."""
    return str(error) if isinstance(error, FedmiraError) else f"{type(error).__name__}: {error}"


def _unwritten(error: OSError, folder: Path) -> MachineError:
    """A system's error on a file in one line: where, why, and how to go on."""
    return MachineError(
        f"{told(error, folder)}, and continue with --resume; what the last checkpoint holds is kept"
    )


def _divergence(result: Result) -> str | None:
    """Why the figures must not be trusted, or None."""
    if not result.diverged:
        return None
    names = ", ".join(result.diverged[:5])
    return (
        f"{len(result.diverged)} of {len(result.adapters)} clients diverged: their test "
        f"loss is not finite ({names}); the means leave "
        "them out. Lower local.learning_rate, or set model.dtype to 'float32'"
    )
