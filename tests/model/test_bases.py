"""A base is what its folder says.

Whatever is missing, left over, damaged or not causal is named before training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig, RobertaForCausalLM

from fedmira.config import AdapterSettings, EngineSettings, ModelSettings
from fedmira.errors import ModelError, RunError
from fedmira.model import (
    adapter_kind,
    check_ids,
    from_model,
    load_base,
    prove_export,
    start_adapter,
)
from tiny import TinyRow, draw_rows, tiny_base, tiny_model, tiny_tokenizer

QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny base as a folder."""
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path, **more: Any) -> Any:
    return load_base(ModelSettings(base=str(folder), device="cpu", **more))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda all_: all_.pop("lm_head.weight"), r"lack lm_head\.weight"),
        (lambda all_: all_.pop(NORM), r"lack model\.norm\.weight"),
        (lambda all_: all_.update(extra=torch.ones(2)), r"hold extra, which"),
        (
            lambda all_: all_.update({QUERY: torch.ones(3, 4)}),
            r"q_proj\.weight has \[3, 4\] in the file, \[32, 32\] by config",
        ),
        (lambda all_: all_[QUERY][0].fill_(float("nan")), r"NaN or infinite in .*q_proj"),
        (lambda all_: all_[NORM][:1].fill_(float("inf")), r"NaN or infinite in model\.norm"),
        (
            lambda all_: all_.update({QUERY: all_[QUERY].to(torch.int8)}),
            r"other numbers.*q_proj\.weight \(I8\)",
        ),
        (
            lambda all_: all_.update({NORM: all_[NORM].int()}),
            r"other numbers.*model\.norm\.weight \(I32\)",
        ),
    ],
)
def test_weights_that_are_not_the_base_are_named(
    folder: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    change_weights(folder, change)
    with pytest.raises(ModelError, match=said) as caught:
        load(folder)
    assert all("\n" not in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 98}, r"lm_head\.weight has \[97, 32\] in the file, \[98, 32\]"),
        ({"hidden_size": 10**9}, r"asks for [\d,]{12,} numbers, but the weights are"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers = 1000000000, but there are only 21"),
        ({"num_hidden_layers": 1}, r"hold model\.layers\.1"),
        ({"num_hidden_layers": 3}, r"lack model\.layers\.2"),
        ({"num_attention_heads": 0}, r"config\.json cannot be loaded \(ZeroDivisionError"),
        ({"hidden_size": "32"}, r"config\.json cannot be loaded"),
        ({"hidden_act": "nothing"}, r"the model cannot be loaded \(KeyError: 'nothing'"),
        ({"dtype": "int8"}, r"the model cannot be loaded .*int8"),
        ({"is_causal": False}, r"is not causal \(is_causal is false"),
        ({"rms_norm_eps": float("nan")}, r"logits are not finite"),
    ],
)
def test_a_config_that_cannot_be_that_of_the_weights_is_one_line(
    folder: Path, changes: dict[str, object], said: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=said):
        load(folder)


@pytest.mark.parametrize("left", [0, 5, 100, 4000])
def test_weights_that_are_cut_short_are_said_to_be(folder: Path, left: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut short"):
        load(folder)


def test_an_index_that_names_absent_files_says_which(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {QUERY: "model-1.safetensors", NORM: "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"not there: model-2\.safetensors;"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_files_are_an_error_and_no_traceback(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_tied_weights_and_old_buffers_are_not_missed(folder: Path) -> None:
    change_weights(folder, lambda all_: all_.pop("lm_head.weight"))
    change_config(folder, tie_word_embeddings=True)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda all_: all_.update({old: torch.ones(4)}))
    assert load(folder).packed


def test_a_base_folder_with_an_adapter_or_no_tokenizer_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"also holds adapter_config\.json.*merge it"):
        load(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="the folder has no tokenizer"):
        load(folder)


def test_a_tokenizer_of_pieces_alone_names_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmira.model.base.files.find_spec", lambda name: None)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ModelError, match=r"pip install 'fedmira\[sentencepiece\]'"):
        load(folder)


def test_a_padding_id_beyond_the_embeddings_is_replaced(folder: Path) -> None:
    change_config(folder, pad_token_id=500)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[more]"})
    tokenizer.save_pretrained(folder)
    base = load(folder)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id


def test_rows_are_held_against_the_embeddings() -> None:
    base = tiny_base()
    fine, beyond = TinyRow((3, 96), (2,)), TinyRow((3,), (97, 2))
    check_ids(base, {"north": [fine]})
    with pytest.raises(ModelError, match=r"client 'south' use token id 97 .* has 97 embeddings"):
        check_ids(base, {"north": [fine], "south": [fine, beyond]})


def roberta(decoder: bool) -> RobertaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = RobertaConfig(
        vocab_size=97,
        num_attention_heads=4,
        max_position_embeddings=66,
        pad_token_id=0,
        is_decoder=decoder,
        **shape,
    )
    model = RobertaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return model.eval()


def test_an_encoder_is_refused_and_loads_as_a_decoder() -> None:
    with pytest.raises(ModelError, match=r"not causal \(is_decoder is false in its config\.json\)"):
        from_model(roberta(False), tiny_tokenizer(), "encoder")
    base = from_model(roberta(True), tiny_tokenizer(), "decoder")
    # its table of positions begins behind the row of the padding token
    assert base.max_positions == 65 and not base.packed


def test_layers_that_text_does_not_reach_are_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama")
    model.model.tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
    base = from_model(model, tiny_tokenizer(), "with a tower")
    kind = adapter_kind(AdapterSettings(targets=("q_proj",)), base, EngineSettings())
    assert [target.name for target in kind.targets] == [
        f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)
    ]
    assert "1 of 3 adapter.targets get no gradient" in caplog.text
    assert "model.tower.q_proj" in caplog.text
    with pytest.raises(ModelError, match=r"none of these layers .*model\.tower\.q_proj"):
        adapter_kind(AdapterSettings(targets=("tower.q_proj",)), base, EngineSettings())


def test_a_saved_adapter_is_proven_with_plain_peft_and_a_changed_one_is_found(
    folder: Path, tmp_path: Path
) -> None:
    base = load(folder)
    kind = adapter_kind(AdapterSettings(rank=4, alpha=8.0), base, EngineSettings())
    draw = torch.Generator().manual_seed(1)
    adapter = {
        name: torch.randn(tensor.shape, generator=draw) * 0.1
        for name, tensor in start_adapter(kind.targets, 4, 0).items()
    }
    rows, saved = draw_rows(4, 3, 0), tmp_path / "saved"
    kind.write(saved, adapter)
    total = kind.losses([adapter], [kind.scale(4)], [rows], 500)[0]
    reported = total / sum(len(row.response) for row in rows)
    found = prove_export(base, kind.targets, saved, adapter, rows, reported)
    assert found == pytest.approx(reported, rel=1e-4)
    with pytest.raises(RunError, match="its loss on 4 rows is"):
        prove_export(base, kind.targets, saved, adapter, rows, reported + 0.1)
    name = sorted(adapter)[0]
    other = adapter | {name: adapter[name] + 1}
    with pytest.raises(RunError, match=f"other numbers in {name}"):
        prove_export(base, kind.targets, saved, other, rows, reported)


@pytest.mark.parametrize(
    ("written", "given", "known"),
    [("", "", None), ("owner/base", "", "owner/base"), ("owner/base", "own/name", "own/name")],
)
def test_saved_adapters_name_the_published_base(
    folder: Path, tmp_path: Path, written: str, given: str, known: str | None
) -> None:
    change_config(folder, _name_or_path=written)
    base = load(folder, name=given)
    kind = adapter_kind(AdapterSettings(rank=2), base, EngineSettings())
    kind.write(tmp_path / "saved", start_adapter(kind.targets, 2, 0))
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == (known or str(folder.resolve()))
