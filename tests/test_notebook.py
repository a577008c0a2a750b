"""fedmira from a notebook: methods, rows and models as objects, DataFrames and pictures out."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

import fedmira
from fedmira.adapters import Adapter, replaced, weighted_sum
from fedmira.errors import ConfigError, DataError, ModelError, RunFolderError
from fedmira.messages import Reply
from fedmira.methods import Combined, ServerState
from small import adapter_bytes
from tiny import tiny_model, tiny_tokenizer

SETTINGS: dict[str, Any] = {
    "data.prompt": "plain",
    "data.max_length": 64,
    "adapter.rank": 4,
    "adapter.alpha": 8.0,
    "local.steps": 2,
    "local.batch_size": 4,
    "rounds.count": 3,
    "evaluation.every": 1,
    "evaluation.rouge": False,
    "evaluation.max_new_tokens": 4,
    "engine.token_budget": 400,
}


class Half(fedmira.methods.Local):
    """Own adapters that go part of the way to the mean, held near their start."""

    pull: float = fedmira.setting(0.5, ge=0, le=1, help="share of the way to the mean")
    hold: float = fedmira.setting(0.0, ge=0, help="strength of the pull back to the start")

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        own = {reply.client_id: reply.payload.tensors["adapter"] for reply in replies}
        mean = weighted_sum(list(own.values()), [1 / len(own)] * len(own))
        moved = {
            client: weighted_sum([adapter, mean], [1 - self.pull, self.pull])
            for client, adapter in own.items()
        }
        return Combined(ServerState(replaced(state.adapters, moved), state.numbers))

    def gradient(self, gradient: Adapter, adapter: Adapter, start: Adapter) -> Adapter:
        return {n: g + self.hold * (adapter[n] - start[n]) for n, g in gradient.items()}


def rows_of(name: str, count: int = 12) -> list[dict[str, str]]:
    words = sorted(set(name))
    return [
        {
            "instruction": " ".join(f"w{ord(letter) % 90}" for letter in words),
            "input": f"w{i} w{(3 * i) % 80}",
            "output": f"w{60 + i % 7} w{(5 * i) % 90}",
        }
        for i in range(count)
    ]


@pytest.fixture
def clients() -> dict[str, Any]:
    """A list, a data set of Hugging Face, and a DataFrame with an empty cell."""
    west = pandas.DataFrame(rows_of("west"))
    west.loc[2, "input"] = np.nan
    return {
        "north": rows_of("north"),
        "south": datasets.Dataset.from_list(rows_of("south")),
        "west": west,
    }


@pytest.fixture
def base() -> tuple[Any, Any]:
    return tiny_model("llama"), tiny_tokenizer()


@pytest.fixture
def run(base: tuple[Any, Any], clients: dict[str, Any], tmp_path: Path) -> Any:
    """Runs into a folder of a name."""

    def with_name(name: str, **given: Any) -> fedmira.Result:
        settings = SETTINGS | given.pop("settings", {})
        return fedmira.run(
            **{
                "method": "local",
                "base": base,
                "clients": clients,
                "settings": settings,
                "output": tmp_path / name,
            }
            | given
        )

    return with_name


def test_objects_go_in_and_data_frames_come_out(run: Any, tmp_path: Path) -> None:
    result = run(
        "half",
        method=Half(pull=0.3),
        settings={
            "rounds.count": np.int64(2),
            "data.path": None,
            "local.learning_rate": np.float64(0.01),
        },
        observers=[fedmira.observers.EarlyStopping(patience=9, metric="test_loss")],
        output=str(tmp_path / "half"),
    )
    assert result.status == "finished" and len(result.rounds) == 2
    assert list(result.clients["client"]) == ["north", "south", "west"]
    assert math.isnan(result.clients["rouge_l"].mean()), "nothing was generated"
    assert result.clients["after_align_loss"].notna().all() and result.rounds["pull"].isna().all()
    assert not (result.clients == "").any().any() and not (result.rounds == "").any().any()
    assert set(result.events["event"]) >= {"train", "evaluate", "round"}
    config = (result.folder / "config.toml").read_text(encoding="utf-8")
    assert "learning_rate = 0.01" in config and "count = 2" in config


def test_a_missing_cell_of_a_data_frame_is_a_missing_key(run: Any, clients: Any) -> None:
    plain = {name: [dict(row) for row in rows_of(name)] for name in clients}
    del plain["west"][2]["input"]
    given = run("frames").about["data"]["sha256"]
    assert run("dicts", clients=plain).about["data"]["sha256"] == given


def test_both_halves_of_a_method_object_act(run: Any) -> None:
    folders = {
        name: run(name, method=method).folder
        for name, method in {
            "pulled": Half(),
            "held": Half(hold=2.0),
            "alone": Half(pull=0.0),
            "local": "local",
        }.items()
    }
    found = {name: tensors_of(folder) for name, folder in folders.items()}
    assert found["pulled"] != found["held"], "the gradient of the method is called"
    assert found["pulled"] != found["alone"]
    assert found["alone"] == found["local"], "without pull and hold it is local training"


def test_papers_name_the_objects(run: Any, tmp_path: Path) -> None:
    result = run("half", method=Half(pull=0.3))
    config = (result.folder / "config.toml").read_text(encoding="utf-8")
    assert 'method = "object"' in config and 'name = "half"' in config and "pull = 0.3" in config
    assert 'source = "object"' in config and 'base = "object"' in config
    assert result.about["base"]["sha256"] in config
    card = (result.folder / "adapters" / "north" / "README.md").read_text(encoding="utf-8")
    assert "`half`" in card
    assert "half" in result.report.read_text(encoding="utf-8")
    table = fedmira.compare(
        {"half": Half(pull=0.3), "local": "local"},
        base=(tiny_model("llama"), tiny_tokenizer()),
        clients={name: rows_of(name) for name in ("north", "south")},
        settings=SETTINGS | {"rounds.count": 1},
        seeds=range(2),
        output=tmp_path / "compared",
    )
    assert {row["method"] for row in table.rows} == {"half", "local"}
    assert "half" in table.page.read_text(encoding="utf-8")


class Interrupted(Exception):
    """What ends a run in a test."""


class Breaks(Half):
    """Half, that breaks when it combines for the second time."""

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        if replies[0].round == 2 and BREAK:
            raise Interrupted
        return super().combine(state, replies)


BREAK: list[int] = []


def test_an_interrupted_run_of_objects_goes_on_bit_for_bit(
    run: Any, base: Any, clients: Any, tmp_path: Path
) -> None:
    BREAK.append(1)
    with pytest.raises(Interrupted):
        run("run", method=Breaks())
    BREAK.clear()
    assert fedmira.load(tmp_path / "run").status == "failed"
    straight = run("straight", method=Breaks())
    again: Mapping[str, Any] = {"output": tmp_path / "run", "resume": True}
    with pytest.raises(ConfigError, match=r"object 'breaks'.*give the object"):
        fedmira.run(**again, base=base, clients=clients)
    with pytest.raises(ConfigError, match=r"pull was 0\.5 and is 0\.1"):
        fedmira.run(**again, method=Breaks(pull=0.1), base=base, clients=clients)
    with pytest.raises(ModelError, match="base of this run was an object"):
        fedmira.run(**again, method=Breaks(), clients=clients)
    with pytest.raises(DataError, match="rows of this run were objects"):
        fedmira.run(**again, method=Breaks(), base=base)
    with pytest.raises((DataError, RunFolderError), match="rows of the run|other settings"):
        fedmira.run(
            **again, method=Breaks(), base=base, clients={**clients, "west": rows_of("east")}
        )
    resumed = fedmira.run(**again, method=Breaks(), base=base, clients=clients)
    assert adapter_bytes(resumed.folder) == adapter_bytes(straight.folder)


def test_a_model_comes_back_as_it_was(run: Any, base: Any) -> None:
    model, tokenizer = base
    model.train()
    model.generation_config.repetition_penalty = 1.7
    tokenizer.pad_token = None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run("run")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert model.generation_config.repetition_penalty == 1.7 and tokenizer.pad_token is None
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())


def test_a_run_is_loaded_from_its_folder(run: Any, base: Any, clients: Any, tmp_path: Path) -> None:
    result = run("run", method="mira", settings={"rounds.count": 2, "graph.kind": "uniform"})
    old = fedmira.load(result.folder, base=base, clients=clients)
    pandas.testing.assert_frame_equal(old.clients, result.clients)
    measured = old.evaluate()
    assert list(measured["test_loss"]) == pytest.approx(list(result.clients["after_align_loss"]))
    assert isinstance(old.generate("north", "w5"), str)
    with pytest.raises(ConfigError, match="no client 'nowhere'"):
        old.generate("nowhere", "w5")
    merged = old.merge(["north", "south"], weights=[3, 1])
    folder = merged.save(tmp_path / "merged")
    assert (folder / "adapter_model.safetensors").is_file()
    with pytest.raises(RunFolderError, match="never overwritten"):
        merged.save(folder)
    only = old.merge(["north"])
    products = {
        name: only.adapter[name.replace("lora_A", "lora_B")] @ only.adapter[name]
        for name in only.adapter
        if "lora_A" in name
    }
    own = old.adapters["north"]
    for name, product in products.items():
        expected = own[name.replace("lora_A", "lora_B")] @ own[name]
        assert (product - expected).norm() <= 1e-4 * max(1.0, float(expected.norm()))


def test_a_notebook_shows_tables_and_pictures(run: Any) -> None:
    result = run("<b>run", method="mira", settings={"graph.kind": "uniform"})
    page = result._repr_html_()
    ElementTree.fromstring(f"<div>{page}</div>")
    assert "&lt;b&gt;run" in page and "<b>run" not in page and "report.html" in page
    assert len(repr(result)) < 300 and "finished" in repr(result)
    for picture in (result.plot("test_loss"), result.plot("train_loss"), result.graph.plot()):
        drawing = ElementTree.fromstring(picture._repr_svg_())
        assert drawing.tag.endswith("svg") and len(list(drawing)) > 2
    with pytest.raises(fedmira.errors.InputError, match="no figure of a round is called so"):
        result.plot("luck")


def test_check_says_what_a_run_would_cost(base: Any, clients: Any) -> None:
    plan = fedmira.check(method=Half(), clients=clients, base=base, settings=SETTINGS)
    assert plan.clients == 3 and plan.rounds == 3 and plan.adapter_parameters > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"settings": {"rounds.count": "many"}}, r'rounds\.count = "many": must be a whole number'),
        ({"settings": {"round.count": 3}}, r"round.*unknown"),
        ({"settings": {3: 4}}, r"settings\[3\]: must be a dotted key"),
        ({"method": "mirra"}, "method 'mirra': there is none of this name"),
        ({"method": fedmira.methods.Local}, r"Local is a class; give an object of it: Local\(\)"),
        ({"method": 3}, "method 3: give the name of one"),
        ({"base": tiny_model("llama")}, r"base is of type LlamaForCausalLM.*\(model, tokenizer\)"),
        ({"base": (tiny_tokenizer(), 1)}, r"give \(model, tokenizer\) of transformers"),
        ({"config": 3}, "config is of type int; give a Config, the path of a TOML file"),
        ({"clients": [rows_of("x")]}, "clients is of type list; give a dict"),
        ({"observers": fedmira.Observer()}, "give a list of them"),
        ({"observers": [fedmira.Observer]}, r"Observer is a class; give an object"),
        ({"observers": ["tensorboard"]}, "'tensorboard' is no observer"),
        ({"resume": True, "settings": {}}, "there is no such folder"),
        ({"clients": {}}, "clients: there are none"),
        ({"clients": {"a": "text"}}, r"clients\['a'\]: rows of type str"),
        ({"clients": {"a": [3]}}, r"clients\['a'\] row 1: is of type int"),
        ({"clients": {"a": {"test": []}}}, r"clients\['a'\]: has the parts test"),
        ({"clients": {"a": []}}, "holds no rows to train on"),
        ({"clients": {"//": rows_of("x")}}, "client id '//' cannot name a folder"),
        ({"clients": {"a": [{"question": "x"}]}}, "a row 1"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_made(
    run: Any, tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(fedmira.errors.InputError, match=words):
        run("run", **given)
    assert not (tmp_path / "run").exists()


def test_parts_of_a_client_are_taken_as_they_are(run: Any) -> None:
    parts = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(rows_of("abc", 10)),
            "test": datasets.Dataset.from_list(rows_of("xyz", 4)),
        }
    )
    result = run("run", method="local", clients={"one": parts, "two": rows_of("two")})
    rows = result.clients.set_index("client")
    assert (rows.loc["one", "train_rows"], rows.loc["one", "test_rows"]) == (10, 4)


def tensors_of(folder: Path) -> dict[str, bytes]:
    files = adapter_bytes(folder, cards=False)
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("methods", "seeds", "words"),
    [
        ([], (0,), r"methods is \[\]"),
        ("local", (0,), "methods is 'local'; give a list"),
        (["local"], (), r"seeds is \(\)"),
        (["local"], 3, "seeds is 3"),
        (["local"], (-1,), "0 or more"),
        ([fedmira.methods.Local], (0,), "Local is a class"),
    ],
)
def test_a_comparison_of_nothing_is_refused(
    tmp_path: Path, methods: Any, seeds: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        fedmira.compare(methods, seeds=seeds, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_wrong_setting_of_a_method_object_is_an_error_of_fedmira() -> None:
    with pytest.raises(ConfigError, match=r"half: pull = 3: .* 1"):
        Half(pull=3)
    with pytest.raises(ConfigError, match="half: pul is no setting of it; .* pull, hold"):
        Half(pul=0.3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("half", "wrong", "words"),
    [
        ("gradient", lambda *_: None, "gradient returned NoneType; must return a dict"),
        ("gradient", lambda *_: {}, "gradient returned dict of ; must|gradient returned dict"),
        ("begin", lambda *_: {}, r"begin returned dict.*Start"),
        ("finish", lambda *_: None, r"finish returned NoneType.*\(Payload, Payload or None\)"),
        ("combine", lambda _, state, replies: state, "combine returned ServerState.*Combined"),
    ],
)
def test_what_a_half_of_a_method_must_return_is_named(
    run: Any, tmp_path: Path, half: str, wrong: Any, words: str
) -> None:
    kind = type("Wrong", (Half,), {half: wrong, "__doc__": "Wrong.", "__module__": __name__})
    with pytest.raises(fedmira.errors.RunError, match=f"wrong: {words}"):
        run("run", method=kind())
    assert fedmira.load(tmp_path / "run").status == "failed"
