"""For each client the adapter that its validation rows can show to be the best.

Its own, what all have in common, what a graph aligned, or half of its own and half of one of those.
"""

from __future__ import annotations

import html
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.special import stdtrit

from fedmira.adapters import Adapter, LazyAdapters, content_hash, mix, modules
from fedmira.atomic import replace_file
from fedmira.clients import LocalClients
from fedmira.config import Config, load_config, with_algorithm
from fedmira.config.methods import AbsentMethod
from fedmira.data import LEFT_OUT, ObjectRows, ReadRows, read_rows
from fedmira.errors import ConfigError, DataError, RunFolderError
from fedmira.experiment import build_experiment, start_experiment, where_they_lay
from fedmira.messages import ClientId
from fedmira.metrics import judge, mean_and_error
from fedmira.model import BaseModel, LoraKind
from fedmira.observers import Observer
from fedmira.records import RecordedFolder
from fedmira.report import ClientDecision, Decisions, write_decision
from fedmira.runs import RunFolder
from fedmira.studies.comparison import compare_algorithms, plan_methods
from fedmira.studies.notebook import html_table
from fedmira.studies.saved import SavedAdapters, clients_of, reload_adapters

if TYPE_CHECKING:
    import pandas

__all__ = ["Decision", "decide"]

ALONE = "local"
COMMON = ("flexlora", "fedavg")
"""One adapter for all: the first of these that goes with the other settings."""

_LEVEL = 0.95
_BLIND = (
    "nobody has validation rows, which are what the rule judges by; set data.validation_fraction, "
    "such as data.train_fraction=0.65 and data.validation_fraction=0.2"
)
_PAGE = "decision.json"


@dataclass(frozen=True)
class Decision:
    """What was decided, with its figures.

    Attributes:
        folder: decision.html, decision.json, decision.csv, and adapters/ with a PEFT folder each.
        page: decision.html.
        decisions: of all clients.
    """

    folder: Path
    page: Path
    decisions: Decisions

    @property
    def table(self) -> pandas.DataFrame:
        """A row per client, as in decision.csv."""
        import pandas

        return pandas.DataFrame([one.row() for one in self.decisions.clients])

    def _repr_html_(self) -> str:
        """For notebooks: who takes what, and the path of the page."""
        rows = [
            [one.client, str(one.judgement.standing), one.judgement.choice]
            for one in self.decisions.clients
        ]
        return (
            html_table(["client", "together is", "takes"], rows)
            + f"<p>report: <code>{html.escape(str(self.page))}</code></p>"
        )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One adapter for each client, and who measures them."""

    name: str
    saved: SavedAdapters
    clients: LocalClients
    adapters: Mapping[ClientId, Adapter]


def decide(
    target: Path | Config,
    output: Path | None = None,
    *,
    seed: int | None = None,
    mixes: bool = True,
    observers: Sequence[Observer] = (),
    base: BaseModel | None = None,
    rows: ObjectRows | ReadRows | None = None,
) -> Decision:
    """Judge, choose, and write a folder with the chosen adapters.

    Args:
        target: the folder of a comparison or of a run, or settings. A run's clients are trained
            alone beside it where that is missing; with settings all runs are made.
        output: where to; None for the folder `decision` within the target's.
        seed: which runs of a comparison; None for the lowest.
        mixes: whether half of the own and half of another adapter is judged, too.
        observers: watch the runs that are made.
        base: one that is loaded already, or was given as an object.
        rows: of clients that were given as objects, or what `read_rows` gave.

    Raises:
        InputError: the target is none of these, holds no run that trains alone, or nobody has
            validation rows.
        RunError: a run that was needed failed.
    """
    if output is None:
        if isinstance(target, Config):
            raise ConfigError("decide: settings have no folder of their own; give an output")
        output = target / "decision"
    _refuse_taken(output)
    if isinstance(target, Config):
        runs = _made(target, output, observers, base, rows)
    elif (target / "comparison.json").is_file():
        runs = _compared(target, seed)
    else:
        runs = _beside(target, output, observers, base, rows)
    candidates = _candidates(runs, base, rows if isinstance(rows, ObjectRows) else None)
    if mixes:
        candidates += _halves(candidates)
    output.mkdir(parents=True, exist_ok=True)
    decisions, adapters = _judged(candidates)
    recorded = RecordedFolder(output)
    recorded.release(lambda name: name.startswith("adapters/"))
    _write_adapters(output / "adapters", decisions, adapters)
    files = [path for path in sorted((output / "adapters").rglob("*")) if path.is_file()]
    recorded.seal(path.relative_to(output).as_posix() for path in files)
    there = {name: os.path.relpath(folder, output) for name, folder in runs.items()}
    decisions = replace(decisions, runs=there)
    return Decision(output, write_decision(decisions, output), decisions)


def _refuse_taken(output: Path) -> None:
    """A folder with something else in it stays as it is.

    Raises:
        RunFolderError: there is such a folder.
    """
    if output.is_file() or (
        output.is_dir()
        and any(output.iterdir())
        and not (output / _PAGE).is_file()
        and not (output / "runs").is_dir()
    ):
        raise RunFolderError(f"{output} holds something else; give a new folder as --output")


def _made(
    config: Config,
    output: Path,
    observers: Sequence[Observer],
    base: BaseModel | None,
    rows: ObjectRows | ReadRows | None,
) -> dict[str, Path]:
    """Runs of all that is judged, name -> folder, the one that trains alone first."""
    read = _with_validation(config, rows)
    names = [ALONE]
    for name in COMMON:
        try:
            plan_methods(config, [name])
        except ConfigError:
            continue
        names.append(name)
        break
    own = config.algorithm.name
    names += [own] if own not in (ALONE, *COMMON) else []
    if len(names) < 2:
        raise ConfigError(
            f"decide: of {', '.join(COMMON)} none goes with these settings, and algorithm.name is "
            f"{own!r}: there is nothing to choose between; name a method that shares"
        )
    comparison = compare_algorithms(
        config, names, [config.seed], output / "runs", observers, base=base, rows=read
    )
    return {name: comparison.runs[f"{name}-seed{config.seed}"] for name in names}


def _with_validation(config: Config, rows: ObjectRows | ReadRows | None) -> ReadRows:
    """The rows of the runs that are to be made.

    Raises:
        DataError: they cannot be read, or nobody has validation rows.
    """
    read = rows if isinstance(rows, ReadRows) else read_rows(config.data, config.seed, rows)
    if not any(split.validation for split in read.splits):
        raise DataError([_BLIND])
    if len(read.clients) < 2:
        raise DataError(
            f"decide: all rows are of one client, {read.clients[0].client_id!r}, who has nobody to "
            "train with; give rows of two at least, or train it by: fedmira run --set "
            "algorithm.name=local"
        )
    return read


def _compared(folder: Path, seed: int | None) -> dict[str, Path]:
    """The finished runs of a comparison with one seed, the one that trains alone first.

    Raises:
        RunFolderError: there is no such run.
    """
    document: dict[str, Any] = RunFolder(folder).read_json("comparison.json")
    found = [(str(row["method"]), int(row["seed"])) for row in document.get("runs", [])]
    seeds = sorted({number for _, number in found})
    if seed is not None and seed not in seeds:
        raise RunFolderError(
            f"{folder}: no run with seed {seed}; its seeds are {', '.join(map(str, seeds))}"
        )
    chosen = seeds[0] if seed is None else seed
    names = [name for name, number in found if number == chosen]
    alone = [row["method"] for row in document.get("algorithms", []) if row["algorithm"] == ALONE]
    own = ALONE if ALONE in alone else next(iter(alone), "")
    if not own or len(names) < 2:
        raise RunFolderError(
            f"{folder}: it compares {', '.join(names)}; needs 'local' and a method that shares: "
            "fedmira compare --algorithms local,flexlora,two-level"
        )
    ordered = [own, *(name for name in names if name != own)]
    return {name: folder / f"{name}-seed{chosen}" for name in ordered}


def _beside(
    folder: Path,
    output: Path,
    observers: Sequence[Observer],
    base: BaseModel | None,
    rows: ObjectRows | ReadRows | None,
) -> dict[str, Path]:
    """A run, and its clients trained alone with the same settings.

    Raises:
        RunFolderError: it is no run, or trains alone itself.
    """
    if not (folder / "config.toml").is_file() and any(folder.glob("*-seed*/config.toml")):
        raise RunFolderError(
            f"{folder}: this comparison is not finished (comparison.json is missing); repeat its "
            "fedmira compare command, which goes on"
        )
    if (folder / "runs" / "comparison.json").is_file():
        raise RunFolderError(
            f"{folder}: these are decisions that were made; the comparison that they come from is "
            f"{folder / 'runs'}"
        )
    run = RunFolder.reopen(folder).read_json("run.json")
    if run.get("status") not in ("finished", "stopped"):
        raise RunFolderError(
            f"{folder}: the run is not finished (status: {run.get('status', 'not begun')}), and "
            "training alone for all its rounds would not compare with it; finish it with: "
            f"fedmira run --resume --output {folder}"
        )
    config = load_config(folder / "config.toml")
    if config.algorithm.name == ALONE:
        raise RunFolderError(
            f"{folder}: its clients train alone, so there is nothing to choose between; give a "
            "comparison, or a run of a method that shares"
        )
    if isinstance(config.algorithm, AbsentMethod):
        raise RunFolderError(
            f"{folder}: its method was given as an object; compare it with local training "
            "(fedmira.compare), and give the folder of the comparison"
        )
    places = where_they_lay(config, run)
    alone, path = with_algorithm(places, ALONE), output / "runs" / ALONE
    begun = (path / "config.toml").is_file()
    if not begun or RunFolder(path).read_json("run.json").get("status") != "finished":
        read = _with_validation(alone, rows)
        experiment = build_experiment(alone, base, path if begun else None, rows=read)
        start_experiment(experiment, path, observers, resume=begun)
    return {ALONE: path, config.algorithm.name: folder}


def _candidates(
    runs: Mapping[str, Path], base: BaseModel | None, rows: ObjectRows | None
) -> list[_Candidate]:
    """The saved adapters of each run on one base and on the rows of the first.

    Raises:
        RunFolderError: a run stands on other rows.
        DataError: nobody has validation rows.
    """
    found: list[_Candidate] = []
    for name, folder in runs.items():
        saved = reload_adapters(folder, base)
        base = saved.kind.base
        if found and saved.data_sha256 != found[0].saved.data_sha256:
            raise RunFolderError(
                f"{folder}: it was made with other rows than {found[0].saved.path}; both must have "
                "one seed and one [data]"
            )
        if found:
            scales = {client: saved.kind.scale(rank) for client, rank in saved.ranks.items()}
            settings = replace(found[0].clients.settings, scales=scales)
            clients = replace(found[0].clients, kind=saved.kind, settings=settings)
        else:
            clients = clients_of(saved, rows, choosing=True)
        found.append(_Candidate(name, saved, clients, saved.adapters))
    if not any(client.validation for client in found[0].clients.data.values()):
        raise DataError([_BLIND])
    return found


def _halves(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Half of the own adapter and half of each other, as products, in the own one's rank."""
    own = candidates[0]
    if not isinstance(own.saved.kind, LoraKind):
        return []
    made = []
    for other in candidates[1:]:
        if [target.name for target in other.saved.kind.targets] != [
            target.name for target in own.saved.kind.targets
        ]:
            continue

        def half(client: ClientId, other: _Candidate = other) -> Adapter:
            mine, theirs = own.adapters[client], other.adapters[client]
            scale, other_scale = (one.clients.settings.scales[client] for one in (own, other))
            rank = next(iter(modules(mine).values()))[0].shape[0]
            return mix([mine, theirs], [0.5, 0.5], [scale, other_scale], rank, scale, mine).adapter

        both = [client for client in own.adapters if client in other.adapters]
        name = f"{own.name} + {other.name}"
        made.append(_Candidate(name, own.saved, own.clients, LazyAdapters(both, half)))
    return made


def _judged(candidates: Sequence[_Candidate]) -> tuple[Decisions, dict[ClientId, _Candidate]]:
    """Each client's decision, and whose adapter it takes."""
    own = candidates[0]
    losses = {one.name: one.clients.row_losses(one.adapters) for one in candidates}
    chosen, judgements = {}, {}
    by_name = {one.name: one for one in candidates}
    for client in own.adapters:
        validation = own.clients.data[client].validation
        values = {
            name: [value if math.isfinite(value) else math.inf for value in found[client]]
            for name, found in losses.items()
            if client in found
        }
        tokens = [len(row.response) for row in validation]
        judgements[client] = judge(values or {own.name: []}, tokens, own.name)
        chosen[client] = by_name[judgements[client].choice]
    tested = own.clients.row_losses(own.adapters, "test")
    taken = {
        one.name: one.clients.row_losses(
            LazyAdapters(
                [client for client, of in chosen.items() if of is one], one.adapters.__getitem__
            ),
            "test",
        )
        for one in candidates[1:]
    }
    made = []
    for client, judgement in judgements.items():
        data, party = own.clients.data[client], own.clients.parties[client]
        tokens = [len(row.response) for row in data.test]
        mine = tested.get(client)
        theirs = taken.get(judgement.choice, {}).get(client)
        made.append(
            ClientDecision(
                client,
                party.category,
                party.train_rows,
                party.test_rows,
                judgement,
                None if mine is None else math.fsum(mine) / sum(tokens),
                None if mine is None else math.fsum(theirs or mine) / sum(tokens),
                None if mine is None or theirs is None else _margin(mine, theirs, tokens),
            )
        )
    without = [client for client, judgement in judgements.items() if not judgement.rows]
    notes = [f"Without validation rows, so not judged: {', '.join(without)}."] if without else []
    notes += [f"{told[0].upper()}{told[1:]}" for told in _left_out(own.saved.path)]
    notes += [note for one in candidates for note in _stopped(one)]
    names = tuple(one.name for one in candidates)
    return Decisions(own.name, names, own.saved.config.seed, made, tuple(notes)), chosen


def _left_out(folder: Path) -> list[str]:
    """Who is not among the clients at all, as the run says it."""
    run: dict[str, Any] = RunFolder(folder).read_json("run.json")
    notes: list[str] = run.get("notes", [])
    return [note for note in notes if note.startswith(LEFT_OUT)]


def _stopped(candidate: _Candidate) -> list[str]:
    """That an observer ended its run before the last round: others may have trained for longer."""
    saved = candidate.saved
    run = RunFolder(saved.path).read_json("run.json")
    if candidate.adapters is not saved.adapters or run.get("status") != "stopped":
        return []
    rounds = f"{run.get('rounds_done')} of {saved.config.rounds.count}"
    return [f"{candidate.name} was stopped after round {rounds}."]


def _margin(own: Sequence[float], other: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Half the width of the interval of the difference per token, between rows."""
    if len(tokens) < 2:
        return None
    differences = [one - mine for one, mine in zip(other, own, strict=True)]
    _, error = mean_and_error(differences, tokens)
    return float(stdtrit(len(tokens) - 1, (1 + _LEVEL) / 2)) * error


def _write_adapters(
    folder: Path, decisions: Decisions, chosen: Mapping[ClientId, _Candidate]
) -> None:
    """A PEFT folder for each client: its run's own, or the half and half with a card that says so.

    Those of an earlier decision go.
    """
    if folder.exists():
        shutil.rmtree(folder)
    for one in decisions.clients:
        candidate, path = chosen[one.client], folder / one.client
        saved = candidate.saved
        source = saved.path / "adapters" / one.client
        RunFolder(saved.path).check_adapter(one.client)
        if candidate.adapters is saved.adapters:
            shutil.copytree(source, path)
            continue
        adapter = candidate.adapters[one.client]
        saved.kind.write(path, adapter)
        card = (source / "README.md").read_text(encoding="utf-8")
        told = (
            f"\n\nThis adapter is {candidate.name}, half of each, chosen by {one.judgement.rows} "
            "validation rows of this client. What follows was written for the half that was "
            "trained alone; base, prompt and code are the same, its figures are not. `sha256` of "
            f"the tensors of this one: {content_hash(adapter)}\n"
        )
        title = f"# Adapter of {one.client}"
        replace_file(path / "README.md", card.replace(title, title + told, 1), lasting=False)
