"""The prompt forms as chat templates, for programs that render Jinja and know no fedmira."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fedmira.data.encoding import Encoder
from fedmira.data.examples import Example
from fedmira.data.prompts import PROMPTS
from fedmira.data.tokenizer import Tokenizer
from fedmira.errors import DataError

__all__ = ["asked", "chat_template_of", "messages_to_send", "wrong_prompt"]

_FIRST, _SECOND = "\x00", "\x01"
"""Stand for instruction and input while the fixed texts around them are found."""

_ALONE = (
    "these adapters were trained on single requests: send the instruction as a system message or "
    "not at all, and then one user message"
)


def asked(
    shared: Mapping[str, Any], text: str, before: tuple[tuple[str, str], ...] = ()
) -> Example:
    """A request in the form of a client's training rows.

    Args:
        shared: what the prompts of the rows share, as index.json has it.
        text: the input, or the whole request where there is no instruction.
        before: earlier messages of the conversation, (role, content) pairs that end with an answer;
            only of clients whose rows are conversations.

    Raises:
        DataError: it holds bytes that are no UTF-8, as a terminal or a pipe may hand them on.
    """
    instruction = shared.get("instruction", "")
    for given in (instruction, text):
        try:
            given.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text {given[:60]!r} holds bytes that are no UTF-8; give it in UTF-8"
            ) from error
    if not shared.get("conversation"):
        return Example(instruction, text, "") if instruction else Example(text, "", "")
    request = "\n\n".join(part for part in (instruction, text) if part and not before) or text
    system = [("system", shared["system"])] if shared.get("system") else []
    messages = (*system, *before, ("user", request))
    return Example("", "", "", messages=messages, tools=shared.get("tools", ""))


def chat_template_of(
    form: str,
    tokenizer: Tokenizer,
    encoder: Encoder,
    *,
    conversation: bool,
    instruction: str = "",
) -> str:
    """A Jinja template that writes what stood before the answers in training.

    Under a last message of the assistant it writes that answer, too, and its end.

    Args:
        form: a key of `PROMPTS`.
        tokenizer: that of the base.
        encoder: of the run's settings, made with this tokenizer.
        conversation: whether the rows were conversations; else they were single requests, whose
            instruction is the system message.
        instruction: of single requests that come without a system message.

    Raises:
        DataError: the form is chat, and the tokenizer's template alone does not write the prompt of
            training.
    """
    if form == "chat":
        return _own(tokenizer, encoder)
    names = [str(tokenizer.decode([token])) for token in encoder.leading]
    lead = "".join(_output(name) for name in names)
    if conversation:
        return _CONVERSATION.format(lead=lead, **_around(form, tokenizer))
    made = _around(form, tokenizer)
    return _REQUEST.format(lead=lead, default=_quoted(instruction), why=_quoted(_ALONE), **made)


def messages_to_send(
    form: str, encoder: Encoder, example: Example, *, with_system: bool = True
) -> list[dict[str, Any]]:
    """The messages of a request, as a server with `chat_template_of` must be sent them.

    Args:
        form: a key of `PROMPTS`.
        encoder: of the run's settings.
        example: a row; its response does not matter.
        with_system: False where the template has the instruction already.
    """
    if encoder.template is not None:
        return encoder.template.asked(example)[0]
    if example.messages:
        return [{"role": role, "content": content} for role, content in example.messages]
    if not example.input:
        return [{"role": "user", "content": example.instruction}]
    system = [{"role": "system", "content": example.instruction}] if with_system else []
    return [*system, {"role": "user", "content": example.input}]


def wrong_prompt(
    tokenizer: Tokenizer,
    encoder: Encoder,
    template: str,
    example: Example,
    messages: list[dict[str, Any]],
) -> str:
    """How a template's prompt differs from that of training, "" where every token is the same.

    Args:
        tokenizer: that of the base.
        encoder: of the run's settings.
        template: in Jinja.
        example: a row; its response does not matter.
        messages: the same request as messages.
    """
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True}
    if example.tools:
        options["tools"] = json.loads(example.tools)
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    found = list(tokenizer([text], add_special_tokens=False)["input_ids"][0])
    wanted = list(encoder.prompt(example))
    if found == wanted:
        return ""
    place = next(
        (i for i, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other),
        min(len(found), len(wanted)),
    )
    return (
        f"the chat template's prompt has {len(found)} tokens and that of training {len(wanted)}; "
        f"they differ from token {place + 1} on ({_shown(tokenizer, found[place:])} for "
        f"{_shown(tokenizer, wanted[place:])})"
    )


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return repr(str(tokenizer.decode(ids[:4]))) if ids else "nothing"


def _own(tokenizer: Tokenizer, encoder: Encoder) -> str:
    """The tokenizer's template, where it writes the prompt by itself."""
    own, chat = tokenizer.chat_template, encoder.template
    assert chat is not None, "the form is chat"
    if isinstance(own, Mapping):
        own = own.get("default", "")
    if not chat.opens_answers:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} writes something else under "
            "add_generation_prompt than in front of an answer, so a server that renders it would "
            "not ask as in training; send the prompt as text, as the adapter's README.md has it"
        )
    if "strftime_now" in str(own):
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} asks for the time, which a server "
            "would answer with its own; send the prompt as text, as the adapter's README.md has it"
        )
    return str(own)


def _around(form: str, tokenizer: Tokenizer) -> dict[str, str]:
    """The fixed texts of a form around its fields, as Jinja's strings."""
    write: Callable[[Example], str] = lambda example: PROMPTS[form](example, tokenizer)  # noqa: E731
    head, rest = write(Example(_FIRST, _SECOND, "")).split(_FIRST)
    middle, tail = rest.split(_SECOND)
    before, after = write(Example(_FIRST, "", "")).split(_FIRST)
    parts = {"head": head, "middle": middle, "tail": tail, "before": before, "after": after}
    found = {name: _quoted(text) for name, text in parts.items()}
    if form == "plain":  # a conversation is a transcript, whose last block is the assistant's
        talk = write(Example("", "", "", messages=(("user", _FIRST),)))
        return found | {"compose": _TRANSCRIPT.format(tail=_quoted(talk.split(_FIRST)[1]))}
    return found | {"compose": _LAST_USER.format(**found)}


def _output(text: str) -> str:
    return "{{- " + _quoted(text) + " -}}"


def _quoted(text: str) -> str:
    """A string of Jinja's."""
    return json.dumps(text, ensure_ascii=False)


_REQUEST = """\
{{%- set first = 1 if messages and messages[0]['role'] == 'system' else 0 -%}}
{{%- set turns = messages[first:] -%}}
{{%- set answered = turns | length == 2 and turns[1]['role'] == 'assistant' -%}}
{{%- if not turns or turns[0]['role'] != 'user' or (turns | length > 1 and not answered) -%}}
{{{{- raise_exception({why}) -}}}}
{{%- endif -%}}
{{%- set instruction = messages[0]['content'] if first else {default} -%}}
{{%- set material = turns[0]['content'] -%}}
{lead}
{{%- if instruction and material -%}}
{{{{- {head} + instruction + {middle} + material + {tail} -}}}}
{{%- else -%}}
{{{{- {before} + (instruction or material) + {after} -}}}}
{{%- endif -%}}
{{%- if answered -%}}{{{{- turns[1]['content'] + eos_token -}}}}{{%- endif -%}}
"""

_CONVERSATION = """\
{{%- if not messages -%}}{{{{- raise_exception('there is no message') -}}}}{{%- endif -%}}
{{%- set answered = messages[-1]['role'] == 'assistant' and not add_generation_prompt -%}}
{{%- set turns = messages[:-1] if answered else messages -%}}
{{%- set found = namespace(chosen=(turns | length) - 1, text='', any=false) -%}}
{lead}
{compose}
{{%- if answered -%}}{{{{- messages[-1]['content'] + eos_token -}}}}{{%- endif -%}}
"""

_BLOCK = """\
{%- set found.text = found.text + ('\\n\\n' if found.any else '') -%}
{%- set found.text = found.text + (turn['role'] | capitalize) + ': ' + turn['content'] -%}
{%- set found.any = true -%}"""

_TRANSCRIPT = (
    "{{%- for turn in turns -%}}\n"
    + _BLOCK.replace("{", "{{").replace("}", "}}")
    + "\n{{%- endfor -%}}\n{{{{- found.text + {tail} -}}}}"
)

_LAST_USER = (
    "{{%- for turn in turns -%}}\n"
    "{{%- if turn['role'] == 'user' -%}}{{%- set found.chosen = loop.index0 -%}}{{%- endif -%}}\n"
    "{{%- endfor -%}}\n{{%- for turn in turns -%}}\n"
    "{{%- if loop.index0 != found.chosen -%}}\n"
    + _BLOCK.replace("{", "{{").replace("}", "}}")
    + "\n{{%- endif -%}}\n{{%- endfor -%}}\n"
    "{{%- set asked = turns[found.chosen]['content'] -%}}\n"
    "{{%- if found.text -%}}\n"
    "{{{{- {head} + asked + {middle} + found.text + {tail} -}}}}\n"
    "{{%- else -%}}\n{{{{- {before} + asked + {after} -}}}}\n{{%- endif -%}}"
)
