"""What runs spent: local steps, tokens, bytes and parameters.

And whether the runs of one seed spent the same on the same ground.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedmira.report.findings import flat_settings
from fedmira.report.records import Event, Run

__all__ = ["Budget", "budget_of", "dtype_of", "inequalities"]

_HASH_DIGITS = 12
_EVALUATED = (
    "evaluation.every",
    "evaluation.select",
    "evaluation.rouge",
    "evaluation.max_new_tokens",
)


@dataclass(frozen=True, slots=True)
class Budget:
    """Sums over all rounds and clients of a run; None where the folder does not say.

    Attributes:
        local_steps: optimizer steps.
        response_tokens: tokens that carried loss.
        tokens: positions computed for them, prompts and padding included.
        bytes_up, bytes_down: of the tensors and numbers that travelled, clients to server and
            server to clients.
        bytes_up_each, bytes_down_each: of one client in one round, on average over the replies.
        parameters_least, parameters_most: of one client's adapter.
        trained_least, trained_most: of those, what local training moves; some methods freeze a
            part.
    """

    local_steps: float | None
    response_tokens: float | None
    tokens: float | None
    bytes_up: float | None
    bytes_down: float | None
    bytes_up_each: float | None
    bytes_down_each: float | None
    parameters_least: float | None
    parameters_most: float | None
    trained_least: float | None
    trained_most: float | None


def budget_of(run: Run) -> Budget:
    """Read from events.jsonl, metrics/rounds.csv and adapters/index.json."""
    trained = run.of_kind("train")
    sizes, moved = _counts(run, "parameters"), _counts(run, "trained_parameters")
    return Budget(
        local_steps=_total(trained, "steps"),
        response_tokens=_total(trained, "response_tokens"),
        tokens=_total(trained, "tokens"),
        bytes_up=_sum([row.bytes_up for row in run.rounds]),
        bytes_down=_sum([row.bytes_down for row in run.rounds]),
        bytes_up_each=_mean(trained, "bytes_up"),
        bytes_down_each=_mean(trained, "bytes_down"),
        parameters_least=min(sizes, default=None),
        parameters_most=max(sizes, default=None),
        trained_least=min(moved, default=None),
        trained_most=max(moved, default=None),
    )


def dtype_of(run: Run) -> str | None:
    """Number types that travelled, such as "float32", of both ways where they differ.

    None where the folder does not say.
    """
    ways = {}
    for way in ("up", "down"):
        told = {event.texts.get(f"dtype_{way}", "") for event in run.of_kind("train")}
        ways[way] = "+".join(sorted({kind for text in told for kind in text.split("+") if kind}))
    up, down = ways["up"], ways["down"]
    return (
        up
        if up == down
        else "; ".join(f"{way} {kinds or 'nothing'}" for way, kinds in ways.items())
    ) or None


def inequalities(runs: Mapping[str, Run], seed: int) -> dict[str, list[str]]:
    """Where runs of one seed do not stand on equal terms.

    Rows, base, clients, local steps, response tokens, and which adapters are evaluated when, must
    be the same. Tokens computed depend on how batches are packed, and bytes and parameters are what
    methods differ in; these are only reported.

    Args:
        runs: method -> its run with this seed; the first is what the others are held against.
        seed: of the runs, for the sentences.

    Returns:
        Method -> sentences about it; only methods that differ from the first.
    """
    found: dict[str, list[str]] = {}
    if not runs:
        return found
    first, *others = runs
    budgets = {method: budget_of(run) for method, run in runs.items()}
    settings = {method: flat_settings(run.settings) for method, run in runs.items()}
    terms: dict[str, Callable[[str], str]] = {
        "rows (sha256)": lambda method: _hash(runs[method], "data"),
        "base model (sha256)": lambda method: _hash(runs[method], "base"),
        "clients": lambda method: ", ".join(sorted(row.client for row in runs[method].clients)),
        "local steps": lambda method: _count(budgets[method].local_steps),
        "response tokens": lambda method: _count(budgets[method].response_tokens),
        **{key: partial(_setting, settings, key) for key in _EVALUATED},
    }
    for method in others:
        for term, value_of in terms.items():
            own, other = value_of(method), value_of(first)
            if own == other:
                continue
            said = (
                "they are not the same"
                if term == "clients"
                else f"{own}, and {other} under {first}"
            )
            found.setdefault(method, []).append(f"{method}, seed {seed}: other {term}: {said}")
    return found


def _total(events: Sequence[Event], number: str) -> float | None:
    return _sum([event.numbers.get(number) for event in events])


def _mean(events: Sequence[Event], number: str) -> float | None:
    known = [event.numbers[number] for event in events if number in event.numbers]
    return sum(known) / len(known) if known else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _counts(run: Run, name: str) -> list[int]:
    """A count of each client's entry in adapters/index.json, where it has it."""
    return [count for entry in run.adapters.values() if isinstance(count := entry.get(name), int)]


def _hash(run: Run, section: str) -> str:
    found = run.provenance.get(section)
    return str(found.get("sha256", ""))[:_HASH_DIGITS] if isinstance(found, dict) else ""


def _count(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:,.0f}"


def _setting(settings: Mapping[str, Mapping[str, object]], key: str, method: str) -> str:
    """A setting of a method's run."""
    return str(settings[method].get(key, "not recorded"))
