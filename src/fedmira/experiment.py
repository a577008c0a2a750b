"""The composition root: from a config to everything built, in the order the data flows, and the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedmira.adapters import Adapter, AdapterTable, scale, truncate_rank
from fedmira.algorithms import Algorithm, AlgorithmContext, build
from fedmira.clients import Cohort, CohortSettings
from fedmira.config import Config, dump_config
from fedmira.data import Dataset, load_clients
from fedmira.engines import Engine, InProcessEngine, MemoryTable
from fedmira.errors import AlignmentError, ConfigError, FedmiraError, RunError, RunFolderError
from fedmira.evaluation import Evaluator
from fedmira.graphs import GraphSource, graph_source
from fedmira.messages import ClientId
from fedmira.model import BaseModel, TargetModule, choose_token_budget, find_targets, load_base, start_adapter, with_engine_options
from fedmira.results import Provenance, Result, write_results
from fedmira.rounds import CheckpointFolder, Progress, Recorder, RunFolder, cohort_size, run_rounds, seed_for

__all__ = ["Experiment", "build_experiment", "resume_experiment", "run_experiment"]


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs, built and checked; nothing has been trained."""

    config: Config
    base: BaseModel
    targets: list[TargetModule]
    dataset: Dataset
    ranks: Mapping[ClientId, int]
    starts: Mapping[ClientId, Adapter]
    graph: GraphSource
    algorithm: Algorithm
    engine: Engine
    evaluator: Evaluator


def build_experiment(config: Config, base: BaseModel | None = None, resumed: Path | None = None) -> Experiment:
    """Load the base and the data and build the parts on them.

    Args:
        base: a base that is loaded already, to share it between runs.
        resumed: the folder of a run that is to be continued: with its token budget, so that it goes on bit for bit.

    Raises:
        InputError: something in the config cannot work; nothing was trained.
    """
    base = base or load_base(config.model)
    targets = find_targets(base.model, config.adapter.targets)
    base = with_engine_options(base, config.engine, targets)
    _check_length(config, base)
    dataset = load_clients(config.data, config.seed, base.tokenizer)
    clients = {client.client_id: client for client in dataset.clients}
    ranks = _ranks(config, list(clients))
    scales = {client: scale(config.adapter.alpha, rank) for client, rank in ranks.items()}
    common = start_adapter(targets, max(ranks.values()), seed_for(config.seed, "start"))
    of_rank = {rank: common if rank == max(ranks.values()) else truncate_rank(common, rank) for rank in set(ranks.values())}
    starts = {client: of_rank[rank] for client, rank in ranks.items()}

    categories = {client.client_id: client.category for client in dataset.clients}
    graph = graph_source(config.graph, tuple(clients), categories, seed_for(config.seed, "graph"))
    rows = {name: len(client.train) for name, client in clients.items()}
    at_once = cohort_size(len(clients), config.rounds)
    context = AlgorithmContext(tuple(clients), rows, ranks, config.adapter.alpha, graph, at_once, config.rounds.count)
    algorithm = build(config.algorithm, context)
    if algorithm.aligns and not graph.acts(config.rounds.count):
        raise ConfigError(
            f"graph.warmup_rounds is {config.graph.warmup_rounds} and rounds.count {config.rounds.count}: the graph would never "
            "act; set rounds.count above the warm-up, or graph.warmup_rounds to 0"
        )

    budget = _token_budget(config, base, targets, resumed)
    cohort = Cohort(algorithm, base, targets, clients, CohortSettings(config.local, scales, config.adapter.dropout, budget))
    return Experiment(
        config,
        base,
        targets,
        dataset,
        ranks,
        starts,
        graph,
        algorithm,
        InProcessEngine(cohort),
        Evaluator(base, targets, clients, scales, budget),
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
    checkpoint, provenance = checkpoints.load(), Provenance(recorder, before)
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
        write_results(recorder, experiment.ranks, last.state, generate=False)
        provenance.write("failed", error=str(error), rounds_done=last.round, clients=len(clients))
        raise
    result = write_results(recorder, experiment.ranks, state, generate=config.evaluation.rouge)
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


def _token_budget(config: Config, base: BaseModel, targets: Sequence[TargetModule], resumed: Path | None) -> int:
    """As set, else that of the run that is continued, else what is fastest."""
    if config.engine.token_budget != "auto":
        return config.engine.token_budget
    recorded = RunFolder(resumed).read_json("run.json").get("token_budget") if resumed else None
    return recorded if isinstance(recorded, int) else choose_token_budget(base, targets)


def _quiet(what: str, figures: Mapping[str, object]) -> None:
    """No progress."""


def _ranks(config: Config, clients: list[ClientId]) -> dict[ClientId, int]:
    unknown = sorted(set(config.adapter.ranks) - set(clients))
    if unknown:
        raise ConfigError(
            [
                f"adapter.ranks: there is no client {client!r}; the clients are "
                f"{', '.join(clients[:8])}{' ...' if len(clients) > 8 else ''}"
                for client in unknown
            ]
        )
    return {client: config.adapter.ranks.get(client, config.adapter.rank) for client in clients}


def _check_length(config: Config, base: BaseModel) -> None:
    if base.max_positions is not None and config.data.max_length > base.max_positions:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but {config.model.base!r} reads at most {base.max_positions} tokens; "
            f"set data.max_length to {base.max_positions} or less"
        )
