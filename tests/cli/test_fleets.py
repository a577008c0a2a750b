"""fedmira merge, compress and align on a run of the installed command, and the same from Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedmira
from fedmira.adapters import modules
from fedmira.errors import ConfigError
from fedmira.model import read_lora_folder
from fedmira.runs import accept_files
from small import CLIENTS, adapters_of

Call = Callable[..., Any]


@pytest.fixture(name="call")
def _call(fedmira: Call) -> Call:
    def called(*arguments: str | Path) -> Any:
        ended = fedmira(*arguments, "--format", "json")
        assert ended.code == 0, ended.err
        return json.loads(ended.out)

    return called


def merged_products(folder: Path) -> dict[str, torch.Tensor]:
    update = read_lora_folder(folder).update
    return {name: up.double() @ down.double() for name, (down, up) in modules(update).items()}


def test_merge_by_rows_is_the_mean_by_training_rows(
    call: Call, command_run: Any, tmp_path: Path
) -> None:
    told = call("merge", command_run.folder, "--by", "rows", "--rank", "20", "-o", tmp_path / "m")
    rows = {row["client"]: int(row["train_rows"]) for row in clients_of(command_run.folder)}
    assert told["weights"] == pytest.approx({c: n / sum(rows.values()) for c, n in rows.items()})
    assert told["base_assumed"] == "", "the hash of the base is in the run's index"
    single = adapters_of(command_run.folder)
    for name, product in merged_products(tmp_path / "m").items():
        expected = sum(
            2.0
            * told["weights"][client]
            * own[f"{name}.lora_B.weight"]
            @ own[f"{name}.lora_A.weight"]
            for client, own in single.items()
        )  # alpha 8, rank 4
        assert torch.allclose(product, torch.from_numpy(expected), atol=1e-5)


def clients_of(folder: Path) -> list[dict[str, Any]]:
    return fedmira.load(folder).clients.to_dict("records")


def test_auto_takes_the_strength_with_the_lowest_validation_loss(
    call: Call, command_run: Any, tmp_path: Path
) -> None:
    told = call("merge", command_run.folder, "--strength", "auto", "-o", tmp_path / "m")
    tried = {float(c): loss for c, loss in told["strengths_tried"].items()}
    assert list(tried) == [1, 2, 4, 8] and told["strength"] == min(tried, key=tried.__getitem__)
    assert told["clients_asked"] == len(CLIENTS)


def test_compress_writes_a_folder_a_client(call: Call, command_run: Any, tmp_path: Path) -> None:
    told = call("compress", command_run.folder, "--rank", "2", "-o", tmp_path / "small")
    assert told["bytes_after"] * 2 == told["bytes_before"], "rank 2 of 4"
    for client in CLIENTS:
        assert set(read_lora_folder(tmp_path / "small" / client).ranks.values()) == {2}


def test_align_of_a_run_by_its_own_validation_rows(
    call: Call, command_run: Any, tmp_path: Path
) -> None:
    run = command_run.folder
    told = call("align", run, "--rows", run, "-o", tmp_path / "aligned")
    assert told["judged"] and told["coupling"] == 1.0
    for each in told["adapters"]:
        written = load_file(tmp_path / "aligned" / each["name"] / "adapter_model.safetensors")
        before = load_file(run / "adapters" / each["name"] / "adapter_model.safetensors")
        same = all(torch.equal(part, before[name]) for name, part in written.items())
        assert same is (each["takes"] != "aligned")
    assert {"graph.json", "report.html", "report.md"} <= {
        path.name for path in (tmp_path / "aligned").iterdir()
    }


def test_people_get_tables_and_names_of_their_own(
    fedmira: Call, command_run: Any, tmp_path: Path
) -> None:
    one, two = (command_run.folder / "adapters" / name for name in ("apple-1", "birch-1"))
    pair = (f"left={one}", f"right={two}")
    ended = fedmira("merge", *pair, "-o", tmp_path / "m")
    assert ended.code == 0 and "left" in ended.out and "cut left out" in ended.out
    ended = fedmira(
        "compress", *pair, "--energy", "0.9", "--around", "uniform", "-o", tmp_path / "c"
    )
    assert ended.code == 0 and "of them for all" in ended.out
    ended = fedmira("align", *pair, "-o", tmp_path / "a")
    assert ended.code == 0 and "not known: Whether anybody is better off" in ended.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("merge", "RUN", "--by", "precisely"),
            "choose from metagpt, rows, uniform, ties, precision",
        ),
        (("merge", "RUN", "--strength", "a lot"), "give a number above 0, or 'auto'"),
        (("merge", "RUN", "RUN"), "a run stands alone"),
        (("compress", "RUN"), "give --rank, --energy or both"),
        (("compress", "RUN", "--rank", "1", "--joined"), "give --around"),
        (("align", "RUN", "--set", "data.prompt=plain"), "give rows too"),
        (("align", "RUN", "--coupling", "2"), "coupling is 2; must be within 0..1"),
        (("align", "nowhere"), "there is no adapter_config.json"),
        (("align", "graph.json=ONE", "b=TWO"), "called 'graph.json', as is something of the"),
        (("compress", "merged=ONE", "b=TWO", "--rank", "1", "--around", "uniform"), "'merged'"),
        (("merge", "a=ONE", "a=TWO"), "both have this name"),
        (("merge", "a=ONE", "b="), "b=: names no folder"),
        (("align", "RUN", "--rows", "nowhere"), "there are no such rows; give a folder with"),
        (("align", "ONE", "TWO", "--rows", "RUN"), "is a run, and the adapters are given as"),
        (("align", "RUN", "--rows", "RUN/..", "--set", "seed=1"), "seed would change nothing"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    fedmira: Call, command_run: Any, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    run = command_run.folder
    places = {"RUN": run, "ONE": run / "adapters" / "apple-1", "TWO": run / "adapters" / "birch-1"}
    given = list(arguments)
    for word, place in places.items():
        given = [each.replace(word, str(place)) for each in given]
    ended = fedmira(*given, "--output", tmp_path / "out")
    assert ended.code == 2 and told in ended.err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(fedmira: Call, command_run: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for verb, *more in (("merge",), ("compress", "--rank", "1"), ("align",)):
        ended = fedmira(verb, command_run.folder, *more, "--output", tmp_path)
        assert ended.code == 2 and "never overwritten" in ended.err


def test_a_result_merges_as_the_verb_does(command_run: Any, tmp_path: Path) -> None:
    result = fedmira.load(command_run.folder)
    made = result.merge(by="metagpt", rank=3)
    fedmira.merge(command_run.folder, rank=3, output=tmp_path / "verb")
    made.save(tmp_path / "result")
    name = "adapter_model.safetensors"
    assert (tmp_path / "verb" / name).read_bytes() == (tmp_path / "result" / name).read_bytes()
    with pytest.raises(ConfigError, match="no client 'nowhere'"):
        result.merge(["nowhere"])
    with pytest.raises(ConfigError, match="2 weights for 1 clients"):
        result.merge(["apple-1"], weights=[1, 2])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"adapters": 3}, "adapters is of type int"),
        ({"rank": "2"}, "rank is '2'; must be a whole number"),
        ({"keep": "x"}, "keep is 'x'; must be a number"),
        ({"output": None}, "output is of type NoneType"),
    ],
)
def test_what_is_of_another_type_is_named(
    command_run: Any, tmp_path: Path, arguments: dict[str, Any], told: str
) -> None:
    given = {"adapters": command_run.folder, "output": tmp_path / "out"} | arguments
    with pytest.raises(ConfigError, match=told):
        fedmira.merge(given.pop("adapters"), **given)


def test_rows_beside_a_run_are_read_in_the_form_of_its_prompts(
    command_run: Any, tmp_path: Path
) -> None:
    """Each client's training rows again, from files: the losses are those of the run's own form."""
    run, rows = command_run.folder, tmp_path / "rows"
    config = fedmira.load_config(run / "config.toml")
    assert (config.data.prompt, config.data.max_length) == ("plain", 64), "not the defaults"
    shutil.copytree(config.data.path, rows)
    found = fedmira.align(run, rows=rows, output=tmp_path / "out").figures["adapters"]
    told = fedmira.align(
        [run / "adapters"],
        rows=rows,
        settings={"data.prompt": "plain", "data.max_length": 64},
        output=tmp_path / "told",
    ).figures["adapters"]
    assert any(each["own_loss"] for each in found)
    assert [each["own_loss"] for each in found] == [each["own_loss"] for each in told]


def test_a_run_that_has_not_ended_is_told(
    command_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = shutil.copytree(command_run.folder, tmp_path / "begun")
    run = json.loads((begun / "run.json").read_text(encoding="utf-8"))
    changed = run | {"status": "interrupted", "rounds_done": 2}
    (begun / "run.json").write_text(json.dumps(changed), encoding="utf-8")
    accept_files(begun, ["run.json"])
    fedmira.merge(begun, output=tmp_path / "m")
    assert "has not ended (status: interrupted after round 2)" in caplog.text
