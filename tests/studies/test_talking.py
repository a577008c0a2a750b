"""`fedmira chat`: base and adapters asked the same, each in the form of its training."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

import fedmira
from fedmira.adapters import content_hash
from fedmira.errors import ConfigError, RunFolderError
from fedmira.runs import accept_files
from small import Ended, call_main, make_run, write_base


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: object) -> Ended:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return call_main("chat", *map(str, arguments))


def test_a_pipe_asks_one_question_a_line(
    shared_run: Path, lone_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "w4 w8\n\n/client birch-2\nw70 w1\n/reset\n/quit\nnever\n"
    options = (shared_run, "--client", "apple-1", "--beside", lone_run)
    ended = piped(monkeypatch, lines, *options, "--format", "json")
    assert ended.code == 0, ended.err
    turns = json.loads(ended.out)
    assert [(turn["client"], turn["question"]) for turn in turns] == [
        ("apple-1", "w4 w8"),
        ("birch-2", "w70 w1"),
    ]
    shared, alone = fedmira.load(shared_run), fedmira.load(lone_run)
    for turn in turns:
        client, question = turn["client"], turn["question"]
        assert list(turn["answers"]) == ["base", "local", "fedit-finetune"]
        assert turn["answers"]["fedit-finetune"] == shared.generate(client, question)
        assert turn["answers"]["local"] == alone.generate(client, question)
    text = piped(monkeypatch, "w4 w8\n", *options).out
    assert text.startswith("> w4 w8\nbase: ") and "\nlocal: " in text


def test_the_base_answers_without_any_adapter(shared_run: Path, tmp_path: Path) -> None:
    """As an adapter whose products are zero, in a run that is the same otherwise."""
    import shutil

    from safetensors.torch import load_file, save_file

    bare = shutil.copytree(shared_run, tmp_path / "bare")
    path = bare / "adapters" / "apple-1" / "adapter_model.safetensors"
    zeros = {name: tensor * 0 for name, tensor in load_file(path).items()}
    save_file(zeros, path)
    index = json.loads((bare / "adapters" / "index.json").read_text(encoding="utf-8"))
    index["apple-1"]["sha256"] = content_hash(zeros)
    (bare / "adapters" / "index.json").write_text(json.dumps(index), encoding="utf-8")
    accept_files(bare, ["all"])
    talk = fedmira.load(shared_run).chat("apple-1")
    for question in ("w4 w8", "w33"):
        assert talk.ask(question)["base"] == fedmira.load(bare).generate("apple-1", question)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/client pear", "there is no client 'pear'"),
        ("/save", "/save: there is no such command"),
        ("/client", "/client: names no client"),
        ("\udcff w1", "bytes that are no UTF-8"),
        ("w1 " * 200, "reads at most 128, with the answer; shorten it"),
    ],
)
def test_a_pipe_ends_at_a_command_that_cannot_be_followed(
    shared_run: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    ended = piped(monkeypatch, f"{line}\nw1\n", shared_run, "--client", "apple-1")
    assert ended.code == 2 and words in ended.err and ended.out == ""


def test_two_runs_of_one_name_are_told_apart_by_their_paths(
    shared_run: Path, lone_run: Path, tmp_path: Path
) -> None:
    import shutil

    twin = shutil.copytree(shared_run, tmp_path / shared_run.name)
    talk = fedmira.load(shared_run).chat("apple-1", beside=[fedmira.load(twin)])
    assert talk.voices == ("base", str(twin), str(shared_run))


def test_another_base_is_refused(shared_run: Path, clients_folder: Path, tmp_path: Path) -> None:
    from tiny import tiny_model

    base = write_base(tmp_path / "base")
    tiny_model("llama", seed=5).save_pretrained(base)
    settings = {"rounds.count": 1, "algorithm.name": "local", "local.steps": 1}
    other = make_run(base, clients_folder, tmp_path / "run", settings)
    with pytest.raises(RunFolderError, match="trained on another base"):
        fedmira.load(shared_run).chat("apple-1", beside=[fedmira.load(other)])


def test_each_voice_remembers_its_own_answers_where_rows_were_conversations(
    base_folder: Path, tmp_path: Path
) -> None:
    talk = [
        {
            "messages": [
                {"role": "system", "content": "w9"},
                {"role": "user", "content": f"w{n}"},
                {"role": "assistant", "content": f"w{n + 1} w{n + 5}"},
            ]
        }
        for n in range(12)
    ]
    result = fedmira.run(
        clients={"north": talk, "south": talk[::-1]},
        method="local",
        settings={
            "model.base": str(base_folder),
            "data.prompt": "plain",
            "data.max_length": 64,
            "rounds.count": 1,
            "local.steps": 2,
            "local.learning_rate": 0.02,
            "evaluation.rouge": False,
            "evaluation.max_new_tokens": 4,
            "model.device": "cpu",
        },
        output=tmp_path / "run",
    )
    chat = result.chat("north")
    assert chat.remembers and chat.voices == ("base", "local")
    first = chat.ask("w1")
    chat.ask("w2")
    said = {voice.name: voice.said for voice in chat._voices}
    for name in chat.voices:
        assert said[name][:3] == (("user", "w1"), ("assistant", first[name]), ("user", "w2"))
    chat.reset()
    assert chat.ask("w1") == first
    with pytest.raises(ConfigError, match="there is no question"):
        chat.ask("  ")
