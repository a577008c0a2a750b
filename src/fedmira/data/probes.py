"""What a chat template does with a conversation of some shape, told by words it cannot know."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedmira.errors import DataError

__all__ = ["THOUGHTS", "TOOLS", "CallForm", "Probes"]

Message = Mapping[str, Any]
Slot = tuple[int, str]
"""A message's position and one of its keys; `TOOLS` for the functions that are offered."""

TOOLS: Slot = (-1, "tools")
THOUGHTS = ("reasoning_content", "thinking")
"""Keys of a message under which data sets keep what was thought before an answer."""
_TEXTS = ("content", "name", *THOUGHTS)
_ASKED = {"role": "user", "content": "Zqask"}


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants to be given a message that calls functions.

    Attributes:
        as_text: whether `arguments` is the text of a JSON object, as OpenAI has it, and not the
            object itself.
        empty: whether a content of null has to be an empty text.
    """

    as_text: bool = False
    empty: bool = False

    def formed(self, message: Message) -> dict[str, Any]:
        """A message with its calls in this form.

        Args:
            message: one with `tool_calls`.
        """
        calls = [self._call(call) for call in message["tool_calls"]]
        content = message["content"]
        if content is None and self.empty:
            content = ""
        return {**message, "content": content, "tool_calls": calls}

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "arguments" not in function:
            return call
        return {**call, "function": {**function, "arguments": self._arguments(function)}}

    def _arguments(self, function: Mapping[str, Any]) -> Any:
        given = function["arguments"]
        if isinstance(given, str):
            try:
                read = json.loads(given)
            except (ValueError, RecursionError):
                return given
            return given if self.as_text or not isinstance(read, dict) else read
        return json.dumps(given, ensure_ascii=False) if self.as_text else given


class Probes:
    """Renders conversations of made-up words, and looks which of them are there.

    Args:
        render: writes messages and the functions that are offered (None for none) as the template
            does; raises DataError where it refuses them.
    """

    def __init__(self, render: Callable[[list[dict[str, Any]], Any], str]) -> None:
        self._render = render
        self._found: dict[str, frozenset[Slot]] = {}

    @cached_property
    def calls(self) -> CallForm:
        """The first form of calls that the template takes and writes as JSON, else the usual."""
        call = {"id": "callzq001", "type": "function"}
        asked = {"name": "zqname", "arguments": {"zqkey": "zqvalue"}}
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**call, "function": asked}],
        }
        for as_text, empty in ((False, False), (False, True), (True, False), (True, True)):
            form = CallForm(as_text, empty)
            try:
                text = self._render([_ASKED, form.formed(message)], None)
            except DataError:
                continue
            # A dict that was joined to a text reads {'key': 'value'}, and a text that was written
            # as JSON once more reads "{\"key\": ...".
            if "zqvalue" in text and "{'zqkey'" not in text and '\\"zqkey' not in text:
                return form
        return CallForm()

    def lost(self, conversation: Sequence[Message], tools: object) -> frozenset[Slot]:
        """What of a conversation of this shape the template leaves out, whatever its words are.

        Nothing where the template refuses the made-up words.

        Args:
            conversation: messages as the template is given them.
            tools: the functions that are offered, or None.
        """
        words: dict[str, Slot] = {}
        probe = [_probed(message, position, words) for position, message in enumerate(conversation)]
        offered = None
        if tools:
            function = {"name": _word(words, TOOLS), "description": "", "parameters": _PARAMETERS}
            offered = [{"type": "function", "function": function}]
        key = json.dumps([probe, offered])
        if key not in self._found:
            try:
                text = self._render(probe, offered)
            except DataError:
                words = {}
                text = ""
            self._found[key] = frozenset(slot for word, slot in words.items() if word not in text)
        return self._found[key]


_PARAMETERS = {"type": "object", "properties": {"zq": {"type": "string", "description": "zq"}}}


def _word(words: dict[str, Slot], slot: Slot) -> str:
    """A new word, which stands for a slot."""
    word = f"zq{len(words)}xk"
    words[word] = slot
    return word


def _probed(message: Message, position: int, words: dict[str, Slot]) -> dict[str, Any]:
    """A message of the same shape with words of our own."""
    made: dict[str, Any] = {"role": message["role"], "content": message.get("content")}
    for key in _TEXTS:
        value = message.get(key)
        if isinstance(value, str):
            made[key] = _word(words, (position, key)) if value.strip() else ""
    if "tool_call_id" in message:
        made["tool_call_id"] = "callzq001"
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        made["tool_calls"] = [_probed_call(call, position, words) for call in calls]
    return made


def _probed_call(call: Any, position: int, words: dict[str, Slot]) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    slot = (position, "tool_calls")
    made: dict[str, Any] = {"name": _word(words, slot)}
    if function.get("arguments"):
        arguments = {"zqkey": _word(words, slot)}
        as_text = isinstance(function["arguments"], str)
        made["arguments"] = json.dumps(arguments) if as_text else arguments
    elif "arguments" in function:
        made["arguments"] = function["arguments"]
    return {
        key: "callzq001" if key == "id" else value
        for key, value in call.items()
        if key != "function"
    } | {"function": made}
