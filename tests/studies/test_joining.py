"""`fedmira join`: a newcomer starts from the adapters of a finished run, which stays as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedmira
from fedmira.adapters import Adapter, modules
from fedmira.data import PROMPTS, Example, Newcomer, load_newcomer
from fedmira.errors import ConfigError, DataError, RunFolderError
from fedmira.fleet import RULES, SHARED, Joining, JoinSettings
from fedmira.methods.parts.averaging import COMMON
from fedmira.model import from_model
from fedmira.runs import CheckpointFolder
from fedmira.studies.joining import pool_of
from fedmira.studies.saved import reload_adapters
from small import CLIENTS, call_main, make_run, table_of, write_clients
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def run(base_folder: Path, clients_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("joined") / "run"
    settings = {"algorithm.name": "two-level", "adapter.ranks": {"birch-1": 2}}
    return make_run(base_folder, clients_folder, output, settings)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newcomer of the family of apples: 6 rows to train on, and 4 that are set aside."""
    place = write_clients(tmp_path_factory.mktemp("rows"), {"apple-9": 10}) / "apple-9"
    lines = (place / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "train.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    (place / "test.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    return place


def product(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: up.double() @ down.double() for name, (down, up) in modules(adapter).items()}


def joining_of(run: Path, rows: Path, steps: int = 3) -> Joining:
    saved = reload_adapters(run)
    settings = saved.config.data.model_copy(update={"path": str(rows)})
    newcomer = load_newcomer(settings, 0, saved.kind.base.tokenizer, "apple-9")
    pool, _ = pool_of(saved, "apple-9")
    return Joining(newcomer, pool, saved.kind, JoinSettings(saved.config.local, steps, 0, 400))


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_newcomer_gets_a_folder_and_the_run_stays_byte_for_byte(
    run: Path, rows: Path, base_folder: Path, tmp_path: Path
) -> None:
    before = files_of(run)
    ended = call_main(
        *("join", run, "--client", "apple-9", "--data", rows, "--steps", "3"),
        *("--output", tmp_path / "new", "--format", "json"),
    )
    assert ended.code == 0, ended.err
    assert files_of(run) == before
    figures = json.loads(ended.out)
    assert figures["rows"] == {"train": 6, "choose": 6, "held_out": 4}
    assert {each["client"] for each in figures["resembles"]} == {*CLIENTS, "the generalist"}
    before_or_after = "loss_trained" if figures["steps"] else "loss_of_start"
    taken = min(figures["tried"], key=lambda each: each[before_or_after])
    assert figures["start"] == taken["start"] and len(figures["tried"]) == len(RULES)
    assert figures["steps_asked"] == 3 and figures["steps"] in (0, 3)
    folder = tmp_path / "new"
    assert figures == {
        **json.loads((folder / "join.json").read_text("utf-8")),
        "output": str(folder),
    }
    page = (folder / "join.html").read_text("utf-8")
    ElementTree.fromstring(
        page[page.index("<section") : page.rindex("</section>")].join(["<all>", "</section></all>"])
    )
    card = (folder / "README.md").read_text("utf-8")
    assert "# Adapter of apple-9" in card and figures["sha256"] in card
    assert peft_loss(folder, base_folder, rows) == pytest.approx(
        figures["held_out"]["trained"], rel=1e-4
    )


def peft_loss(folder: Path, base: Path, rows: Path) -> float:
    """Nats a response token of the rows that are set aside, by plain PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    total, count = 0.0, 0
    for line in (rows / "test.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt = PROMPTS["plain"](Example(row["instruction"], row["input"], ""), tokenizer)
        texts = (prompt, row["output"])
        head, tail = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        ids = torch.tensor([[*head, *tail, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(head) - 1 : -1]
        wanted = ids[0, len(head) :]
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    return total / count


def test_no_row_measures_what_it_chose_or_trained(run: Path, rows: Path) -> None:
    joining = joining_of(run, rows)
    trials = {trial.rule: trial for trial in joining.trials()}
    folds, train = 5, joining.newcomer.data.train
    assert len(joining.groups) == 6
    for fold in (0, 3):
        held = joining.groups[fold::folds]
        rest = [group for number, group in enumerate(joining.groups) if number % folds != fold]
        places = sorted(place for group in rest for place in group)
        own = tuple(train[place] for place in places)
        alone = replace(
            joining,
            newcomer=Newcomer(replace(joining.newcomer.data, train=own), tuple(range(len(own)))),
        )
        scores = alone.scores()
        starts = {rule: joining.pool.start(joining.pool.weights(rule, scores)) for rule in RULES}
        ended = alone.trained(starts).adapters
        for rule, adapter in ended.items():
            rows_held = [train[place] for group in held for place in group]
            wanted = joining.kind.row_losses([adapter], [joining.pool.scale], [rows_held], 400)[0]
            found = trials[rule].losses[fold::folds]
            assert list(found) == pytest.approx(wanted, rel=1e-4), (rule, fold)


def test_the_generalist_of_two_levels_is_the_common_part(run: Path) -> None:
    saved = reload_adapters(run)
    pool, made = pool_of(saved, "apple-9")
    checkpoint = CheckpointFolder(run / "checkpoint").load()
    assert checkpoint is not None and made == "the common part of the run"
    common = checkpoint.state.adapters[COMMON]  # alpha 8, of 4 times rank 4
    for name, whole in product(common).items():
        left, values, right = torch.linalg.svd(8.0 / 16 * whole)
        wanted = left[:, :4] * values[:4] @ right[:4]
        assert torch.allclose(8.0 / 4 * product(pool.generalist)[name], wanted, atol=1e-5)


def test_without_a_checkpoint_it_is_the_mean_by_training_rows(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoint"))
    saved = reload_adapters(bare)
    pool, made = pool_of(saved, "apple-9")
    assert made == "the mean of 5 adapters, by training rows"
    rows = {line["client"]: int(line["train_rows"]) for line in table_of(run, "clients")}
    for name, found in product(pool.generalist).items():
        whole = sum(
            rows[client] / sum(rows.values()) * 8.0 / saved.ranks[client] * product(own)[name]
            for client, own in saved.adapters.items()
        )
        left, values, right = torch.linalg.svd(whole)
        assert torch.allclose(2.0 * found, left[:, :4] * values[:4] @ right[:4], atol=1e-5)


def test_the_scores_are_the_losses_of_the_runs_adapters(run: Path, rows: Path) -> None:
    joining = joining_of(run, rows)
    tokens = sum(len(row.response) for row in joining.newcomer.data.train)
    saved = reload_adapters(run)
    for score in joining.scores():
        if score.name == SHARED:
            continue
        scale = 8.0 / saved.ranks[score.name]  # birch-1 has another rank
        own = [saved.adapters[score.name]]
        (total,) = saved.kind.losses(own, [scale], [joining.newcomer.data.train], 400)
        assert score.loss == pytest.approx(total / tokens, rel=1e-4)


def test_no_steps_keep_the_start_and_a_given_start_is_not_judged(
    run: Path, rows: Path, tmp_path: Path
) -> None:
    made = fedmira.join(
        run, client="apple-9", data=rows, steps=0, start="mix", output=tmp_path / "new"
    )
    joining = joining_of(run, rows)
    wanted = joining.pool.start(joining.pool.weights("mix", joining.scores()))
    assert all(torch.equal(made.adapter[name], wanted[name]) for name in wanted)
    assert made.figures["tried"] == [] and made.figures["training"] is None
    held_out = made.figures["held_out"]  # measured beside other adapters, and alone
    assert held_out["start"] == pytest.approx(held_out["trained"], rel=1e-6)
    assert "join.html" in made._repr_html_()


def test_where_rows_show_that_training_harms_the_start_is_kept(
    run: Path, rows: Path, tmp_path: Path
) -> None:
    settings = {"local.learning_rate": 1e3}  # far beyond what any start stands
    given = {"client": "apple-9", "data": rows, "steps": 4, "settings": settings}
    made = fedmira.join(run, **given, output=tmp_path / "new")
    start = min(made.figures["tried"], key=lambda each: each["loss_of_start"])
    assert (made.figures["steps"], made.figures["start"]) == (0, start["start"])
    assert any(note.startswith("the start is kept as it is") for note in made.figures["notes"])
    joining = joining_of(run, rows)
    wanted = joining.pool.start(joining.pool.weights(start["start"], joining.scores()))
    assert all(torch.equal(made.adapter[name], wanted[name]) for name in wanted)
    told = fedmira.join(run, **given, start=start["start"], output=tmp_path / "told")
    assert told.figures["steps"] == 4, "a start that is given is trained in any case"
    assert "keeps that as it is, as 4 local steps made it worse" in made.page.read_text("utf-8")


def test_objects_join_too_and_equally(run: Path, rows: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (rows / "train.jsonl").read_text("utf-8").splitlines()]
    other = fedmira.join(run, client="apple-9", data=lines, steps=2, output=tmp_path / "objects")
    path = tmp_path / "rows.jsonl"
    shutil.copy(rows / "train.jsonl", path)
    one = fedmira.join(run, client="apple-9", data=path, steps=2, output=tmp_path / "file")
    assert one.figures["sha256"] == other.figures["sha256"]
    assert any("no rows were set aside" in note for note in one.figures["notes"])


def test_a_run_that_is_at_hand_joins_as_the_verb_does(
    run: Path, rows: Path, tmp_path: Path
) -> None:
    verb = fedmira.join(run, client="apple-9", data=rows, steps=2, output=tmp_path / "verb")
    result = fedmira.load(run)
    made = result.join("apple-9", rows, steps=2, output=tmp_path / "method")
    files = [
        {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".html"}
        for folder in (verb.folder, made.folder)
    ]
    assert files[0] == files[1]
    with pytest.raises(ConfigError, match="'apple-1'.* already"):
        result.join("apple-1", rows, output=tmp_path / "taken")
    assert made.folder.is_dir() and not (tmp_path / "taken").exists()


def test_a_newcomer_joins_a_run_of_another_method(
    lone_run: Path, rows: Path, tmp_path: Path
) -> None:
    made = fedmira.join(lone_run, client="x", data=rows, steps=1, output=tmp_path / "new")
    assert made.figures["generalist"].startswith("the mean of 5 adapters")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text("utf-8"))
    assert config["use_rslora"] is True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client": "apple-1"}, "there is a client 'apple-1'"),
        ({"client": "Apple-1"}, "there is a client 'apple-1'"),
        ({"client": "no/name"}, "cannot name a folder"),
        ({"steps": -1}, "steps is -1"),
        ({"start": "best"}, "start is 'best'; must be one of generalist"),
        ({"settings": {"data.prompt": "chat"}}, "data.prompt is not the newcomer's to set"),
        ({"settings": ["rounds.count=3"]}, "rounds.count is not the newcomer's to set"),
        ({"settings": {"local.steps": 3}}, "local.steps is not the newcomer's to set"),
    ],
)
def test_what_a_newcomer_cannot_be_or_set_is_told(
    run: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    given = {"client": "apple-9", "data": rows, "output": tmp_path / "new", **changes}
    with pytest.raises(ConfigError, match=words):
        fedmira.join(run, **given)
    assert not (tmp_path / "new").exists()


def test_rows_and_bases_that_cannot_be_used_are_told(run: Path, rows: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    lines = (rows / "train.jsonl").read_text("utf-8").splitlines()
    few.write_text("\n".join(lines[:3]), encoding="utf-8")
    with pytest.raises(DataError, match="3 rows to train on; a start is chosen by at least 4"):
        fedmira.join(run, client="new", data=few, output=tmp_path / "new")
    with pytest.raises(DataError, match="does not exist"):
        fedmira.join(run, client="new", data=tmp_path / "none", output=tmp_path / "new")
    other = from_model(tiny_model("llama", 1), tiny_tokenizer(), "other")
    with pytest.raises(RunFolderError, match="was trained on another base"):
        fedmira.join(run, client="new", data=rows, base=other, output=tmp_path / "new")
    with pytest.raises(RunFolderError, match="within the run"):
        fedmira.join(run, client="new", data=rows, output=run / "new")
    with pytest.raises(RunFolderError, match="never overwritten"):
        fedmira.join(run, client="new", data=rows, output=run)
    assert not (tmp_path / "new").exists()


def test_adapters_of_another_kind_are_refused(
    base_folder: Path, clients_folder: Path, rows: Path, tmp_path: Path
) -> None:
    settings = {
        "algorithm.name": "local",
        "adapter.kind": "prompt",
        "rounds.count": 1,
        "local.steps": 1,
    }
    made = make_run(base_folder, clients_folder, tmp_path / "run", settings)
    with pytest.raises(ConfigError, match="of kind 'prompt', which cannot be mixed"):
        fedmira.join(made, client="new", data=rows, output=tmp_path / "new")


def test_settings_of_the_newcomer_are_heard(run: Path, rows: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "other.jsonl"
    lines = [json.loads(line) for line in (rows / "train.jsonl").read_text("utf-8").splitlines()]
    texts = [{"ask": f"{row['instruction']} {row['input']}", "say": row["output"]} for row in lines]
    renamed.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    ended = call_main(
        *("join", run, "--client", "new", "--data", renamed, "--steps", "1"),
        *("--set", 'data.columns={instruction="ask", output="say"}'),
        *("--set", "local.learning_rate=0.001", "--output", tmp_path / "new"),
    )
    assert ended.code == 0, ended.err
    figures = json.loads((tmp_path / "new" / "join.json").read_text("utf-8"))
    assert figures["learning_rate"] == 0.001 and figures["rows"]["train"] == 6
    assert "starts from" in ended.out and "no rows were set aside" in ended.err
