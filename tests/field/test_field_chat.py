"""More inputs of the kinds that `test_chat.py` is about, which nobody reported."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fedmira
from data.templates import TEMPLATES, byte_tokenizer
from fedmira.observers import Observer, RoundEvent, Stop
from field.inputs import (
    BED,
    Reads,
    call,
    chat_ids,
    check,
    noted,
    run_json,
    watering,
    write_clients,
    write_random_base,
)
from small import adapter_bytes, events_of, table_of

CLOCKED = "<|im_start|>system\nIt is {{ strftime_now('%H:%M:%S on %d %B %Y') }}.<|im_end|>\n"


@pytest.fixture
def clocked(tmp_path: Path) -> Path:
    """A base whose template tells the model the time."""
    return write_random_base(tmp_path / "base", byte_tokenizer(CLOCKED + TEMPLATES["chatml"][0]))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two clients of twelve rows."""
    return write_clients(tmp_path / "rows", {name: watering(name) for name in ("fern", "moss")})


def begin_at(patch: pytest.MonkeyPatch, time: str) -> None:
    """Makes what follows a process that began at another time."""
    patch.setattr("fedmira.data.rendering._STARTED", time)


def clock_of(folder: Path) -> str:
    """The time that a run was told."""
    return str(tomllib.loads((folder / "config.toml").read_text())["data"]["clock"])


class StopAfter(Observer):
    """Ends a run after its first round, and never again."""

    def on_round(self, event: RoundEvent) -> Stop | None:
        return Stop("the light went out") if event.round == 1 else None


def test_a_stopped_run_goes_on_at_its_time_and_ends_as_another_at_that_time(
    clocked: Path, rows: Path, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind G."""
    given: dict[str, Any] = {"method": "local", "clients": rows, "base": clocked}
    settings = {**BED, "data.prompt": "chat", "rounds.count": 3, "local.learning_rate": 0.02}
    begin_at(monkeypatch, "2031-08-09T10:11:12")
    stopped = fedmira.run(
        **given, settings=settings, observers=[StopAfter()], output=tmp_path / "parts"
    )
    assert stopped.status == run_json(tmp_path / "parts")["status"] == "stopped"

    begin_at(monkeypatch, "2032-09-10T11:12:13")
    ended = call("run", "--resume", "--output", tmp_path / "parts")
    assert ended.code == 0, ended.err
    told = {**settings, "data.clock": clock_of(tmp_path / "parts")}
    fedmira.run(**given, settings=told, output=tmp_path / "whole")
    fedmira.run(**given, settings=settings, output=tmp_path / "later")

    first, again, whole, later = (data.clients for data in reads.datasets)
    assert first == again == whole != later
    assert clock_of(tmp_path / "whole") == "2031-08-09T10:11:12" != clock_of(tmp_path / "later")
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "later") != adapter_bytes(tmp_path / "whole")
    for table in ("rounds", "clients"):
        parts, at_once = (
            table_of(tmp_path / name, table, timing=False) for name in ("parts", "whole")
        )
        assert parts == at_once


def test_a_comparison_that_is_asked_for_again_has_one_time_and_trains_nothing(
    clocked: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind G."""
    given: dict[str, Any] = {
        "clients": rows,
        "base": clocked,
        "settings": {**BED, "data.prompt": "chat"},
        "output": tmp_path / "both",
    }
    del given["settings"]["algorithm.name"]
    runs = [tmp_path / "both" / name for name in ("local-seed0", "fedavg-seed0")]
    begin_at(monkeypatch, "2031-08-09T10:11:12")
    first = fedmira.compare(["local", "fedavg"], **given)
    told = [events_of(run) for run in runs]

    begin_at(monkeypatch, "2032-09-10T11:12:13")
    again = fedmira.compare(["local", "fedavg"], **given)
    assert [events_of(run) for run in runs] == told
    assert again.rows == first.rows and len(first.rows) == 2
    assert {clock_of(run) for run in runs} == {"2031-08-09T10:11:12"}
    one, other = (run_json(run)["data"]["sha256"] for run in runs)
    assert one == other


def test_a_clock_is_of_no_account_in_forms_without_a_template(
    clocked: Path, rows: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind G."""
    for year in (2031, 2032):
        begin_at(monkeypatch, f"{year}-08-09T10:11:12")
        check(clocked, rows, data__prompt="alpaca")
    assert reads.datasets[0].clients == reads.datasets[1].clients


LEADING = {"system": "Speak as a gardener.", "assistant": "Good day."}


@pytest.mark.parametrize(
    ("chat", "role"), [("gemma", "system"), ("gemma", "assistant"), ("mistral", "system")]
)
def test_a_leading_message_that_a_template_refuses_is_merged_and_counted(
    chat: str, role: str, reads: Reads, tmp_path: Path
) -> None:
    """Kind B."""
    tokenizer = byte_tokenizer(TEMPLATES[chat][0])
    base = write_random_base(tmp_path / "base", tokenizer)
    turns = [
        [
            {"role": "user", "content": f"Is pot {place} dry?"},
            {"role": "assistant", "content": "yes"},
        ]
        for place in range(10)
    ]
    leading = {"role": role, "content": LEADING[role]}
    given = [{"messages": [*([leading] if n < 7 else []), *pair]} for n, pair in enumerate(turns)]
    folder = write_clients(tmp_path / "rows", {"fern": given})
    noted(check(base, folder, data__prompt="chat"), "7 of 10", role, "first user message")
    expected = set()
    for place, (asked, said) in enumerate(turns):
        before = f"{LEADING[role]}\n\n" if place < 7 else ""
        asked = {**asked, "content": before + asked["content"]}
        expected.add(tuple(chat_ids(tokenizer, [asked, said])))
    assert {(*row.prompt, *row.response) for row in reads.rows("fern")} == expected


def test_a_template_that_has_several_forms_is_used_as_transformers_uses_it(
    reads: Reads, tmp_path: Path
) -> None:
    """Kind B."""
    forms = {"default": TEMPLATES["zephyr"][0], "rag": TEMPLATES["chatml"][0]}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = forms
    base = write_random_base(tmp_path / "base", tokenizer)
    folder = write_clients(tmp_path / "rows", {"fern": watering("fern")})
    check(base, folder, data__prompt="chat")
    expected = {
        tuple(
            chat_ids(
                tokenizer,
                [
                    {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"},
                    {"role": "assistant", "content": row["output"]},
                ],
            )
        )
        for row in watering("fern")
    }
    assert {(*row.prompt, *row.response) for row in reads.rows("fern")} == expected


@pytest.mark.parametrize("form", ["chat", "alpaca", "plain"])
def test_asking_needs_neither_rows_nor_an_instruction(
    form: str, plain_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Kind G: the prompt form of a client is saved beside its adapter."""
    output = tmp_path / "out"
    settings = {**BED, "data.prompt": form}
    fedmira.run(clients=rows, base=plain_base, settings=settings, output=output)
    index = json.loads((output / "adapters" / "index.json").read_text())
    assert index["fern"]["prompt"]["instruction"] == "Say when to water."
    with_rows = call("generate", output, "--client", "fern", "pot 3 of fern")
    shutil.rmtree(rows)
    without = call("generate", output, "--client", "fern", "pot 3 of fern")
    assert (with_rows.code, without.code) == (0, 0)
    assert without.out == with_rows.out
