"""A chat row is what the template renders, and adapters are asked as they were trained."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import fedmira
from data.templates import TEMPLATES
from fedmira.observers import Observer, RoundEvent, Stop
from field.inputs import (
    BED,
    Asked,
    Reads,
    base_that_says,
    byte_tokenizer,
    call,
    card_says,
    chat_ids,
    check,
    options,
    refused,
    run,
    run_json,
    watering,
    write_base,
    write_clients,
    write_random_base,
)
from small import adapter_bytes, table_of

HEAD = "<start_of_turn>{{ m.role }}\n"
FRAME = (
    "{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}"
    + HEAD
    + "{{{{ m.content }}}}<end_of_turn>\n"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{opening}{{% endif %}}"
).replace(HEAD, "<start_of_turn>{{{{ m.role }}}}\n")
SAYS = "<start_of_turn>assistant\n"


def template(answer: str, opening: str) -> str:
    """A template of what it writes for an answer, and where one is to begin."""
    return FRAME.format(answer=answer, opening=opening)


ENDS = {
    "ends turns with a token of its own": template(SAYS + "{{ m.content }}<end_of_turn>\n", SAYS),
    "ends turns with another token": template(SAYS + "{{ m.content }}<|eot_id|>", SAYS),
    "trims answers": template(SAYS + "{{ m.content | trim }}<end_of_turn>\n", SAYS),
    "marks answers": template(
        SAYS + "{% generation %}{{ m.content }}<end_of_turn>{% endgeneration %}{{ '\n' }}", SAYS
    ),
    "writes a blank before an answer": template(
        SAYS.strip() + " {{ m.content }}<end_of_turn>", SAYS.strip()
    ),
    "ignores add_generation_prompt": template(SAYS + "{{ m.content }}<end_of_turn>\n", ""),
}
"""Templates in which nothing is thought."""
THINKS = {
    "opens a thought": template(SAYS + "{{ m.content }}<end_of_turn>\n", SAYS + "<think>\n"),
    "opens an empty thought": template(
        SAYS + "{{ m.content }}<end_of_turn>\n", SAYS + "<think>\n\n</think>\n\n"
    ),
    "writes an empty thought": template(
        SAYS + "<think>\n\n</think>\n\n{{ m.content }}<end_of_turn>\n", SAYS
    ),
    "cuts thoughts off": template(
        SAYS + "{{ m.content.split('</think>')[-1] }}<end_of_turn>\n", SAYS + "<think>"
    ),
    "writes a channel": template(SAYS + "<|Assistant|>{{ m.content }}<end_of_turn>\n", SAYS),
}
"""Templates that open an answer otherwise than they write it, or write more than it."""
CLIENTS = {name: watering(name) for name in ("fern", "moss")}


def chat_base(folder: Path, chat: str) -> tuple[Path, Any]:
    """A random base with a chat template, and its tokenizer."""
    tokenizer = byte_tokenizer(chat)
    return write_random_base(folder, tokenizer), tokenizer


def turns_of(row: Mapping[str, Any], answered: bool = True) -> list[dict[str, str]]:
    """The messages of a row of an instruction."""
    said = [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}]
    return [*said, {"role": "assistant", "content": row["output"]}] if answered else said


# Kind B: a chat row is not what the template renders.


@pytest.mark.parametrize("name", [*ENDS, *THINKS])
def test_a_chat_row_is_what_the_template_renders_and_is_asked_as_it_was_trained(
    name: str, reads: Reads, asked: Asked, tmp_path: Path
) -> None:
    """Kind B."""
    base, tokenizer = chat_base(tmp_path / "base", (ENDS | THINKS)[name])
    rows = write_clients(tmp_path / "rows", CLIENTS)
    run(tmp_path / "run", base, rows, data__prompt="chat")
    found = {(*row.prompt, *row.response): row for row in reads.rows("fern")}
    prompts = {}
    for row in CLIENTS["fern"]:
        whole = chat_ids(tokenizer, turns_of(row))
        if name == "marks answers":
            whole = whole[:-1]  # the line end behind the mark is not learned
        trained = found.pop(tuple(whole))
        answer = tokenizer.decode(list(trained.response))
        assert row["output"] in answer
        assert answer.partition(row["output"])[2].startswith(
            "<|eot_id|>" if "another token" in name else "<end_of_turn>"
        )
        prompt = tokenizer.decode(list(trained.prompt))
        assert prompt.count("<think>") == prompt.count("</think>"), "no thought is open"
        prompts[row["input"]] = trained.prompt
    assert found == {}, "there are no other rows"
    for text in list(prompts)[:2]:
        ended = call("generate", tmp_path / "run", "--client", "fern", text)
        assert ended.code == 0 and asked.prompts.pop() == prompts[text]


@pytest.mark.parametrize("name", sorted(ENDS))
def test_what_a_template_marks_or_writes_behind_a_prompt_is_learned(
    name: str, reads: Reads, tmp_path: Path
) -> None:
    """Kind B."""
    base, tokenizer = chat_base(tmp_path / "base", ENDS[name])
    turns = [
        {"role": role, "content": text}
        for role, text in (
            ("user", "is it dry ?"),
            ("assistant", "a little"),
            ("user", "and now ?"),
            ("assistant", "no more"),
        )
    ]
    rows = [{"messages": [{**turns[0], "content": f"bed {n} ?"}, *turns[1:]]} for n in range(10)]
    check(base, write_clients(tmp_path / "rows", {"fern": rows}), data__prompt="chat")
    found = {(row.prompt, row.response) for row in reads.rows("fern")}
    expected = set()
    for row in rows:
        for stop in (2, 4):
            messages = row["messages"][:stop]
            whole = chat_ids(tokenizer, messages)
            if name == "marks answers":
                marked = tokenizer.apply_chat_template(
                    messages, return_dict=True, return_assistant_tokens_mask=True
                )["assistant_masks"]
                place = max(i for i in range(len(marked)) if not marked[i] and any(marked[i:])) + 1
                whole = whole[: len(marked) - marked[::-1].index(1)]
            else:
                opened = chat_ids(tokenizer, messages[:-1], add_generation_prompt=True)
                if "ignores" in name:
                    opened += tokenizer(SAYS, add_special_tokens=False)["input_ids"]
                place = len(opened)
                assert whole[:place] == opened
            expected.add((tuple(whole[:place]), tuple(whole[place:])))
    assert found == expected and len(found) == 20


@pytest.mark.parametrize("name", ["ends turns with a token of its own", "writes a channel"])
def test_a_base_that_was_tuned_with_its_template_has_nothing_left_to_learn(
    name: str, tmp_path: Path
) -> None:
    """Kind B."""
    tokenizer = byte_tokenizer((ENDS | THINKS)[name])
    rows = {name: watering(name, output="dusk") for name in ("fern", "moss")}
    turns = turns_of(rows["fern"][0])
    opened = chat_ids(tokenizer, turns[:1], add_generation_prompt=True)
    base = base_that_says(
        tmp_path / "base",
        tokenizer,
        [chat_ids(tokenizer, turns)[len(opened) - 1 :]],
        {"eos_token_id": [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]},
    )
    folder = write_clients(tmp_path / "rows", rows)
    output = tmp_path / "run"
    run(output, base, folder, data__prompt="chat", local__learning_rate=1e-6)
    for row in table_of(output, "clients"):
        assert float(row["base_loss"]) < 0.01
    ended = call("generate", output, "--client", "moss", "pot 3 of moss", "--max-new-tokens", "40")
    assert ended.out.strip().endswith("dusk")


def test_an_answer_before_which_the_template_writes_something_else_is_refused(
    tmp_path: Path,
) -> None:
    """Kind B."""
    changing = template(
        SAYS + "{{ m.content | length }} letters: {{ m.content }}<end_of_turn>\n", SAYS + "Well, "
    )
    base, _ = chat_base(tmp_path / "base", changing)
    rows = write_clients(tmp_path / "rows", CLIENTS)
    refused(call("check", *options(base, rows, data__prompt="chat")), "the chat template")


# Kind G: asking is not training.


def quiet_base(folder: Path, chat: str | None = None, **generation: Any) -> tuple[Path, Any]:
    """A base whose answers hold no special token, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer(chat)
    write_random_base(folder, tokenizer, generation=generation)
    made: Any = AutoModelForCausalLM
    model = made.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[torch.tensor(tokenizer.all_special_ids)] = 0
    return write_base(folder, model, tokenizer), tokenizer


def with_system(client: str) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "system", "content": "You tend ferns."}, *turns_of(row)]}
        for row in watering(client)
    ]


def with_system_beside(client: str) -> list[dict[str, Any]]:
    return [{"system": "You tend ferns.", **row} for row in watering(client)]


@pytest.mark.parametrize("rows", [with_system, with_system_beside])
@pytest.mark.parametrize("chat", ["chatml", "gemma", "deepseek"])
def test_the_system_message_that_all_rows_share_stands_in_front_of_a_question(
    chat: str,
    rows: Callable[[str], list[dict[str, Any]]],
    reads: Reads,
    asked: Asked,
    tmp_path: Path,
) -> None:
    """Kind G."""
    base, tokenizer = quiet_base(tmp_path / "base", TEMPLATES[chat][0])
    own = {name: rows(name) for name in ("fern", "moss")}
    folder, output = write_clients(tmp_path / "rows", own), tmp_path / "run"
    run(output, base, folder, data__prompt="chat")
    trained = {row.prompt for row in reads.rows("moss")}
    assert len(trained) == 12
    shutil.rmtree(folder)  # asking needs no rows
    for row in watering("moss")[:3]:
        request = turns_of(row)[0]["content"]
        ended = call("generate", output, "--client", "moss", request, "--max-new-tokens", "4")
        prompt = asked.prompts.pop()
        assert prompt in trained and "You tend ferns." in tokenizer.decode(list(prompt))
        trained.remove(prompt)
    assert "You tend ferns." in (output / "adapters" / "moss" / "README.md").read_text()
    if chat != "gemma":
        assert card_says(output, "moss", base, request).strip() == ended.out.strip() != ""


@pytest.mark.parametrize("chat", ["gemma", "mistral"])
def test_the_cards_code_asks_a_template_that_takes_no_system_message(
    chat: str, tmp_path: Path
) -> None:
    """Kind G."""
    base, _ = quiet_base(tmp_path / "base", TEMPLATES[chat][0])
    rows = write_clients(tmp_path / "rows", {"moss": with_system("moss")})
    output = tmp_path / "run"
    run(output, base, rows, data__prompt="chat")
    request = turns_of(watering("moss")[3])[0]["content"]
    ended = call("generate", output, "--client", "moss", request)
    assert card_says(output, "moss", base, request).strip() == ended.out.strip() != ""


def test_functions_that_all_rows_share_are_offered_with_a_question(
    reads: Reads, asked: Asked, tmp_path: Path
) -> None:
    """Kind G."""
    chat = "{% if tools %}MAY CALL {{ tools | tojson }}\n{% endif %}" + ENDS["trims answers"]
    base, tokenizer = quiet_base(tmp_path / "base", chat)
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    rows = [{"messages": turns_of(row), "tools": tools} for row in watering("fern")]
    folder, output = write_clients(tmp_path / "rows", {"fern": rows}), tmp_path / "run"
    run(output, base, folder, data__prompt="chat")
    request = turns_of(watering("fern")[3])[0]["content"]
    call("generate", output, "--client", "fern", request)
    prompt = asked.prompts.pop()
    assert prompt in {row.prompt for row in reads.rows("fern")}
    assert "MAY CALL" in tokenizer.decode(list(prompt))
    assert '"rain' in (output / "adapters" / "fern" / "README.md").read_text().replace("\\", "")


def test_the_card_offers_the_functions_that_all_rows_share(asked: Asked, tmp_path: Path) -> None:
    """Kind G."""
    chat = "{% if tools %}MAY CALL {{ tools | tojson }}\n{% endif %}" + ENDS["trims answers"]
    base, _ = quiet_base(tmp_path / "base", chat)
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    rows = [{"messages": turns_of(row), "tools": tools} for row in watering("fern")]
    folder, output = write_clients(tmp_path / "rows", {"fern": rows}), tmp_path / "run"
    run(output, base, folder, data__prompt="chat")
    request = turns_of(watering("fern")[3])[0]["content"]
    ended = call("generate", output, "--client", "fern", request)
    assert card_says(output, "fern", base, request).strip() == ended.out.strip() != ""


def test_a_system_message_that_differs_is_asked_for_by_nobody(asked: Asked, tmp_path: Path) -> None:
    """Kind G."""
    base, tokenizer = quiet_base(tmp_path / "base", TEMPLATES["chatml"][0])
    rows = [
        {"messages": [{"role": "system", "content": f"You tend bed {n}."}, *turns_of(row)]}
        for n, row in enumerate(watering("fern"))
    ]
    output = tmp_path / "run"
    run(output, base, write_clients(tmp_path / "rows", {"fern": rows}), data__prompt="chat")
    assert call("generate", output, "--client", "fern", "is it dry ?").code == 0
    assert "You tend" not in tokenizer.decode(list(asked.prompts.pop()))


SECONDS = "%d %b %Y %H:%M:%S"
CLOCKS = {
    "in the text": "{{ strftime_now('" + SECONDS + "') }}\n",
    "as Llama has it": "{% if not date is defined %}{% if strftime_now is defined %}{% set date = "
    'strftime_now("' + SECONDS + '") %}{% else %}{% set date = "26 Jul 2024" %}{% endif %}'
    "{% endif %}Today: {{ date }}\n",
    "several times": "{{- strftime_now( '%H' ) }} h {{ strftime_now('%M:%S') }}\n",
}
OTHER_CLOCKS = {
    "of a named form": "{{ strftime_now(format='%H:%M:%S') }}\n",
    "of a form in a variable": "{% set form = '%H:%M:%S' %}{{ strftime_now(form) }}\n",
    "under another name": "{% set now = strftime_now %}{{ now('%H:%M:%S') }}\n",
    "through a macro": "{% macro at(f) %}{{ f('%H:%M:%S') }}{% endmacro %}{{ at(strftime_now) }}\n",
}
"""Questions for the time that have no fixed text."""


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes what follows a process that began later, each time it is called."""
    times = iter(f"2031-04-0{day}T03:02:0{day}" for day in range(1, 9))

    class Clock(datetime):
        """The time that transformers tells to templates."""

        @classmethod
        def now(cls, zone: Any = None) -> Any:
            return cls.fromisoformat(present[-1])

    present: list[str] = []
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    def later() -> None:
        present.append(next(times))
        monkeypatch.setattr("fedmira.data.rendering._STARTED", present[-1])

    return later


def clock_of(folder: Path) -> str:
    return str(tomllib.loads((folder / "config.toml").read_text())["data"].get("clock", ""))


@pytest.mark.parametrize("name", sorted(CLOCKS))
def test_a_template_that_asks_for_the_time_is_told_the_same_one_for_a_whole_run(
    name: str,
    reads: Reads,
    asked: Asked,
    pass_time: Callable[[], None],
    tmp_path: Path,
) -> None:
    """Kind G."""
    base, tokenizer = quiet_base(tmp_path / "base", CLOCKS[name] + TEMPLATES["chatml"][0])
    rows, output = write_clients(tmp_path / "rows", CLIENTS), tmp_path / "run"
    pass_time()
    run(output, base, rows, data__prompt="chat")
    assert clock_of(output) == run_json(output)["clock"] == "2031-04-01T03:02:01"
    prompts = {row.prompt for row in reads.rows("fern")}
    assert all("03:02:01" in p or "03 h 02:01" in p for p in reads.prompts(tokenizer, "fern"))
    losses = {row["client"]: row["after_align_loss"] for row in table_of(output, "clients")}

    pass_time()
    ended = call("evaluate", output, "--format", "json")
    assert ended.code == 0 and ended.err == "", "nothing is said of other rows"
    for row in json.loads(ended.out):
        assert row["test_loss"] == pytest.approx(float(losses[row["client"]]), rel=1e-5)

    pass_time()
    ended = call("generate", output, "--client", "fern", "pot 5 of fern")
    assert asked.prompts.pop() in prompts
    request = turns_of(watering("fern")[5])[0]["content"]
    assert card_says(output, "fern", base, request).strip() == ended.out.strip() != ""


@pytest.mark.parametrize(
    "name",
    [
        "of a named form",
        "of a form in a variable",
        "under another name",
        "through a macro",
    ],
)
def test_a_time_that_cannot_be_fixed_is_refused_or_stays_the_same(
    name: str, pass_time: Callable[[], None], tmp_path: Path
) -> None:
    """Kind G."""
    base, _ = quiet_base(tmp_path / "base", OTHER_CLOCKS[name] + TEMPLATES["chatml"][0])
    rows = write_clients(tmp_path / "rows", CLIENTS)
    output = tmp_path / "run"
    pass_time()
    ended = call("run", *options(base, rows, data__prompt="chat"), "--output", output)
    if ended.code:
        refused(ended, "the chat template", "strftime_now")
        return
    losses = {row["client"]: row["after_align_loss"] for row in table_of(output, "clients")}
    pass_time()
    ended = call("evaluate", output, "--format", "json")
    assert ended.code == 0 and ended.err == "", "nothing is said of other rows"
    for row in json.loads(ended.out):
        assert row["test_loss"] == pytest.approx(float(losses[row["client"]]), rel=1e-5)


class AfterRound(Observer):
    """Stops a run after a round."""

    def __init__(self, last: int) -> None:
        self.last = last

    def on_round(self, event: RoundEvent) -> Stop | None:
        return Stop("somebody came in") if event.round == self.last else None


@pytest.mark.parametrize("method", ["fedavg", "mira"])
def test_a_run_that_is_resumed_later_ends_as_one_that_was_not_interrupted(
    method: str, reads: Reads, pass_time: Callable[[], None], tmp_path: Path
) -> None:
    """Kind G."""
    base, _ = quiet_base(tmp_path / "base", CLOCKS["in the text"] + TEMPLATES["chatml"][0])
    rows = write_clients(tmp_path / "rows", CLIENTS)
    settings: dict[str, Any] = {
        **BED,
        "algorithm.name": method,
        "rounds.count": 3,
        "data.prompt": "chat",
        "local.learning_rate": 0.05,
        "engine.token_budget": 1024,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given: dict[str, Any] = {"clients": rows, "base": base, "settings": settings}
    pass_time()
    fedmira.run(**given, output=whole)
    stopped = fedmira.run(**given, observers=[AfterRound(1)], output=parts)
    assert (stopped.status, run_json(parts)["rounds_done"]) == ("stopped", 1)
    assert adapter_bytes(parts) != adapter_bytes(whole)

    pass_time()
    ended = call("run", "--resume", "--output", parts)
    assert ended.code == 0, ended.err
    first, _, again = reads.datasets
    assert again.clients == first.clients
    assert clock_of(parts) == clock_of(whole) == "2031-04-01T03:02:01"
    assert run_json(parts)["status"] == "finished"
    assert adapter_bytes(parts) == adapter_bytes(whole)
    for table in ("rounds", "clients"):
        assert table_of(parts, table, timing=False) == table_of(whole, table, timing=False)


def compared(base: Path, rows: Path, output: Path) -> None:
    ended = call(
        "compare",
        *options(base, rows, data__prompt="chat"),
        *("--algorithms", "local,fedavg", "--output", output),
    )
    assert ended.code == 0, ended.err


def test_a_comparison_is_continued_at_the_time_at_which_it_began(
    pass_time: Callable[[], None], tmp_path: Path
) -> None:
    """Kind G."""
    base, _ = quiet_base(tmp_path / "base", CLOCKS["in the text"] + TEMPLATES["chatml"][0])
    rows, output = write_clients(tmp_path / "rows", CLIENTS), tmp_path / "both"
    pass_time()
    compared(base, rows, output)
    runs = [output / "local-seed0", output / "fedavg-seed0"]
    before = {path: (path / "run.json").read_bytes() for path in runs}
    assert {clock_of(path) for path in runs} == {"2031-04-01T03:02:01"}

    pass_time()
    compared(base, rows, output)
    assert {path: (path / "run.json").read_bytes() for path in runs} == before, "none ran again"

    pass_time()
    shutil.rmtree(runs[1])
    compared(base, rows, output)
    assert (runs[0] / "run.json").read_bytes() == before[runs[0]]
    assert {clock_of(path) for path in runs} == {"2031-04-01T03:02:01"}
    hashes = {run_json(path)["data"]["sha256"] for path in runs}
    assert hashes == {json.loads(before[runs[1]])["data"]["sha256"]}


PENALTIES = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 6},
    {"do_sample": True, "temperature": 4.0},
    {"suppress_tokens": list(range(150, 321))},
    {"forced_eos_token_id": 9, "begin_suppress_tokens": list(range(40, 290))},
]


@pytest.mark.parametrize("form", ["alpaca", "chat"])
@pytest.mark.parametrize("penalties", PENALTIES, ids=lambda given: " and ".join(given))
def test_the_cards_code_answers_as_generate_whatever_the_base_says_of_generation(
    penalties: dict[str, Any], form: str, tmp_path: Path
) -> None:
    """Kind G."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    made: Any = AutoModelForCausalLM
    unset: Any = GenerationConfig
    base, tokenizer = quiet_base(tmp_path / "base", TEMPLATES["chatml"][0], **penalties)
    rows, output = write_clients(tmp_path / "rows", CLIENTS), tmp_path / "run"
    more = {"data__prompt": form, "evaluation__max_new_tokens": 24}
    run(output, base, rows, local__learning_rate=1e-6, **more)
    request = "Say when to water.\n\npot 2 of fern"
    ended = call("generate", output, "--client", "fern", "pot 2 of fern")
    assert card_says(output, "fern", base, request).strip() == ended.out.strip() != ""
    # The settings of the base would have changed the answer.
    model = made.from_pretrained(base)
    ids = torch.tensor([tokenizer(request)["input_ids"]])
    mask = torch.ones_like(ids)
    torch.manual_seed(0)
    own = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24)
    model.generation_config = unset()
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert own.tolist() != plain.tolist()


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "adapter", "request_"),
    [
        pytest.param(
            "first-steps.md",
            "runs/ni/adapters/fern",
            ("The instruction of this client's rows.", "An input for this task."),
        ),
        (
            "python.md",
            "runs/from-python/adapters/clinic-north",
            (
                "Read the patient note and name the department that should see the patient.",
                "Ada reports dizziness since Monday.",
            ),
        ),
    ],
    ids=["first steps", "from Python"],
)
def test_the_code_of_the_pages_answers_as_generate(
    page: str,
    adapter: str,
    request_: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Kind G."""
    monkeypatch.chdir(tmp_path)
    base, _ = quiet_base(tmp_path / "base", repetition_penalty=1.8, no_repeat_ngram_size=2)
    client = adapter.rpartition("/")[2]
    rows = write_clients(tmp_path / "rows", {client: watering(client)})
    output = Path(adapter).parents[1]
    run(output, base, rows)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "PeftModel.from_pretrained" in block]
    instruction, text = request_
    assert instruction in code and text in code
    code = f"import json, torch\nfrom pathlib import Path\n{code}"
    out = StringIO()
    with redirect_stdout(out):
        exec(compile(code, page, "exec"), {})
    asking = ("--instruction", instruction, "--max-new-tokens", "64")
    ended = call("generate", output, "--client", client, text, *asking)
    assert out.getvalue().strip() == ended.out.strip() != ""


def test_nothing_is_said_of_a_template_without_a_clock(tmp_path: Path) -> None:
    """Kind G."""
    base, _ = chat_base(tmp_path / "base", TEMPLATES["chatml"][0])
    rows, output = write_clients(tmp_path / "rows", CLIENTS), tmp_path / "run"
    run(output, base, rows, data__prompt="chat")
    assert clock_of(output) == "" and "clock" not in run_json(output)
