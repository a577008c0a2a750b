"""fedmira forget: a client leaves a run that is over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmira.cli.options import Format, FormatOption, RunPath
from fedmira.cli.screen import print_json
from fedmira.errors import ConfigError, RunError

__all__ = ["forget"]


def forget(
    run: RunPath,
    client: Annotated[
        str | None, typer.Option("--client", help="Who leaves.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new run folder.", show_default=False)
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="RUN has forgotten a client: hold its certificate against its files."
        ),
    ] = False,
    retrain_from: Annotated[
        Path | None,
        typer.Option(
            "--retrain-from",
            metavar="OLD",
            help="With --check: train OLD again without the client, which must give the same "
            "adapters.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Make a run that never had one of its clients.

    Those that it reached are trained again, the others stay bit for bit; forgotten.json certifies
    it. The old run is not changed: delete it, and the leaver's rows.

    Example: fedmira forget runs/first --client clinic-west --output runs/without-west
    """
    from fedmira.studies.forgetting import check_certificate, forget_client

    if check:
        if client is not None or output is not None:
            raise ConfigError("forget: --check takes no --client and no --output; leave them out")
        problems = check_certificate(run, retrain_from)
        if format is Format.json:
            print_json({"problems": problems})
        elif not problems:
            print("the certificate holds")
        if problems:
            raise RunError("; ".join(problems))
        return
    if client is None or output is None or retrain_from is not None:
        raise ConfigError(
            "forget: give --client ID and --output NEW; or --check, perhaps with --retrain-from OLD"
        )
    made = forget_client(run, client, output)
    told = made.certificate
    if format is Format.json:
        print_json({**told, "output": str(made.folder)})
        return
    cost = told["cost"]
    print(f"trained again: {', '.join(told['replayed']) or 'nobody'}")
    print(f"kept as they were: {', '.join(told['kept']) or 'nobody'}")
    print(f"why: {told['why']}")
    print(
        f"cost: {cost['client_rounds_replayed']} rounds of single clients, of "
        f"{cost['client_rounds_of_retraining']} that retraining takes"
    )
    print(f"adapters and certificate: {made.folder}")
