"""How a client's adapter is asked outside of fedmira: messages, and the chat template for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmira.data import (
    EncodedExample,
    Example,
    ObjectRows,
    asked,
    chat_template_of,
    encode_few,
    make_encoder,
    messages_to_send,
    rows_of_clients,
    wrong_prompt,
)
from fedmira.errors import DataError
from fedmira.messages import ClientId
from fedmira.studies.saved import SavedAdapters

__all__ = ["FewRows", "RequestForm", "few_rows", "request_form"]

_log = logging.getLogger("fedmira")

_MADE = (
    "Please say in one sentence what this is about.",
    "The second delivery of the 14th has not arrived, and nobody answers the telephone.",
    "w1 w2 w3",
)
"""Texts that are asked where no row of the client is on this machine."""

_MOST = 8


@dataclass(frozen=True, slots=True)
class FewRows:
    """A few rows of a client, as texts and as tokens.

    Attributes:
        examples: the rows, or requests that were made up.
        encoded: their tokens; a made-up request has no response.
        real: whether they are rows of the client.
    """

    examples: tuple[Example, ...]
    encoded: tuple[tuple[int, ...], ...]
    real: bool


@dataclass(frozen=True, slots=True)
class RequestForm:
    """The chat template that asks a client's adapter as in training.

    Attributes:
        template: in Jinja; "" where none asks so.
        why_not: why there is none.
        checked: on how many requests its tokens were those of training.
        messages: a request with the text "{input}", as the template is given it.
        shared: what the prompts of the client's rows share, as index.json has it.
    """

    template: str
    why_not: str
    checked: int
    messages: list[dict[str, Any]]
    shared: Mapping[str, Any]


def few_rows(
    saved: SavedAdapters, clients: Sequence[ClientId], rows: ObjectRows | None = None
) -> dict[ClientId, FewRows]:
    """Rows of clients where they are on this machine, else requests of their form.

    Args:
        saved: what the run has saved.
        clients: their ids.
        rows: of a run whose rows were objects.
    """
    config = saved.config
    encoder = make_encoder(config.data, saved.kind.base.tokenizer)
    try:
        found = rows_of_clients(config.data, config.seed, _MOST, rows)
    except DataError as error:
        _log.warning("rows are not on this machine, so made-up requests are tried: %s", error)
        found = {}
    few = {}
    for client in clients:
        if examples := found.get(client):
            few[client] = FewRows(examples, _tokens(encode_few(encoder, examples)), real=True)
            continue
        shared = saved.prompts.get(client, {})
        examples = tuple(asked(shared, text) for text in _MADE)
        few[client] = FewRows(examples, tuple(map(encoder.prompt, examples)), real=False)
    return few


def request_form(
    saved: SavedAdapters, client: ClientId, few: FewRows, *, own_instruction: bool
) -> RequestForm:
    """The template of a client's requests, held against the prompts of training token by token.

    Args:
        saved: what the run has saved.
        client: its id.
        few: rows to try it on.
        own_instruction: whether the template has the client's instruction, for requests that come
            without one; else every request brings it.
    """
    config, tokenizer = saved.config, saved.kind.base.tokenizer
    encoder, form = make_encoder(config.data, tokenizer), config.data.prompt
    shared = saved.prompts.get(client, {})
    instruction = str(shared.get("instruction", "")) if own_instruction else ""
    messages = messages_to_send(
        form, encoder, asked(shared, "{input}"), with_system=not instruction
    )
    try:
        template = chat_template_of(
            form,
            tokenizer,
            encoder,
            conversation=bool(shared.get("conversation")),
            instruction=instruction,
        )
    except DataError as error:
        return RequestForm("", str(error), 0, messages, shared)
    requests = [*few.examples, *(asked(shared, text) for text in _MADE)]
    for example in requests:
        sent = messages_to_send(
            form,
            encoder,
            example,
            with_system=not instruction or example.instruction != instruction,
        )
        if wrong := wrong_prompt(tokenizer, encoder, template, example, sent):
            told = f"{wrong}; send the prompt as token ids, as the adapter's README.md makes them"
            return RequestForm("", told, 0, messages, shared)
    return RequestForm(template, "", len(requests), messages, shared)


def _tokens(rows: tuple[EncodedExample, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple((*row.prompt, *row.response) for row in rows)
