"""How a space is searched, as it was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, get_args

from fedmira.config import Config
from fedmira.errors import ConfigError
from fedmira.studies.tuning.exponentiated import Divisor
from fedmira.studies.tuning.tpe import check_optuna
from fedmira.studies.tuning.trials import At

__all__ = ["Algorithm", "Search"]

Algorithm = Literal["halving", "random", "tpe", "exponentiated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How a space is searched.

    Attributes:
        method: "halving" runs many trials a few rounds and the best of them on; "random" runs all
            to the end; "tpe" has Optuna propose each from those before it; "exponentiated" has the
            clients of one run draw theirs anew in each round.
        trials: how many settings are tried.
        seeds: of the runs of each trial; none takes the config's.
        at: which round of a client counts; "" takes that of `evaluation.select`.
        rate: of halving, see `stage_sizes`.
        budgets: of halving, the last round of each stage; none takes `stage_rounds`.
        divisor: of exponentiated, what its steps are divided by.
    """

    method: Algorithm = "halving"
    trials: int = 9
    seeds: tuple[int, ...] = ()
    at: At | Literal[""] = ""
    rate: int = 3
    budgets: tuple[int, ...] = ()
    divisor: Divisor = "aggressive"

    def checked(self, config: Config) -> Search:
        """With the config's seed and round, where none were chosen.

        Raises:
            ConfigError: a choice is wrong; all problems together.
        """
        problems = []
        for name, value, known in (
            ("method", self.method, get_args(Algorithm)),
            ("at", self.at or "last", get_args(At)),
            ("divisor", self.divisor, get_args(Divisor)),
        ):
            if value not in known:
                problems.append(f"tune: {name} is {value!r}; must be {' or '.join(known)}")
        for name, number in (("trials", self.trials), ("rate", self.rate)):
            if not (isinstance(number, Integral) and number >= 1):
                problems.append(f"tune: {name} is {number!r}; must be a whole number, 1 or more")
        if not all(isinstance(each, Integral) for each in self.budgets):
            problems.append(f"tune: budgets are {list(self.budgets)!r}; must be whole numbers")
        if min(self.seeds, default=0) < 0 or len(set(self.seeds)) < len(self.seeds):
            problems.append(
                f"tune: seeds are {', '.join(map(str, self.seeds))}; must be 0 or more, each once"
            )
        if self.budgets and self.method != "halving":
            problems.append(
                f"tune: budgets are the stages of halving, and the method is {self.method!r}; "
                "leave them away"
            )
        if problems:
            raise ConfigError(problems)
        if self.method == "tpe":
            check_optuna()
        return replace(
            self, seeds=self.seeds or (config.seed,), at=self.at or config.evaluation.select
        )
