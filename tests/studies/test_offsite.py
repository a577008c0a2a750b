"""emulate, a run on the emulator, plug: the four losses, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedmira.config import ModelSettings
from fedmira.errors import ConfigError, ModelError
from fedmira.model import LoraKind, adapter_logits, load_base
from fedmira.studies.offsite import COLUMNS, Emulated, emulate, plug_run
from fedmira.studies.saved import clients_of, reload_adapters
from small import call_main, make_run, write_clients
from tiny import VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of eight layers, and rows."""
    folder = tmp_path_factory.mktemp("offsite")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_clients(folder / "rows", {"apple-1": 14, "birch-1": 18})
    return folder


@pytest.fixture(scope="module")
def emulator(place: Path) -> Emulated:
    return emulate(str(place / "base"), place / "emulator", left=1, right=1, drop=0.5)


@pytest.fixture(scope="module")
def run(place: Path, emulator: Emulated) -> Path:
    settings = {"algorithm.name": "local", "adapter.targets": emulator.targets}
    return make_run(emulator.folder, place / "rows", place / "run", settings)


def test_an_emulator_names_both_ends(emulator: Emulated) -> None:
    assert emulator.emulator.layers == (0, 1, 3, 6, 7)  # of 1 to 6, three at the stride 5 / 2
    assert emulator.targets == tuple(
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 4) for name in "qv"
    )
    assert emulator.parameters < emulator.of


def test_all_four_losses_are_those_of_plain_models(
    place: Path, run: Path, emulator: Emulated, tmp_path: Path
) -> None:
    saved = reload_adapters(run)
    found = plug_run(saved, str(place / "base"))
    found.save(tmp_path / "plugged")
    whole = load_base(ModelSettings(base=str(place / "base"), device="cpu"))
    data = clients_of(saved).data
    assert set(found.losses) == {"apple-1", "birch-1"}
    for client, line in found.losses.items():
        rows = data[client].test
        for model, folder, names in (
            (whole, tmp_path / "plugged" / client, ("plugged", "base")),
            (saved.kind.base, run / "adapters" / client, ("emulator_tuned", "emulator")),
        ):
            tokens = [(*row.prompt, *row.response) for row in rows]
            total = [0.0, 0.0]
            for row, ids in zip(rows, tokens, strict=True):
                for side, each in enumerate(every_logit(model, folder, ids)):
                    start = len(row.prompt) - 1
                    scores = each[start : start + len(row.response)].log_softmax(-1)
                    total[side] -= float(
                        scores.gather(1, torch.tensor(row.response)[:, None]).sum()
                    )
            count = sum(len(row.response) for row in rows)
            assert [line[name] for name in names] == pytest.approx(
                [each / count for each in total], abs=1e-4
            )
    assert found.means["plugged"] == pytest.approx(
        sum(line["plugged"] for line in found.losses.values()) / 2
    )
    assert not found.notes


def every_logit(model: object, folder: Path, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """Logits with and without the adapter at all places, each read at the end of its prefix."""
    prefixes = [ids[: length + 1] for length in range(len(ids) - 1)]
    found, bare = adapter_logits(model, folder, prefixes)  # type: ignore[arg-type]
    return [torch.stack([one[0] for one in each]) for each in (found, bare)]


def test_written_adapters_are_those_that_were_trained(
    place: Path, run: Path, tmp_path: Path
) -> None:
    saved = reload_adapters(run)
    found = plug_run(saved, str(place / "base"))
    found.save(tmp_path / "plugged")
    assert isinstance(found.kind, LoraKind)
    for client, adapter in saved.adapters.items():
        again = found.kind.read(tmp_path / "plugged" / client)
        renamed = {name.replace("layers.4.", "layers.7."): part for name, part in adapter.items()}
        assert set(again) == set(renamed)
        assert all(torch.equal(again[name], renamed[name]) for name in again)
    figures = json.loads((tmp_path / "plugged" / "plug.json").read_text(encoding="utf-8"))
    assert set(figures["mean"]) == set(COLUMNS)


def test_another_base_and_a_run_on_no_emulator_are_refused(
    place: Path, run: Path, tmp_path: Path, base_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="the emulator was made of another base"):
        plug_run(reload_adapters(run), str(base_folder))
    other = make_run(
        place / "base", place / "rows", tmp_path / "plain", {"algorithm.name": "local"}
    )
    with pytest.raises(ModelError, match="so it is no emulator"):
        plug_run(reload_adapters(other), str(place / "base"))


def test_adapters_in_the_middle_are_told(place: Path, emulator: Emulated, tmp_path: Path) -> None:
    run = make_run(emulator.folder, place / "rows", tmp_path / "all", {"algorithm.name": "local"})
    found = plug_run(reload_adapters(run), str(place / "base"))
    assert any("12 of 20 tensors of each adapter belong to the thinned" in n for n in found.notes)


def test_where_the_rows_are_elsewhere_adapters_are_plugged_all_the_same(
    place: Path, run: Path
) -> None:
    rows = place / "rows"
    aside = rows.rename(place / "elsewhere")
    try:
        found = plug_run(reload_adapters(run), str(place / "base"))
    finally:
        aside.rename(rows)
    assert len(found.adapters) == 2 and not found.losses
    assert found.notes[0].startswith("nothing was measured, as the rows are not here")


def test_the_verbs_say_what_they_wrote(place: Path, run: Path, tmp_path: Path) -> None:
    base = str(place / "base")
    arguments = ["--left", "1", "--right", "1", "--output", str(tmp_path / "thin")]
    made = call_main("emulate", base, *arguments)
    assert made.code == 0
    assert "--set 'adapter.targets=" in made.err and str(tmp_path / "thin") in made.out
    ended = call_main("plug", str(run), "--base", base, "--format", "json")
    assert ended.code == 0
    assert set(json.loads(ended.out)["mean"]) == set(COLUMNS)
    again = call_main("emulate", base, *arguments)
    assert again.code == 2 and "never overwritten" in again.err
    few = call_main("emulate", base, "--drop", "0.9", "--output", str(tmp_path / "few"))
    assert few.code == 2 and "at least 2 must" in few.err
    assert not (tmp_path / "few").exists()
