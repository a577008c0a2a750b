"""Loading a base: real checkpoints, targets, defaults per architecture, and errors that help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from fedmira.config import AdapterSettings, EngineSettings, LocalSettings, ModelSettings
from fedmira.errors import ModelError
from fedmira.experiment import prepare_kind
from fedmira.model import (
    LocalTask,
    LoraBranch,
    StackedAdapters,
    adapter_kind,
    find_targets,
    from_model,
    load_base,
    start_adapter,
    train_cohort,
)
from fedmira.model.generation.probe import decoding_agrees
from fedmira.model.packed import attention, probe
from fedmira.model.packed.probe import losses_agree
from small import make_config
from tiny import ARCHITECTURES, draw_rows, tiny_base, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama-tok105-hf"])
def test_checkpoints_nobody_here_wrote_load_frozen_and_packed(
    name: str, shared_folder: Path
) -> None:
    base = load_base(ModelSettings(base=str(shared_folder / "models" / name)))
    assert (
        base.packed
        and not base.model.training
        and not any(p.requires_grad for p in base.model.parameters())
    )
    assert [target.name.rsplit(".", 1)[-1] for target in find_targets(base.model, ())] == [
        "q_proj",
        "v_proj",
    ] * 5
    again = load_base(ModelSettings(base=str(shared_folder / "models" / name)))
    assert again.sha256 == base.sha256


def test_bfloat16_base_keeps_float32_adapters(shared_folder: Path) -> None:
    base = load_base(
        ModelSettings(base=str(shared_folder / "models" / "stories260K-hf"), dtype="bfloat16")
    )
    assert base.dtype is torch.bfloat16 and base.packed
    stacked = StackedAdapters(
        targets := find_targets(base.model, ()), [start_adapter(targets, 4, 0)], [1.0], base.device
    )
    assert stacked.values.dtype is torch.float32


@pytest.mark.parametrize(
    ("architecture", "usual"),
    [
        ("llama", {"q_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("qwen2", {"q_proj", "v_proj"}),
        ("gemma3", {"q_proj", "v_proj"}),
    ],
)
def test_every_architecture_has_usual_targets(architecture: str, usual: set[str]) -> None:
    assert {
        target.name.rsplit(".", 1)[-1] for target in find_targets(tiny_model(architecture), ())
    } == usual


def test_conv1d_sizes_are_inputs_and_outputs_not_rows_and_columns() -> None:
    target = find_targets(tiny_model("gpt2"), ("c_attn",))[0]
    assert (target.inputs, target.outputs, target.stored_transposed) == (32, 96, True)


def test_unknown_target_lists_what_exists_and_the_head_is_not_offered() -> None:
    with pytest.raises(
        ModelError,
        match=r"'q_projj' is no linear layer.*down_proj, gate_proj, k_proj, o_proj, q_proj, "
        r"up_proj, v_proj",
    ) as caught:
        find_targets(tiny_model("llama"), ("q_projj", "v_proj", "lm_head"))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_probe_accepts_every_tested_architecture(architecture: str) -> None:
    assert tiny_base(architecture).packed


@pytest.mark.parametrize("name", ["bundled", "stories260K-hf", "babyllama-tok105-hf"])
def test_trained_models_lose_no_fast_path_to_the_rounding_of_bfloat16(
    name: str, shared_folder: Path
) -> None:
    base = load_base(
        ModelSettings(
            base=name if name == "bundled" else str(shared_folder / "models" / name),
            dtype="bfloat16",
        )
    )
    assert base.packed and base.attention == "blocks" and base.last_layer is not None
    targets = find_targets(base.model, ["q_proj", "v_proj"])
    stacked = StackedAdapters(
        targets, [start_adapter(targets, 4, 0)], [1.0], base.device, trainable=False
    )
    with torch.no_grad(), LoraBranch(base.model, stacked) as branch:
        assert decoding_agrees(base, branch)


def test_losses_of_other_tokens_are_no_rounding() -> None:
    """A row that sees the other rows, or one token less: in bfloat16, too, more than rounding."""
    base = load_base(ModelSettings(base="bundled", dtype="bfloat16"))
    ids = torch.randint(0, base.num_embeddings, (2, 24), generator=torch.Generator().manual_seed(3))

    def losses(tokens: torch.Tensor, read: int) -> torch.Tensor:
        logits = base.model(input_ids=tokens[None], use_cache=False).logits[0, read:-1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[read + 1 :], reduction="none")

    with torch.no_grad():
        alone, behind, without = (
            losses(ids[0], 12),
            losses(ids.flip(0).flatten(), 36),
            losses(ids[0, 1:], 11),
        )
    assert losses_agree(alone, alone * (1 + 2**-8), torch.bfloat16), "the last bit"
    assert not losses_agree(behind, alone, torch.bfloat16) and not losses_agree(
        without, alone, torch.bfloat16
    )


def test_a_base_that_does_not_fit_in_memory_is_not_taken_for_one_that_cannot_be_packed() -> None:
    model = tiny_model("llama")

    def refuse(module: torch.nn.Module, arguments: Any) -> None:
        raise RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        )

    handle = model.base_model.layers[1].register_forward_pre_hook(refuse)  # type: ignore[index, union-attr]
    count = sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(
        ModelError,
        match=rf"model\.base 'large': out of memory on cpu beside its {count:,} "
        r"parameters.*model\.dtype",
    ):
        from_model(model, tiny_tokenizer(), "large")
    handle.remove()
    assert from_model(model, tiny_tokenizer(), "large").packed


def test_kernels_that_are_lost_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lacking(*_: object) -> None:
        raise NotImplementedError("no such kernel on this processor")

    monkeypatch.setattr(attention, "attend_on_cpu", lacking)
    base = tiny_base()
    assert base.packed and base.attention == "rows" and base.last_layer is not None
    assert (
        "tiny llama: packed steps agree only without attention kernels, which is slower"
        in caplog.text
    )


def test_a_base_with_windows_says_how_their_attention_runs() -> None:
    assert (tiny_base().attention, tiny_base().attention_in_windows) == ("blocks", "")
    base = tiny_base("gemma3")
    assert base.packed
    assert (base.attention, base.attention_in_windows) == ("blocks", "rows")


@pytest.mark.parametrize(
    ("dtype", "seen", "reason"),
    [
        (torch.float32, {0: (False, "rows")}, "there is none for float32; set model.dtype to"),
        (torch.bfloat16, {0: (False, "joined"), 1: (True, "rows")}, "it does not agree with"),
        (torch.bfloat16, {0: (False, "joined"), 1: (True, "copied")}, None),
    ],
)
def test_a_device_that_calls_attention_for_each_row_is_warned_of(
    dtype: torch.dtype,
    seen: dict[int, tuple[bool, str]],
    reason: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = tiny_base()
    base.model.to(torch.device("meta"), dtype=dtype)
    caplog.clear()
    found = probe._attending(replace(base, attention=seen[0][1]), seen)
    assert found.attention == seen[0][1]
    assert found.attention_in_windows == (seen[1][1] if 1 in seen else "")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (reason is not None)
    assert not said or (reason is not None and reason in said[0] and "slow on meta" in said[0])


def test_the_probe_rejects_attention_with_soft_capping() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=0.5,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    assert not from_model(model, tiny_tokenizer(), "gemma2").packed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ModelSettings(base="./nowhere"), "no such folder"),
        (ModelSettings(base="bundled", device="cuda:99"), "cannot be used here"),
        (ModelSettings(base="bundled", device="abacus"), "cannot be used here"),
    ],
)
def test_errors_name_the_base_and_the_next_step(settings: ModelSettings, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_base(settings)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_base(ModelSettings(base=str(tmp_path)))


def test_a_tokenizer_that_is_too_large_for_the_model_is_said_and_loads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(50)
    assert from_model(model, tiny_tokenizer(), "mixed up").num_embeddings == 50
    assert "the tokenizer has 97 tokens and the model 50 embeddings" in caplog.text


def test_a_quantised_base_needs_a_cuda_device(base_folder: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"model\.quantization '4bit' needs a CUDA device, and model\.device is 'cpu' here",
    ):
        load_base(ModelSettings(base=str(base_folder), device="cpu", quantization="4bit"))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"
)
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_trains_close_to_the_whole_one(bits: str, base_folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra fedmira[quantized]")
    outcomes = []
    for quantization in ("none", bits):
        base = load_base(
            ModelSettings(base=str(base_folder), device="cuda", quantization=quantization)
        )  # type: ignore[arg-type]
        targets = find_targets(base.model, ())
        task = LocalTask(start_adapter(targets, 4, 1), 2.0, draw_rows(8, 9, 1), 1)
        outcomes.append(train_cohort(base, targets, [task], LocalSettings(steps=3), 0.0, 500)[0])
    assert outcomes[1].last_loss < outcomes[1].first_loss
    assert abs(outcomes[0].first_loss - outcomes[1].first_loss) < 0.3


def test_layers_that_mix_tokens_without_attention_are_never_packed() -> None:
    """A state space reads on into the next row, however faintly it does so in a trial.

    Its layer dt_proj is read past its forward method, so that no branch can act there.
    """
    model = MambaForCausalLM(
        MambaConfig(vocab_size=128, hidden_size=16, state_size=4, num_hidden_layers=2)
    )
    base = from_model(model, tiny_tokenizer(), "mamba")
    assert not base.packed
    kind = adapter_kind(AdapterSettings(targets=("in_proj", "dt_proj")), base, EngineSettings())
    assert {target.name.rsplit(".", 1)[-1] for target in kind.targets} == {"in_proj"}
    with pytest.raises(ModelError, match="none of these layers .* gets a gradient"):
        adapter_kind(AdapterSettings(targets=("dt_proj",)), base, EngineSettings())


def test_bases_whose_long_rows_change_the_positions_of_others_say_from_where_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert tiny_base().mixing_positions is None
    base = tiny_base()
    base.model.config.rope_parameters = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
    }  # as Phi-3 has it
    assert base.mixing_positions == 64
    for longest, warned in ((64, False), (65, True)):
        caplog.clear()
        prepare_kind(
            make_config(
                "bundled", "rows", {"data.max_length": longest, "adapter.targets": ["q_proj"]}
            ),
            base,
        )
        assert ("set data.max_length to 64 or less" in caplog.text) == warned
