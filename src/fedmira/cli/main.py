"""The `fedmira` command: verbs, and errors turned into messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fedmira import __version__
from fedmira.cli import (
    audit,
    chat,
    check,
    compare,
    decide,
    evaluate,
    export,
    fleets,
    flower,
    forget,
    generate,
    join,
    offsite,
    presets,
    report,
    route,
    run,
    serve_config,
    tune,
    verify,
)
from fedmira.cli.screen import logged, tell
from fedmira.errors import FedmiraError, InputError
from fedmira.records import told

__all__ = ["app", "main"]

_INTERRUPTED = 130
_REPEATED = ("compare", "decide", "tune")

app = typer.Typer(
    name="fedmira",
    help="Federated multi-task fine-tuning: one LoRA adapter per client, pulled together along "
    "a task graph.\n\nStart with: fedmira run",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _verb in (
    run.run,
    compare.compare,
    decide.decide,
    tune.tune,
    check.check,
    evaluate.evaluate,
    generate.generate,
    export.export,
    serve_config.serve_config,
    chat.chat,
    route.route,
    fleets.merge,
    fleets.compress,
    fleets.align,
    join.join,
    forget.forget,
    offsite.emulate,
    offsite.plug,
    report.report,
    verify.verify,
    audit.audit,
    presets.presets,
):
    app.command()(_verb)
app.add_typer(flower.app)


def _told_version(asked: bool) -> None:
    """Print the version and end, where it is asked for."""
    if asked:
        tell(f"fedmira {__version__}")
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_told_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Options that stand before the verb."""


def main() -> None:
    """Run the command line and return its exit code.

    0 for success, 2 for bad input, 3 for a failed run, 130 for an interrupt.
    """
    try:
        with logged():
            app()
    except InputError as error:
        for problem in error.problems:
            tell(f"error: {problem}", error=True)
        sys.exit(error.exit_code)
    except FedmiraError as error:
        tell(f"error: {error}", error=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder without permission
        tell(f"error: {told(error)}", error=True)
        sys.exit(FedmiraError.exit_code)
    except SystemExit as ending:
        if ending.code == _INTERRUPTED:  # typer ends an interrupt from the keyboard without a word
            tell(f"interrupted{_way_on(sys.argv[1:])}", error=True)
        raise


def _way_on(arguments: Sequence[str]) -> str:
    """How a verb that was interrupted goes on."""
    verb = next((each for each in arguments if not each.startswith("-")), "")
    if verb == "run":
        return "; continue the run with --resume and the --output that it has"
    if verb in _REPEATED:
        return "; the same command with the same --output goes on from there"
    return ""
