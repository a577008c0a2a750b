"""fedmira generate: ask a client's adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmira.cli.options import Format, FormatOption, ReferenceShare, RunPath
from fedmira.cli.screen import print_json, tell_answer

__all__ = ["generate"]


def generate(
    run: RunPath,
    prompt: Annotated[
        str,
        typer.Argument(
            help="The input, or the whole request where the client's task has no instruction."
        ),
    ],
    client: Annotated[str, typer.Option("--client", help="Whose adapter answers.")],
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction",
            help="Default: the instruction that all the client's training rows share, where "
            "they do and are on this machine.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="Default: the run's setting.", show_default=False
        ),
    ] = None,
    reference_share: ReferenceShare = None,
    format: FormatOption = Format.text,
) -> None:
    """Answer a prompt with a client's adapter, in the prompt form the run was trained with.

    Example: fedmira generate runs/first --client clinic-north "Ada reports dizziness since Monday."
    """
    from fedmira.studies import answer
    from fedmira.studies.saved import reload_adapters

    text = answer(
        reload_adapters(run),
        client,
        prompt,
        instruction,
        max_new_tokens,
        reference_share=reference_share,
    )
    if format is Format.json:
        print_json({"client": client, "prompt": prompt, "answer": text})
        return
    tell_answer(text)
