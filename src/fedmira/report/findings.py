"""What a run found, as numbers.

Headline figures, who gained and who was harmed, settings that differ, traffic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmira.metrics import metrics
from fedmira.report.records import Run

__all__ = [
    "CHANGE_LIMIT",
    "Change",
    "Kept",
    "SummaryRow",
    "Traffic",
    "algorithm_title",
    "changed_settings",
    "changes_by_alignment",
    "flat_settings",
    "mean",
    "mean_series",
    "pull_kept",
    "summary_rows",
    "curve_of_test_loss",
    "traffic",
]

CHANGE_LIMIT = 0.02  # a loss that differs by less than this share of itself counts as unchanged
MIB = 1024.0**2

ALGORITHM_TITLES = {
    "mira": "MIRA",
    "local": "Local training",
    "fedavg": "FedAvg (FedIT)",
    "fedit-finetune": "FedIT, then local",
    "fedprox": "FedProx",
    "ditto": "Ditto",
    "share-factor": "Shared factor",
    "flexlora": "FlexLoRA",
    "hetlora": "HetLoRA",
    "fedex": "FedEx-LoRA",
    "flora": "FLoRA",
    "fedrot": "FedRot-LoRA",
    "fedopt": "FedOpt",
    "scaffold": "SCAFFOLD",
    "fedlease": "FedLEASE, no router",
    "fedalt": "FedALT",
    "feddpa": "FedDPA",
    "cgc-lora": "CGC-LoRA",
    "fola": "FOLA",
    "gossip": "MIRA without a server",
    "mtlora": "MTLoRA",
    "lora-fair": "LoRA-FAIR",
    "rolora": "RoLoRA",
    "fedfomo": "FedFomo",
    "fedkseed": "FedKSeed",
}


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One headline figure: its name in run.json, its title, and its statistics.

    The statistics are over the clients, None where the figure was not measured.

    Attributes:
        name: in run.json.
        title: on the page.
        mean: every client counts alike.
        weighted_mean: by test tokens or test rows.
        worst_tenth: mean over the worst tenth of the clients.
        spread: standard deviation over clients.
    """

    name: str
    title: str
    mean: float | None
    weighted_mean: float | None
    worst_tenth: float | None
    spread: float | None


@dataclass(frozen=True, slots=True)
class Change:
    """A client's test loss before and after the server's step.

    Attributes:
        client: its id.
        before: nats per response token.
        after: nats per response token.
    """

    client: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        """(after - before) / before; below 0 is a gain."""
        return (self.after - self.before) / self.before if self.before else 0.0

    @property
    def verdict(self) -> str:
        """Whether the client "gained", was "harmed", or is "unchanged" within CHANGE_LIMIT."""
        return (
            "harmed"
            if self.relative > CHANGE_LIMIT
            else "gained"
            if self.relative < -CHANGE_LIMIT
            else "unchanged"
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """Clients that chose by their own validation rows, when they were evaluated last.

    How much of the server's pull they kept.

    Attributes:
        nothing: clients that kept none of it.
        some: clients that kept a part.
        everything: clients that kept all.
    """

    nothing: int
    some: int
    everything: int

    @property
    def clients(self) -> int:
        """The number of clients that had a choice."""
        return self.nothing + self.some + self.everything


@dataclass(frozen=True, slots=True)
class Traffic:
    """What travelled in the whole run, in MiB, and per client and round.

    Attributes:
        up_mib: clients to server.
        down_mib: server to clients.
        up_mib_each: of one client in one round, None where no client answered.
        down_mib_each: the same, server to client.
        edge_mib: what was passed on along an edge of the graph, both ways, on average; None where
            nothing goes from client to client.
    """

    up_mib: float
    down_mib: float
    up_mib_each: float | None
    down_mib_each: float | None
    edge_mib: float | None = None


def algorithm_title(name: str) -> str:
    """An algorithm's name for people; unknown names stay as they are."""
    return ALGORITHM_TITLES.get(name, name)


def mean(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None


def summary_rows(run: Run) -> list[SummaryRow]:
    """The headline figures of run.json, in reading order.

    Figures that were not measured are left out.
    """
    return [
        SummaryRow(
            metric.name,
            metric.title,
            figure.get("mean"),
            figure.get("weighted_mean"),
            figure.get("worst_tenth"),
            figure.get("spread"),
        )
        for metric in metrics()
        if (figure := run.summary.get(metric.name))
    ]


def changes_by_alignment(run: Run) -> list[Change]:
    """Every client's test loss before and after the server's last step, greatest gain first.

    Empty where nothing changed at all.
    """
    changes = [
        Change(row.client, row.before_align_loss, row.after_align_loss)
        for row in run.clients
        if row.before_align_loss is not None and row.after_align_loss is not None
    ]
    if all(change.before == change.after for change in changes):
        return []
    return sorted(changes, key=lambda change: change.relative)


def pull_kept(run: Run) -> Kept | None:
    """What the clients chose when they were evaluated last; None where they had no choice."""
    evaluated = run.of_kind("evaluate")
    last = max((event.round for event in evaluated), default=0)
    shares = [
        event.numbers["pull_kept"]
        for event in evaluated
        if event.round == last and "pull_kept" in event.numbers
    ]
    if not shares:
        return None
    nothing, everything = sum(share <= 0 for share in shares), sum(share >= 1 for share in shares)
    return Kept(nothing, len(shares) - nothing - everything, everything)


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys, {"local": {"steps": 5}} -> {"local.steps": 5}.

    An empty section is a value of its own.

    Args:
        settings: nested by section.
        prefix: stands before each key.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def changed_settings(run: Run, defaults: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that differ from the defaults, as (dotted key, value, default).

    Args:
        run: whose settings.
        defaults: nested sections. The default is None for a key that they lack.
    """
    known = flat_settings(defaults)
    return [
        (key, value, known.get(key))
        for key, value in flat_settings(run.settings).items()
        if value != known.get(key) and value not in ({}, [])
    ]


def mean_series(run: Run, kind: str, number: str) -> list[tuple[int, float]]:
    """The mean over clients of one number of one kind of event, as (round, mean).

    Args:
        run: the run that is read.
        kind: of event, such as "evaluate".
        number: the key of the number.
    """
    of_round: dict[int, list[float]] = {}
    for points in run.series(kind, number).values():
        for round_number, value in points:
            of_round.setdefault(round_number, []).append(value)
    return [
        (round_number, sum(values) / len(values))
        for round_number, values in sorted(of_round.items())
    ]


def curve_of_test_loss(run: Run) -> list[tuple[float, float]]:
    """The mean test loss over the rounds that were evaluated, as (round, loss).

    Round 0 is the base model.
    """
    curve = [(row.round, row.test_loss) for row in run.rounds if row.test_loss is not None]
    if curve and curve[0][0] == 0:
        return curve
    return [
        (float(number), loss)
        for number, loss in mean_series(run, "evaluate", "test_loss")
        if number == 0
    ] + curve


def traffic(run: Run) -> Traffic | None:
    """Bytes that travelled, from metrics/rounds.csv; None where nothing did."""
    up = sum(row.bytes_up or 0 for row in run.rounds)
    down = sum(row.bytes_down or 0 for row in run.rounds)
    if not up and not down:
        return None
    exchanges = sum(row.clients or 0 for row in run.rounds)
    totals = run.provenance.get("method", {})
    along = totals.get("bytes_per_edge") if isinstance(totals, Mapping) else None
    edge = along / MIB if isinstance(along, int | float) else None
    return Traffic(
        up_mib=up / MIB,
        down_mib=down / MIB,
        up_mib_each=up / MIB / exchanges if exchanges else None,
        down_mib_each=down / MIB / exchanges if exchanges else None,
        edge_mib=edge,
    )
