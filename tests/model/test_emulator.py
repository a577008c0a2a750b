"""Emulators: which layers stay, that the folder says what they say, and where adapters land."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fedmira.config import ModelSettings
from fedmira.errors import ModelError, RunError
from fedmira.model import (
    BaseModel,
    LoraKind,
    adapter_logits,
    find_targets,
    in_the_middle,
    kept_layers,
    load_base,
    outer_targets,
    plugged,
    read_emulator,
    start_adapter,
    write_emulator,
)
from tiny import VOCABULARY, tiny_tokenizer

ROWS = [(1, 5, 9, 30, 2), (1, 40, 41, 42, 43, 44, 2)]


def shape(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }


MODELS = {
    "llama": lambda layers: LlamaForCausalLM(LlamaConfig(**shape(layers))),
    "gemma3": lambda layers: Gemma3ForCausalLM(
        Gemma3TextConfig(**shape(layers), head_dim=8, sliding_window=4, sliding_window_pattern=3)
    ),
    "gpt2": lambda layers: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=128)
    ),
}


def written(folder: Path, architecture: str = "llama", layers: int = 12) -> BaseModel:
    """A base of so many layers, from a folder."""
    torch.manual_seed(3)
    model: PreTrainedModel = MODELS[architecture](layers)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_base(ModelSettings(base=str(folder), device="cpu"))


def emulated(base: BaseModel, folder: Path, left: int, right: int, drop: float) -> BaseModel:
    folder.mkdir()
    write_emulator(base, left, right, drop, folder)
    return load_base(ModelSettings(base=str(folder), device="cpu"))


def logits(base: BaseModel) -> list[Tensor]:
    with torch.no_grad():
        return [base.model(input_ids=torch.tensor([row])).logits for row in ROWS]


def test_layers_are_those_of_the_authors_code() -> None:
    # n = 32, r = 30: 22 of the 28 between, at the stride 27 / 21.
    between = [2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 20, 21, 22, 23, 25, 26, 27, 29]
    assert between == [2 + int(place * 27 / 21 + 1e-9) for place in range(22)]
    assert kept_layers(32, 2, 2, 0.2) == [0, 1, *between, 30, 31]
    assert kept_layers(12, 2, 2, 0.5) == [0, 1, 2, 4, 6, 9, 10, 11]


@given(st.integers(4, 60), st.integers(1, 5), st.integers(1, 5), st.floats(0, 0.95))
def test_ends_stay_and_the_middle_keeps_its_first_and_last_layer(
    count: int, left: int, right: int, drop: float
) -> None:
    middle = count - left - right
    if middle < 2 or round(middle * (1 - drop)) < 2:
        with pytest.raises(ModelError, match="at least 2 must"):
            kept_layers(count, left, right, drop)
        return
    kept = kept_layers(count, left, right, drop)
    assert kept == sorted(set(kept))
    assert kept[: left + 1] == [*range(left + 1)]
    assert kept[-right - 1 :] == [*range(count - right - 1, count)]
    assert len(kept) == left + right + round(middle * (1 - drop))


@pytest.mark.parametrize(("left", "right", "drop"), [(0, 2, 0.5), (2, 0, 0.5), (2, 2, 1.0)])
def test_numbers_that_cannot_be_used_are_named(left: int, right: int, drop: float) -> None:
    with pytest.raises(ModelError, match=r"(left|right|drop) is"):
        kept_layers(12, left, right, drop)


@pytest.mark.parametrize("architecture", list(MODELS))
def test_nothing_dropped_is_the_base_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    base = written(tmp_path / "base", architecture, layers=6)
    whole = emulated(base, tmp_path / "emulator", 1, 1, 0.0)
    for found, wanted in zip(logits(whole), logits(base), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("architecture", list(MODELS))
def test_an_emulator_is_the_base_with_the_other_layers_left_out(
    architecture: str, tmp_path: Path
) -> None:
    base = written(tmp_path / "base", architecture, layers=8)
    emulator = emulated(base, tmp_path / "emulator", 1, 2, 0.5)
    kept = kept_layers(8, 1, 2, 0.5)
    assert kept == [0, 1, 5, 6, 7]  # m = round(5 / 2) = 2: the first and the last of 1 to 5
    dropped = set(range(8)) - set(kept)
    layers = base.model.transformer.h if architecture == "gpt2" else base.model.model.layers
    for number in dropped:
        layers[number].forward = lambda hidden_states, *_, **__: hidden_states
    for found, wanted in zip(logits(emulator), logits(base), strict=True):
        assert torch.equal(found, wanted)
    assert emulator.num_parameters < base.num_parameters


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_lands_on_the_layers_it_was_trained_on(
    architecture: str, tmp_path: Path
) -> None:
    base = written(tmp_path / "base", architecture)
    thin = emulated(base, tmp_path / "emulator", 2, 2, 0.5)
    about = read_emulator(tmp_path / "emulator")
    names = outer_targets(thin.model, about, ())
    adapter = start_adapter(find_targets(thin.model, names), 2, 1)
    moved = plugged(adapter, about)
    path = "transformer.h" if architecture == "gpt2" else "model.layers"
    places = {int(name.split(f"{path}.")[1].split(".")[0]) for name in moved}
    assert places == {0, 1, 10, 11}  # the last of the emulator is the last of the base
    assert list(adapter.values()) == list(moved.values())
    assert not in_the_middle(adapter, about)
    paths = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in moved}
    assert paths <= {target.name for target in find_targets(base.model, ())}


def test_plugging_an_adapter_whose_b_is_zero_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    base = written(tmp_path / "base")
    thin = emulated(base, tmp_path / "emulator", 2, 2, 0.5)
    about = read_emulator(tmp_path / "emulator")
    names = outer_targets(thin.model, about, ())
    moved = plugged(start_adapter(find_targets(thin.model, names), 2, 1), about)
    paths = sorted({name.removeprefix("base_model.model.").split(".lora_")[0] for name in moved})
    kind = LoraKind(base, find_targets(base.model, paths), 8.0)
    kind.write(tmp_path / "plugged", moved)
    with_adapter, without = adapter_logits(base, tmp_path / "plugged", ROWS)
    for found, wanted in zip(with_adapter, without, strict=True):
        assert torch.equal(found, wanted)


def test_what_is_no_emulator_or_was_changed_is_refused(tmp_path: Path) -> None:
    base = written(tmp_path / "base")
    with pytest.raises(ModelError, match=r"holds no emulator.json"):
        read_emulator(tmp_path / "base")
    emulated(base, tmp_path / "emulator", 2, 2, 0.5)
    file = tmp_path / "emulator" / "emulator.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"left": 2', '"left": 1'), encoding="utf-8")
    with pytest.raises(ModelError, match="not those that left, right and drop give"):
        read_emulator(tmp_path / "emulator")
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="not what `fedmira emulate` writes"):
        read_emulator(tmp_path / "emulator")


def test_tensors_of_no_layer_are_refused(tmp_path: Path) -> None:
    base = written(tmp_path / "base")
    emulated(base, tmp_path / "emulator", 2, 2, 0.5)
    about = read_emulator(tmp_path / "emulator")
    for name in ("base_model.model.lm_head.lora_A.weight", "x.model.layers.99.q.lora_A.weight"):
        with pytest.raises(RunError, match="belongs to none of the emulator's layers"):
            plugged({name: torch.zeros(1)}, about)
