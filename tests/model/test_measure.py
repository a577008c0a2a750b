"""The best of several adapters for each client, on its own rows.

Against one client at a time on the model's own forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedmira.adapters import Adapter
from fedmira.config import AdapterSettings, EngineSettings
from fedmira.model import (
    BaseModel,
    Contender,
    TargetModule,
    adapter_kind,
    choose_adapters,
    find_targets,
    start_adapter,
    summed_losses,
)
from tiny import TinyRow, draw_rows, tiny_base

SCALES = (2.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base()


@pytest.fixture(scope="module")
def targets(base: BaseModel) -> list[TargetModule]:
    return find_targets(base.model, ())


def noisy(targets: Sequence[TargetModule], rank: int, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start_adapter(targets, rank, seed).items()
    }


def merged_loss(base: BaseModel, adapter: Adapter, scale: float, rows: Sequence[TinyRow]) -> float:
    """The sum over response tokens with s B A added to the weights, a row at a time."""
    model = tiny_base().model
    with torch.no_grad():
        for name, tensor in adapter.items():
            if name.endswith(".lora_B.weight"):
                path = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                model.get_submodule(path).weight += (
                    scale * tensor @ adapter[name.replace("lora_B", "lora_A")]
                )
        total = 0.0
        for row in rows:
            scores = (
                model(input_ids=torch.tensor([[*row.prompt, *row.response]]))
                .logits[0]
                .log_softmax(dim=-1)
            )
            total -= sum(
                float(scores[len(row.prompt) - 1 + j, token])
                for j, token in enumerate(row.response)
            )
    return total


@pytest.fixture(scope="module")
def contenders(targets: list[TargetModule]) -> list[Contender]:
    """Three clients of different rank and scale with two to four adapters each."""
    return [
        Contender(
            [noisy(targets, rank, 10 * k + i) for i in range(count)],
            SCALES[k],
            draw_rows(3 + k, 4 * k, k),
        )
        for k, (rank, count) in enumerate([(4, 3), (2, 4), (6, 2)])
    ]


def test_losses_side_by_side_are_those_of_merged_weights(
    base: BaseModel, targets: list[TargetModule], contenders: list[Contender]
) -> None:
    firsts = [one.adapters[0] for one in contenders]
    losses, tokens, _ = summed_losses(
        base, targets, firsts, SCALES, [one.rows for one in contenders], 60
    )
    for k, one in enumerate(contenders):
        assert losses[k] == pytest.approx(
            merged_loss(base, firsts[k], SCALES[k], one.rows), rel=2e-5
        )
        assert (
            sum(len(row.response) for row in one.rows)
            < tokens[k]
            <= sum(len(row.prompt) + len(row.response) for row in one.rows)
        )


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_each_client_takes_the_adapter_with_the_lowest_loss(
    budget: int, base: BaseModel, targets: list[TargetModule], contenders: list[Contender]
) -> None:
    expected = []
    for one in contenders:
        losses = [merged_loss(base, adapter, one.scale, one.rows) for adapter in one.adapters]
        assert (
            min(abs(left - right) for left in losses for right in losses if left is not right)
            > 1e-3
        ), "the case must be clear"
        expected.append(losses.index(min(losses)))
    assert [
        choice.index for choice in choose_adapters(base, targets, contenders, budget)
    ] == expected
    assert len(set(expected)) > 1
    alone = [choose_adapters(base, targets, [one], budget)[0] for one in contenders]
    assert [choice.index for choice in alone] == expected


def test_of_equals_the_first_is_taken_and_without_rows_the_last(
    base: BaseModel, targets: list[TargetModule], contenders: list[Contender]
) -> None:
    one = contenders[0]
    equals = replace(one, adapters=[one.adapters[0], dict(one.adapters[0]), one.adapters[0]])
    found = choose_adapters(
        base, targets, [equals, replace(one, rows=[]), replace(one, adapters=one.adapters[:1])], 60
    )
    assert [choice.index for choice in found] == [0, 2, 0]
    assert [choice.tokens > 0 for choice in found] == [True, False, False], (
        "nothing is computed where there is nothing to choose"
    )
    assert choose_adapters(base, targets, [], 60) == []


@pytest.mark.parametrize("spoiled", [0, 1])
def test_an_adapter_that_gives_no_number_is_never_taken(
    spoiled: int, base: BaseModel, targets: list[TargetModule], contenders: list[Contender]
) -> None:
    one = contenders[0]
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in one.adapters[0].items()}
    adapters = [broken if i == spoiled else one.adapters[0] for i in range(2)]
    assert (
        choose_adapters(base, targets, [replace(one, adapters=adapters)], 60)[0].index
        == 1 - spoiled
    )
    assert (
        choose_adapters(base, targets, [replace(one, adapters=[broken, broken])], 60)[0].index == 0
    )


@pytest.mark.parametrize(
    "settings", [{}, {"kind": "prompt", "virtual_tokens": 4}], ids=["lora", "prompt"]
)
def test_where_memory_ran_out_the_next_adapter_starts_with_the_lowered_budget(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A model that has memory for 130 tokens only.

    200 are too many once, and not again for the second and the third adapter.
    """
    base = tiny_base()
    kind = adapter_kind(AdapterSettings(**settings), base, EngineSettings())
    adapters = [kind.starts({"one": 4}, seed)["one"] for seed in range(3)]
    one = Contender(adapters, 1.0, draw_rows(40, 0, 3))
    expected = kind.choose([one], 100)

    def limited(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        given = (
            options["input_ids"]
            if options.get("input_ids") is not None
            else options["inputs_embeds"][..., 0]
        )
        if given.numel() > 130:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = base.model.base_model.register_forward_pre_hook(limited, with_kwargs=True)
    assert kind.choose([one], 200) == expected
    handle.remove()
    assert caplog.text.count("going on with at most 100 tokens") == 1


def test_every_pass_over_the_rows_is_counted(
    base: BaseModel, targets: list[TargetModule], contenders: list[Contender]
) -> None:
    for one, choice in zip(
        contenders, choose_adapters(base, targets, contenders, 10_000), strict=True
    ):
        _, (each,), _ = summed_losses(
            base, targets, [one.adapters[0]], [one.scale], [one.rows], 10_000
        )
        assert choice.tokens == each * len(one.adapters)
