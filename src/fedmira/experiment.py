"""The composition root: from a config to everything built, in the order the data flows, and the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedmira.adapters import Adapter, AdapterTable
from fedmira.algorithms import Algorithm
from fedmira.clients import Cohort, CohortSettings
from fedmira.config import Config, dump_config
from fedmira.data import ClientSummary, Dataset, load_clients
from fedmira.engines import Engine, InProcessEngine, MemoryTable
from fedmira.errors import AlignmentError, FedmiraError, RunError, RunFolderError
from fedmira.evaluation import Evaluation, Evaluator
from fedmira.graphs import GraphSource
from fedmira.messages import ClientId
from fedmira.model import AdapterKind, BaseModel, TargetModule, most_side_by_side
from fedmira.parts import make_scheme, prepare_kind, token_budget
from fedmira.results import Ground, Provenance, Result, hash_of_rows, write_results
from fedmira.rounds import CheckpointFolder, Progress, Recorder, RunFolder, run_rounds

__all__ = ["Experiment", "build_experiment", "resume_experiment", "run_experiment"]


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs, built and checked; nothing has been trained.

    Attributes:
        kind: the adapters, on their base.
        parties: what each client says of itself, by client id.
        data_sha256, token_budget, federation: as in `Ground`.
        skipped: what was left out of the data, one "name: reason" each.
    """

    config: Config
    kind: AdapterKind
    parties: Mapping[ClientId, ClientSummary]
    ranks: Mapping[ClientId, int]
    starts: Mapping[ClientId, Adapter]
    graph: GraphSource
    algorithm: Algorithm
    engine: Engine
    evaluator: Evaluation
    data_sha256: str
    token_budget: int | None
    skipped: tuple[str, ...] = ()
    federation: Mapping[str, object] = field(default_factory=dict)

    @property
    def base(self) -> BaseModel:
        """The frozen base model."""
        return self.kind.base

    @property
    def targets(self) -> Sequence[TargetModule]:
        """The layers that carry a LoRA branch."""
        return self.kind.targets

    @property
    def ground(self) -> Ground:
        """What the run stands on."""
        return Ground(self.kind, self.data_sha256, self.token_budget, self.federation)


def build_experiment(
    config: Config, base: BaseModel | None = None, resumed: Path | None = None, dataset: Dataset | None = None
) -> Experiment:
    """Load the base and the data and build the parts on them.

    Args:
        base: a base that is loaded already, to share it between runs.
        resumed: the folder of a run that is to be continued: with its token budget, so that it goes on bit for bit.
        dataset: what `load_clients` gave for this config's [data] and seed, to share it between runs.

    Raises:
        InputError: something in the config cannot work; nothing was trained.
    """
    kind = prepare_kind(config, base)
    dataset = dataset or load_clients(config.data, config.seed, kind.base.tokenizer)
    clients = {client.client_id: client for client in dataset.clients}
    parties = {party.client_id: party for party in dataset.summaries()}
    scheme = make_scheme(config, kind, parties)
    scales = {client: kind.scale(rank) for client, rank in scheme.ranks.items()}
    budget = _token_budget(config, kind, resumed)
    largest = max(sum(tensor.numel() for tensor in start.values()) for start in scheme.starts.values())
    at_once = most_side_by_side(largest, kind.base.device)
    cohort = Cohort(scheme.algorithm, kind, clients, CohortSettings(config.local, scales, budget))
    return Experiment(
        config,
        kind,
        parties,
        scheme.ranks,
        scheme.starts,
        scheme.graph,
        scheme.algorithm,
        InProcessEngine(cohort, at_once, config.engine.wire),
        Evaluator(kind, clients, scales, budget, at_once),
        hash_of_rows(clients),
        budget,
        dataset.skipped,
    )


def run_experiment(experiment: Experiment, output: Path, progress: Progress | None = None) -> Result:
    """Run from round 1 into a new run folder.

    Raises:
        RunFolderError: the folder is taken.
        RunError: the run failed; what was computed is in the folder.
    """
    folder = RunFolder.create(output, dump_config(experiment.config))
    with folder.locked():
        return _run(experiment, folder, progress)


def resume_experiment(experiment: Experiment, output: Path, progress: Progress | None = None) -> Result:
    """Continue the run in `output` from its last checkpoint; its config must be the experiment's.

    Raises:
        RunFolderError: there is no such run, or it was made with other settings, base or data.
        RunError: the run failed.
    """
    folder = RunFolder.reopen(output)
    if (output / "config.toml").read_text(encoding="utf-8") != dump_config(experiment.config):
        raise RunFolderError(
            f"{output}: this run was made with other settings; --resume continues it as it was: leave the config and --set away"
        )
    with folder.locked():
        return _run(experiment, folder, progress)


def _run(experiment: Experiment, folder: RunFolder, progress: Progress | None) -> Result:
    """Go on from the folder's checkpoint, or from the start in one that has none."""
    config, algorithm, engine = experiment.config, experiment.algorithm, experiment.engine
    checkpoints, before = CheckpointFolder(folder.checkpoint), folder.read_json("run.json")
    recorder = Recorder(
        config,
        folder,
        algorithm,
        experiment.evaluator,
        checkpoints,
        lambda: engine.memories,
        progress or _quiet,
        float(before.get("wall_seconds", 0.0)),  # type: ignore[arg-type]
    )
    checkpoint, provenance = checkpoints.load(), Provenance(recorder, experiment.ground, before)
    provenance.check_same_ground()
    checkpoints.tidy(checkpoint)
    if checkpoint is not None:
        recorder.restore(checkpoint)
    provenance.write("running")
    engine.restore(checkpoint.memories if checkpoint else MemoryTable(checkpoints.store, {}))
    if checkpoint is None:
        start = algorithm.initial_state(experiment.starts)
        state = replace(start, adapters=AdapterTable.of(checkpoints.store, start.adapters))
        folder.cut_back({})
        recorder.begin(state)
    else:
        state = checkpoint.state
    clients, first = list(experiment.ranks), checkpoint.round + 1 if checkpoint else 1
    try:
        state = run_rounds(algorithm, engine, state, clients, config.rounds, config.seed, recorder.on_round, first)
        if algorithm.aligns and not recorder.ever_moved:
            raise AlignmentError(
                f"{config.algorithm.name}: alignment is on, yet in {config.rounds.count} rounds no client was pulled: the graph "
                "has no edge between clients that trained; run more rounds or choose another graph.kind"
            )
    except FedmiraError as error:
        last = checkpoints.load()
        assert last is not None, "the recorder writes a checkpoint before round 1"
        write_results(recorder, experiment.ground, experiment.ranks, last.state, generate=False)
        provenance.write("failed", error=str(error), rounds_done=last.round, clients=len(clients))
        raise
    result = write_results(recorder, experiment.ground, experiment.ranks, state, generate=config.evaluation.rouge)
    reason = _divergence(result)
    provenance.write(
        "failed" if reason else "finished", error=reason, rounds_done=config.rounds.count, clients=len(clients), summary=result.summary
    )
    if reason:
        raise RunError(reason)
    return result


def _divergence(result: Result) -> str | None:
    """Why the figures must not be trusted, or None."""
    if not result.diverged:
        return None
    names = ", ".join(result.diverged[:5])
    return (
        f"{len(result.diverged)} of {len(result.adapters)} clients diverged: their test loss is not finite ({names}); the means leave "
        "them out. Lower local.learning_rate, or set model.dtype to 'float32'"
    )


def _token_budget(config: Config, kind: AdapterKind, resumed: Path | None) -> int:
    """As set, else that of the run that is continued, else what is fastest."""
    recorded = RunFolder(resumed).read_json("run.json").get("token_budget") if resumed else None
    return recorded if isinstance(recorded, int) and config.engine.token_budget == "auto" else token_budget(config, kind)


def _quiet(what: str, figures: Mapping[str, object]) -> None:
    """No progress."""
