"""A built experiment, run from its first round or continued from its last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedmira.config import Config, dump_config
from fedmira.errors import (
    AlignmentError,
    FedmiraError,
    RunError,
    RunFolderError,
)
from fedmira.experiment.build import Experiment
from fedmira.methods import Method
from fedmira.rounds import run_rounds
from fedmira.runs import (
    CheckpointFolder,
    Progress,
    Provenance,
    Recorder,
    Result,
    RunFolder,
    write_results,
)
from fedmira.storage import AdapterTable, MemoryTable

__all__ = ["resume_experiment", "run_experiment", "start_experiment"]


def run_experiment(
    experiment: Experiment, output: Path, progress: Progress | None = None
) -> Result:
    """Run from round 1 into a new run folder.

    Raises:
        RunFolderError: the folder is taken.
        RunError: the run failed; what was computed is in the folder.
    """
    folder = RunFolder.create(output, dump_config(experiment.config))
    with folder.locked():
        return _run(experiment, folder, progress)


def resume_experiment(
    experiment: Experiment, output: Path, progress: Progress | None = None
) -> Result:
    """Continue the run in `output` from its last checkpoint; its config must be the experiment's.

    Raises:
        RunFolderError: there is no such run, or it was made with other settings, base or data.
        RunError: the run failed.
    """
    folder = RunFolder.reopen(output)
    if (output / "config.toml").read_text(encoding="utf-8") != dump_config(experiment.config):
        raise RunFolderError(
            f"{output}: this run was made with other settings; --resume continues it as it "
            "was: leave the config and --set away"
        )
    with folder.locked():
        return _run(experiment, folder, progress)


def start_experiment(
    experiment: Experiment, output: Path, progress: Progress | None = None, *, resume: bool
) -> Result:
    """Run from round 1 into a new run folder, or continue the run that is there.

    Args:
        experiment: built for this run; where it is resumed, with the folder's token budget.
        output: the run folder.
        progress: told of rounds and evaluations as they end.
        resume: whether to continue.

    Raises:
        RunFolderError: the folder is taken, or holds no such run to be continued.
        RunError: the run failed; what was computed is in the folder.
    """
    start = resume_experiment if resume else run_experiment
    return start(experiment, output, progress)


def _run(experiment: Experiment, folder: RunFolder, progress: Progress | None) -> Result:
    """Go on from the folder's checkpoint, or from the start in one that has none."""
    config, algorithm, workers = experiment.config, experiment.algorithm, experiment.clients
    checkpoints, before = CheckpointFolder(folder.checkpoint), folder.read_json("run.json")
    recorder = Recorder(
        config=config,
        folder=folder,
        algorithm=algorithm,
        clients=workers,
        checkpoints=checkpoints,
        progress=progress or _quiet,
        spent_seconds=float(before.get("wall_seconds", 0.0)),  # type: ignore[arg-type]
    )
    checkpoint, provenance = checkpoints.load(), Provenance(recorder, experiment.ground, before)
    provenance.check_same_ground()
    checkpoints.tidy(checkpoint)
    if checkpoint is not None:
        recorder.restore(checkpoint)
    provenance.write("running")
    workers.restore(checkpoint.memories if checkpoint else MemoryTable(checkpoints.store, {}))
    if checkpoint is None:
        start = algorithm.initial_state(experiment.starts)
        state = replace(start, adapters=AdapterTable.of(checkpoints.store, start.adapters))
        folder.cut_back({})
        recorder.begin(state)
    else:
        state = checkpoint.state
    clients, first = list(experiment.ranks), checkpoint.round + 1 if checkpoint else 1
    try:
        state = run_rounds(
            algorithm=algorithm,
            workers=workers,
            state=state,
            clients=clients,
            settings=config.rounds,
            run_seed=config.seed,
            on_round=recorder.on_round,
            first_round=first,
        )
        _check_anybody_moved(config, algorithm, recorder)
    except FedmiraError as error:
        last = checkpoints.load()
        assert last is not None, "the recorder writes a checkpoint before round 1"
        write_results(recorder, experiment.ground, experiment.ranks, last.state, generate=False)
        provenance.write("failed", error=str(error), rounds_done=last.round, clients=len(clients))
        raise
    result = write_results(
        recorder, experiment.ground, experiment.ranks, state, generate=config.evaluation.rouge
    )
    reason = _divergence(result)
    provenance.write(
        "failed" if reason else "finished",
        error=reason,
        rounds_done=config.rounds.count,
        clients=len(clients),
        summary=result.summary,
    )
    if reason:
        raise RunError(reason)
    return result


def _check_anybody_moved(config: Config, algorithm: Method, recorder: Recorder) -> None:
    """Alignment that is on must have pulled somebody by the end of the run.

    Raises:
        AlignmentError: nobody was.
    """
    if algorithm.aligns and not recorder.ever_moved:
        raise AlignmentError(
            f"{config.algorithm.name}: alignment is on, yet in {config.rounds.count} "
            "rounds no client was pulled: the graph "
            "has no edge between clients that trained; run more rounds or choose "
            "another graph.kind"
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


def _quiet(what: str, figures: Mapping[str, object]) -> None:
    """No progress."""
