"""A conversation in a browser on this machine, through gradio (an extra)."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fedmira.errors import ConfigError, InputError
from fedmira.studies.serving.talking import Conversation

__all__ = ["check_gradio", "serve_page", "talking_page"]

_HERE = "127.0.0.1"
_HINT = "All are asked alike, in the prompt form of training. Nothing leaves this machine."


def check_gradio() -> None:
    """Refuses a page where gradio is not there.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("gradio") is None:
        raise ConfigError("gradio is not installed; install it with: pip install 'fedmira[page]'")


def serve_page(conversation: Conversation, port: int, told: Callable[[str], None]) -> None:
    """Serves the page on this machine alone, until it is interrupted from the keyboard.

    Args:
        conversation: what a browser's conversation begins as.
        port: where it listens.
        told: is given the page's address once it answers.

    Raises:
        ConfigError: gradio is not installed, or something else listens on that port.
    """
    page = talking_page(conversation)
    try:
        _, address, _ = page.launch(
            server_name=_HERE, server_port=port, share=False, quiet=True, prevent_thread_lock=True
        )
    except OSError as error:
        raise ConfigError(
            f"--port {port}: nothing can listen there ({error}); another program may; take another"
        ) from error
    told(address)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def talking_page(conversation: Conversation) -> Any:
    """The page: whose adapter answers, a question, and a column for each voice.

    Answers stand in plain text fields, so that nothing in them acts in the browser. Every browser
    tab has its own conversation, and one question is answered at a time.

    Args:
        conversation: what each tab's conversation begins as.

    Returns:
        A `gradio.Blocks`.

    Raises:
        ConfigError: gradio is not installed.
    """
    check_gradio()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported
    gradio = import_module("gradio")
    tabs = _Tabs(conversation)
    with gradio.Blocks(title="fedmira", analytics_enabled=False) as page:
        client = gradio.Dropdown(
            list(conversation.clients), value=conversation.client, label="client"
        )
        with gradio.Row():
            answers = [
                gradio.Textbox(label=voice, interactive=False, lines=8, buttons=["copy"])
                for voice in conversation.voices
            ]
        question = gradio.Textbox(label="question", info=_HINT, lines=2)
        with gradio.Row():
            send = gradio.Button("Ask", variant="primary")
            forget = gradio.Button("Forget what was said")

        def ask(text: str, request: Any) -> list[str]:
            try:
                return tabs.asked(request.session_hash, text)
            except InputError as error:
                raise gradio.Error(str(error), print_exception=False) from None

        def switch(name: str, request: Any) -> list[str]:
            try:
                return tabs.switched(request.session_hash, name)
            except InputError as error:
                raise gradio.Error(str(error), print_exception=False) from None

        def reset(request: Any) -> list[str]:
            return tabs.forgotten(request.session_hash)

        def close(request: Any) -> None:
            tabs.close(request.session_hash)

        # By the type of an argument gradio knows that it is to be given the request.
        for called in (ask, switch, reset, close):
            called.__annotations__["request"] = gradio.Request
        one = {"concurrency_limit": 1, "concurrency_id": "base"}
        send.click(ask, [question], answers, api_name="ask", **one)
        question.submit(ask, [question], answers, api_name=False, **one)
        client.change(switch, [client], answers, api_name="client", **one)
        forget.click(reset, [], answers, api_name="forget", **one)
        page.unload(close)
    return page


class _Tabs:
    """The conversation of each browser tab, and what its columns show."""

    def __init__(self, first: Conversation) -> None:
        self._first = first
        self._open: dict[str, tuple[Conversation, list[str]]] = {}

    def asked(self, tab: str, text: str) -> list[str]:
        """The columns after a question: answers, below what was said where that is remembered."""
        talk, shown = self._of(tab)
        found = talk.ask(text).values()
        added = [f"> {text.strip()}\n{answer}" for answer in found]
        if talk.remembers:
            added = [f"{old}\n\n{new}".lstrip() for old, new in zip(shown, added, strict=True)]
        self._open[tab] = talk, added
        return added

    def switched(self, tab: str, client: str) -> list[str]:
        """Empty columns, with another client's adapter behind them."""
        talk, _ = self._of(tab)
        talk.switch(client)
        return self._emptied(tab, talk)

    def forgotten(self, tab: str) -> list[str]:
        """Empty columns, with nothing said before behind them."""
        talk, _ = self._of(tab)
        talk.reset()
        return self._emptied(tab, talk)

    def close(self, tab: str) -> None:
        """Lets go of a tab's conversation."""
        self._open.pop(tab, None)

    def _of(self, tab: str) -> tuple[Conversation, list[str]]:
        if tab not in self._open:
            talk = self._first.another()
            self._open[tab] = talk, [""] * len(talk.voices)
        return self._open[tab]

    def _emptied(self, tab: str, talk: Conversation) -> list[str]:
        self._open[tab] = talk, [""] * len(talk.voices)
        return self._open[tab][1]
