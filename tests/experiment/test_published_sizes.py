"""What the published presets send on models of the published shapes.

The parameters of MIRA's Table II, and our own MiB beside its MB.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedmira.config import load_config
from fedmira.experiment import client_ranks
from fedmira.messages import Payload
from fedmira.model import find_targets, start_adapter

MIB = 2**20
LLAMA = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=24,
    num_attention_heads=16,
    tie_word_embeddings=False,
)
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)


def on_meta(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Shapes without numbers."""
    with torch.device("meta"):
        return make()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return on_meta(lambda: LlamaForCausalLM(LLAMA))


def payload(model: PreTrainedModel, preset: str) -> tuple[int, Payload]:
    """Parameters of an adapter as the preset makes it, and what travels one way."""
    settings = load_config(preset=preset).adapter
    adapter = start_adapter(find_targets(model, settings.targets), settings.rank, 0)
    return sum(tensor.numel() for tensor in adapter.values()), Payload({"adapter": adapter})


@pytest.mark.parametrize("preset", ["mira-paper-ni", "mira-paper-dolly", "fedit-ni", "fedit-dolly"])
def test_a_llama_of_1_3_billion_sends_6_mib_each_way(preset: str, llama: PreTrainedModel) -> None:
    assert llama.num_parameters() == 1_345_423_360
    parameters, sent = payload(llama, preset)
    assert parameters == 1_572_864 and sent.dtype == "float32"
    assert sent.num_bytes / MIB == 6.0  # Table II says 12 MB: both ways together


@pytest.mark.parametrize("preset", ["mira-paper-dolly-gpt2", "fedit-dolly-gpt2"])
def test_gpt2_large_sends_twice_the_published_bytes_in_float32(preset: str) -> None:
    parameters, sent = payload(on_meta(lambda: GPT2LMHeadModel(GPT2_LARGE)), preset)
    assert parameters == 4_055_040
    assert sent.num_bytes / MIB == pytest.approx(
        2 * 7.734, abs=1e-3
    )  # Table II says 7.74 MB: 16 bits, one way


def test_flexloras_types_on_that_llama_have_ranks_8_30_129_and_200(llama: PreTrainedModel) -> None:
    config = load_config(preset="flexlora-types-ni")
    targets = find_targets(llama, config.adapter.targets)
    assert len(targets) == 7 * 24
    drawn = client_ranks(
        config.adapter, [f"task-{number}" for number in range(1613)], targets, config.seed
    )
    assert set(drawn.values()) == {8, 30, 129, 200}
    assert sum(rank == 8 for rank in drawn.values()) / 1613 == pytest.approx(0.8, abs=0.03)
