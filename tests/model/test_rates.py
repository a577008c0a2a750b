"""Learning rates over a run, of two factors, and of ranks: each as torch and PEFT have them."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmira.adapters import Adapter
from fedmira.config import AdapterSettings, Config, EngineSettings, LocalSettings, load_config
from fedmira.errors import ConfigError
from fedmira.model import (
    LocalTask,
    adapter_kind,
    count_steps,
    find_targets,
    rate_shares,
    start_adapter,
    train_cohort,
)
from fedmira.model.training.batches import batch_indices
from tiny import TinyRow, draw_rows, tiny_base, tiny_model

TOLERANCE = 5e-5


def with_torch(
    rows: list[TinyRow], start: Adapter, settings: LocalSettings, rates: tuple[float, ...]
) -> Adapter:
    """One client by PEFT and torch's AdamW, with a group for A and one for B."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    peft.set_peft_model_state_dict(model, dict(start))
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {"params": [each for name, each in named if key in name], "ratio": ratio}
        for key, ratio in (("lora_A", 1.0), ("lora_B", settings.lora_plus_ratio))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=settings.weight_decay)
    for step, chosen in enumerate(batch_indices(len(rows), settings, 7)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rates[step] * group["ratio"]
        optimizer.zero_grad()
        sums, count = torch.zeros(()), 0
        for row in (rows[i] for i in chosen):
            ids = torch.tensor([[*row.prompt, *row.response]])
            logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
            target = torch.tensor(row.response)
            sums = sums + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            count += len(row.response)
        (sums / count).backward()
        torch.nn.utils.clip_grad_norm_([each for _, each in named], settings.max_grad_norm)
        optimizer.step()
    return dict(peft.get_peft_model_state_dict(model, save_embedding_layers=False))


@pytest.mark.parametrize(
    "settings",
    [
        LocalSettings(steps=4, batch_size=4, schedule="cosine", weight_decay=0.1),
        LocalSettings(steps=4, batch_size=4, lora_plus_ratio=8),
        LocalSettings(steps=4, batch_size=4, schedule="linear", warmup_steps=6, lora_plus_ratio=4),
    ],
    ids=["cosine", "LoRA+", "all together"],
)
def test_rates_are_those_of_torchs_groups_and_schedulers(settings: LocalSettings) -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    rows, others = draw_rows(9, 6, 1), draw_rows(5, 4, 2)
    rates = rate_shares(settings, 2, 3, 4) or (1.0,) * 4
    start = start_adapter(targets, 4, 11)
    tasks = [
        LocalTask(start, 4.0, rows, 7, rates=rates),
        LocalTask(start, 4.0, others, 8, rates=(0.5, 0.5, 0.5, 0.5)),
    ]
    first, _ = train_cohort(base, targets, tasks, settings, 0.0, 300)
    expected = with_torch(rows, start, settings, rates)
    assert (
        max(float((first.adapter[name] - expected[name]).abs().max()) for name in expected)
        < TOLERANCE
    )


@given(
    rounds=st.integers(1, 20),
    steps=st.integers(1, 12),
    schedule=st.sampled_from(["linear", "cosine"]),
)
def test_a_schedule_falls_from_one_towards_zero_over_the_run(
    rounds: int, steps: int, schedule: str
) -> None:
    settings = LocalSettings(steps=steps, schedule=schedule)  # type: ignore[arg-type]
    shares = [
        share
        for number in range(1, rounds + 1)
        for share in rate_shares(settings, number, rounds, steps) or ()
    ]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] > 0
    done = (rounds * steps - 1) / (rounds * steps)
    last = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    assert shares[-1] == pytest.approx(last)


def test_warm_up_counts_the_steps_of_a_client_of_every_round() -> None:
    settings = LocalSettings(steps=3, warmup_steps=5)
    assert rate_shares(settings, 1, 9, 3) == pytest.approx((1 / 5, 2 / 5, 3 / 5))
    assert rate_shares(settings, 2, 9, 3) == pytest.approx((4 / 5, 1, 1))
    assert rate_shares(LocalSettings(), 1, 9, 3) is None


def test_steps_follow_the_rows() -> None:
    settings = LocalSettings(steps_per_row=0.1)
    assert [count_steps(rows, settings) for rows in (2, 16, 128)] == [1, 2, 13]
    assert len(list(batch_indices(128, settings, 0))) == 13


@pytest.mark.parametrize("rank", [2, 9])
def test_a_rank_stabilised_adapter_is_that_of_peft(tmp_path: Path, rank: int) -> None:
    base = tiny_base()
    settings = AdapterSettings(rank=rank, alpha=6.0, rslora=True)
    kind = adapter_kind(settings, base, EngineSettings())
    assert kind.scale(rank) == pytest.approx(6 / math.sqrt(rank))
    start = kind.starts({"north": rank}, 3)["north"]
    adapter = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for name, tensor in start.items()
    }
    kind.write(tmp_path, adapter)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).use_rslora
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).eval()
    rows = draw_rows(4, 5, 2)
    (ours,) = kind.losses([adapter], [kind.scale(rank)], [rows], 200)
    theirs = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([[*row.prompt, *row.response]])).logits[0]
        target = torch.tensor(row.response)
        theirs += float(
            torch.nn.functional.cross_entropy(
                logits[len(row.prompt) - 1 : -1], target, reduction="sum"
            )
        )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_all_linear_is_every_layer_but_the_head() -> None:
    model = tiny_base().model
    found = {target.name for target in find_targets(model, ("all-linear",))}
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert found == wanted and len(found) > 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["local.epochs=1", "local.steps_per_row=0.5"], "set one of them to 0"),
        (["local.lora_plus_ratio=4", "adapter.kind=prompt", "algorithm.name=local"], "two factors"),
        (["local.lora_plus_ratio=4", "local.optimizer=zeroth-order"], "one direction"),
        (["local.schedule=step"], "constant"),
        (["adapter.rslora=true", "adapter.kind=prompt", "algorithm.name=local"], "rslora"),
    ],
)
def test_rates_that_cannot_be_are_said(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(overrides=overrides)


def test_the_defaults_stay() -> None:
    local = Config().local
    assert (local.schedule, local.warmup_steps, local.lora_plus_ratio) == ("constant", 0, 1)
