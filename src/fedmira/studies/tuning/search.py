"""Settings chosen by validation loss: a search over trials, its folder, and what it found.

Test rows are set aside before anything is trained, so that no trial can be measured on them.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmira.atomic import PARTIAL
from fedmira.config import (
    Config,
    dump_config,
    refuse_federation,
    with_algorithm,
    with_settings,
)
from fedmira.config.methods import is_object
from fedmira.data import ObjectRows, ReadRows
from fedmira.errors import RunError, RunFolderError
from fedmira.model import BaseModel
from fedmira.observers import Observer
from fedmira.records import RECORD, RecordedFolder
from fedmira.report import write_tuning
from fedmira.shown import html_text
from fedmira.studies.ground import with_one_clock
from fedmira.studies.notebook import html_table
from fedmira.studies.tuning.choices import Search
from fedmira.studies.tuning.exponentiated import about_drawing, check_drawn, drawable
from fedmira.studies.tuning.halving import check_stages, stage_rounds, stage_sizes
from fedmira.studies.tuning.space import (
    Space,
    default_space,
    draw,
    edge_notes,
    foreign_keys,
    read_space,
)
from fedmira.studies.tuning.tpe import OptunaStudy
from fedmira.studies.tuning.trials import Trial, Trials

if TYPE_CHECKING:
    import pandas

__all__ = ["Tuning", "tune_methods", "tune_settings"]

_PLAN = "plan.json"


@dataclass(frozen=True)
class Tuning:
    """A search that is over.

    Attributes:
        folder: where it lies: trials.csv, tune.json, tune.html, best.toml and the trials' runs.
        config: the best settings in the config that was searched around; what best.toml holds.
        document: all figures, the content of tune.json.
    """

    folder: Path
    config: Config
    document: Mapping[str, Any]

    @property
    def page(self) -> Path:
        """All trials, the chosen settings, and how close the next ones come."""
        return self.folder / "tune.html"

    @property
    def best(self) -> dict[str, Any]:
        """The chosen values by dotted key."""
        return dict(self.document["best"]["values"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial, the best first: its values, loss and difference to the best."""
        return list(self.document["rows"])

    @property
    def table(self) -> pandas.DataFrame:
        """`rows` as a table, with NaN where nothing was measured."""
        import pandas

        return pandas.DataFrame(self.rows)

    def _repr_html_(self) -> str:
        """For notebooks: all trials, what is to be said of the best, and the path of the page."""
        columns = list(self.rows[0])
        notes = "".join(f"<p>{html.escape(html_text(note))}</p>" for note in self.document["notes"])
        return (
            html_table(columns, [[row[column] for column in columns] for row in self.rows])
            + notes
            + f"<p>page: <code>{html.escape(str(self.page))}</code></p>"
        )


def tune_methods(
    config: Config,
    algorithms: Sequence[str],
    space: Path | Mapping[str, Any] | None,
    search: Search,
    output: Path,
    observers: Sequence[Observer] = (),
    *,
    base: BaseModel | None = None,
    rows: ObjectRows | ReadRows | None = None,
) -> dict[str, Tuning]:
    """Tune each of several methods, into `output`/<method>; name -> what was found.

    Keys of the space that only another of the methods reads are left out, and this is said.

    Args:
        config: the settings that all methods share.
        algorithms: names of methods.
        space: as for `tune_settings`.
        search: as for `tune_settings`.
        output: the folder above those of the methods.
        observers: as for `tune_settings`.
        base: as for `tune_settings`.
        rows: as for `tune_settings`.

    Raises:
        InputError: something is wrong; all settings are checked before the first method is tuned.
        RunError: all trials of a method failed.
    """
    configs = {name: with_algorithm(config, name) for name in algorithms}
    foreign: dict[str, list[str]] = {name: [] for name in configs}
    if space is not None:
        found = {name: foreign_keys(space, of) for name, of in configs.items()}
        nobody = set.intersection(*map(set, found.values()))
        foreign = {name: [k for k in keys if k not in nobody] for name, keys in found.items()}
    for name, of in configs.items():
        _ = _usual(search, of) if space is None else read_space(space, of, foreign[name])
    return {
        name: tune_settings(
            of,
            space,
            search,
            output / name,
            observers,
            base=base,
            rows=rows,
            foreign=foreign[name],
        )
        for name, of in configs.items()
    }


def tune_settings(
    config: Config,
    space: Path | Mapping[str, Any] | None,
    search: Search,
    output: Path,
    observers: Sequence[Observer] = (),
    *,
    base: BaseModel | None = None,
    rows: ObjectRows | ReadRows | None = None,
    foreign: Sequence[str] = (),
) -> Tuning:
    """Search for the settings with the lowest validation loss, into `output`.

    Called again with the same folder, it goes on: trials that are there are not run again.

    Args:
        config: what is searched around; its `rounds.count` is that of a whole trial.
        space: a TOML file, or dotted key -> values or a range; None for the usual space.
        search: how, and with which seeds.
        output: the folder of the search, new or one that was begun.
        observers: watch the runs of the trials, one after the other.
        base: one that is loaded already, or was given as an object.
        rows: of clients that were given as objects, or what `read_rows` gave for one of the seeds.
        foreign: keys of the space to be left out.

    Raises:
        InputError: the space, the search or a trial is wrong, a client has no validation rows, or
            the folder holds something else; nothing was trained.
        RunError: all trials failed, or a file could not be written. Call again to continue.
    """
    refuse_federation(config)
    search = search.checked(config)
    if space is not None:
        looked_at = read_space(space, config, foreign)
    else:
        looked_at = _usual(search, config)
    if search.method == "exponentiated":
        check_drawn(looked_at, config)
    config = with_one_clock(config, output, base, "trials/*")
    trials = Trials(
        config,
        search.seeds,
        output,
        search.at or "last",
        observers,
        base,
        rows,
        turns=search.method == "tpe",
    )
    return _Searching(config, looked_at, search, output, trials).run()


def _usual(search: Search, config: Config) -> Space:
    """What is searched where nothing was said."""
    usual = default_space(config)
    return drawable(usual) if search.method == "exponentiated" else usual


class _Searching:
    """One search, from its plan to its page."""

    def __init__(
        self, config: Config, space: Space, search: Search, output: Path, trials: Trials
    ) -> None:
        self._config, self._space, self._search = config, space, search
        self._output, self._trials = output, trials
        self._rounds = config.rounds.count
        self._tried: list[Trial] = []
        self._stages: list[dict[str, int]] = []

    def run(self) -> Tuning:
        """Search, and write what was found."""
        _check_plan(self._output, self._plan())
        if self._search.method == "tpe":
            best = self._propose()
        else:
            drawn = draw(
                self._space,
                self._search.trials,
                self._config.seed,
                self._space.present(self._config),
            )
            self._tried = [Trial(number, values) for number, values in enumerate(drawn, start=1)]
            for trial in self._tried:
                self._trials.config_of(trial.values)
            ends = self._ends()
            self._trials.check(self._tried)
            self._keep_plan()
            best = {
                "halving": lambda: self._halve(ends),
                "random": self._try_all,
                "exponentiated": self._explore,
            }[self._search.method]()
        return self._found(best)

    def _ends(self) -> list[int]:
        """The last round of each stage."""
        if self._search.method != "halving":
            return [self._rounds]
        sizes = stage_sizes(len(self._tried), self._search.rate)
        if self._search.budgets:
            check_stages(self._search.budgets, self._rounds, len(sizes))
            return list(self._search.budgets)
        return stage_rounds(self._rounds, len(sizes), self._search.rate)

    def _halve(self, ends: Sequence[int]) -> Trial:
        left = list(self._tried)
        for place, end in enumerate(ends):
            self._stages.append({"rounds": end, "trials": len(left)})
            self._trials.bring(left, end)
            left = self._ranked(left, end)
            if place + 1 < len(ends):
                left = left[: -(-self._stages[-1]["trials"] // self._search.rate)]
            self._write_table()
        return left[0]

    def _try_all(self) -> Trial:
        self._stages = [{"rounds": self._rounds, "trials": len(self._tried)}]
        self._trials.bring(self._tried, self._rounds)
        return self._ranked(self._tried, self._rounds)[0]

    def _explore(self) -> Trial:
        """One run a seed whose clients draw, and then the likeliest settings alone."""
        self._stages = [{"rounds": self._rounds, "trials": 1}]
        self._trials.explore(self._tried, self._search.divisor)
        best = max(self._tried, key=lambda trial: (trial.probability or 0.0, -trial.number))
        self._write_table()
        self._trials.bring([best], self._rounds)
        return self._ranked([best], self._rounds)[0]

    def _propose(self) -> Trial:
        """Trials that Optuna proposes, one after the other."""
        some = draw(self._space, self._search.trials, self._config.seed, None)
        planned = [Trial(number, values) for number, values in enumerate(some, start=1)]
        for trial in planned:  # what is proposed is not known yet, but is made of these values
            self._trials.config_of(trial.values)
        if not (self._output / _PLAN).exists():
            self._trials.check(planned)
        self._keep_plan()
        study = OptunaStudy(
            self._output, self._space, self._config.seed, self._space.present(self._config)
        )
        self._stages = [{"rounds": self._rounds, "trials": self._search.trials}]
        for number in range(1, self._search.trials + 1):
            trial = Trial(number, study.proposed(number))
            self._tried.append(trial)
            self._trials.bring([trial], self._rounds)
            study.tell(number, trial.loss(self._rounds))
            self._write_table()
        return self._ranked(self._tried, self._rounds)[0]

    def _ranked(self, trials: Sequence[Trial], rounds: int) -> list[Trial]:
        """Those that did not fail, the lowest loss first; of equal ones, the first drawn.

        Raises:
            RunError: all failed.
        """
        fine = [trial for trial in trials if math.isfinite(trial.loss(rounds))]
        if not fine:
            reasons = "; ".join(f"trial {trial.number}: {trial.problem}" for trial in trials[:3])
            raise RunError(
                f"all {len(trials)} trials failed ({reasons}); their runs are in "
                f"{self._output / 'trials'}: search lower values of local.learning_rate, or mend "
                "what is named"
            )
        return sorted(fine, key=lambda trial: (trial.loss(rounds), trial.number))

    def _found(self, best: Trial) -> Tuning:
        """Write best.toml and the page."""
        chosen = with_settings(self._config, best.values)
        RecordedFolder(self._output).write("best.toml", self._best_text(best, chosen))
        document = write_tuning(self._document(best), self._output)
        return Tuning(self._output, chosen, document)

    def _document(self, best: Trial | None) -> dict[str, Any]:
        seeds = self._search.seeds
        edges = edge_notes(self._space, self._config, best.values) if best else []
        return {
            **{key: value for key, value in self._plan().items() if key != "config"},
            "asked": self._search.trials,
            "rounds": self._rounds,
            "stages": self._stages,
            "complete": best is not None,
            "best": best.document(seeds, "chosen") if best else None,
            "edges": edges,
            "notes": self._notes(best),
            "trials": [trial.document(seeds, self._status(trial, best)) for trial in self._tried],
        }

    def _status(self, trial: Trial, best: Trial | None) -> str:
        if trial.problem:
            return "failed"
        if trial is best:
            return "chosen"
        return "finished" if trial.rounds == self._rounds else "dropped" if best else "begun"

    def _notes(self, best: Trial | None) -> list[str]:
        """What to know of the search, a sentence each."""
        notes = list(self._space.notes)
        points = self._space.points
        if points is not None and points < self._search.trials:
            notes.append(
                f"the space holds {points} different settings, and {self._search.trials} trials "
                "were asked for"
            )
        if self._search.method == "exponentiated" and best is not None:
            notes += about_drawing(best.probability or 0.0, best.drawn, len(self._tried))
        own = self._space.present(self._config)
        if own is None:
            notes.append("the config's own settings do not lie in the space and were not tried")
        elif best is not None and best.values == own:
            notes.append("the best settings are those that the config has already")
        notes += [
            f"trial {trial.number}: clients failed {trial.failures} times in a round and kept the "
            "adapter that they had"
            for trial in self._tried
            if trial.failures and not trial.problem
        ]
        if len(self._search.seeds) == 1:
            notes.append(
                "with one seed noise is not measured: the order of close trials may be chance "
                "(give several --seeds)"
            )
        return notes

    def _write_table(self) -> None:
        """What is known so far, for whoever looks while it goes on."""
        RecordedFolder(self._output).write(
            "tune.json", json.dumps(self._document(None), indent=1), lasting=False
        )

    def _plan(self) -> dict[str, Any]:
        search = self._search
        return {
            "format": 1,
            "search": search.method,
            "algorithm": self._config.algorithm.name,
            "seeds": list(search.seeds),
            "at": search.at,
            "trials": search.trials,
            "rate": search.rate if search.method == "halving" else None,
            **({"divisor": search.divisor} if search.method == "exponentiated" else {}),
            "budgets": list(search.budgets),
            "space": self._space.written,
            "config": dump_config(self._config),
        }

    def _keep_plan(self) -> None:
        self._output.mkdir(parents=True, exist_ok=True)
        RecordedFolder(self._output).write(_PLAN, json.dumps(self._plan(), indent=1) + "\n")

    def _best_text(self, best: Trial, chosen: Config) -> str:
        """best.toml, which opens with where it comes from."""
        search, seeds = self._search, ", ".join(map(str, self._search.seeds))
        lines = [
            f"fedmira tune: trial {best.number} of {len(self._tried)} ({search.method}), validation"
            f" loss {best.loss(self._rounds):.4f} at the {search.at} round, mean over clients and "
            f"seeds {seeds}.",
            "Chosen: " + ", ".join(f"{key} = {value!r}" for key, value in best.values.items()),
            "No test row was looked at. Run it with: fedmira run best.toml",
        ]
        if is_object(chosen.algorithm) or "object" in (chosen.data.source, chosen.model.base):
            lines.append("It was made of Python objects, which no file holds: give them to run.")
        return "".join(f"# {line}\n" for line in lines) + "\n" + dump_config(chosen)


_GROWS = "trials"


def _check_plan(output: Path, plan: Mapping[str, Any]) -> None:
    """A folder that is there must be of this search; the number of trials may grow but for halving.

    Raises:
        RunFolderError: it holds something else, or a search with other choices.
    """
    path = output / _PLAN
    if not path.is_file():
        begun = {RECORD, RECORD + PARTIAL, _PLAN + PARTIAL}
        if output.exists() and (
            not output.is_dir() or any(child.name not in begun for child in output.iterdir())
        ):
            raise RunFolderError(
                f"{output}: this folder exists and holds no search; choose another --output"
            )
        return
    try:
        before: dict[str, Any] = json.loads(RecordedFolder(output).read(_PLAN).decode())
    except ValueError as error:
        raise RunFolderError(
            f"{path}: not valid JSON ({error}); restore it, or choose another --output"
        ) from error
    changed = [
        "the config" if key == "config" else f"{key} (was {before.get(key)!r}, is {value!r})"
        for key, value in plan.items()
        if before.get(key) != value
        and not (key == _GROWS and plan["search"] != "halving" and value > before.get(key, 0))
    ]
    if changed:
        raise RunFolderError(
            f"{output}: this search was begun with other choices: {', '.join(changed)}; choose "
            "another --output, or give what it was begun with"
        )
