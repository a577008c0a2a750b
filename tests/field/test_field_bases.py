"""More inputs of the kinds that `test_bases.py` is about, which nobody reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedmira
from fedmira.errors import ModelError
from field.inputs import (
    byte_tokenizer,
    call,
    check,
    options,
    refused,
    run,
    run_json,
    special_ids,
    watering,
    write_clients,
    write_random_base,
)
from small import table_of

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
PLAIN = {"data__prompt": "plain"}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients of twelve rows."""
    folder = tmp_path_factory.mktemp("field-rows")
    return write_clients(folder, {name: watering(name) for name in ("fern", "moss")})


@pytest.fixture
def own_base(plain_base: Path, tmp_path: Path) -> Path:
    """A copy of the plain base, to be changed."""
    shutil.copytree(plain_base, tmp_path / "own")
    return tmp_path / "own"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def made_config(kind: str, **settings: Any) -> Any:
    """A config of transformers by its model type, for the tokenizer whose tokens are bytes."""
    from transformers import AutoConfig

    tokenizer = byte_tokenizer()
    return AutoConfig.for_model(
        kind, **{"vocab_size": len(tokenizer), **special_ids(tokenizer), **settings}
    )


def refused_before_training(base: Path, rows: Path, output: Path, *words: str) -> None:
    """Asserts that check and run refuse a base in the same words, and that no folder is made."""
    checked = call("check", *options(base, rows, **PLAIN))
    said = refused(checked, *words)
    ended = call("run", *options(base, rows, **PLAIN), "--output", output)
    assert refused(ended, *words) == said
    assert not output.exists()


# Kind C: the base is not the base.


def test_a_base_with_tied_embeddings_needs_no_head_of_its_own(
    own_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Kind C: what is missing there is nothing to be drawn at random."""
    change_weights(own_base, lambda all_: all_.pop("lm_head.weight"))
    change_config(own_base, tie_word_embeddings=True)
    run(tmp_path / "out", own_base, rows, **PLAIN)
    measured = table_of(tmp_path / "out", "clients")
    ended = call("evaluate", tmp_path / "out", "--format", "json")
    assert ended.code == 0, ended.err
    for row, again in zip(measured, json.loads(ended.out), strict=True):
        assert again["test_loss"] == pytest.approx(float(row["after_align_loss"]), rel=1e-5)


# Kind D: bases that are not causal.


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_a_decoder_that_reads_ahead_is_refused(kind: str, rows: Path, tmp_path: Path) -> None:
    """Kind D."""
    base = write_random_base(tmp_path / "base", config=made_config(kind, **GROUPED))
    assert check(base, rows, **PLAIN)["clients"]
    change_config(base, is_causal=False)
    refused_before_training(base, rows, tmp_path / "out", "not causal", "is_causal is false")


# Kind L: what ended in a traceback.


def words_tokenizer(beyond: str, away: int = 4) -> tuple[Any, int]:
    """A tokenizer of words of which one has an id far behind the others, and that id.

    There are as many tokens as embeddings then, and one of them has none.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = ["Say when to water.", *(row["input"] for row in watering("fern"))]
    words = sorted({word for text in texts for word in text.replace(".", " .").split()})
    ids = {
        word: place
        for place, word in enumerate(
            ["<pad>", "<s>", "</s>", "today", "tomorrow", "never", "of", *words]
        )
    }
    ids[beyond] = len(ids) + away
    made = Tokenizer(models.WordLevel(ids, unk_token="of"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped: Any = PreTrainedTokenizerFast
    tokenizer = wrapped(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return tokenizer, ids[beyond]


@pytest.mark.parametrize("part", ["prompt", "response"])
def test_rows_with_an_id_beyond_the_embeddings_are_refused_before_anything_is_made(
    tmp_path: Path, part: str
) -> None:
    """Kind L."""
    tokenizer, top = words_tokenizer("fog")
    config = made_config("llama", **GROUPED, **{"vocab_size": len(tokenizer)})
    base = write_random_base(tmp_path / "base", tokenizer, config)
    fine = write_clients(tmp_path / "fine", {"fern": watering("fern")})
    run(tmp_path / "first", base, fine, **PLAIN)
    key = "input" if part == "prompt" else "output"
    foggy = watering("fern")
    foggy[7][key] += " fog"
    folder = write_clients(tmp_path / "rows", {"fern": foggy})
    words = (f"token id {top} ('fog')", f"has {len(tokenizer)} embeddings", "'fern'")
    refused_before_training(base, folder, tmp_path / "out", *words)
    ended = call("generate", tmp_path / "first", "--client", "fern", "pot 2 fog")
    refused(ended, f"token id {top} ('fog')")


def test_added_tokens_without_embeddings_matter_where_rows_use_them(tmp_path: Path) -> None:
    """Kind L."""
    base = write_random_base(tmp_path / "base")
    more = byte_tokenizer()
    more.add_tokens(["[MORE]"])
    more.save_pretrained(base)
    fine = write_clients(tmp_path / "fine", {"fern": watering("fern")})
    assert check(base, fine, **PLAIN)["clients"]
    used = watering("fern")
    used[0]["input"] = "[MORE]"
    folder = write_clients(tmp_path / "rows", {"fern": used})
    refused_before_training(base, folder, tmp_path / "out", "'[MORE]'", "embeddings")


# Bases of experts, whose adapters PEFT may convert.

EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
MIXED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**GROUPED, **EXPERTS, "mlp_only_layers": [0]},
    "deepseek_v2": {
        **SHAPE,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        **SHAPE,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
}
"""Small bases of experts, some with a layer or a shared expert of the usual form."""


GATED = ["gate_proj", "up_proj", "down_proj"]


def effect_of(base: Path, adapter: Path) -> float:
    """How far an adapter moves the logits, loaded as a user of plain PEFT loads it."""
    import warnings

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    ids = torch.arange(30, 50)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about names in its conversion
        plain = made.from_pretrained(base).eval()(ids).logits
        moved = PeftModel.from_pretrained(made.from_pretrained(base), str(adapter)).eval()
        return float((moved(ids).logits - plain).abs().max())


@pytest.mark.parametrize("targets", [GATED, ["down_proj"], ["o_proj"]], ids=" ".join)
@pytest.mark.parametrize("kind", sorted(MIXED))
def test_adapters_that_plain_peft_would_lose_are_refused_and_others_act(
    kind: str, targets: list[str], rows: Path, tmp_path: Path
) -> None:
    """Kind M: PEFT rewrites the names of layers that it takes for those of experts.

    Each of these bases has a layer, or a shared expert, of the usual form beside its experts.
    """
    base = write_random_base(tmp_path / "base", config=made_config(kind, **MIXED[kind]))
    settings = {**PLAIN, "adapter__targets": targets, "local__learning_rate": 0.05}
    ended = call("run", *options(base, rows, **settings), "--output", tmp_path / "out")
    if ended.code:
        assert targets != ["o_proj"], "PEFT leaves attention as it is"
        refused(ended, "adapter.targets", "plain PEFT leaves", *targets)
        assert not (tmp_path / "out").exists()
        with pytest.raises(ModelError, match="plain PEFT leaves"):
            fedmira.check(
                clients=rows,
                base=base,
                method="local",
                settings={"adapter.targets": targets, "model.device": "cpu"},
            )
        return
    document = run_json(tmp_path / "out")
    (client,) = document["export"]["checked"]
    reported = {row["client"]: row for row in table_of(tmp_path / "out", "clients")}[client]
    assert document["export"]["checked"][client] == pytest.approx(
        float(reported["after_align_loss"]), rel=1e-4
    )
    assert effect_of(base, tmp_path / "out" / "adapters" / client) > 1e-3
