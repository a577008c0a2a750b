"""Reference Trustable Decoding: hand-made stores, stores of real states, and answers with both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from fedmira.adapters import Adapter, content_hash
from fedmira.config import EvaluationSettings
from fedmira.errors import ModelError, RunError
from fedmira.model import (
    BaseModel,
    LoraKind,
    ReferenceStore,
    find_targets,
    from_model,
    start_adapter,
)
from fedmira.model.generation import reference
from fedmira.model.generation.reference import auto_temperature
from tiny import VOCABULARY, TinyRow, draw_rows, tiny_base, tiny_tokenizer

SETTINGS = EvaluationSettings(reference_neighbours=8)
SCALE = 2.0
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def by_hand(temperature: float, neighbours: int = 32) -> ReferenceStore:
    """(0, 0) -> 5, (3, 4) -> 7, (0, 1) -> 5."""
    keys = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]], dtype=torch.float16)
    return ReferenceStore(keys, torch.tensor([5, 7, 5]), temperature, neighbours, "")


def asked(store: ReferenceStore, *targets: int) -> list[float]:
    """p_ref of tokens for the state (0, 0)."""
    queries = torch.zeros(len(targets), store.keys.shape[0] * store.keys.shape[2])
    return store.of_targets(queries, torch.tensor(targets)).tolist()


def test_squared_distances_weigh_as_in_the_authors_code() -> None:
    near, far = 1 + math.exp(-1 / 10), math.exp(-25 / 10)
    five, seven, other = asked(by_hand(10.0), 5, 7, 6)
    assert five == pytest.approx(near / (near + far), abs=1e-6)
    assert (five, seven) == pytest.approx((0.958687, 0.041313), abs=1e-6)
    assert other == 0


def test_a_high_temperature_counts_neighbours_and_a_low_one_takes_the_nearest() -> None:
    assert asked(by_hand(1e9), 5, 7) == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    one = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]])
    lone = ReferenceStore(one, torch.tensor([9, 7, 5]), 1e-4, 32, "")
    assert asked(lone, 9, 7, 5) == pytest.approx([1, 0, 0], abs=1e-6)


def test_only_the_nearest_neighbours_count() -> None:
    assert asked(by_hand(1e9, neighbours=2), 5, 7) == pytest.approx([1, 0], abs=1e-6)


def test_heads_have_neighbours_of_their_own_and_count_alike() -> None:
    # Head 1 reads the first number and head 2 the second: states (0, 3) -> 5 and (4, 0) -> 7.
    keys = torch.tensor([[[0.0], [4.0]], [[3.0], [0.0]]])
    store = ReferenceStore(keys, torch.tensor([5, 7]), 10.0, 32, "")
    first = 1 / (1 + math.exp(-2 * 16 / 10))  # exp(-H d / T)
    second = math.exp(-2 * 9 / 10) / (1 + math.exp(-2 * 9 / 10))
    assert asked(store, 5) == pytest.approx([(first + second) / 2], abs=1e-6)
    assert sum(asked(store, 5, 7)) == pytest.approx(1, abs=1e-6)


def test_neighbours_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(2, 50, 3, generator=draw), torch.randn(9, 6, generator=draw)
    targets = torch.randint(0, 7, (50,), generator=draw)
    store = ReferenceStore(keys, targets, 2.0, 5, "")
    whole = store.of_targets(queries, targets[:9])
    for block in (450, 7, 3):  # as differences, and as products of few keys at a time
        monkeypatch.setattr(reference, "_BLOCK", block)
        assert torch.allclose(store.of_targets(queries, targets[:9]), whole, atol=1e-5)


def test_the_temperature_of_itself_is_the_median_distance_to_the_last_neighbour() -> None:
    keys = torch.tensor([[[0.0], [1.0], [3.0], [7.0]]])
    # To the second neighbour: 3, 2, 3, 6, squared; torch takes the lower of two middle values.
    assert auto_temperature(keys, 2) == 9
    assert auto_temperature(keys, 99) == 36  # to the farthest: 7, 6, 4, 7
    assert auto_temperature(2 * keys, 2) == 36
    assert auto_temperature(keys[:, :1], 2) == 1
    assert auto_temperature(torch.zeros(1, 5, 2), 2) > 0


def with_adapter(packed: bool = True) -> tuple[LoraKind, Adapter]:
    base: BaseModel = replace(tiny_base(), packed=packed)
    kind = LoraKind(base, find_targets(base.model, ("q_proj", "v_proj")), 4.0)
    draw = torch.Generator().manual_seed(4)
    start = start_adapter(kind.targets, 2, 4)
    return kind, {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start.items()
    }


def log_probabilities(kind: LoraKind, adapter: Adapter, row: TinyRow) -> float:
    return -kind.losses([adapter], [SCALE], [[row]], 500)[0]


def test_a_store_has_the_states_of_all_response_tokens_and_no_others() -> None:
    kind, adapter = with_adapter()
    train, test = draw_rows(5, 6, 1), draw_rows(3, 6, 2)
    store = kind.reference(adapter, SCALE, train, SETTINGS)
    assert store.targets.tolist() == [token for row in train for token in row.response]
    assert store.keys.dtype == torch.float16
    # A state asks for itself: the nearest one is its own, and its own token follows.
    sharp = replace(store, temperature=1e-6)
    own = kind.referred_losses(adapter, SCALE, train, sharp, 0.999999)
    assert max(own) < 1e-3
    assert min(kind.referred_losses(adapter, SCALE, test, sharp, 0.5)) > 1


def test_a_share_of_nothing_is_the_adapter_alone() -> None:
    kind, adapter = with_adapter()
    rows = draw_rows(4, 6, 1)
    store = kind.reference(adapter, SCALE, rows, SETTINGS)
    found = kind.referred_losses(adapter, SCALE, rows, store, 0.0)
    alone = [-log_probabilities(kind, adapter, row) for row in rows]
    assert found == pytest.approx(alone, rel=1e-5)


def test_losses_are_those_of_the_mixture() -> None:
    kind, adapter = with_adapter()
    train, share = draw_rows(5, 6, 1), 0.3
    row = TinyRow(train[0].prompt, train[0].response[:1])
    store = kind.reference(adapter, SCALE, train, SETTINGS)
    (one,) = kind.referred_losses(adapter, SCALE, [row], store, 0.0)
    (mixed,) = kind.referred_losses(adapter, SCALE, [row], store, share)
    (nearly,) = kind.referred_losses(adapter, SCALE, [row], store, 1 - 1e-9)
    expected = (1 - share) * math.exp(-one) + share * math.exp(-nearly)
    assert math.exp(-mixed) == pytest.approx(expected, rel=1e-4)


def greedy(
    kind: LoraKind, adapter: Adapter, prompt: Sequence[int], store: ReferenceStore, share: float
) -> list[int]:
    """One token after the other, each the likeliest of the mixture by its loss."""
    answer: list[int] = []
    for _ in range(6):
        read = [*prompt, *answer]
        rows = [TinyRow(tuple(read), (token,)) for token in range(97)]
        losses = kind.referred_losses(adapter, SCALE, rows, store, share)
        answer.append(losses.index(min(losses)))
    return answer


@pytest.mark.parametrize("packed", [True, False])
def test_answers_are_greedy_in_the_mixture_packed_and_padded(packed: bool) -> None:
    kind, adapter = with_adapter(packed)
    train = draw_rows(5, 6, 1)
    store = kind.reference(adapter, SCALE, train, SETTINGS)
    prompts = [train[0].prompt, draw_rows(1, 6, 9)[0].prompt]
    found = kind.referred_answers(adapter, SCALE, prompts, 6, 500, store, 0.6)
    ends = {kind.base.tokenizer.eos_token_id}
    for prompt, text in zip(prompts, found, strict=True):
        tokens = greedy(kind, adapter, prompt, store, 0.6)
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        assert text == kind.base.tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()
    # The head is as it was: nothing refers behind the block.
    plain = kind.generate([adapter], [SCALE], [(0, prompt) for prompt in prompts], 6, 500)
    assert plain == with_adapter(packed)[0].generate(
        [adapter], [SCALE], [(0, prompt) for prompt in prompts], 6, 500
    )
    assert not kind.base.model.get_output_embeddings()._forward_hooks


def test_a_store_of_another_adapter_is_refused() -> None:
    kind, adapter = with_adapter()
    rows = draw_rows(4, 6, 1)
    store = kind.reference(adapter, SCALE, rows, SETTINGS)
    assert store.adapter_sha256 == content_hash(adapter)
    other = {name: 2 * tensor for name, tensor in adapter.items()}
    with pytest.raises(RunError, match="was made with another adapter"):
        kind.referred_losses(other, SCALE, rows, store, 0.5)
    with pytest.raises(RunError, match="was made with another adapter"):
        kind.referred_answers(other, SCALE, [rows[0].prompt], 3, 500, store, 0.5)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=0.5, head_dim=8)),
        lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
        lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.1)),
    ],
    ids=["capped", "divided", "multiplied"],
)
def test_a_base_that_changes_its_scores_behind_the_head_is_refused(
    model: Callable[[], PreTrainedModel],
) -> None:
    torch.manual_seed(1)
    made = model()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20)
    base = from_model(made, tiny_tokenizer(), "tiny")
    kind = LoraKind(base, find_targets(base.model, ("q_proj",)), 4.0)
    with pytest.raises(ModelError, match="changes its scores behind the head"):
        kind.reference(start_adapter(kind.targets, 2, 1), SCALE, draw_rows(3, 6, 1), SETTINGS)


def test_what_cannot_be_referred_to_is_named() -> None:
    kind, adapter = with_adapter()
    rows = draw_rows(4, 6, 1)
    with pytest.raises(ModelError, match="does not divide the width"):
        kind.reference(adapter, SCALE, rows, SETTINGS.model_copy(update={"reference_heads": 5}))
    with pytest.raises(ModelError, match="needs training rows"):
        kind.reference(adapter, SCALE, [], SETTINGS)


def test_numbers_too_large_for_float16_are_kept_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, adapter = with_adapter()
    real = reference._states

    def large(*arguments: object) -> object:
        yield from ((row, 1e6 * hidden) for row, hidden in real(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "_states", large)
    store = kind.reference(adapter, SCALE, draw_rows(4, 6, 1), SETTINGS)
    keys: Tensor = store.keys
    assert keys.dtype == torch.float32 and bool(keys.isfinite().all())
