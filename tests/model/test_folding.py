"""An adapter folded into its base: equal logits for every shape of layer, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedmira.config import ModelSettings
from fedmira.errors import ModelError, RunError
from fedmira.model import (
    BaseModel,
    LoraKind,
    find_targets,
    from_model,
    load_base,
    write_folded,
)
from fedmira.model.kinds import folding
from tiny import ARCHITECTURES, draw_rows, tiny_model, tiny_tokenizer

ROWS = [(*row.prompt, *row.response) for row in draw_rows(5, shared=3, seed=4, longest=30)]
ALPHA, RANK = 6.0, 3


def kind_on(base: BaseModel, wanted: tuple[str, ...] = ("all-linear",)) -> LoraKind:
    return LoraKind(base, find_targets(base.model, wanted), alpha=ALPHA)


def drawn(kind: LoraKind, seed: int = 0) -> dict[str, torch.Tensor]:
    """An adapter that changes logits by much more than rounding."""
    (adapter,) = kind.starts({"a": RANK}, seed).values()
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.2 if "lora_B" in name else tensor
        for name, tensor in adapter.items()
    }


def fold(
    kind: LoraKind, place: Path, dtype: torch.dtype = torch.float32
) -> tuple[folding.FoldProof, dict[str, torch.Tensor]]:
    adapter = drawn(kind)
    kind.write(place / "adapter", adapter)
    (place / "model").mkdir()
    proof = write_folded(
        kind,
        adapter,
        source=place / "adapter",
        dtype=dtype,
        rows=ROWS,
        folder=place / "model",
        max_new_tokens=7,
    )
    return proof, adapter


@pytest.mark.parametrize("from_files", [True, False], ids=["from files", "in memory"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_merged_weights_say_what_base_and_adapter_say(
    architecture: str, from_files: bool, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    if from_files:
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        base = load_base(ModelSettings(base=str(tmp_path / "base"), device="cpu"))
    else:
        base = from_model(model, tiny_tokenizer(), "tiny")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    kind = kind_on(base)
    proof, adapter = fold(kind, tmp_path)
    assert proof.largest <= 1e-5 * proof.logit and proof.effect > 1e-2
    # The stored matrix of each layer is W + s B A (its transpose in GPT-2).
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for target in kind.targets:
        name = f"base_model.model.{target.name}"
        product = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        product = product.T if architecture == "gpt2" else product
        wanted = before[f"{target.name}.weight"] + ALPHA / RANK * product
        assert torch.allclose(merged[f"{target.name}.weight"], wanted, atol=1e-6)
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_merged_folder_ends_answers_as_the_run_does_and_is_no_copy_of_its_base(
    tmp_path: Path,
) -> None:
    base = from_model(tiny_model("llama"), tiny_tokenizer(), "tiny")
    fold(kind_on(base), tmp_path)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text("utf-8"))
    assert (written["max_new_tokens"], written["eos_token_id"]) == (7, [2])
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    assert not config.get("_name_or_path")


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    base = from_model(LlamaForCausalLM(config).eval(), tiny_tokenizer(), "tied")
    proof, _ = fold(kind_on(base), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert proof.largest <= 1e-5 * max(1.0, proof.logit)


def test_half_precision_is_written_so_and_its_rounding_is_told(tmp_path: Path) -> None:
    base = from_model(tiny_model("llama"), tiny_tokenizer(), "tiny")
    proof, _ = fold(kind_on(base), tmp_path, torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
    assert proof.exact <= 1e-5 * proof.logit < proof.largest < proof.logit / 10


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5  # float16 ends at 65504
    base = from_model(model, tiny_tokenizer(), "tiny")
    with pytest.raises(RunError, match=r"too large for it in model.layers.0.mlp.up_proj.weight"):
        fold(kind_on(base), tmp_path, torch.float16)


def test_a_wrong_sum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = from_model(tiny_model("llama"), tiny_tokenizer(), "tiny")
    right = folding._fold
    monkeypatch.setattr(
        folding, "_fold", lambda model, targets, adapter, s: right(model, targets, adapter, 1.1 * s)
    )
    with pytest.raises(RunError, match=r"differ by .* before anything was rounded"):
        fold(kind_on(base), tmp_path)


def test_a_weight_of_two_layers_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    base = from_model(model, tiny_tokenizer(), "tiny")
    with pytest.raises(ModelError, match=r"layers share their weights .*layers.1.self_attn.q_proj"):
        fold(kind_on(base, ("q_proj",)), tmp_path)
