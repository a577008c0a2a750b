"""The verbs from Python: run, check, compare, tune, decide, join, load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fedmira.api.arguments import Base, check_seeds, kept_base, prepared, told_apart
from fedmira.config import Config, MethodSection, refuse_federation
from fedmira.data import rows_from_objects
from fedmira.errors import ConfigError
from fedmira.experiment import build_experiment, start_experiment
from fedmira.observers import Observer, check_observers
from fedmira.records import machine_errors
from fedmira.runs import RunFolder
from fedmira.studies import (
    Comparison,
    Decision,
    Plan,
    Search,
    Tuning,
    compare_algorithms,
    make_plan,
    tune_settings,
)
from fedmira.studies import decide as decide_for
from fedmira.studies.joining import JoinedClient, join_run
from fedmira.studies.result import Result

__all__ = ["check", "compare", "decide", "join", "load", "run", "tune"]


@machine_errors()
def run(
    config: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    method: str | MethodSection | None = None,
    clients: str | Path | Mapping[str, Any] | None = None,
    base: Base | None = None,
    settings: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
    preset: str | None = None,
    output: str | Path,
    resume: bool = False,
) -> Result:
    """Runs a federation.

    >>> import fedmira
    >>> rows = [{"instruction": "Add.", "input": f"{n}+1", "output": f"{n + 1}"} for n in range(9)]
    >>> result = fedmira.run(
    ...     method="fedavg",
    ...     clients={"north": rows, "south": rows, "east": rows},
    ...     settings={"rounds.count": 1, "local.steps": 1, "evaluation.rouge": False},
    ...     output="runs/first",
    ... )
    >>> result.status
    'finished'

    Args:
        config: a Config, a TOML file, a mapping of dotted keys to values, or None for the defaults.
        method: a name such as "mira", or an object of a `fedmira.Method`.
        clients: client id -> rows (a list of dicts, a `datasets.Dataset`, a DataFrame, or a dict of
            such parts by "train", "test" and "validation"), or a path of files as `data.path` takes
            it.
        base: "bundled", a folder, a hub id, or (model, tokenizer) of transformers. A model is used
            in place and given back as it was.
        settings: dotted key -> value, such as {"rounds.count": 20}; they win over `config`. Paths,
            None (leave it as it is) and numpy's numbers are fine.
        observers: who is told what happens, and may end the run.
        preset: the name of settings that lie under all others.
        output: the run folder, which must be new; with `resume` the folder of the run to continue.
        resume: continue the run in `output` from its last checkpoint. Objects that it was made of
            must be given again.

    Raises:
        InputError: something is wrong with the settings, the rows or the base; nothing was trained.
        RunError: the run failed; what was computed is in the folder.
    """
    check_observers(observers)
    if resume and config is None and preset is None:
        config = RunFolder.reopen(Path(output)).path / "config.toml"
    with prepared(config, method, clients, base, settings, preset) as ready:
        refuse_federation(ready.config)
        experiment = build_experiment(
            ready.config, ready.base, Path(output) if resume else None, rows=ready.rows
        )
        start_experiment(experiment, Path(output), observers, resume=resume)
    return Result(output, ready.base, ready.rows)


@machine_errors()
def check(
    config: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    method: str | MethodSection | None = None,
    clients: str | Path | Mapping[str, Any] | None = None,
    base: Base | None = None,
    settings: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> Plan:
    """What a run will cost and whether its alignment can act; nothing is trained.

    >>> import fedmira
    >>> rows = [{"instruction": "Add.", "input": f"{n}+1", "output": f"{n + 1}"} for n in range(9)]
    >>> plan = fedmira.check(method="fedavg", clients={"north": rows, "south": rows})
    >>> plan.clients
    2

    Args:
        config: as for `run`.
        method: as for `run`.
        clients: as for `run`.
        base: as for `run`.
        settings: as for `run`.
        preset: as for `run`.

    Raises:
        InputError: something is wrong with the settings, the rows or the base.
    """
    with prepared(config, method, clients, base, settings, preset) as ready:
        return make_plan(build_experiment(ready.config, ready.base, rows=ready.rows))


@machine_errors()
def compare(
    methods: Sequence[str | MethodSection] | Mapping[str, str | MethodSection],
    *,
    config: Config | str | Path | Mapping[str, Any] | None = None,
    clients: str | Path | Mapping[str, Any] | None = None,
    base: Base | None = None,
    settings: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    observers: Sequence[Observer] = (),
    preset: str | None = None,
    tuned: str | Path | None = None,
    controls: bool = False,
    output: str | Path,
) -> Comparison:
    """The same rows, seeds and budget for several methods.

    Finished runs in the folder are not repeated.

    >>> import fedmira
    >>> rows = [{"instruction": "Add.", "input": f"{n}+1", "output": f"{n + 1}"} for n in range(9)]
    >>> table = fedmira.compare(
    ...     ["local", "fedavg"],
    ...     clients={"north": rows, "south": rows},
    ...     settings={"rounds.count": 1, "local.steps": 1, "evaluation.rouge": False},
    ...     output="runs/both",
    ... )
    >>> len(table.rows)
    2

    Args:
        methods: names and method objects; as a mapping, each under a name of its own.
        config: as for `run`.
        clients: as for `run`.
        base: as for `run`.
        settings: as for `run`; equal for all methods.
        seeds: of the runs of each method.
        observers: who is told what happens in each run, one after the other.
        preset: as for `run`.
        tuned: a folder with the folder of a search for each named method, <method>/best.toml: each
            runs with its own tuned settings, on other seeds than those tuned on.
        controls: whether the controls of each method are run beside it, such as two-level-alone,
            which shares nothing.
        output: the folder of the comparison; runs lie in it as <method>-seed<seed>.

    Raises:
        InputError: something is wrong; nothing was trained.
        RunError: a run failed; the tables hold the methods whose runs all finished.
    """
    check_observers(observers)
    named, objects = told_apart(methods)
    check_seeds(seeds)
    with prepared(config, None, clients, base, settings, preset) as ready:
        return compare_algorithms(
            ready.config,
            named,
            [int(seed) for seed in seeds],
            Path(output),
            observers,
            objects=objects,
            base=ready.base,
            rows=ready.rows,
            tuned=None if tuned is None else Path(tuned),
            controls=controls,
        )


@machine_errors()
def tune(
    config: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    space: str | Path | Mapping[str, Any] | None = None,
    search: Literal["halving", "random", "tpe", "exponentiated"] = "halving",
    trials: int = 9,
    seeds: Sequence[int] = (),
    at: Literal["last", "best", ""] = "",
    rate: int = 3,
    budgets: Sequence[int] = (),
    divisor: Literal["aggressive", "adaptive", "auto", "constant"] = "aggressive",
    method: str | MethodSection | None = None,
    clients: str | Path | Mapping[str, Any] | None = None,
    base: Base | None = None,
    settings: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
    preset: str | None = None,
    output: str | Path,
) -> Tuning:
    """Settings chosen by validation loss; no trial is measured on test rows.

    Called again with the same folder, it goes on.

    >>> import fedmira
    >>> rows = [{"instruction": "Add.", "input": f"{n}+1", "output": f"{n + 1}"} for n in range(9)]
    >>> tuned = fedmira.tune(
    ...     method="fedavg",
    ...     clients={"north": rows, "south": rows},
    ...     settings={"rounds.count": 2, "local.steps": 1, "data.validation_fraction": 0.2,
    ...               "data.train_fraction": 0.6},
    ...     space={"local.learning_rate": [1e-3, 1e-2]},
    ...     seeds=[5],
    ...     output="runs/tuned",
    ... )
    >>> sorted(tuned.best)
    ['local.learning_rate']

    Args:
        config: as for `run`; what is searched around.
        space: a TOML file, or dotted key -> list of values or {"low", "high", "log"}; None for the
            learning rate times 1/4 to 4 and the method's main settings.
        search: "halving" runs many trials a few rounds and the best of them on, "random" runs all
            to the end, "tpe" has Optuna propose each, "exponentiated" has the clients of one run
            draw theirs in each round.
        trials: how many settings are tried.
        seeds: of the runs of each trial; none takes the config's.
        at: each client's loss after the last round or at its own best one; "" takes that of
            evaluation.select.
        rate: halving keeps one of so many.
        budgets: of halving, the last round of each stage.
        divisor: of exponentiated, what a step of the settings' weights is divided by.
        method: as for `run`.
        clients: as for `run`.
        base: as for `run`.
        settings: as for `run`; equal for all trials.
        observers: who is told what happens in each run, one after the other.
        preset: as for `run`.
        output: the folder of the search.

    Raises:
        InputError: something is wrong; nothing was trained.
        RunError: all trials failed.
    """
    check_observers(observers)
    if not isinstance(seeds, Sequence) or seeds:
        check_seeds(seeds, "tune")
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise ConfigError(f"tune: budgets is {budgets!r}; give a list, such as [3, 7, 20]")
    if space is not None and not isinstance(space, str | Path | Mapping):
        raise ConfigError(
            f"tune: space is of type {type(space).__name__}; give a TOML file, or a dict such as "
            "{'local.learning_rate': [1e-3, 3e-3]}"
        )
    how = Search(
        method=search,
        trials=trials,
        seeds=tuple(int(seed) for seed in seeds),
        at=at,
        rate=rate,
        budgets=tuple(budgets),
        divisor=divisor,
    )
    place = Path(space) if isinstance(space, str) else space
    with prepared(config, method, clients, base, settings, preset) as ready:
        return tune_settings(
            ready.config,
            place,
            how,
            Path(output),
            observers,
            base=ready.base,
            rows=ready.rows,
        )


@machine_errors()
def decide(
    target: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    clients: str | Path | Mapping[str, Any] | None = None,
    base: Base | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    mixes: bool = True,
    observers: Sequence[Observer] = (),
    preset: str | None = None,
    output: str | Path | None = None,
) -> Decision:
    """For each client the adapter that its own validation rows can show to be the best.

    >>> import fedmira
    >>> rows = [{"instruction": "Add.", "input": f"{n}+1", "output": f"{n + 1}"} for n in range(9)]
    >>> decision = fedmira.decide(
    ...     clients={"north": rows, "south": rows},
    ...     settings={"rounds.count": 1, "local.steps": 1, "evaluation.rouge": False}
    ...     | {"data.validation_fraction": 0.3},
    ...     output="runs/decided",
    ... )
    >>> list(decision.table["choice"])
    ['local', 'local']

    Args:
        target: the folder of a comparison or of a run; or, as the config of `run`, settings with
            which all that is judged is trained first.
        clients: as for `run`; of a folder whose rows were objects, those rows.
        base: as for `run`; of a folder whose base was an object, that base.
        settings: as for `run`; not with a folder.
        seed: which runs of a comparison; None for the lowest.
        mixes: whether half of a client's own adapter and half of another is judged, too.
        observers: who is told what happens in the runs that are made.
        preset: as for `run`; not with a folder.
        output: where to; None for the folder `decision` within the target's.

    Raises:
        InputError: something is wrong, or nobody has validation rows.
        RunError: a run that was needed failed.
    """
    check_observers(observers)
    place = None if output is None else Path(output)
    if isinstance(target, str | Path) and Path(target).is_dir():
        if settings or preset:
            raise ConfigError(
                f"decide: {target} is a folder whose runs are made; leave settings and preset away"
            )
        if clients is not None and not isinstance(clients, Mapping):
            raise ConfigError(
                f"decide: clients is {clients!r}; a folder's own rows are read where they lay, so "
                "give only rows that are objects"
            )
        return decide_for(
            Path(target),
            place,
            seed=seed,
            mixes=mixes,
            observers=observers,
            base=kept_base("decide", base),
            rows=None if clients is None else rows_from_objects(clients),
        )
    if seed is not None:
        raise ConfigError("decide: seed chooses among the runs of a comparison; set 'seed'")
    with prepared(target, None, clients, base, settings, preset) as ready:
        return decide_for(
            ready.config,
            place,
            mixes=mixes,
            observers=observers,
            base=ready.base,
            rows=ready.rows,
        )


@machine_errors()
def join(
    run: str | Path,
    *,
    client: str,
    data: str | Path | Sequence[Mapping[str, Any]] | Any,
    steps: int | None = None,
    start: str | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    base: Base | None = None,
    output: str | Path | None = None,
) -> JoinedClient:
    """An adapter for a newcomer with a few rows, begun from those of a run, which stays as it is.

    >>> import fedmira
    >>> rows = [{"instruction": "Add.", "input": f"{n}+2", "output": f"{n + 2}"} for n in range(9)]
    >>> made = fedmira.join("runs/first", client="west", data=rows, steps=2, output="west")
    >>> sorted(made.figures["rows"].items())
    [('choose', 9), ('held_out', 0), ('train', 9)]

    Args:
        run: the run folder.
        client: what the newcomer is called.
        data: its rows: a file or a folder, or what `run` takes as the rows of a client.
        steps: local steps, 10 by default; 0 keeps the start as it is.
        start: "generalist", "nearest", "mix" or "fresh"; None lets the rows choose.
        settings: dotted key -> value, or KEY=VALUE texts: how rows are read, and [local].
        base: the base of a run whose base was an object, or one that is loaded already.
        output: a new folder; by default beside the run, with the client's name behind the run's.

    Raises:
        InputError: something cannot be used; nothing was trained or written.
        RunError: training diverges.
    """
    given = Path(data) if isinstance(data, str | Path) else rows_from_objects({client: data})
    return join_run(
        Path(run),
        client,
        given,
        None if output is None else Path(output),
        steps=steps,
        start=start,
        settings=settings,
        base=kept_base("join", base),
    )


def load(
    folder: str | Path, *, clients: Mapping[str, Any] | None = None, base: Base | None = None
) -> Result:
    """A run from its folder, however it ended.

    >>> import fedmira
    >>> sorted(fedmira.load("runs/first").clients["client"])
    ['east', 'north', 'south']

    Args:
        folder: the run folder.
        clients: the rows of a run whose rows were objects, to evaluate it again.
        base: the base of a run whose base was an object, or one that is loaded already.

    Raises:
        RunFolderError: it is no run folder.
    """
    rows = None if clients is None else rows_from_objects(clients)
    return Result(folder, kept_base("load", base), rows)
