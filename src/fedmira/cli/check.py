"""fedmira check: look before you train."""

from __future__ import annotations

from dataclasses import asdict

from fedmira.cli.options import (
    ConfigFile,
    Format,
    FormatOption,
    Overrides,
    PresetName,
    settings_and_rows,
)
from fedmira.cli.screen import print_json, print_table, tell

__all__ = ["check"]


def check(
    config: ConfigFile = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    format: FormatOption = Format.text,
) -> None:
    """Read the data, count rows and tokens, plan memory and bound the graph; trains nothing.

    Example: fedmira check --set data.source=natural-instructions --set data.path=tasks
    """
    chosen, rows = settings_and_rows(config, preset, overrides)
    from fedmira.experiment import build_experiment
    from fedmira.studies import make_plan

    experiment = build_experiment(chosen, rows=rows)
    plan = make_plan(experiment)
    summaries = [asdict(party) for party in experiment.parties.values()]
    if format is Format.json:
        print_json(
            {
                "plan": asdict(plan),
                "clients": summaries,
                "skipped": experiment.skipped,
                "notes": experiment.notes,
            }
        )
        return
    columns = {
        "client_id": "client",
        "category": "category",
        "train_rows": "train",
        "validation_rows": "val",
        "test_rows": "test",
        "train_response_tokens": "response tokens",
    }
    more = {
        "longest_row": "longest",
        "truncated_prompts": "cut prompts",
        "truncated_responses": "cut responses",
        "duplicates": "duplicates",
        "overlaps": "overlaps",
    }
    table = {**columns, **more}
    print_table(
        f"{len(summaries)} clients",
        list(table.values()),
        [[row[name] for name in table] for row in summaries],
    )
    for line in plan.lines():
        tell(line)
