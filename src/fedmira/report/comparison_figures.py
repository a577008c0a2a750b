"""All figures of a comparison, from run folders.

Methods over seeds, their budgets, and each client against the baselines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from fedmira.errors import ConfigError
from fedmira.metrics import TEXT_METRICS, Judgement
from fedmira.report.budgets import (
    Budget,
    budget_of,
    dtype_of,
    inequalities,
)
from fedmira.report.choices import judgements
from fedmira.report.findings import flat_settings
from fedmira.report.paired import (
    LEVEL,
    NOISE_RULE,
    RESAMPLES,
    Losses,
    Pairing,
    pair,
)
from fedmira.report.records import Client, Run
from fedmira.report.sharing import SHARING_RULE, SharingGain, sharing_gains
from fedmira.report.tables import number_text
from fedmira.report.targets import check_target, mean_reached, reached

__all__ = ["BASELINE", "Figures", "budget_text", "compare_runs", "pools_of"]

BASELINE = "local"
"""The algorithm that every method is held against where it was run."""


@dataclass(frozen=True)
class Figures:
    """What a comparison found.

    Attributes:
        methods: method -> seed -> run.
        baselines: methods that the others are paired with: the one that trains alone, and the
            chosen reference.
        problems: method -> sentences that say where it does not stand on equal terms; empty for an
            equal comparison.
        pairings: (method, baseline) -> their paired differences.
        best_pairings: the same, with each client at the round that its validation rows choose;
            empty where that is no other read-out.
        pooled: whether several clients hold rows of one pool, see `pools_of`.
        failures: run -> why it failed; its method is not among `methods`.
        target: a mean test loss; how soon each method reached it stands in the tables. None for no
            such columns.
        other_seeds: of finished runs in the folder that are not among these.
        tuned: method -> the settings that a search chose for it, and how; empty for none.
        sharing: method -> what it gains over its own control; empty where none is compared.
    """

    methods: Mapping[str, Mapping[int, Run]]
    baselines: tuple[str, ...]
    problems: Mapping[str, Sequence[str]]
    pairings: Mapping[tuple[str, str], Pairing]
    best_pairings: Mapping[tuple[str, str], Pairing]
    failures: Mapping[str, str]
    pooled: bool = False
    target: float | None = None
    other_seeds: tuple[int, ...] = ()
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sharing: Mapping[str, SharingGain] = field(default_factory=dict)

    @property
    def left_out(self) -> str:
        """What lies in the folder and is not compared; empty where that is nothing."""
        if not self.other_seeds:
            return ""
        own = {seed for runs in self.methods.values() for seed in runs}
        everything = ",".join(map(str, sorted(own | set(self.other_seeds))))
        known = ", ".join(map(str, self.other_seeds))
        return (
            f"Finished runs with other seeds ({known}) lie in this folder and are not in this "
            f"comparison; --seeds {everything} adds them."
        )

    @property
    def resampled(self) -> str:
        """What the bootstrap intervals resample."""
        several = any(pairing.seeds > 1 for pairing in self.pairings.values())
        return ("categories with all their clients" if self.pooled else "clients") + (
            " and seeds" if several else ""
        )

    @property
    def read_out(self) -> str:
        """When the adapters that clients were given were made."""
        chosen = {
            flat_settings(run.settings).get("evaluation.select") == "best"
            for runs in self.methods.values()
            for run in runs.values()
        }
        if len(chosen) > 1:
            return "after the last round or at each client's own best, by method"
        return "at each client's own best round" if chosen == {True} else "after the last round"

    @cached_property
    def notes(self) -> list[str]:
        """Where methods have or train another number of parameters.

        No inequality, since that is what methods may differ in.
        """
        told = []
        for figure, does in (
            ("parameters", "has {} parameters in"),
            ("trained", "trains {} parameters of"),
        ):
            known = [row for row in self.method_rows if row[f"{figure}_most"] is not None]
            first = next(
                (row for row in known if row["method"] in self.baselines), known[0] if known else {}
            )
            own = budget_text(first, figure) if first else ""
            told += [
                f"{row['method']} {does.format(budget_text(row, figure))} a client's "
                f"adapter, {first['method']} {own}"
                for row in known
                if any(
                    row[f"{figure}_{end}"] != first[f"{figure}_{end}"] for end in ("least", "most")
                )
            ]
        return told

    @cached_property
    def described(self) -> dict[str, Client]:
        """Client -> its row in the first run that has it, clients with few training rows first."""
        rows: dict[str, Client] = {}
        for runs in self.methods.values():
            for run in runs.values():
                rows = {row.client: row for row in run.clients} | rows
        return dict(sorted(rows.items(), key=lambda entry: (entry[1].train_rows or 0.0, entry[0])))

    @cached_property
    def method_rows(self) -> list[dict[str, Any]]:
        """A row per method with equal keys; None where something was not measured."""
        return [self._method_row(name, runs) for name, runs in self.methods.items()]

    @cached_property
    def run_rows(self) -> list[dict[str, Any]]:
        """A row per run: its loss and its budget."""
        return [
            {
                "method": name,
                "seed": seed,
                "folder": run.folder.name,
                "data_sha256": _hash(run, "data"),
                "base_sha256": _hash(run, "base"),
                "test_loss": _mean(list(_losses_of(run).values())),
                "worst_tenth": _worst_tenth(run),
                **{key: _whole(value) for key, value in asdict(budget_of(run)).items()},
                "dtype": dtype_of(run),
                **self._soon(run),
                "wall_seconds": run.provenance.get("wall_seconds"),
            }
            for name, runs in self.methods.items()
            for seed, run in runs.items()
        ]

    @cached_property
    def client_rows(self) -> list[dict[str, Any]]:
        """A row per client, with few training rows first.

        Its mean loss over the seeds under each method, and its differences.
        """
        losses = {name: _losses(runs) for name, runs in self.methods.items()}
        rows = []
        for client, described in self.described.items():
            row: dict[str, Any] = {
                "client": client,
                "category": described.category,
                "train_rows": _whole(described.train_rows),
            }
            judged = self.judgements.get(client)
            row["validation_choice"] = judged.choice if judged else None
            row["validation_standing"] = str(judged.standing) if judged else None
            for name, of_seed in losses.items():
                row[f"{name}_test_loss"] = _mean(
                    [found[client] for found in of_seed.values() if client in found]
                )
            for (name, baseline), pairing in self.pairings.items():
                found = pairing.clients.get(client)
                row[f"{name}_to_{baseline}"] = found.difference if found else None
                row[f"{name}_to_{baseline}_relative"] = found.relative if found else None
                row[f"{name}_to_{baseline}_error"] = (
                    found.error if found and pairing.seeds > 1 else None
                )
                row[f"{name}_against_{baseline}"] = found.verdict if found else None
            rows.append(row)
        return rows

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "equal": not self.problems,
            "problems": [problem for problems in self.problems.values() for problem in problems],
            "notes": self.notes,
            "failures": dict(self.failures),
            "other_seeds": list(self.other_seeds),
            "baselines": list(self.baselines),
            "rule": NOISE_RULE,
            **({} if self.target is None else {"target_loss": self.target}),
            **({"tuned": dict(self.tuned)} if self.tuned else {}),
            **({"sharing_rule": SHARING_RULE} if self.sharing else {}),
            "interval": {
                "kind": f"percentile bootstrap over {self.resampled}",
                "level": LEVEL,
                "resamples": RESAMPLES,
            },
            "algorithms": self.method_rows,
            "runs": self.run_rows,
            "clients": self.client_rows,
        }

    def _method_row(self, name: str, runs: Mapping[int, Run]) -> dict[str, Any]:
        means = [
            mean
            for run in runs.values()
            if (mean := _mean(list(_losses_of(run).values()))) is not None
        ]
        row: dict[str, Any] = {
            "method": name,
            "algorithm": next(iter(runs.values())).algorithm,
            "seeds": len(runs),
            "test_loss": _mean(means),
            "test_loss_spread": stdev(means) if len(means) > 1 else None,
            "worst_tenth": _over_seeds([_worst_tenth(run) for run in runs.values()]),
            "weighted_mean": _over_seeds(
                [
                    run.summary.get("after_align_loss", {}).get("weighted_mean")
                    for run in runs.values()
                ]
            ),
            "best_round": _over_seeds([_at_best_round(run) for run in runs.values()]),
            **{
                text: _over_seeds([run.summary.get(text, {}).get("mean") for run in runs.values()])
                for text in TEXT_METRICS
            },
        }
        for prefix, pairings in (("", self.pairings), ("best_", self.best_pairings)):
            for baseline in () if prefix and not pairings else self.baselines:
                row |= _standing(pairings.get((name, baseline)), prefix, baseline)
        kinds = {dtype for run in runs.values() if (dtype := dtype_of(run))}
        row |= _mean_budget([budget_of(run) for run in runs.values()]) | {
            "dtype": "; ".join(sorted(kinds)) or None
        }
        row |= {} if self.target is None else mean_reached(list(runs.values()), self.target)
        if self.sharing:
            keys = next(iter(self.sharing.values())).row()
            row |= self.sharing[name].row() if name in self.sharing else dict.fromkeys(keys)
        return row | {"equal_budget": name not in self.problems}

    @cached_property
    def judgements(self) -> dict[str, Judgement]:
        """Client -> what its validation rows say; empty where nobody trained alone."""
        if BASELINE not in self.methods or len(self.methods) < 2:
            return {}
        return judgements(self.methods, BASELINE)

    def _soon(self, run: Run) -> dict[str, Any]:
        """When a run reached the target; nothing where none is set."""
        if self.target is None:
            return {}
        found = reached(run, self.target)
        return {
            "rounds_to_target": found.rounds if found else None,
            "seconds_to_target": found.seconds if found else None,
        }


def compare_runs(
    methods: Mapping[str, Mapping[int, Run]],
    reference: str = "",
    failures: Mapping[str, str] | None = None,
    target: float | None = None,
    controls: Mapping[str, str] | None = None,
) -> Figures:
    """Pair and count.

    Args:
        methods: method -> seed -> run, in the order of the tables.
        reference: a method that the others are paired with besides local training; empty for none.
        failures: run -> why it failed.
        target: see `Figures`.
        controls: method -> the method that is its control.

    Raises:
        ConfigError: there is no method of the reference's name, and none failed; or the target is
            no loss.
    """
    if target is not None:
        check_target(target)
    if reference and reference not in methods and not failures:
        raise ConfigError(
            f"reference {reference!r} is not among the compared methods; they are "
            f"{', '.join(methods)}"
        )
    alone = [
        name for name, runs in methods.items() if next(iter(runs.values())).algorithm == BASELINE
    ]
    alone = [BASELINE] if BASELINE in alone else alone[:1]
    baselines = tuple(dict.fromkeys([*alone, *([reference] if reference in methods else [])]))
    every = [run for runs in methods.values() for run in runs.values()]
    pools = pools_of(every)
    at_last = {name: _losses(runs) for name, runs in methods.items()}
    pairings = _pairings(at_last, baselines, pools)
    at_best = {
        name: {seed: _best_losses_of(run) for seed, run in runs.items()}
        for name, runs in methods.items()
    }
    other_round = all(
        flat_settings(run.settings).get("evaluation.select") != "best" for run in every
    )
    best_pairings = _pairings(at_best, baselines, pools) if other_round else {}
    order = [*baselines, *(name for name in methods if name not in baselines)]
    problems: dict[str, list[str]] = {}
    for seed in sorted({seed for runs in methods.values() for seed in runs}):
        of_seed = {name: methods[name][seed] for name in order if seed in methods[name]}
        for name, sentences in inequalities(of_seed, seed).items():
            problems.setdefault(name, []).extend(sentences)
    return Figures(
        methods,
        baselines,
        problems,
        pairings,
        best_pairings,
        dict(failures or {}),
        pools is not None,
        target,
        sharing=sharing_gains(controls or {}, at_last, at_best if other_round else None, pools),
    )


def pools_of(runs: Sequence[Run]) -> dict[str, str] | None:
    """Client -> the pool that its rows were dealt from.

    None where the partition does not deal one pool to several clients.

    With `data.partition = "category"` and several clients per category, the clients of a category
    resemble each other, and are no independent draws of a population of clients. Under the other
    partitions each client has a task or a mixture of its own.
    """
    of_client = {row.client: row.category for run in runs for row in run.clients}
    dealt = all(flat_settings(run.settings).get("data.partition") == "category" for run in runs)
    return of_client if dealt and len(set(of_client.values())) < len(of_client) else None


def budget_text(row: Mapping[str, Any], figure: str) -> str:
    """A figure of one client in a row of methods, as a range where clients differ.

    Args:
        row: of one method.
        figure: "parameters" or "trained".
    """
    least, most = row[f"{figure}_least"], row[f"{figure}_most"]
    return number_text(least) if least == most else f"{number_text(least)} to {number_text(most)}"


def _losses_of(run: Run) -> dict[str, float]:
    """Client -> test loss at the end, of those that were measured."""
    return {
        row.client: row.after_align_loss for row in run.clients if row.after_align_loss is not None
    }


def _best_losses_of(run: Run) -> dict[str, float]:
    """Client -> test loss at the round that its validation rows choose, where it has any."""
    return {row.client: row.best_test_loss for row in run.clients if row.best_test_loss is not None}


def _pairings(
    losses: Mapping[str, Losses], baselines: Sequence[str], pools: Mapping[str, str] | None
) -> dict[tuple[str, str], Pairing]:
    """Every method against every baseline but itself, where they have clients in common."""
    pairs = [(name, baseline) for name in losses for baseline in baselines if name != baseline]
    found = {
        (name, baseline): pair(losses[name], losses[baseline], pools) for name, baseline in pairs
    }
    return {key: pairing for key, pairing in found.items() if pairing is not None}


def _standing(pairing: Pairing | None, prefix: str, baseline: str) -> dict[str, float | None]:
    """A method's difference to a baseline and its counts of clients.

    None for the baseline itself.
    """
    figures: dict[str, float | None] = {
        f"difference_to_{baseline}": pairing.difference if pairing else None,
        f"difference_to_{baseline}_low": pairing.low if pairing else None,
        f"difference_to_{baseline}_high": pairing.high if pairing else None,
        f"better_than_{baseline}": pairing.count("better") if pairing else None,
        f"equal_to_{baseline}": pairing.count("equal") if pairing else None,
        f"worse_than_{baseline}": pairing.count("worse") if pairing else None,
        f"below_{baseline}": pairing.below if pairing else None,
        f"above_{baseline}": pairing.above if pairing else None,
    }
    return {f"{prefix}{key}": value for key, value in figures.items()}


def _losses(runs: Mapping[int, Run]) -> Losses:
    return {seed: _losses_of(run) for seed, run in runs.items()}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _over_seeds(values: Sequence[float | None]) -> float | None:
    """The mean, unless a seed has no value."""
    known = [value for value in values if value is not None]
    return _mean(known) if len(known) == len(values) else None


def _worst_tenth(run: Run) -> float | None:
    losses = sorted(_losses_of(run).values(), reverse=True)
    return _mean(losses[: math.ceil(len(losses) / 10)])


def _at_best_round(run: Run) -> float | None:
    """Mean over clients of the loss in the round that each one's validation rows choose.

    None unless all have it.
    """
    return _over_seeds([row.best_test_loss for row in run.clients]) if run.clients else None


def _mean_budget(budgets: Sequence[Budget]) -> dict[str, Any]:
    """The mean of each figure over seeds."""
    each = [asdict(budget) for budget in budgets]
    return {key: _whole(_over_seeds([budget[key] for budget in each])) for key in each[0]}


def _whole(value: float | None) -> float | None:
    """A whole number as int, so that it is written without a decimal point."""
    return int(value) if value is not None and float(value).is_integer() else value


def _hash(run: Run, section: str) -> str | None:
    found = run.provenance.get(section)
    return found.get("sha256") if isinstance(found, dict) else None
