"""The same data, seeds and budget for several methods; finished runs are not repeated, interrupted ones continue."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmira.config import Config, dump_config, with_algorithm, with_overrides
from fedmira.errors import ConfigError, RunError, RunFolderError
from fedmira.experiment import Experiment, build_experiment, resume_experiment, run_experiment
from fedmira.model import BaseModel, load_base
from fedmira.report import Figures, check_target, write_comparison
from fedmira.rounds import Progress, RunFolder

__all__ = ["Comparison", "compare_algorithms", "plan_methods"]

Watch = Callable[[str, int], AbstractContextManager[Progress]]
"""(name of the run, its rounds) -> a progress callback for its duration."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
        """A row per method: losses over clients and seeds, standing of the clients against the baselines, budget."""
        return self.figures.method_rows


def plan_methods(config: Config, algorithms: Sequence[str], variants: Mapping[str, Sequence[str]] | None = None) -> dict[str, Config]:
    """Name of a method -> its settings, in the order in which they run.

    Args:
        algorithms: names; each keeps those settings of the config's algorithm that it has too.
        variants: further methods by name, each with `key=value` overrides of the config.

    Raises:
        ConfigError: a name or a setting is wrong, or a variant changes what must be equal for all.
    """
    plans = {name: with_algorithm(config, name) for name in algorithms}
    problems = []
    for name, overrides in (variants or {}).items():
        if name in plans or not _NAME.fullmatch(name):
            problems.append(f"variant {name!r}: must be a new name of letters, digits, '.', '_' and '-'; it names the run folders")
            continue
        try:
            plans[name] = with_overrides(config, overrides)
        except ConfigError as error:
            problems += [f"variant {name!r}: {problem}" for problem in error.problems]
            continue
        terms, equal = _terms(plans[name]), _terms(config)
        changed = [term for term in terms if terms[term] != equal[term]]
        if changed:
            problems.append(
                f"variant {name!r} changes {', '.join(changed)}: methods are compared on equal rows, base, rounds and local steps; "
                "set these for all methods"
            )
    if problems:
        raise ConfigError(problems)
    return plans


def compare_algorithms(
    config: Config,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    watch: Watch,
    *,
    variants: Mapping[str, Sequence[str]] | None = None,
    reference: str = "",
    target_loss: float | None = None,
) -> Comparison:
    """Run every method with every seed into `output`/<method>-seed<seed>, put the results side by side and write them into `output`.

    Args:
        variants: methods besides the algorithms, see `plan_methods`.
        reference: a method that the others are paired with besides local training.
        target_loss: a mean test loss; the tables then say after how many rounds and seconds each method reached it.

    Raises:
        InputError: a setting is wrong, a folder of another comparison is in the way, or rows or base changed since a run of it.
        RunError: a run failed; the tables hold the methods whose runs all finished. Call again to continue.
    """
    methods = plan_methods(config, algorithms, variants)
    if reference and reference not in methods:
        raise ConfigError(f"reference {reference!r} is not among the compared methods; they are {', '.join(methods)}")
    if target_loss is not None:
        check_target(target_loss)
    folders = {name: {seed: output / f"{name}-seed{seed}" for seed in seeds} for name in methods}
    base: BaseModel | None = None
    failures: dict[str, RunError] = {}
    for seed in dict.fromkeys(seeds):
        for name, method in methods.items():
            folder, plan = folders[name][seed], method.model_copy(update={"seed": seed})
            if _is_finished(folder, plan):
                continue
            base = base or load_base(config.model)
            experiment = build_experiment(plan, base, resumed=folder)
            _refuse_other_ground(experiment, [runs[seed] for runs in folders.values()])
            start = resume_experiment if (folder / "config.toml").exists() else run_experiment
            try:
                with watch(folder.name, plan.rounds.count) as progress:
                    start(experiment, folder, progress)
            except RunError as error:  # the other methods are still worth comparing
                failures[folder.name] = error
    return _compared(folders, output, reference, failures, target_loss)


def _compared(
    folders: Mapping[str, Mapping[int, Path]], output: Path, reference: str, failures: Mapping[str, RunError], target: float | None
) -> Comparison:
    """Read and write; then raise where runs failed."""
    complete = {name: runs for name, runs in folders.items() if not any(run.name in failures for run in runs.values())}
    page, comparison = output / "comparison.html", None
    if complete:
        seeds = next(iter(complete.values()))
        figures = write_comparison(complete, output, reference, {name: str(error) for name, error in failures.items()}, target)
        comparison = Comparison(page, figures, {runs[seed].name: runs[seed] for seed in seeds for runs in complete.values()})
    if failures or comparison is None:
        reasons = "; ".join(f"{name}: {error}" for name, error in failures.items())
        rest = f"the others are compared in {page}" if complete else "no method has all its runs, so nothing is compared"
        raise RunError(f"{len(failures)} of {sum(map(len, folders.values()))} runs failed ({reasons}); {rest}")
    return comparison


def _is_finished(folder: Path, plan: Config) -> bool:
    """Whether the run is there and done.

    Raises:
        RunFolderError: it was made with other settings.
    """
    if RunFolder(folder).read_json("run.json").get("status") != "finished":
        return False
    if (folder / "config.toml").read_text(encoding="utf-8") != dump_config(plan):
        raise RunFolderError(f"{folder}: this run was made with other settings; choose another --output")
    return True


def _refuse_other_ground(experiment: Experiment, folders: Sequence[Path]) -> None:
    """Before training: the runs of this seed that exist must stand on the same rows and base.

    Raises:
        RunFolderError: one does not.
    """
    present = {"data": experiment.data_sha256, "base": experiment.base.sha256}
    for folder in folders:
        document: Mapping[str, Any] = RunFolder(folder).read_json("run.json")
        changed = [part for part, sha256 in present.items() if document.get(part, {}).get("sha256", sha256) != sha256]
        if changed:
            raise RunFolderError(
                f"{folder}: the {' and the '.join(changed)} changed since this run, so that others would not be comparable with it; "
                "put back what it was made with, or choose another --output"
            )


def _terms(config: Config) -> dict[str, object]:
    """What must be equal for all methods of a comparison, by the keys that set it."""
    local = {f"local.{key}": getattr(config.local, key) for key in ("steps", "epochs", "batch_size")}
    return {"seed": config.seed, "model": config.model, "data": config.data, "rounds": config.rounds, **local}
