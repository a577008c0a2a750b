"""The page about one run: report.html, self-contained.

It is readable on a phone, in light and dark, and on paper.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedmira.atomic import replace_file
from fedmira.metrics import LOSS_METRICS
from fedmira.records import RecordedFolder
from fedmira.report.charts import (
    Series,
    change_bars,
    legend,
    line_chart,
    percent_text,
)
from fedmira.report.findings import (
    CHANGE_LIMIT,
    Change,
    algorithm_title,
    changed_settings,
    changes_by_alignment,
    curve_of_test_loss,
    flat_settings,
    mean,
    mean_series,
    pull_kept,
    summary_rows,
    traffic,
)
from fedmira.report.graph_picture import (
    MOST_DRAWN_EDGES,
    Node,
    category_styles,
    graph_picture,
)
from fedmira.report.newcomers import newcomers_of
from fedmira.report.read import read_run
from fedmira.report.records import Client, Run
from fedmira.report.tables import (
    MOST_ROWS,
    client_table,
    loss_text,
    number_text,
    round_table,
    setting_text,
    worst_clients,
)
from fedmira.shown import html_text

__all__ = ["environment", "render", "run_title", "write_report"]

MOST_NAMED = 5  # clients in a list of the greatest gains or harms
MOST_LISTED = 200  # failures and warnings
MOST_CHARTED = 100  # clients with a chart of their own
MOST_BARS = 400  # more would be thinner than a pixel
SMALL = (200, 120)  # a chart of one client
FEW_TEST_ROWS = 50  # fewer tell little of a single client


@dataclass(frozen=True, slots=True)
class _Small:
    """A client's small chart."""

    number: int
    client: str
    chart: Markup


def write_report(
    run_folder: Path, defaults: Callable[[str], Mapping[str, Any]] | None = None
) -> Path:
    """Writes report.html into a run folder, over an older one.

    Args:
        run_folder: of a run that finished, failed or is still running.
        defaults: from an algorithm's name to the settings that a run with it has by default, as
            nested sections; where None, the page does not say which settings differ from them.

    Returns:
        The path of the page.

    Raises:
        RunFolderError: the folder or a needed file is missing, or a file is damaged.
    """
    run = read_run(run_folder)
    path = run.folder / "report.html"
    page = render("report.html.j2", _content(run, defaults))
    if run.status == "running":  # perhaps in another process, whose record it is
        replace_file(path, page, lasting=False)
    else:
        RecordedFolder(run.folder).write(path.name, page, lasting=False)
    return path


def environment() -> Environment:
    """Templates that escape every value, in any file type, and stop at a name that is not given."""
    templates = Environment(
        loader=PackageLoader("fedmira.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    templates.filters |= {
        "loss": loss_text,
        "number": number_text,
        "percent": percent_text,
        "short": setting_text,
    }
    return templates


def _seen(value: Any) -> Any:
    """A value as a template prints it: what cannot be seen in a text is written out."""
    return html_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fill a template with content, styles and the one script.

    The page's own security policy allows the script by its hash.

    Args:
        template: its file name.
        content: name in the template -> value.
    """
    templates = environment()
    style, script = (Markup(_source(templates, name)) for name in ("style.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template(template).render(
        style=style, script=script, script_hash=digest, **content
    )


def _source(templates: Environment, name: str) -> str:
    loader = templates.loader
    assert loader is not None  # set in environment()
    return loader.get_source(templates, name)[0]


def run_title(run: Run) -> str:
    """The algorithm and the day, such as "MIRA, 20 November 2026"."""
    day = f", {run.started.day} {run.started:%B %Y}" if run.started else ""
    return algorithm_title(run.algorithm) + day


def _content(run: Run, defaults: Callable[[str], Mapping[str, Any]] | None) -> dict[str, Any]:
    """Everything the template shows.

    A part that was not measured is None or empty and its section is left out.
    """
    names = _client_names(run)
    changes = changes_by_alignment(run)
    columns, cells, alike = client_table(
        worst_clients(run.clients, MOST_ROWS), {change.client: change for change in changes}
    )
    round_columns, round_cells = round_table(run.rounds)
    messages = _messages(run)
    small_charts, small_legend = _small_charts(run, names)
    return {
        "title": run_title(run),
        "run": run,
        "duration": _duration(run.provenance.get("wall_seconds")),
        "summary": summary_rows(run),
        "tiles": _tiles(run),
        "tests": _test_rows(run),
        "algorithm": run.algorithm,
        "at_best": flat_settings(run.settings).get("evaluation.select") == "best",
        "changes": _change_content(changes),
        "changed_settings": None
        if defaults is None
        else changed_settings(run, defaults(run.algorithm)),
        "charts": _round_charts(run),
        "small_charts": small_charts,
        "small_legend": small_legend,
        "all_clients": len(names),
        "columns": columns,
        "cells": cells,
        "alike": alike,
        "round_columns": round_columns,
        "round_cells": round_cells,
        "graph": _graph_content(run, names),
        "traffic": traffic(run),
        "newcomers": newcomers_of(run),
        "messages": messages[:MOST_LISTED],
        "messages_left": max(0, len(messages) - MOST_LISTED),
        "provenance": _provenance(run),
        "hashes": [
            (client, entry.get("sha256", "")) for client, entry in sorted(run.adapters.items())
        ][:MOST_ROWS],
    }


def _client_names(run: Run) -> list[str]:
    """Clients in the order of clients.csv.

    A run that failed before writing it has those of its events.
    """
    if run.clients:
        return [row.client for row in run.clients]
    return sorted(
        {event.client for event in run.events if event.client}
        | set(run.graph.clients if run.graph else ())
    )


def _duration(seconds: object) -> str:
    if not isinstance(seconds, int | float) or seconds < 0:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def _test_rows(run: Run) -> dict[str, object] | None:
    """How many test rows clients have, and whether that is too few to look at single ones.

    None where nothing was measured.
    """
    rows = sorted(row.test_rows for row in run.clients if row.test_rows)
    if not rows:
        return None
    least, most = number_text(rows[0]), number_text(rows[-1])
    return {
        "rows": least if rows[0] == rows[-1] else f"{least} to {most}",
        "few": rows[len(rows) // 2] < FEW_TEST_ROWS,
    }


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The numbers on top: (title, value, remark)."""
    tiles = []
    after, base = run.summary.get("after_align_loss", {}), run.summary.get("base_loss", {})
    for name, title in (("mean", "Mean test loss"), ("worst_tenth", "Worst tenth of the clients")):
        if name in after:
            change = f" ({percent_text(after[name] / base[name] - 1)})" if base.get(name) else ""
            tiles.append(
                (
                    title,
                    loss_text(after[name]),
                    f"base model {loss_text(base[name])}{change}" if name in base else "",
                )
            )
    best = mean([row.best_test_loss for row in run.clients if row.best_test_loss is not None])
    if best is not None and all(row.best_test_loss is not None for row in run.clients):
        tiles.append(
            (
                "Mean at the best round",
                loss_text(best),
                "each client's round by its own validation rows",
            )
        )
    kept = pull_kept(run)
    if kept is not None:
        remark = (
            f"by their own validation rows, at the last evaluation; {kept.some} more kept a part "
            "of it"
        )
        tiles.append(("Declined the server’s pull", f"{kept.nothing} of {kept.clients}", remark))
    for row in summary_rows(run):
        if row.name not in LOSS_METRICS and row.mean is not None:
            tiles.append((row.title, f"{row.mean:.3f}", "mean over clients"))
    return tiles


def _change_content(changes: Sequence[Change]) -> dict[str, Any] | None:
    if not changes:
        return None
    verdicts = [change.verdict for change in changes]
    step = -(-len(changes) // MOST_BARS)
    bars = change_bars(
        [(change.client, change.relative) for change in changes[::step]],
        "Relative change of each client's test loss",
        limit=CHANGE_LIMIT,
    )
    return {
        "counts": {
            verdict: verdicts.count(verdict) for verdict in ("gained", "unchanged", "harmed")
        },
        "limit": f"{100 * CHANGE_LIMIT:g} %",
        "gained": [change for change in changes if change.verdict == "gained"][:MOST_NAMED],
        "harmed": [change for change in reversed(changes) if change.verdict == "harmed"][
            :MOST_NAMED
        ],
        "chart": bars,
        "step": step,
    }


def _round_charts(run: Run) -> list[tuple[str, Markup, Markup]]:
    """Charts over rounds with at least two points of a line: (title, legend, chart)."""
    relative = run.series("align", "relative_pull")
    most: dict[float, float] = {}
    for points in relative.values():
        for number, value in points:
            most[number] = max(value, most.get(number, 0.0))
    pull = [Series("mean over clients", mean_series(run, "align", "relative_pull"), 3)]
    pull.append(Series("client that moved most", sorted(most.items()), 4, dashed=True))
    drawn = [
        (
            "Mean loss per response token",
            [
                Series("test", curve_of_test_loss(run), 1),
                Series("training", _column(run, "train_loss"), 2, dashed=True),
            ],
        ),
        (
            "Pull: how far alignment moves an adapter, relative to its norm",
            pull if relative else [Series("pull", _column(run, "pull"), 3)],
        ),
        (
            "Disagreement of neighbours",
            [
                Series("before alignment", _column(run, "disagreement_before"), 5, dashed=True),
                Series("after alignment", _column(run, "disagreement_after"), 6),
            ],
        ),
    ]
    kept = []
    for title, lines in drawn:
        present = [line for line in lines if any(value for _, value in line.points)]
        if any(len(line.points) > 1 for line in present):
            kept.append((title, legend(present), line_chart(present, title)))
    return kept


def _column(run: Run, name: str) -> list[tuple[float, float]]:
    return [(row.round, value) for row in run.rounds if (value := getattr(row, name)) is not None]


def _small_charts(run: Run, names: Sequence[str]) -> tuple[list[_Small], Markup]:
    """One chart a client, all with the same axes, and their legend.

    None before two rounds were trained.

    Of many clients, those with the highest loss at the end; of a run that has no such losses, the
    first.
    """
    kinds = [
        ("test", 1, False, run.series("evaluate", "test_loss")),
        ("validation", 3, False, run.series("evaluate", "validation_loss")),
        ("training", 2, True, run.series("train", "loss")),
    ]
    kinds = [kind for kind in kinds if kind[3]]
    points = [
        point for _, _, _, series in kinds for client in names for point in series.get(client, [])
    ]
    if len({number for number, _ in points}) < 3:
        return [], Markup("")
    rounds, losses = [number for number, _ in points], [value for _, value in points]
    bounds = {"x_bounds": (min(rounds), max(rounds)), "y_bounds": (min(losses), max(losses))}
    chosen = {
        number: row.client for number, row in worst_clients(run.clients, MOST_CHARTED).items()
    }
    charts = []
    for number, client in (chosen or dict(enumerate(names[:MOST_CHARTED], start=1))).items():
        lines = [
            Series(name, series.get(client, []), colour, dashed)
            for name, colour, dashed, series in kinds
        ]
        chart = line_chart(lines, f"Loss of {client}", **bounds, size=SMALL, font=11, x_title="")
        if chart:
            charts.append(_Small(number, client, chart))
    return charts, legend([Series(name, [], colour, dashed) for name, colour, dashed, _ in kinds])


def _graph_content(run: Run, names: Sequence[str]) -> dict[str, Any] | None:
    graph = run.graph
    if graph is None or not graph.clients:
        return None
    rows = {row.client: row for row in run.clients}
    nodes = {}
    for number, client in enumerate(names, start=1):
        row = rows.get(client, Client(client))
        category = row.category or str(run.adapters.get(client, {}).get("category") or "")
        nodes[client] = Node(number, category, row.train_rows or 0.0)
    picture = graph_picture(graph, nodes)
    styles = category_styles(node.category for node in nodes.values()) if picture else {}
    groups = [
        (
            category,
            colour,
            shape,
            [(node.number, client) for client, node in nodes.items() if node.category == category],
        )
        for category, (colour, shape) in styles.items()
    ]
    return {
        "picture": picture,
        "kind": graph.kind,
        "clients": len(graph.clients),
        "edges": len(graph.edges),
        "strongest_only": MOST_DRAWN_EDGES if len(graph.edges) > MOST_DRAWN_EDGES else 0,
        "groups": groups,
        "sized": any(node.train_rows for node in nodes.values()),
    }


def _messages(run: Run) -> list[tuple[str, str, str]]:
    """Failures, then warnings, then what could not be read: (kind, round and client, text)."""
    messages = []
    for kind, key in (("failure", "reason"), ("warning", "message")):
        for event in run.of_kind(kind):
            place = f"round {event.round}" + (f", {event.client}" if event.client else "")
            stage = f"{event.texts['stage']}: " if event.texts.get("stage") else ""
            messages.append((kind, place, stage + event.texts[key]))
    return messages + [("reading", "", note) for note in run.notes]


def _left_out(screened: object) -> str | None:
    """Whose replies the server's screen left out, and in how many rounds."""
    if not isinstance(screened, dict) or not screened:
        return None
    return ", ".join(f"{client} in {times} rounds" for client, times in screened.items())


def _promise(privacy: object) -> str | None:
    """What the run promises of single rows or clients, and what it does not."""
    if not isinstance(privacy, dict):
        return None
    spent = privacy.get("epsilon")
    return (
        f"epsilon {f'{spent:.4g}' if isinstance(spent, int | float) else 'without bound'} "
        f"at delta {privacy.get('delta')} of each {privacy.get('kind')}; promise: "
        f"{privacy.get('promise')}; not covered: {privacy.get('not_covered')}"
    )


def _provenance(run: Run) -> list[tuple[str, str]]:
    """What was run, on what and from what, as (name, value); absent parts are left out."""
    facts: dict[str, Any] = {
        "started": run.started.isoformat(sep=" ", timespec="seconds") if run.started else None
    }
    facts |= {
        "seed": run.provenance.get("seed"),
        "rounds done": run.provenance.get("rounds_done"),
        "clients": run.provenance.get("clients"),
    }
    facts |= {"left out by the server": _left_out(run.provenance.get("screened"))}
    facts |= {"privacy": _promise(run.provenance.get("privacy"))}
    facts |= {"wall time": _duration(run.provenance.get("wall_seconds"))}
    for section, prefix in (("base", "base model "), ("machine", "machine "), ("versions", "")):
        values = run.provenance.get(section)
        if isinstance(values, dict):
            facts |= flat_settings(values, prefix)
    parameters = facts.get("base model parameters")
    if isinstance(parameters, int):
        facts["base model parameters"] = f"{parameters:,}"
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "", {})]
