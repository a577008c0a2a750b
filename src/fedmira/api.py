"""The verbs from Python: run, compare, tune, check, load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedmira.config import (
    Config,
    MethodSection,
    load_config,
    method_names,
    refuse_federation,
    with_method,
)
from fedmira.config.methods import AbsentMethod
from fedmira.data import ObjectRows, rows_from_objects
from fedmira.errors import ConfigError
from fedmira.experiment import build_experiment, start_experiment
from fedmira.model import BaseModel, borrowed, from_model, with_padding
from fedmira.observers import Observer, check_observers
from fedmira.runs import RunFolder
from fedmira.studies import (
    Comparison,
    Plan,
    Search,
    Tuning,
    compare_algorithms,
    make_plan,
    tune_settings,
)
from fedmira.studies.arguments import check_kinds, check_method, check_pair, check_seeds
from fedmira.studies.result import Result

__all__ = ["check", "compare", "load", "run", "tune"]

Base = str | Path | BaseModel | tuple[Any, Any]
"""A name or folder of a base, one that is loaded already, or (model, tokenizer) of transformers."""

_OBJECT = "object"


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
    with _prepared(config, method, clients, base, settings, preset) as ready:
        refuse_federation(ready.config)
        experiment = build_experiment(
            ready.config, ready.base, Path(output) if resume else None, rows=ready.rows
        )
        start_experiment(experiment, Path(output), observers, resume=resume)
    return Result(output, ready.base, ready.rows)


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
    with _prepared(config, method, clients, base, settings, preset) as ready:
        return make_plan(build_experiment(ready.config, ready.base, rows=ready.rows))


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
        output: the folder of the comparison; runs lie in it as <method>-seed<seed>.

    Raises:
        InputError: something is wrong; nothing was trained.
        RunError: a run failed; the tables hold the methods whose runs all finished.
    """
    check_observers(observers)
    named, objects = _told_apart(methods)
    check_seeds(seeds)
    with _prepared(config, None, clients, base, settings, preset) as ready:
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
        )


def tune(
    config: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    space: str | Path | Mapping[str, Any] | None = None,
    search: Literal["halving", "random", "tpe"] = "halving",
    trials: int = 9,
    seeds: Sequence[int] = (),
    at: Literal["last", "best", ""] = "",
    rate: int = 3,
    budgets: Sequence[int] = (),
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
            to the end, "tpe" has Optuna propose each.
        trials: how many settings are tried.
        seeds: of the runs of each trial; none takes the config's.
        at: each client's loss after the last round or at its own best one; "" takes that of
            evaluation.select.
        rate: halving keeps one of so many.
        budgets: of halving, the last round of each stage.
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
    if seeds:
        check_seeds(seeds, "tune")
    how = Search(
        method=search,
        trials=trials,
        seeds=tuple(int(seed) for seed in seeds),
        at=at,
        rate=rate,
        budgets=tuple(budgets),
    )
    place = Path(space) if isinstance(space, str) else space
    with _prepared(config, method, clients, base, settings, preset) as ready:
        return tune_settings(
            ready.config,
            place,
            how,
            Path(output),
            observers,
            base=ready.base,
            rows=ready.rows,
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
    loaded = base if isinstance(base, BaseModel) else None
    if isinstance(base, tuple):
        # The caller keeps the model for as long as the result is used, so it stays frozen.
        check_pair(base)
        loaded = _base_of(*base)
    elif base is not None and loaded is None:
        raise ConfigError(
            f"load: base is {base!r}; give (model, tokenizer), as a folder's own base is "
            "loaded by itself"
        )
    return Result(folder, loaded, rows)


@dataclass(frozen=True)
class _Ready:
    """A checked config with the objects that it stands for."""

    config: Config
    base: BaseModel | None
    rows: ObjectRows | None


@contextmanager
def _prepared(
    config: Config | str | Path | Mapping[str, Any] | None,
    method: str | MethodSection | None,
    clients: str | Path | Mapping[str, Any] | None,
    base: Base | None,
    settings: Mapping[str, Any] | None,
    preset: str | None,
) -> Iterator[_Ready]:
    """The config and its objects; a model is frozen within the block only."""
    check_kinds(method, clients, base, settings)
    if isinstance(base, tuple):
        with borrowed(base[0]):
            own = _base_of(*base)
            yield _made(config, method, clients, own, settings, preset)
    else:
        yield _made(config, method, clients, base, settings, preset)


def _made(
    config: Config | str | Path | Mapping[str, Any] | None,
    method: str | MethodSection | None,
    clients: str | Path | Mapping[str, Any] | None,
    base: str | Path | BaseModel | None,
    settings: Mapping[str, Any] | None,
    preset: str | None,
) -> _Ready:
    given = _written(config, preset)
    given |= settings or {}
    rows = rows_from_objects(clients) if isinstance(clients, Mapping) else None
    if rows is not None:
        given |= {"data.source": _OBJECT, "data.sha256": rows.sha256}
    elif clients is not None:
        given |= {"data.path": clients}
        given.setdefault("data.source", "jsonl")
    loaded = base if isinstance(base, BaseModel) else None
    if loaded is not None:
        given |= {"model.base": _OBJECT, "model.sha256": loaded.sha256}
    elif base is not None:
        given |= {"model.base": base}
    if isinstance(method, str):
        if method not in method_names():
            raise ConfigError(
                f"method {method!r}: there is none of this name; there are "
                f"{', '.join(method_names())}"
            )
        given |= {"algorithm.name": method}
    path = Path(config) if isinstance(config, str | Path) else None
    return _Ready(_with(load_config(path, preset, (), given), method), loaded, rows)


def _written(
    config: Config | str | Path | Mapping[str, Any] | None, preset: str | None
) -> dict[str, Any]:
    """The settings of a config that is no file.

    Raises:
        ConfigError: a preset lies under a complete Config.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, Config):
        return {}
    if preset is not None:
        raise ConfigError(
            f"preset {preset!r} cannot lie under a Config, which is complete; give the "
            "settings that "
            "differ as a mapping instead"
        )
    return dict(config.model_dump(mode="json", exclude_unset=True, exclude_none=True))


def _with(config: Config, method: str | MethodSection | None) -> Config:
    """The config with a method object, where it is one.

    Raises:
        ConfigError: the config names an object that is not given, or another one.
    """
    if isinstance(method, MethodSection):
        return with_method(config, method)
    if isinstance(config.algorithm, AbsentMethod):
        raise ConfigError(config.algorithm.problem())
    return config


def _base_of(model: Any, tokenizer: Any) -> BaseModel:
    """A base of a transformers model and its tokenizer."""
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return from_model(model, with_padding(tokenizer), name)


def _told_apart(
    methods: Sequence[str | MethodSection] | Mapping[str, str | MethodSection],
) -> tuple[list[str], dict[str, MethodSection]]:
    """Names of methods, and objects by the name under which they run.

    Raises:
        ConfigError: there are none, two go by one name, or something is neither.
    """
    if isinstance(methods, str) or not isinstance(methods, Mapping | Sequence) or not methods:
        raise ConfigError(
            f"compare: methods is {methods!r}; give a list of at least one, such as "
            "['local', 'mira'], or a dict of names to methods"
        )
    for each in methods.values() if isinstance(methods, Mapping) else methods:
        check_method(each)
    pairs = (
        list(methods.items())
        if isinstance(methods, Mapping)
        else [
            (each if isinstance(each, str) else getattr(each, "name", ""), each) for each in methods
        ]
    )
    named: list[str] = []
    objects: dict[str, MethodSection] = {}
    for name, method in pairs:
        if isinstance(method, MethodSection) and name not in objects and name not in named:
            objects[name] = method
        elif isinstance(method, str) and method == name and name not in named:
            named.append(name)
        else:
            raise ConfigError(
                f"compare: {name!r} stands for {method!r}; give names of methods and "
                "method objects, two of one "
                "name as a dict: {'weak': Half(pull=0.1), 'strong': Half(pull=0.9)}"
            )
    return named, objects
