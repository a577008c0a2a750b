"""The same data, seeds and budget for several methods.

Finished runs are not repeated, interrupted ones continue.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmira.config import (
    Config,
    MethodSection,
    refuse_federation,
    with_algorithm,
    with_method,
    with_overrides,
)
from fedmira.config.methods import method_names
from fedmira.data import ObjectRows, ReadRows
from fedmira.errors import (
    ConfigError,
    MachineError,
    RunError,
)
from fedmira.experiment import (
    build_experiment,
    start_experiment,
)
from fedmira.model import BaseModel
from fedmira.observers import Observer
from fedmira.report import Figures, check_target, write_comparison
from fedmira.runs import RunFolder
from fedmira.studies.controls import controls_of, with_controls
from fedmira.studies.ground import CommonGround, PlannedRun, with_one_clock
from fedmira.studies.notebook import html_table
from fedmira.studies.tuning.tuned import Tuned, read_tuned

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "compare_algorithms", "plan_methods"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


_SHOWN_COLUMNS = ("method", "seeds", "test_loss", "test_loss_spread", "worst_tenth")


@dataclass(frozen=True)
class Comparison:
    """A comparison with its figures.

    Attributes:
        page: comparison.html.
        figures: everything that was found; `figures.document()` is comparison.json.
        runs: name of the run -> its folder.
    """

    page: Path
    figures: Figures
    runs: Mapping[str, Path]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per method: losses over clients and seeds, standing and budget.

        The standing is that of the clients against the baselines.
        """
        return self.figures.method_rows

    @property
    def table(self) -> pandas.DataFrame:
        """`rows` as a table, with NaN where nothing was measured."""
        import pandas

        table = pandas.DataFrame(self.rows)
        for column in table.columns[table.isna().any()]:
            known = table[column].dropna()
            table[column] = known.reindex(table.index) if len(known) else math.nan
        return table

    def _repr_html_(self) -> str:
        """For notebooks: the losses of each method and the path of the page."""
        columns = [
            column
            for column in _SHOWN_COLUMNS
            if any(row.get(column) is not None for row in self.rows)
        ]
        return (
            html_table(columns, [[row.get(column) for column in columns] for row in self.rows])
            + f"<p>report: <code>{html.escape(str(self.page))}</code></p>"
        )


def plan_methods(
    config: Config,
    algorithms: Sequence[str],
    variants: Mapping[str, Sequence[str]] | None = None,
    objects: Mapping[str, MethodSection] | None = None,
    tuned: Mapping[str, Tuned] | None = None,
) -> dict[str, Config]:
    """Name of a method -> its settings, in the order in which they run.

    Args:
        config: the settings that all methods share.
        algorithms: names; each keeps those settings of the config's algorithm that it has too.
        variants: further methods by name, each with `key=value` overrides of the config.
        objects: further methods by name, each an object.
        tuned: name of an algorithm -> its own settings, found by validation loss.

    Raises:
        ConfigError: a name or a setting is wrong, or a variant changes what must be equal for all.
    """
    plans: dict[str, Config] = {}
    problems: list[str] = []
    for name in algorithms:
        try:
            if tuned and name in tuned:
                plans[name] = tuned[name].plan(config, name)
                problems += _unequal(f"{name}, as it was tuned,", plans[name], config)
            else:
                plans[name] = with_algorithm(config, name)
        except ConfigError as error:
            alone = (
                "; or, for this method alone, leave it out of --algorithms and give "
                f'--variant "{name}=algorithm.name={name};KEY=VALUE"'
            )
            way_out = "" if name in (tuned or {}) else alone
            problems += [
                f"{name}: {problem}{way_out}" if name in method_names() else problem
                for problem in error.problems
            ]
    for name, method in (objects or {}).items():
        try:
            plans[name] = _of_object(config, name, method, plans)
        except ConfigError as error:
            problems += error.problems
    for name, overrides in (variants or {}).items():
        if name in plans or not _NAME.fullmatch(name):
            problems.append(
                f"variant {name!r}: must be a new name of letters, digits, '.', '_' and "
                "'-'; it names the run folders"
            )
            continue
        try:
            plans[name] = with_overrides(config, overrides)
        except ConfigError as error:
            problems += [f"variant {name!r}: {problem}" for problem in error.problems]
            continue
        problems += _unequal(f"variant {name!r}", plans[name], config)
    if problems:
        raise ConfigError(problems)
    return plans


def _unequal(what: str, plan: Config, config: Config) -> list[str]:
    """That a method changes what must be equal for all, or nothing."""
    terms, equal = _terms(plan), _terms(config)
    changed = [term for term in terms if terms[term] != equal[term]]
    if not changed:
        return []
    return [
        f"{what} changes {', '.join(changed)}: methods are compared on "
        "equal rows, base, rounds and local steps, "
        "evaluated alike; set these for all methods"
    ]


def _of_object(
    config: Config, name: str, method: MethodSection, known: Mapping[str, Config]
) -> Config:
    """The run of a method that is an object.

    Raises:
        ConfigError: its name is taken or names no folder, or it does not go with the config.
    """
    if name in known or not _NAME.fullmatch(name):
        raise ConfigError(
            f"method {name!r}: must be a new name of letters, digits, '.', '_' and '-'; it "
            "names the run "
            "folders (give a dict from name to method where two have one name)"
        )
    try:
        return with_method(config, method)
    except ConfigError as error:
        raise ConfigError([f"{name}: {problem}" for problem in error.problems]) from error


def compare_algorithms(
    config: Config,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    observers: Sequence[Observer] = (),
    *,
    variants: Mapping[str, Sequence[str]] | None = None,
    reference: str = "",
    target_loss: float | None = None,
    objects: Mapping[str, MethodSection] | None = None,
    base: BaseModel | None = None,
    rows: ObjectRows | ReadRows | None = None,
    tuned: Path | None = None,
    controls: bool = False,
) -> Comparison:
    """Run every method with every seed and compare the results in `output`.

    The runs go into `output`/<method>-seed<seed>; the results side by side are written into
    `output`.

    Args:
        config: the settings that all methods share.
        algorithms: names of methods.
        seeds: of the runs of each method.
        output: the folder of the comparison.
        observers: watch the runs, one run after the other.
        variants: methods besides the algorithms, see `plan_methods`.
        reference: a method that the others are paired with besides local training.
        target_loss: a mean test loss; the tables then say after how many rounds and seconds each
            method reached it.
        objects: methods given as objects, by name.
        base: one that is loaded already, or was given as an object.
        rows: of clients that were given as objects, or what `read_rows` gave for one of the seeds.
        tuned: a folder of searches; each algorithm then runs with its own tuned settings, on other
            seeds than those tuned on.
        controls: whether the controls of each method are run beside it, as <name>-<control>.

    Raises:
        InputError: a setting is wrong, a folder of another comparison is in the way, or rows or
            base changed since a run of it; all methods and seeds are checked before the first of
            them trains.
        RunError: a run failed; the tables hold the methods whose runs all finished. Call again to
            continue.
    """
    config = with_one_clock(config, output, base)
    found = {} if tuned is None else read_tuned(tuned, algorithms, seeds)
    methods = plan_methods(config, algorithms, variants, objects, found)
    methods = with_controls(methods) if controls else methods
    refuse_federation(config, *methods.values())
    if reference and reference not in methods:
        raise ConfigError(
            f"reference {reference!r} is not among the compared methods; they are "
            f"{', '.join(methods)}"
        )
    if target_loss is not None:
        check_target(target_loss)
    folders = {name: {seed: output / f"{name}-seed{seed}" for seed in seeds} for name in methods}
    plans = [
        PlannedRun(name, folders[name][seed], method.model_copy(update={"seed": seed}))
        for seed in dict.fromkeys(seeds)
        for name, method in methods.items()
    ]
    unfinished = [run for run in plans if not run.is_finished()]
    failures: dict[str, RunError] = {}
    if unfinished:
        ground = CommonGround(config.model, folders, base, rows)
        failures = _run(unfinished, ground, observers)
    about = {name: of.about for name, of in found.items()}
    for name in found if controls else ():
        for control, changes in methods[name].algorithm.controls.items():
            about[f"{name}-{control}"] = {"control_of": name, "values": dict(changes)}
    return _compared(folders, output, failures, reference, target_loss, about, controls_of(methods))


def _run(
    runs: Sequence[PlannedRun], ground: CommonGround, observers: Sequence[Observer]
) -> dict[str, RunError]:
    """Check all runs, then run them; name of a run -> why it failed."""
    ground.check(runs)
    failures = {}
    for run in runs:
        experiment = build_experiment(
            run.config, ground.base, run.folder, ground.dataset(run.config)
        )
        try:
            start_experiment(experiment, run.folder, observers, resume=run.is_begun)
        except MachineError:  # nor would the others be written
            raise
        except RunError as error:  # the other methods are still worth comparing
            failures[run.folder.name] = error
    return failures


def _compared(
    folders: Mapping[str, Mapping[int, Path]],
    output: Path,
    failures: Mapping[str, RunError],
    reference: str,
    target: float | None,
    tuned: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, str],
) -> Comparison:
    """Read and write; then raise where runs failed."""
    complete = {
        name: runs
        for name, runs in folders.items()
        if not any(run.name in failures for run in runs.values())
    }
    page, comparison = output / "comparison.html", None
    if complete:
        seeds = next(iter(complete.values()))
        failed = {name: str(error) for name, error in failures.items()}
        figures = write_comparison(
            methods=complete,
            folder=output,
            reference=reference,
            failures=failed,
            target=target,
            other_seeds=_other_seeds(complete, output),
            tuned={name: about for name, about in tuned.items() if name in complete},
            controls=controls,
        )
        comparison = Comparison(
            page,
            figures,
            {runs[seed].name: runs[seed] for seed in seeds for runs in complete.values()},
        )
    if failures or comparison is None:
        reasons = "; ".join(f"{name}: {error}" for name, error in failures.items())
        rest = (
            f"the others are compared in {page}"
            if complete
            else "no method has all its runs, so nothing is compared"
        )
        raise RunError(
            f"{len(failures)} of {sum(map(len, folders.values()))} runs failed ({reasons}); {rest}"
        )
    return comparison


def _other_seeds(folders: Mapping[str, Mapping[int, Path]], output: Path) -> list[int]:
    """Seeds with finished runs of these methods in the folder that are not among those compared."""
    found: set[int] = set()
    for name, runs in folders.items():
        for path in output.glob(f"{name}-seed*/run.json"):
            seed = path.parent.name.removeprefix(f"{name}-seed")
            if (
                seed.isdecimal()
                and int(seed) not in runs
                and RunFolder(path.parent).read_json("run.json").get("status") == "finished"
            ):
                found.add(int(seed))
    return sorted(found)


def _terms(config: Config) -> dict[str, object]:
    """What must be equal for all methods of a comparison, by the keys that set it.

    Evaluated rounds are those among which a client's best one is chosen, and in which a target loss
    can be seen to be reached. Text scores depend on how long answers may be.
    """
    local = {
        f"local.{key}": getattr(config.local, key) for key in ("steps", "epochs", "batch_size")
    }
    evaluated = {
        f"evaluation.{key}": getattr(config.evaluation, key)
        for key in ("select", "every", "rouge", "max_new_tokens")
    }
    return {
        "seed": config.seed,
        "model": config.model,
        "data": config.data,
        "rounds": config.rounds,
        **local,
        **evaluated,
    }
