"""Prompt and response of a chat row are what the tokenizer's template makes of the conversation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.templates import TEMPLATES, byte_tokenizer
from fedmira.data import EncodedExample, Encoder, Example
from fedmira.data.answers import answer_text, turn_ends
from fedmira.data.problems import Problems
from fedmira.data.rendering import ChatTemplate, uses_clock
from fedmira.data.rows import example_of
from fedmira.errors import DataError

CONVERSATION = [
    {"role": "user", "content": "what is it ?"},
    {"role": "assistant", "content": "the desk"},
    {"role": "user", "content": " billing or travel"},
    {"role": "assistant", "content": "travel, then loans"},
]


def row_of(messages: list[dict[str, Any]], **more: Any) -> Example:
    problems = Problems()
    row = example_of({"messages": messages, **more}, "rows.jsonl:1", problems)
    problems.raise_if_any()
    assert row is not None
    return row


def encode(tokenizer: Any, *rows: Example, **more: Any) -> tuple[EncodedExample, ...]:
    problems = Problems()
    found, *_ = Encoder(tokenizer, "chat", 4096, **more).encode(rows, problems)
    problems.raise_if_any()
    return found


def own_ids(tokenizer: Any, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    """What transformers makes of a conversation."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **more))


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"marked"}))
def test_prompt_and_response_of_every_turn_are_the_templates_own_tokens(name: str) -> None:
    template, end = TEMPLATES[name]
    tokenizer = byte_tokenizer(template)
    rows = encode(tokenizer, row_of(CONVERSATION))
    assert [[*row.prompt, *row.response] for row in rows] == [
        own_ids(tokenizer, CONVERSATION[:2]),
        own_ids(tokenizer, CONVERSATION),
    ]
    for row, answer in zip(rows, ("the desk", "travel, then loans"), strict=True):
        text = tokenizer.decode(list(row.response))
        assert answer in text and answer not in tokenizer.decode(list(row.prompt))[-20:]
        assert text.partition(answer)[2].startswith(end)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_generation_is_asked_with_the_prompt_of_training(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name][0])
    encoder = Encoder(tokenizer, "chat", 4096)
    (*_, trained) = encode(tokenizer, row_of(CONVERSATION))
    assert encoder.prompt(row_of(CONVERSATION)) == trained.prompt
    assert encode(tokenizer, Example("q", "", "a"))[0].prompt == encoder.prompt(
        Example("q", "", "")
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi", "zephyr", "qwen thinking"])
def test_a_prompt_is_what_the_template_opens_where_it_opens_answers(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name][0])
    asked = own_ids(tokenizer, CONVERSATION[:3], add_generation_prompt=True)
    found = encode(tokenizer, row_of(CONVERSATION))[-1].prompt
    assert tuple(asked[: len(found)]) == found
    # Line ends at the end of a prompt are other tokens before a word than at the end of a text.
    assert not tokenizer.decode(asked[len(found) :]).strip("\n")


def test_marks_of_the_template_say_what_is_learned() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["marked"][0])
    found = tokenizer.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = found["input_ids"], found["assistant_masks"]
    learned = [token for row in encode(tokenizer, row_of(CONVERSATION)) for token in row.response]
    assert learned == [token for token, marked in zip(ids, mask, strict=True) if marked]


def test_no_answer_stands_behind_an_open_thought_that_the_template_did_not_write() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["deepseek"][0])
    (row,) = encode(tokenizer, Example("what is it ?", "", "the desk"))
    assert "<think>" not in tokenizer.decode(list(row.prompt))
    assert tokenizer.decode(list(row.response)) == "the desk</s>"


def test_thoughts_that_a_template_leaves_out_are_said() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["deepseek"][0])
    problems = Problems()
    (turn,) = Encoder(tokenizer, "chat", 4096).turns(
        [Example("what", "", "<think>hm</think>the desk")], problems
    )
    assert any("leaves out thoughts" in note for note in turn.notes)
    assert turn.reference == "the desk"


def test_only_the_last_turn_is_learned_where_that_is_asked_for() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["chatml"][0])
    rows = encode(tokenizer, row_of(CONVERSATION), train_on="last")
    assert [[*row.prompt, *row.response] for row in rows] == [own_ids(tokenizer, CONVERSATION)]


def test_a_turn_of_weight_zero_is_not_learned() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["chatml"][0])
    messages = [dict(message) for message in CONVERSATION]
    messages[1]["weight"] = 0
    assert len(encode(tokenizer, row_of(messages))) == 1
    messages[1]["weight"], messages[3]["weight"] = 1, 0
    (row,) = encode(tokenizer, row_of(messages))
    assert [*row.prompt, *row.response] == own_ids(tokenizer, CONVERSATION[:2])


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_refused_system_message_stands_in_front_of_the_first_user_message(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name][0])
    system = {"role": "system", "content": "Be brief."}
    row = row_of([system, *CONVERSATION])
    merged = [{"role": "user", "content": "Be brief.\n\nwhat is it ?"}, *CONVERSATION[1:]]
    found = encode(tokenizer, row)[-1]
    assert [*found.prompt, *found.response] == own_ids(tokenizer, merged)
    (*_, turn) = Encoder(tokenizer, "chat", 4096).turns([row], Problems())
    assert any("system message" in note for note in turn.notes)
    for way in ("template", "error"):
        with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template"):
            encode(tokenizer, row, system=way)


def test_a_dropped_system_message_is_merged_or_said() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages if m.role != 'system' %}" + TEMPLATES["chatml"][0].partition("%}")[2]
    )
    row = row_of([{"role": "system", "content": "Be brief."}, *CONVERSATION[:2]])
    assert "Be brief." in tokenizer.decode(list(encode(tokenizer, row)[0].prompt))
    (turn,) = Encoder(tokenizer, "chat", 4096, system="template").turns([row], Problems())
    assert any("leaves out" in note for note in turn.notes)
    with pytest.raises(DataError, match=r"data.system = 'error'"):
        encode(tokenizer, row, system="error")


def test_a_leading_answer_that_the_template_refuses_is_merged() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["gemma"][0])
    row = row_of([{"role": "assistant", "content": "hello"}, *CONVERSATION[:2]])
    merged = [{"role": "user", "content": "hello\n\nwhat is it ?"}, CONVERSATION[1]]
    (found,) = encode(tokenizer, row)
    assert [*found.prompt, *found.response] == own_ids(tokenizer, merged)


def test_a_text_that_the_template_leaves_out_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content[:8] }}</s>{% endfor %}"
    tokenizer = byte_tokenizer(template)
    with pytest.raises(DataError, match="leaves out or changes the text of a user message"):
        encode(tokenizer, Example("much longer than that", "", "short"))


def test_tools_and_calls_reach_the_template_or_are_named() -> None:
    heard = (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>"
        "{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"q": 1}}}
    messages: list[dict[str, Any]] = [
        CONVERSATION[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "cards"},
        {"role": "assistant", "content": "the desk"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    tokenizer = byte_tokenizer(heard)
    first, last = encode(tokenizer, row_of(messages, tools=tools))
    assert [*first.prompt, *first.response] == own_ids(tokenizer, messages[:2], tools=tools)
    assert [*last.prompt, *last.response] == own_ids(tokenizer, messages, tools=tools)
    with pytest.raises(DataError, match=r"leaves out tools or tool_calls of this row \('look'"):
        encode(byte_tokenizer(TEMPLATES["chatml"][0]), row_of(messages, tools=tools))


LOOK = {"type": "function", "function": {"name": "look", "arguments": {"q": "it"}}}
LOOKING: list[dict[str, Any]] = [
    {"role": "user", "content": "look at it"},
    {"role": "assistant", "content": "", "tool_calls": [LOOK]},
    {"role": "tool", "content": "cards"},
    {"role": "assistant", "content": "the desk"},
]
OFFERED = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
BODY = TEMPLATES["chatml"][0]


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("{% if tools %}{{ tools | tojson }}{% endif %}" + BODY, "tool_calls"),
        (
            BODY.replace("{{ m.content }}", "{{ m.content }}{{ (m.tool_calls or []) | tojson }}"),
            "tools",
        ),
    ],
    ids=["calls", "functions"],
)
def test_a_function_that_stands_elsewhere_hides_no_loss(template: str, lost: str) -> None:
    """The name of a call also stands in the list of functions, and the other way round."""
    tokenizer = byte_tokenizer(template)
    with pytest.raises(DataError, match=f"leaves out {lost} of this row"):
        encode(tokenizer, row_of(LOOKING, tools=OFFERED))


def test_a_short_message_that_stands_elsewhere_by_chance_is_missed_all_the_same() -> None:
    template = BODY.replace("for m in messages", "for m in messages if m.role != 'tool'")
    messages = [
        {"role": "user", "content": "is it 5 ?"},
        {"role": "assistant", "content": "yes 5"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "ok"},
    ]
    with pytest.raises(DataError, match="leaves out a tool message"):
        encode(byte_tokenizer(template), row_of(messages))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_under_a_key_of_their_own_reach_the_template_or_are_said(key: str) -> None:
    messages = [CONVERSATION[0], {"role": "assistant", "content": "the desk", key: "hm"}]
    (deaf,) = Encoder(byte_tokenizer(BODY), "chat", 4096).turns([row_of(messages)], Problems())
    assert [note for note in deaf.notes if key in note]
    heard = BODY.replace("{{ m.content }}", f"{{{{ m.{key} }}}}{{{{ m.content }}}}")
    tokenizer = byte_tokenizer(heard)
    (turn,) = Encoder(tokenizer, "chat", 4096).turns([row_of(messages)], Problems())
    assert "hmthe desk" in tokenizer.decode(list(turn.row.response))
    assert not any(key in note for note in turn.notes)


def test_a_name_that_the_template_leaves_out_is_said() -> None:
    messages = [{"role": "user", "content": "what", "name": "anna"}, CONVERSATION[1]]
    (turn,) = Encoder(byte_tokenizer(BODY), "chat", 4096).turns([row_of(messages)], Problems())
    assert turn.notes == ("rows of which the chat template leaves out the name of a user",)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("given_as_text", [False, True])
def test_arguments_of_calls_are_given_in_the_form_that_the_template_writes_as_json(
    as_text: bool, given_as_text: bool
) -> None:
    said = "'' ~ c.function.arguments" if as_text else "c.function.arguments | tojson"
    calls = "{% for c in m.tool_calls %}CALL{{ c.function.name }}{{ " + said + " }}{% endfor %}"
    tokenizer = byte_tokenizer(
        "{{ tools | tojson }}" + BODY.replace("{{ m.content }}", "{{ m.content }}" + calls)
    )
    arguments = '{"q": "it"}' if given_as_text else {"q": "it"}
    function = {**LOOK["function"], "arguments": arguments}  # type: ignore[dict-item]
    messages = [LOOKING[0], {**LOOKING[1], "tool_calls": [{**LOOK, "function": function}]}]
    (row,) = encode(tokenizer, row_of(messages, tools=OFFERED))
    assert tokenizer.decode(list(row.response)) == 'CALLlook{"q": "it"}<|im_end|>\n'


def test_a_content_of_null_is_an_empty_text_where_the_template_needs_one() -> None:
    calls = "{{ m.content + '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    tokenizer = byte_tokenizer("{{ tools | tojson }}" + BODY.replace("{{ m.content }}", calls))
    messages = [LOOKING[0], {**LOOKING[1], "content": None}]
    (row,) = encode(tokenizer, row_of(messages, tools=OFFERED))
    assert [*row.prompt, *row.response] == own_ids(tokenizer, LOOKING[:2], tools=OFFERED)


def test_a_system_message_that_stands_only_before_an_open_answer_is_merged() -> None:
    """As Mistral's later templates do, which write it where the user speaks last."""
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
        "{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = byte_tokenizer(template)
    row = row_of([{"role": "system", "content": "Be brief."}, *CONVERSATION[:2]])
    (found,) = encode(tokenizer, row)
    assert "Be brief." in tokenizer.decode(list(found.prompt))
    for system in ("merge", "template"):
        encoder = Encoder(tokenizer, "chat", 4096, system=system)
        (turn,) = encoder.turns([row], Problems())
        assert encoder.prompt(row) == turn.row.prompt
        chat = encoder.template
        assert chat is not None and chat.prompt(row) == tokenizer.decode(list(turn.row.prompt))


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_system_message_is_nothing_to_a_template_that_knows_none(blank: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["gemma"][0])
    (found,) = encode(tokenizer, row_of([{"role": "system", "content": blank}, *CONVERSATION[:2]]))
    assert [*found.prompt, *found.response] == own_ids(tokenizer, CONVERSATION[:2])


def test_what_is_learned_behind_the_end_of_a_turn_is_said() -> None:
    template = BODY.partition("{% if add_generation_prompt %}")[0] + "<|im_start|>assistant\n"
    (turn,) = Encoder(byte_tokenizer(template), "chat", 4096).turns(
        [row_of(CONVERSATION[:2])], Problems()
    )
    assert any("'<|im_start|>assistant' there" in note for note in turn.notes)


def test_a_token_that_stands_before_every_answer_does_not_end_it() -> None:
    template = BODY.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}<|end|>said: {% endif %}{{ m.content }}<|end|>",
    )
    tokenizer = byte_tokenizer(template)
    assert turn_ends(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    (turn,) = Encoder(tokenizer, "chat", 4096).turns([row_of(CONVERSATION[:2])], Problems())
    assert "the desk" in turn.reference


def test_an_answer_that_joins_the_end_of_the_prompt_is_said(words: Any) -> None:
    words.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }}</s>{% endfor %}"
    encoder = Encoder(byte_tokenizer(BODY), "chat", 4096)
    plain, blank = encoder.turns(
        [Example("what", "", "the desk"), Example("what", "", "\n\nthe desk")], Problems()
    )
    assert plain.notes == ()
    joined = len(plain.row.prompt) != len(blank.row.prompt)
    assert joined == any("joins the end of the prompt" in note for note in blank.notes)


def test_an_answer_with_thoughts_may_begin_where_the_template_opens_them() -> None:
    """Answers without thoughts are opened by an empty one, and the others by an open one."""
    template = BODY.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and '</think>' not in m.content %}<think></think>{% endif %}"
        "{{ m.content }}",
    ).replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer = byte_tokenizer(template)
    messages = [CONVERSATION[0], {"role": "assistant", "content": "<think>hm</think>the desk"}]
    (row,) = encode(tokenizer, row_of(messages))
    assert [*row.prompt, *row.response] == own_ids(tokenizer, messages)
    assert tokenizer.decode(list(row.prompt)).endswith("assistant\n<think>")
    assert tokenizer.decode(list(row.response)).startswith("hm</think>the desk")


def test_marks_with_holes_and_marks_beside_the_answer_are_mended() -> None:
    whole = TEMPLATES["marked"][0]
    tokenizer = byte_tokenizer(whole)
    (turn,) = Encoder(tokenizer, "chat", 4096).turns([Example("hi", "", "ok 😀")], Problems())
    assert tokenizer.decode(list(turn.row.response)).startswith("ok 😀")
    beside = BODY.replace(
        "{{ m.content }}<|im_end|>",
        "{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}",
    )
    tokenizer = byte_tokenizer(beside)
    (turn,) = Encoder(tokenizer, "chat", 4096).turns([Example("hi", "", "the desk")], Problems())
    assert tokenizer.decode(list(turn.row.response)).startswith("the desk<|im_end|>")
    assert any("outside of what the chat template marks" in note for note in turn.notes)


def test_any_error_of_a_template_is_one_line() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content + m.get('name') }}{% endfor %}")
    with pytest.raises(DataError, match=r"the chat template of 'bytes' .*\(TypeError: "):
        Encoder(tokenizer, "chat", 64)


def test_an_end_is_added_only_where_the_template_writes_none() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    (turn,) = Encoder(tokenizer, "chat", 64).turns([Example("what", "", "the desk")], Problems())
    whole = [*turn.row.prompt, *turn.row.response]
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the desk"}]
    assert whole == [*own_ids(tokenizer, messages), tokenizer.eos_token_id]
    assert any("end-of-sequence" in note for note in turn.notes)


def test_the_time_is_that_of_the_run() -> None:
    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + TEMPLATES["chatml"][0]
    tokenizer = byte_tokenizer(template)
    assert uses_clock(tokenizer) and not uses_clock(byte_tokenizer(TEMPLATES["chatml"][0]))
    row = Example("what", "", "the desk")
    (found,) = encode(tokenizer, row, clock="2026-05-01T12:00:30")
    assert tokenizer.decode(list(found.prompt)).startswith("01 May 2026 12:00:30\n")
    assert encode(tokenizer, row) == encode(tokenizer, row)


def test_turns_end_with_the_first_special_token_behind_an_answer() -> None:
    for template, end in TEMPLATES.values():
        tokenizer = byte_tokenizer(template)
        assert turn_ends(tokenizer) == {tokenizer.convert_tokens_to_ids(end)}
    assert turn_ends(byte_tokenizer()) == frozenset()


def test_an_answer_may_be_a_special_token_and_ends_at_the_first_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("<POS></s> more", add_special_tokens=False)["input_ids"]
    padding = tokenizer.pad_token_id
    assert answer_text(tokenizer, [padding, *ids], {tokenizer.eos_token_id}) == "<POS>"


def test_an_empty_thought_in_front_of_an_answer_is_no_part_of_it() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["qwen thinking"][0])
    (turn,) = Encoder(tokenizer, "chat", 4096).turns([Example("what", "", "travel")], Problems())
    assert tokenizer.decode(list(turn.row.response)).startswith("<think>")
    assert (turn.reference, turn.notes) == ("travel", ())


blanks = st.sampled_from(["", " ", "\n", "\n\n", "  "])
headers = st.sampled_from(["<|im_start|>{role}\n", "{role}: ", "<|{role}|>", "[{role}]", ""])
ends = st.sampled_from(["<|im_end|>\n", "</s>", "<|end|>", "\n", "<|eot_id|>", " </s>\n\n", ""])
openings = st.sampled_from(["own", "own", "none", "<think>\n", "<think>\n\n</think>\n\n", " "])
systems = st.sampled_from(["written", "dropped", "refused"])
contents = st.text("ab \ncd?", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@st.composite
def templates(draw: st.DrawFn) -> str:
    """A template of a header, a text and an end for each message, and one of many openings."""
    header, end, opening = draw(headers), draw(ends), draw(openings)
    before, trims, system = draw(blanks), draw(st.booleans()), draw(systems)
    thought = draw(st.sampled_from(["", "<think>\n\n</think>\n\n"]))
    written = "{{ m.content | trim }}" if trims else "{{ m.content }}"
    refusal = "{{ raise_exception('no system role') }}"
    kept = {"written": written, "dropped": "", "refused": refusal}[system]
    own = header.format(role="assistant") + before
    opens = {"own": own, "none": "", " ": own.rstrip()}.get(opening, own + opening)
    return (
        draw(st.sampled_from(["", "{{ bos_token }}"]))
        + "{% for m in messages %}{% if m.role == 'system' %}"
        + kept
        + "{% elif m.role == 'assistant' %}"
        + "{% raw %}"
        + own
        + thought
        + "{% endraw %}"
        + written
        + "{% raw %}"
        + end
        + "{% endraw %}"
        + "{% else %}{% raw %}"
        + header.format(role="user")
        + "{% endraw %}"
        + written
        + "{% raw %}"
        + end
        + "{% endraw %}"
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{% raw %}"
        + opens
        + "{% endraw %}{% endif %}"
    )


@settings(max_examples=300)
@given(
    templates(),
    st.lists(contents, min_size=2, max_size=4).filter(lambda c: len(c) % 2 == 0),
    st.booleans(),
)
def test_any_template_is_rendered_token_for_token_or_refused(
    template: str, texts: list[str], system: bool
) -> None:
    tokenizer = byte_tokenizer(template)
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(texts)
    ]
    row = row_of([*([{"role": "system", "content": "Ww"}] if system else []), *messages])
    try:
        turns = Encoder(tokenizer, "chat", 4096).turns([row], problems := Problems())
        problems.raise_if_any()
    except DataError as error:
        assert "chat template" in str(error)
        return
    assert len(turns) == len(texts) // 2
    for turn, stop in zip(turns, range(2, len(texts) + 1, 2), strict=True):
        asked = [dict(message) for message in messages[:stop]]
        if system and any("in front of" in note for note in turn.notes):
            asked[0]["content"] = "Ww\n\n" + asked[0]["content"]
        elif system:
            asked.insert(0, {"role": "system", "content": "Ww"})
        own = own_ids(tokenizer, asked)
        added = any("end-of-sequence" in note for note in turn.notes)
        assert [*turn.row.prompt, *turn.row.response] == own + [tokenizer.eos_token_id] * added
        answer = texts[stop - 1].strip()
        assert answer in tokenizer.decode(list(turn.row.response))
        if system:
            assert "Ww" in tokenizer.decode(list(turn.row.prompt))


def test_a_template_is_asked_for_the_prompt_alone_as_for_the_whole() -> None:
    tokenizer = byte_tokenizer(TEMPLATES["mistral"][0])
    chat = ChatTemplate(tokenizer)
    rendering = chat.render(Example("what", "", "the desk"))
    assert rendering.whole.startswith(rendering.prompt)
    assert chat.prompt(Example("what", "", "")) == rendering.prompt
