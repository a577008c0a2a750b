"""fedmira chat: a conversation with a client's adapter, beside its base and other runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmira.cli.options import Format, FormatOption, ReferenceShare, RunPath
from fedmira.cli.screen import print_json, print_table, say, tell_answer
from fedmira.errors import ConfigError, InputError

if TYPE_CHECKING:
    from fedmira.studies.serving.talking import Conversation

__all__ = ["chat"]

_PORT = 7860
_COMMANDS = "/client NAME talks to another client, /reset forgets what was said, /quit ends"


def chat(
    run: RunPath,
    client: Annotated[str, typer.Option("--client", help="Whose adapter answers.")],
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--beside",
            metavar="RUN",
            help="Another run on the same base, such as one of local training, whose adapter for "
            "the client answers too. May be repeated.",
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction",
            help="In place of the client's own; as for generate.",
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
    page: Annotated[
        bool,
        typer.Option(
            "--page",
            help="A page in a browser on this machine, in place of the terminal; needs gradio "
            "(pip install 'fedmira[page]').",
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=1, max=65535, help="Of --page. Default: 7860.", show_default=False
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Ask base and adapters the same, and see their answers side by side.

    Questions are typed, or come one a line from a pipe. Every question is asked in the prompt form
    of training.

    Example: fedmira chat runs/first --client clinic-north
    """
    if port is not None and not page:
        raise ConfigError("--port belongs to --page; give that too, or leave it away")
    if page and format is not Format.text:
        raise ConfigError("--format json prints what is typed here; leave it or --page away")
    if page:
        from fedmira.studies.serving.talking_page import check_gradio, serve_page

        check_gradio()
    typed = sys.stdin.isatty() and not page
    if typed:
        say(f"{_COMMANDS}; loading the base ...")
    from fedmira.studies.saved import reload_adapters
    from fedmira.studies.serving.talking import Conversation

    saved = reload_adapters(run)
    others = [reload_adapters(path, saved.kind.base) for path in beside or []]
    conversation = Conversation(
        saved,
        client,
        beside=others,
        instruction=instruction,
        max_new_tokens=max_new_tokens,
        reference_share=reference_share,
    )
    if page:
        serve_page(conversation, port or _PORT, lambda place: say(f"{place}  (Ctrl-C ends it)"))
        return
    if typed:
        _introduce(conversation)
    told: list[dict[str, Any]] = []
    for turn in _turns(conversation, typed):
        told.append(turn)
        if format is Format.text:
            _show(turn, typed)
    if format is Format.json:
        print_json(told)


def _turns(conversation: Conversation, typed: bool) -> Iterator[dict[str, Any]]:
    """Questions with their answers, until the input or the user ends.

    Raises:
        InputError: a line from a pipe cannot be followed or asked.
    """
    for line in _lines(typed):
        try:
            if not _obeyed(conversation, line, typed):
                answers = conversation.ask(line.strip())
                yield {"client": conversation.client, "question": line, "answers": answers}
        except EOFError:
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            return
        except InputError as error:
            if not typed:  # nobody reads it in time, and later lines may count on this one
                raise
            say(f"error: {error}")


def _lines(typed: bool) -> Iterator[str]:
    """Lines with something on them, until the input ends or is interrupted.

    Raises:
        ConfigError: a line is no text.
    """
    try:
        while line := (_typed() if typed else sys.stdin.readline()):
            if line.strip():
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError("a line holds bytes that are no UTF-8; give it in UTF-8") from error
    except (EOFError, KeyboardInterrupt):
        say("")


def _typed() -> str:
    return input("> ") + "\n"


def _introduce(conversation: Conversation) -> None:
    say(f"{conversation.client}: {', '.join(conversation.voices)}")
    if not conversation.remembers:
        say("the client's rows are single requests, so every question is asked alone")


def _obeyed(conversation: Conversation, line: str, typed: bool) -> bool:
    """Whether a line is a command, which is followed.

    Raises:
        EOFError: it ends the conversation.
        ConfigError: there is no such command or client.
    """
    if not line.startswith("/"):
        return False
    command, _, argument = line.partition(" ")
    if command == "/quit":
        raise EOFError
    if command == "/reset":
        conversation.reset()
    elif command == "/client" and argument.strip():
        conversation.switch(argument.strip())
        if typed:
            _introduce(conversation)
    else:
        what = "names no client" if command == "/client" else "there is no such command"
        raise ConfigError(
            f"{command}: {what}; {_COMMANDS}; a question that begins with a "
            "slash needs a space in front of it"
        )
    return True


def _show(turn: dict[str, Any], typed: bool) -> None:
    answers: dict[str, str] = turn["answers"]
    if typed:
        print_table(turn["client"], list(answers), [list(answers.values())])
        return
    tell_answer(f"> {turn['question']}")
    for voice, text in answers.items():
        tell_answer(f"{voice}: {text}")
    tell_answer("")
