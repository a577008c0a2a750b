"""A tokenizer's chat template: what it makes of a conversation, and where its answer begins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from fedmira.data.examples import Example
from fedmira.data.probes import THOUGHTS, TOOLS, Probes
from fedmira.data.tokenizer import Tokenizer
from fedmira.errors import DataError

__all__ = ["ChatTemplate", "Rendering", "clock_now", "uses_clock"]

_PROBE = "Zqx"
_OTHER_PROBE = "Vjk"
_WAY_OUT = 'set data.prompt = "alpaca"'
_CALLS_WAY_OUT = "leave such rows out, or take a base whose template writes functions and calls"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TIME_CODES = "aAbBcCdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZ"
_PERCENT = "\ue000"
"""In place of an escaped percent sign, while the others are told apart."""
_CLOSED_THOUGHT = "</think>"
_STARTED = datetime.now(UTC).astimezone().replace(tzinfo=None).isoformat(timespec="seconds")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation with its last answer, as text.

    Attributes:
        prompt: what stands before the answer; `whole` begins with it.
        whole: everything that the template writes.
        notes: what the template did to the conversation, in words that are equal for equal things.
    """

    prompt: str
    whole: str
    notes: tuple[str, ...] = ()


def clock_now() -> str:
    """The local time at which this process began, to the second, as ISO 8601 writes it."""
    return _STARTED


def uses_clock(tokenizer: Tokenizer) -> bool:
    """Whether the chat template asks what time it is."""
    return "strftime_now" in str(tokenizer.chat_template)


class ChatTemplate:
    """Renders conversations as the tokenizer's chat template does, at one fixed time.

    Args:
        tokenizer: with a chat template.
        system: what to do with a system message, or an assistant message before the first
            user's, that the template refuses or leaves out: "merge" puts it in front of the
            first user message, "error" refuses the row, "template" lets the template decide.
        clock: the time that the template is told, ISO 8601; "" is `clock_now()`.

    Raises:
        DataError: there is no template, or it cannot render a question and an answer.
    """

    def __init__(self, tokenizer: Tokenizer, system: str = "merge", clock: str = "") -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"prompt 'chat': tokenizer {tokenizer.name_or_path!r} has no chat template; "
                f"{_WAY_OUT}"
            )
        self._tokenizer = tokenizer
        self._system = system
        self._time = datetime.fromisoformat(clock or clock_now())
        self._template = self._timed(tokenizer.chat_template)
        self._regular = False
        question, answer = Example(_OTHER_PROBE, "", ""), _said(_PROBE)
        self._probes = Probes(
            lambda messages, tools: self._text(messages, tools, question)  # the row names no place
        )
        probe = self._conversation(question, frozenset())
        whole = self._text([*probe, answer], None, question)
        cut = self._cut(probe, whole, None, question)
        self._opening, _, self._tail = whole[len(cut) :].rpartition(_PROBE)
        self._regular = cut == self._opened(probe, None, question)

    @property
    def opens_answers(self) -> bool:
        """Whether a prompt is what the template writes under `add_generation_prompt`."""
        return self._regular

    @property
    def masked(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return _GENERATION.search(str(self._tokenizer.chat_template)) is not None and bool(
            getattr(self._tokenizer, "is_fast", False)
        )

    @cached_property
    def turn_end(self) -> int | None:
        """The first special or added token behind an answer; None where there is none.

        One that stands before the answer, too, ends something else, unless it is the only one.
        """
        special = set(getattr(self._tokenizer, "all_special_ids", ())) | set(
            getattr(self._tokenizer, "added_tokens_decoder", ())
        )
        opening, tail = self._tokenizer([self._opening, self._tail], add_special_tokens=False)[
            "input_ids"
        ]
        ends = [token for token in tail if token in special]
        return next((token for token in ends if token not in opening), ends[0] if ends else None)

    @cached_property
    def behind(self) -> str:
        """What the template writes behind the end of an answer's turn, but for blanks and eos."""
        if self.turn_end is None:
            return ""
        tail = self._tokenizer([self._tail], add_special_tokens=False)["input_ids"][0]
        rest = [
            token
            for token in tail[list(tail).index(self.turn_end) + 1 :]
            if token not in (self.turn_end, self._tokenizer.eos_token_id)
        ]
        return str(self._tokenizer.decode(rest)).strip()

    def render(self, example: Example) -> Rendering:
        """The conversation of a row with its response.

        Raises:
            DataError: the template refuses it, leaves out or changes a text of it, or writes
                something before the answer that depends on the answer.
        """
        tools = json.loads(example.tools) if example.tools else None
        moved, notes = self._moved(example)
        conversation = self._conversation(example, moved)
        answer = self._answer(example)
        whole = self._text([*conversation, answer], tools, example)
        notes += self._said_otherwise(example, whole)
        notes += self._left_out(example, [*conversation, answer], tools)
        if _calls(_extras(example)) != _calls([*conversation, answer]):
            notes.append(
                "rows whose calls of functions are given to the chat template as it writes them: "
                "their arguments as an object or as a text"
            )
        if self.behind:
            notes.append(
                "answers are followed by more than the end of their turn, which is learned with "
                f"them: the chat template writes {self.behind[:40]!r} there"
            )
        return Rendering(self._cut(conversation, whole, tools, example), whole, tuple(notes))

    def prompt(self, example: Example) -> str:
        """What stands before the answer of a row, whatever the answer is.

        Raises:
            DataError: as `render`.
        """
        tools = json.loads(example.tools) if example.tools else None
        moved, _ = self._moved(example)
        conversation = self._conversation(example, moved)
        whole = self._text([*conversation, _said(_PROBE)], tools, example)
        return self._cut(conversation, whole, tools, example)

    def asked(self, example: Example) -> tuple[list[Message], list[Any] | None]:
        """The messages before the answer as the template is given them, and the functions.

        Args:
            example: a row; its response does not matter.
        """
        moved, _ = self._moved(example)
        tools = json.loads(example.tools) if example.tools else None
        return self._conversation(example, moved), tools

    def marked(self, example: Example) -> tuple[list[int], list[int]]:
        """All token ids of a row with its response, and a 1 for each that the assistant writes.

        Only of templates that mark it (`masked`).
        """
        moved, _ = self._moved(example)
        conversation = [*self._conversation(example, moved), self._answer(example)]
        found = self._call(
            conversation,
            example,
            tools=json.loads(example.tools) if example.tools else None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(found["input_ids"]), list(found["assistant_masks"])

    def _timed(self, template: Any) -> Any:
        """The template with a `strftime_now` of its own, which tells the time of the run.

        However it is called, this one is found before that of transformers, which reads the clock.
        """
        if isinstance(template, Mapping):
            return {name: self._timed(text) for name, text in template.items()}
        if "strftime_now" not in template:
            return template
        told = "".join(
            f" | replace({json.dumps(code)}, {json.dumps(self._time.strftime(code))})"
            for letter in _TIME_CODES
            for code in (f"%{letter}", f"%-{letter}")
        )
        percent = json.dumps(_PERCENT)
        form = f"form | replace('%%', {percent}){told} | replace({percent}, '%')"
        # An expression behind the macro, so that a line end at the template's start stays.
        return "{% macro strftime_now(form) %}{{ " + form + " }}{% endmacro %}{{ '' }}" + template

    def _call(self, conversation: Sequence[Message], example: Example, **more: Any) -> Any:
        # jinja2 comes with every tokenizer that has a chat template; without one there is nothing
        # to render and no need for it.
        from jinja2 import TemplateError

        # A template is a small program: what it runs into are Python's own errors.
        errors = (
            TemplateError,
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            MemoryError,
            RuntimeError,
            TypeError,
            ValueError,
        )
        try:
            return self._tokenizer.apply_chat_template(
                list(conversation), chat_template=self._chosen(more.get("tools")), **more
            )
        except errors as error:
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise self._refusal(example, f"refuses this row ({kind}{error})") from error

    def _chosen(self, tools: object) -> Any:
        """One template of several: with tools the one named so, as transformers takes it."""
        if not isinstance(self._template, Mapping):
            return self._template
        name = "tool_use" if tools and "tool_use" in self._template else "default"
        if name not in self._template:
            raise DataError(
                f"tokenizer {self._tokenizer.name_or_path!r} has chat templates "
                f"{', '.join(sorted(self._template))} and none called 'default'; {_WAY_OUT}"
            )
        return self._template[name]

    def _text(
        self, conversation: Sequence[Message], tools: Any, example: Example, *, opens: bool = False
    ) -> str:
        return str(
            self._call(
                conversation, example, tools=tools, tokenize=False, add_generation_prompt=opens
            )
        )

    def _opened(self, conversation: Sequence[Message], tools: Any, example: Example) -> str:
        return self._text(conversation, tools, example, opens=True)

    def _cut(
        self, conversation: Sequence[Message], whole: str, tools: Any, example: Example
    ) -> str:
        """What stands before the answer in `whole`, and stands there whatever the answer is."""
        opened = self._opened(conversation, tools, example)
        if self._regular and whole.startswith(opened):
            return opened
        befores = []
        for probe in (_PROBE, _OTHER_PROBE):
            probed = self._text([*conversation, _said(probe)], tools, example)
            befores.append(probed[: probed.rfind(probe)] if probe in probed else None)
        before = befores[0]
        if before is None or before != befores[1]:
            raise self._refusal(example, "does not write an answer as it stands")
        # A template that ignores add_generation_prompt opens with nothing; then what it writes
        # before an answer belongs to the prompt, unless it is blank and joins the first word.
        opens = opened != self._text(conversation, tools, example) or not (
            before[len(opened) :].strip()
        )
        cut = opened if before.startswith(opened) and opens else before
        if opens and not whole.startswith(cut) and whole.startswith(opened):
            return opened  # an answer with thoughts, where others are opened by an empty one
        if not whole.startswith(cut):
            raise self._refusal(
                example,
                "writes something else before this answer than before another, so no prompt "
                "would lead to what is trained,",
            )
        return cut

    def _conversation(self, example: Example, moved: frozenset[int]) -> list[Message]:
        """The messages before the answer; those at `moved` in front of the first user message."""
        request = "\n\n".join(part for part in (example.instruction, example.input) if part)
        messages = example.messages or (("user", request),)
        merged = [text for position in sorted(moved) if (text := messages[position][1]).strip()]
        conversation: list[Message] = []
        for position, (role, content) in enumerate(messages):
            if position in moved:
                continue
            if role == "user" and merged:
                content, merged = "\n\n".join([*merged, content]), []
            conversation.append(self._message(role, content, example.extras, position))
        return conversation

    def _answer(self, example: Example) -> Message:
        return self._message("assistant", example.output, example.extras, len(example.messages))

    def _message(self, role: str, content: str, extras: Sequence[str], position: int) -> Message:
        """A message as the template is given it, calls of functions in the form that it takes."""
        more = json.loads(extras[position]) if extras and extras[position] else {}
        message = {"role": role, "content": content, **more}
        return self._probes.calls.formed(message) if "tool_calls" in more else message

    def _moved(self, example: Example) -> tuple[frozenset[int], list[str]]:
        """Messages before the first user's that are merged into it, and what to say of it."""
        first = next((i for i, (role, _) in enumerate(example.messages) if role == "user"), 0)
        leading = [
            i
            for i, (role, _) in enumerate(example.messages[:first])
            if role in ("system", "developer", "assistant")
        ]
        if not leading:
            return frozenset(), []
        lost = frozenset(i for i in leading if self._loses(example.messages[i][0]))
        said = [i for i in sorted(lost) if example.messages[i][1].strip()]
        if not said:
            return lost, []  # blank messages, which are nothing to a template that knows no such
        roles = " and ".join(dict.fromkeys(example.messages[i][0] for i in said))
        if self._system == "error":
            raise self._refusal(
                example,
                f"refuses or leaves out a leading {roles} message (data.system = 'error')",
                "set data.system = 'merge' to put it in front of the first user message",
            )
        if self._system == "merge":
            return lost, [
                f"rows whose {roles} message the chat template does not take stands in front of "
                "the first user message (data.system = 'merge')"
            ]
        return frozenset(), []

    def _loses(self, role: str) -> bool:
        """Whether the template refuses or leaves out a message of this role before the user's."""
        if role not in self._losses:
            question = Example(_OTHER_PROBE, "", "")
            probe = [{"role": role, "content": _PROBE}, {"role": "user", "content": _OTHER_PROBE}]
            try:  # some write it only where the last message is the user's
                texts = [
                    self._opened(probe, None, question),
                    self._text([*probe, _said(_OTHER_PROBE)], None, question),
                ]
                lost = any(_PROBE not in text for text in texts)
            except DataError:
                lost = True
            self._losses[role] = lost
        return self._losses[role]

    @cached_property
    def _losses(self) -> dict[str, bool]:
        return {}

    def _said_otherwise(self, example: Example, whole: str) -> list[str]:
        """What the template left out, where that is said and not refused.

        Raises:
            DataError: the text of a message, a called function or a tool does not stand in
                `whole`.
        """
        request = [("user", part) for part in (example.instruction, example.input) if part]
        notes = []
        for role, content in [*(example.messages or request), ("assistant", example.output)]:
            if _stands(content, whole):
                continue
            answered = content.rpartition(_CLOSED_THOUGHT)[2]
            if _CLOSED_THOUGHT in content and _stands(answered, whole):
                notes.append("rows of which the chat template leaves out thoughts (<think>)")
            elif role in ("system", "developer") and self._system == "template":
                notes.append(
                    f"rows whose {role} message the chat template leaves out "
                    "(data.system = 'template')"
                )
            else:
                raise self._refusal(
                    example, f"leaves out or changes the text of a {role} message of this row"
                )
        for name in _called(example):
            if not _stands(name, whole):
                raise self._refusal(
                    example,
                    f"leaves out tools or tool_calls of this row ({name!r} is not there)",
                    _CALLS_WAY_OUT,
                )
        return notes

    def _left_out(self, example: Example, conversation: Sequence[Message], tools: Any) -> list[str]:
        """What the template leaves out of any conversation of this shape.

        Raises:
            DataError: the text of a message, tools or calls of them are left out.
        """
        notes = []
        for position, key in sorted(self._probes.lost(conversation, tools)):
            if (position, key) == TOOLS or key == "tool_calls":
                raise self._refusal(example, f"leaves out {key} of this row", _CALLS_WAY_OUT)
            role = conversation[position]["role"]
            if key in THOUGHTS:
                notes.append(f"rows of which the chat template leaves out thoughts ({key})")
            elif key == "name":
                notes.append(f"rows of which the chat template leaves out the name of a {role}")
            elif role not in ("system", "developer") or self._system != "template":
                raise self._refusal(example, f"leaves out a {role} message of this row")
        return list(dict.fromkeys(notes))

    def _refusal(self, example: Example, what: str, way_out: str = _WAY_OUT) -> DataError:
        where = f"{example.where}: " if example.where else ""
        return DataError(
            f"{where}the chat template of {self._tokenizer.name_or_path!r} {what}; {way_out}"
        )


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _stands(text: str, whole: str) -> bool:
    """Whether a text is in a rendering: as it is but for outer blanks, or as JSON writes it."""
    bare = text.strip()
    return bare in whole or any(
        json.dumps(bare, ensure_ascii=escaped)[1:-1] in whole for escaped in (True, False)
    )


def _extras(example: Example) -> list[Message]:
    """The further keys of those messages that have any."""
    return [json.loads(extra) for extra in example.extras if extra]


def _calls(messages: Sequence[Message]) -> list[Any]:
    """All calls of functions, in order."""
    return [call for message in messages for call in message.get("tool_calls") or ()]


def _called(example: Example) -> list[str]:
    """Names of the functions in tools and tool calls."""
    calls = _calls(_extras(example))
    tools = json.loads(example.tools) if example.tools else []
    found = []
    for each in [*calls, *tools]:
        function = each.get("function", each) if isinstance(each, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        found += [name] if isinstance(name, str) else []
    return found
