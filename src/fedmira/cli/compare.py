"""fedmira compare: the same data, seeds and budget for several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmira.cli.options import (
    ConfigFile,
    Format,
    FormatOption,
    Observers,
    OutputFolder,
    Overrides,
    PresetName,
    fresh_folder,
    names_of,
    observers_of,
    seeds_of,
    settings,
    settings_and_rows,
)
from fedmira.cli.screen import print_json, print_table, progress, say, tell
from fedmira.errors import ConfigError

if TYPE_CHECKING:
    from fedmira.studies import Comparison

__all__ = ["compare"]

_MIB = 2**20


def compare(
    algorithms: Annotated[str, typer.Option("--algorithms", help="Names, separated by commas.")],
    config: ConfigFile = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Run seeds, separated by commas.")] = "0",
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME=KEY=VALUE;KEY=VALUE",
            help="A further method: these settings under a name of its own. May be repeated.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            help="A method to hold the others against, besides local.",
            show_default=False,
        ),
    ] = "",
    target_loss: Annotated[
        float | None,
        typer.Option(
            "--target-loss",
            help="Also say when each method's mean test loss first was at or below this.",
            show_default=False,
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Also run the controls of each method, such as two-level-alone, which shares "
            "nothing: what a method is below it is gained by sharing.",
        ),
    ] = False,
    tuned: Annotated[
        Path | None,
        typer.Option(
            "--tuned",
            metavar="FOLDER",
            help="Each of --algorithms runs with its own settings, FOLDER/<name>/best.toml, as "
            "fedmira tune --algorithms writes them; on other seeds than those tuned on.",
            show_default=False,
        ),
    ] = None,
    output: OutputFolder = None,
    observer: Observers = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare methods on equal data, seeds and steps. Run again with the same --output to continue.

    Example: fedmira compare --algorithms local,fedavg,two-level --seeds 0,1,2 --output runs/demo
    """
    numbers = seeds_of(seeds)
    if output is not None and output.is_dir():  # perhaps finished: then no row is needed
        chosen, rows = settings(config, preset, overrides), None
    else:
        chosen, rows = settings_and_rows(config, preset, overrides, numbers[0])
    names = names_of(algorithms)
    if not names:
        raise ConfigError(
            "--algorithms is empty; name at least one, such as local,fedavg,two-level"
        )
    further = _variants(variants or [])
    watchers = observers_of(observer)
    from fedmira.studies import compare_algorithms

    folder = output or fresh_folder("compare")
    say(
        f"comparing {', '.join([*names, *further])} with seeds "
        f"{', '.join(map(str, numbers))}, into {folder}"
    )
    comparison = compare_algorithms(
        chosen,
        names,
        numbers,
        folder,
        [progress(), *watchers],
        variants=further,
        reference=reference,
        target_loss=target_loss,
        rows=rows,
        tuned=tuned,
        controls=controls,
    )
    if format is Format.json:
        print_json(
            {"folder": str(folder), "report": str(comparison.page), **comparison.figures.document()}
        )
        return
    _print(comparison)


def _print(comparison: Comparison) -> None:
    """The tables for people."""
    from fedmira.report.targets import TARGET_RULE, reached_text

    document, rows = comparison.figures.document(), comparison.rows
    losses = {
        "method": "method",
        "seeds": "seeds",
        "test_loss": "mean",
        "test_loss_spread": "± seeds",
        "worst_tenth": "worst tenth",
    }
    _print_columns(f"test loss per response token {comparison.figures.read_out}", losses, rows)
    _print_pairings(comparison, document)
    if comparison.figures.sharing:
        _print_sharing(comparison)
    _print_budgets(document, rows)
    if document.get("target_loss") is not None:
        soon = {"method": "method", "rounds": "rounds", "seconds_to_target": "seconds"}
        there = [row | {"rounds": reached_text(row)} for row in rows]
        _print_columns(f"to a mean test loss of {document['target_loss']:g}", soon, there)
        tell(TARGET_RULE)
    if document["baselines"]:
        tell(document["rule"])
        if max(row["seeds"] for row in rows) == 1:
            tell("With one seed noise is not measured: a difference may be chance.")
    if not document["equal"]:
        tell(
            "\nUNEQUAL: these methods were not run on equal terms, and their figures do "
            "not compare:"
        )
        tell("\n".join(f"  {problem}" for problem in document["problems"]))
    if comparison.figures.tuned:
        from fedmira.report.comparison_files import TUNED_RULE, settings_text

        for name in comparison.figures.methods:
            tell(f"{name}: {settings_text(comparison.figures.tuned.get(name))}")
        tell(TUNED_RULE)
    if comparison.figures.left_out:
        tell(comparison.figures.left_out)
    tell(f"report: {comparison.page}")


def _print_pairings(comparison: Comparison, document: Mapping[str, Any]) -> None:
    """Each method held against the baselines, client by client."""
    from fedmira.report.comparison_files import COUNTS

    rows = comparison.rows
    for baseline in document["baselines"]:
        difference = f"difference_to_{baseline}"
        columns = {
            "method": "method",
            difference: "difference",
            f"{difference}_low": "low",
            f"{difference}_high": "high",
        }
        columns |= {
            f"{key}_{baseline}": words.removesuffix(" than").removesuffix(" to")
            for key, words in COUNTS.items()
        }
        others = [row for row in rows if row["method"] != baseline]
        level = f"{100 * document['interval']['level']:g} %"
        told = f"paired difference, its {level} bootstrap interval, and clients"
        _print_columns(f"against {baseline}: {told}", columns, others)
        if comparison.figures.best_pairings:
            at_best = {
                key if key == "method" else f"best_{key}": title for key, title in columns.items()
            }
            _print_columns(
                f"against {baseline}, each client at its own best round: {told}", at_best, others
            )


def _print_sharing(comparison: Comparison) -> None:
    """Each method against its own control."""
    from fedmira.report.sharing import SHARING_RULE

    columns = ["method", "control", "read-out", "difference", "below / above"]
    cells = [
        [gain.method, gain.control, *texts]
        for gain in comparison.figures.sharing.values()
        for texts in gain.texts()
    ]
    print_table("what sharing gains", columns, cells)
    tell(SHARING_RULE)


def _print_budgets(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """What each method took: steps, tokens, and what travelled."""
    budget = {
        "method": "method",
        "local_steps": "local steps",
        "response_tokens": "response tokens",
        "tokens": "tokens computed",
    }
    budget |= {
        "MiB_up": "MiB up",
        "MiB_down": "MiB down",
        "parameters_most": "parameters a client",
        "trained_most": "of these trained",
    }
    budget |= {"equal_budget": "equal"}
    ways = ("up", "down", "up_each", "down_each")
    counts = ("local_steps", "response_tokens", "tokens")
    in_mib: list[dict[str, Any]] = [
        {
            **row,
            **{f"MiB_{way}": _mib(row[f"bytes_{way}"]) for way in ways},
            **{name: _whole(row[name]) for name in counts},
        }
        for row in rows
    ]
    _print_columns("budget of a run, mean over seeds", budget, in_mib)
    tell("".join(f"{note}\n" for note in document["notes"]), end="")
    each = {
        "method": "method",
        "MiB_down_each": "MiB down",
        "MiB_up_each": "MiB up",
        "dtype": "number type",
    }
    _print_columns("what one client sends and is sent in one round, on average", each, in_mib)


def _print_columns(
    title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Print some columns of rows, key -> heading.

    Those that no row has a value for are left out.
    """
    keys = [key for key in columns if any(row[key] is not None for row in rows)]
    cells = [["" if row[key] is None else _word(row[key]) for key in keys] for row in rows]
    if cells:
        print_table(title, [columns[key] for key in keys], cells)


def _word(value: object) -> object:
    return ("yes" if value else "NO") if isinstance(value, bool) else value


def _whole(count: float | None) -> int | None:
    """A mean over seeds of what is counted."""
    return None if count is None else round(count)


def _mib(size: float | None) -> float | None:
    return None if size is None else size / _MIB


def _variants(texts: Sequence[str]) -> dict[str, list[str]]:
    """Name -> its overrides."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        changes = [change.strip() for change in rest.split(";") if change.strip()]
        if not name.strip() or not changes or name.strip() in found:
            raise ConfigError(
                f"--variant {text!r}: must be a name of its own, '=' and settings, such as "
                "'shuffled=graph.shuffled=true;graph.nearest=5'"
            )
        found[name.strip()] = changes
    return found
