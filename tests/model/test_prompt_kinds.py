"""Prompt encoders train as plain PEFT trains them, and what is saved is what plain PEFT loads."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedmira.adapters import (
    Adapter,
    norm,
    subtract,
    weighted_sum,
)
from fedmira.config import AdapterSettings, EngineSettings, LocalSettings
from fedmira.errors import ModelError
from fedmira.model import (
    AdapterKind,
    BaseModel,
    Contender,
    LocalTask,
    adapter_kind,
    find_targets,
    start_adapter,
)
from fedmira.model.kinds.prompt_encoders import PromptModel
from fedmira.model.training.batches import batch_indices
from tiny import ARCHITECTURES, TinyRow, draw_rows, tiny_base, tiny_model, tiny_tokenizer

VIRTUAL = 5
KINDS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt"},
    "p-tuning": {"kind": "p-tuning", "encoder_hidden": 16},
    "p-tuning, lstm": {"kind": "p-tuning", "encoder_hidden": 12, "encoder": "lstm"},
    "prefix": {"kind": "prefix"},
    "prefix, projected": {"kind": "prefix", "encoder_hidden": 16, "prefix_projection": True},
}
every_kind = pytest.mark.parametrize("name", KINDS)


@functools.cache
def base_of(architecture: str) -> BaseModel:
    """One for all tests: a base is frozen."""
    return tiny_base(architecture)


def settings_of(name: str) -> AdapterSettings:
    return AdapterSettings(virtual_tokens=VIRTUAL, **KINDS[name])


def kind_of(name: str, architecture: str = "llama") -> AdapterKind:
    return adapter_kind(settings_of(name), base_of(architecture), EngineSettings())


def task(kind: AdapterKind, rows: Sequence[TinyRow], seed: int = 7, **more: Any) -> LocalTask:
    return LocalTask(kind.starts({"one": 0}, 11)["one"], 1.0, rows, seed, **more)


def peft_model(name: str, architecture: str = "llama") -> Any:
    settings = settings_of(name)
    configs = {
        "prompt": lambda: peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL
        ),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=VIRTUAL,
            encoder_hidden_size=settings.encoder_hidden,
            encoder_reparameterization_type=settings.encoder.upper(),
        ),
        "prefix": lambda: peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=VIRTUAL,
            encoder_hidden_size=settings.encoder_hidden,
            prefix_projection=settings.prefix_projection,
        ),
    }
    return peft.get_peft_model(tiny_model(architecture), configs[settings.kind]()).eval()


def encoder_of(model: Any) -> dict[str, torch.nn.Parameter]:
    return {
        f"prompt_encoder.{name}": part
        for name, part in model.prompt_encoder["default"].named_parameters()
    }


def padded(rows: Sequence[TinyRow]) -> dict[str, torch.Tensor]:
    size = max(len(row.prompt) + len(row.response) for row in rows)
    ids, labels, seen = (torch.full((len(rows), size), fill) for fill in (0, -100, 0))
    for j, row in enumerate(rows):
        length = len(row.prompt) + len(row.response)
        ids[j, :length] = torch.tensor([*row.prompt, *row.response])
        labels[j, len(row.prompt) : length] = torch.tensor(row.response)
        seen[j, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": seen}


def with_peft(
    name: str, job: LocalTask, settings: LocalSettings, architecture: str = "llama"
) -> Adapter:
    """The same client alone, in a loop as anybody would write it.

    With PEFT, transformers' loss and torch's optimizer.
    """
    model = peft_model(name, architecture)
    with torch.no_grad():
        for parameter_name, parameter in encoder_of(model).items():
            parameter.copy_(job.start[parameter_name])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == len(job.start), "gradients on the prompt parameters only"
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    optimizer = kinds[settings.optimizer](
        trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    for chosen in batch_indices(len(job.rows), settings, job.seed):
        optimizer.zero_grad()
        batch = padded([job.rows[i] for i in chosen])
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, -labels.shape[1] :]
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        ).backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
    return {
        parameter_name: parameter.detach().clone()
        for parameter_name, parameter in encoder_of(model).items()
    }


def assert_close(left: Adapter, right: Adapter, start: Adapter, share: float = 0.02) -> None:
    """Equal but for a small share of the way from the start.

    Adam turns the rounding of tiny gradients into whole steps.
    """
    assert set(left) == set(right)
    way = norm(subtract(right, start))
    assert way > 1e-3 and norm(subtract(left, right)) < share * way


@every_kind
def test_a_cohort_equals_plain_peft_one_by_one(name: str) -> None:
    kind = kind_of(name)
    settings = LocalSettings(steps=4, batch_size=4, learning_rate=5e-3, weight_decay=0.1)
    jobs = [task(kind, draw_rows(count, 6, count), seed=count) for count in (9, 3)]
    for job, outcome in zip(jobs, kind.train(jobs, settings, budget=90), strict=True):
        assert not outcome.failure and outcome.num_steps == 4
        assert_close(outcome.adapter, with_peft(name, job, settings), job.start)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
@pytest.mark.parametrize("name", ["p-tuning", "prefix"])
def test_other_architectures_equal_plain_peft_too(architecture: str, name: str) -> None:
    kind = kind_of(name, architecture)
    settings = LocalSettings(
        optimizer="sgd", steps=3, batch_size=4, learning_rate=0.5, max_grad_norm=0.5
    )
    job = task(kind, draw_rows(7, 4, 1))
    assert_close(
        kind.train([job], settings, 200)[0].adapter,
        with_peft(name, job, settings, architecture),
        job.start,
        1e-3,
    )


@every_kind
def test_training_lowers_the_loss_that_is_measured(name: str) -> None:
    kind = kind_of(name)
    rows = draw_rows(6, 4, 1)
    job = task(kind, rows)
    outcome = kind.train([job], LocalSettings(steps=12, batch_size=6, learning_rate=5e-2), 400)[0]
    before, after = kind.losses([job.start, outcome.adapter], [1.0, 1.0], [rows, rows], 400)
    tokens = sum(len(row.response) for row in rows)
    assert outcome.first_loss == pytest.approx(before / tokens, rel=1e-5)
    assert after < 0.95 * before
    by_row = kind.row_losses([job.start, outcome.adapter], [1.0, 1.0], [rows, rows[::-1]], 400)
    assert [sum(losses) for losses in by_row] == pytest.approx([before, after], rel=1e-5)
    assert by_row[0][2] == pytest.approx(kind.losses([job.start], [1.0], [[rows[2]]], 400)[0])


def test_counts_are_those_of_table_two_of_the_mira_paper() -> None:
    llama = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    with torch.device("meta"):
        models = {
            2048: LlamaForCausalLM(llama),
            1280: GPT2LMHeadModel(GPT2Config(n_embd=1280, n_layer=36, n_head=20)),
        }
    lora = {
        (2048, 16, ("q_proj",)): 24 * 16 * (2048 + 2048),
        (1280, 8, ("c_attn", "c_proj")): 36
        * 8
        * ((1280 + 3 * 1280) + (1280 + 1280) + (4 * 1280 + 1280)),
    }
    assert list(lora.values()) == [1_572_864, 4_055_040]
    for (width, rank, targets), count in lora.items():
        assert parameters(start_adapter(find_targets(models[width], targets), rank, 0)) == count

    def mlp(e: int, h: int, tokens: int) -> int:
        return tokens * e + (e * h + h) + (h * h + h) + (h * e + e)

    assert [mlp(width, 128, 20) for width in models] == [583_936, 371_200]
    for width, model in models.items():
        base = BaseModel(model, tiny_tokenizer(), "meta", "meta", "")
        encoder = PromptModel(base, AdapterSettings(kind="p-tuning")).start(0)
        assert parameters(encoder) == mlp(width, 128, 20)
        assert parameters(PromptModel(base, AdapterSettings(kind="prompt")).start(0)) == 20 * width
        layers = model.config.num_hidden_layers
        assert (
            parameters(PromptModel(base, AdapterSettings(kind="prefix")).start(0))
            == 20 * 2 * layers * width
        )


def parameters(adapter: Adapter) -> int:
    return sum(tensor.numel() for tensor in adapter.values())


@every_kind
def test_the_start_is_drawn_as_peft_draws_it_and_moves_nobody_elses_randomness(name: str) -> None:
    kind = kind_of(name)
    before = torch.get_rng_state()
    starts = [kind.starts({"one": 0, "two": 0}, seed) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        model = peft_model(name)
        torch.manual_seed(3)
        fresh = type(model.prompt_encoder["default"])
        arguments = (
            (model.peft_config["default"], None)
            if name == "prompt"
            else (model.peft_config["default"],)
        )
        drawn = dict(fresh(*arguments).named_parameters())
    assert all(
        torch.equal(starts[0]["one"][f"prompt_encoder.{part}"], parameter)
        for part, parameter in drawn.items()
    )
    assert all(
        torch.equal(starts[0]["one"][part], starts[1]["two"][part]) for part in starts[0]["one"]
    )
    assert norm(subtract(starts[0]["one"], starts[2]["one"])) > 0


def reloaded(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(tiny_model("llama"), str(folder)).eval()


def plain_loss(model: Any, row: TinyRow) -> float:
    batch = padded([row])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        0, -batch["labels"].shape[1] :
    ]
    return float(
        torch.nn.functional.cross_entropy(
            logits[:-1], batch["labels"][0, 1:], ignore_index=-100, reduction="sum"
        )
    )


@every_kind
def test_a_saved_folder_gives_plain_peft_the_same_loss_and_us_the_encoder(
    name: str, tmp_path: Path
) -> None:
    kind = kind_of(name)
    rows = draw_rows(4, 4, 1)
    trained = kind.train([task(kind, rows)], LocalSettings(steps=3, learning_rate=2e-2), 400)[
        0
    ].adapter
    for folder in (tmp_path / "one", tmp_path / "two"):
        kind.write(folder, trained)
    back = kind.read(tmp_path / "one")
    assert set(back) == set(trained) and all(
        torch.equal(back[part], trained[part]) for part in trained
    )
    assert (
        json.loads((tmp_path / "one" / "adapter_config.json").read_text(encoding="utf-8"))[
            "inference_mode"
        ]
        is True
    )
    for file in ("adapter_config.json", "adapter_model.safetensors", "encoder.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with torch.no_grad():
        model = reloaded(tmp_path / "one")
        theirs = sum(plain_loss(model, row) for row in rows)
    assert kind.losses([trained], [1.0], [rows], 400)[0] == pytest.approx(theirs, rel=1e-5)


def test_the_mean_of_encoders_is_not_the_mean_of_what_they_put_out(tmp_path: Path) -> None:
    """Averaging what PEFT exports would be another method.

    Between the virtual tokens there are ReLUs.
    """
    kind = kind_of("p-tuning")
    jobs = [task(kind, draw_rows(6, 4, seed), seed=seed) for seed in (1, 2)]
    trained = [
        outcome.adapter
        for outcome in kind.train(jobs, LocalSettings(steps=10, learning_rate=3e-2), 400)
    ]
    mean = weighted_sum(trained, [0.5, 0.5])
    exported = []
    for i, adapter in enumerate((*trained, mean)):
        kind.write(tmp_path / str(i), adapter)
        model = reloaded(tmp_path / str(i))
        exported.append(model.prompt_encoder["default"].embedding.weight.detach())
    spread = float((exported[0] - exported[1]).norm())
    assert float((exported[2] - (exported[0] + exported[1]) / 2).norm()) > 0.02 * spread > 0
    # And what PEFT saves holds no encoder: read back for training, it would put the output where
    # the input belongs.
    assert set(kind.read(tmp_path / "2")) > {"prompt_encoder.embedding.weight"}


@every_kind
def test_answers_are_those_of_reading_everything_again_for_each_token(name: str) -> None:
    kind = kind_of(name)
    draw = torch.Generator().manual_seed(5)
    start = kind.starts({"one": 0}, 1)["one"]
    adapters = [
        {
            part: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
            for part, tensor in start.items()
        }
        for _ in range(2)
    ]
    prompts = [(i % 2, row.prompt) for i, row in enumerate(draw_rows(6, 2, 3))]
    answers = kind.generate(adapters, [1.0, 1.0], prompts, 6, 400)
    tokenizer = tiny_tokenizer()
    model = peft_model(name)
    for (client, prompt), answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            for part, parameter in encoder_of(model).items():
                parameter.copy_(adapters[client][part])
            ids = torch.tensor([prompt])
            while ids.shape[1] < len(prompt) + 6:
                following = (
                    model(input_ids=ids, attention_mask=torch.ones_like(ids))
                    .logits[:, -1]
                    .argmax(dim=-1)
                )
                if int(following) == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, following[:, None]], dim=1)
        assert answer == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()
    alone = [
        kind.generate([adapters[client]], [1.0], [(0, prompt)], 6, 1)[0]
        for client, prompt in prompts
    ]
    assert answers == alone


def test_an_answer_ends_where_the_context_ends_virtual_tokens_included() -> None:
    kind = kind_of("p-tuning")  # 128 positions
    start = kind.starts({"one": 0}, 1)["one"]
    long = tuple(3 + i % 90 for i in range(120))
    short = kind.generate([start], [1.0], [(0, long)], 50, 400)[0]
    assert len(short.split()) <= 128 - VIRTUAL - 120
    assert kind.generate([start], [1.0], [(0, (*long, *long))], 2, 400)


@every_kind
def test_a_client_does_not_depend_on_who_shares_its_cohort_or_on_the_budget(name: str) -> None:
    kind = kind_of(name)
    settings = LocalSettings(optimizer="sgd", learning_rate=0.3, steps=2, batch_size=3)
    mine, others = task(kind, draw_rows(5, 4, 1)), [task(kind, draw_rows(4, 3, 2), seed=2)]
    alone, together = (
        kind.train([mine], settings, 2000)[0],
        kind.train([*others, mine], settings, 1)[-1],
    )
    assert_close(together.adapter, alone.adapter, mine.start, 1e-3)
    assert alone.response_tokens == together.response_tokens


def test_a_client_that_diverges_is_reported_and_the_others_go_on() -> None:
    kind = kind_of("prompt")
    good = task(kind, draw_rows(5, 4, 2))
    bad = LocalTask(
        {name: torch.full_like(part, math.inf) for name, part in good.start.items()},
        1.0,
        draw_rows(5, 4, 1),
        1,
    )
    broken, fine = kind.train([bad, good], LocalSettings(steps=2), 400)
    assert "non-finite loss at local step 1" in broken.failure and not fine.failure
    assert (
        norm(subtract(fine.adapter, kind.train([good], LocalSettings(steps=2), 400)[0].adapter))
        == 0
    )


def test_hooks_and_kept_moments_are_obeyed() -> None:
    kind = kind_of("p-tuning")
    rows = draw_rows(4, 5, 1)

    def nothing(gradient: Adapter, parameters: Adapter) -> Adapter:
        return {name: torch.zeros_like(tensor) for name, tensor in gradient.items()}

    held = kind.train([task(kind, rows, hook=nothing)], LocalSettings(optimizer="sgd"), 400)[0]
    assert norm(subtract(held.adapter, task(kind, rows).start)) == 0
    kept = LocalSettings(steps=3, batch_size=4, optimizer_state="kept", max_grad_norm=0)
    first = kind.train([task(kind, rows)], kept, 400)[0]
    second = kind.train([LocalTask(first.adapter, 1.0, rows, 8, moments=first.moments)], kept, 400)[
        0
    ]
    long = kind.train([task(kind, rows)], kept.model_copy(update={"steps": 6}), 400)[0]
    assert_close(second.adapter, long.adapter, task(kind, rows).start)


@pytest.mark.parametrize("optimizer", ["sophia", "zeroth-order"])
def test_the_other_local_optimizers_work_on_encoders(optimizer: str) -> None:
    kind = kind_of("p-tuning")
    settings = LocalSettings.model_validate(
        {"optimizer": optimizer, "learning_rate": 1e-3, "steps": 4}
    )
    outcome = kind.train([task(kind, draw_rows(6, 4, 1))], settings, 400)[0]
    assert (
        not outcome.failure
        and norm(subtract(outcome.adapter, task(kind, draw_rows(6, 4, 1)).start)) > 0
    )
    assert (outcome.clip_share is not None) == (optimizer == "sophia")
    assert (outcome.movement is not None) == (optimizer == "zeroth-order")


def test_a_client_chooses_the_better_of_two_encoders() -> None:
    kind = kind_of("prompt")
    rows = draw_rows(6, 4, 1)
    job = task(kind, rows)
    trained = kind.train([job], LocalSettings(steps=25, learning_rate=2e-2), 400)[0].adapter
    choices = kind.choose(
        [Contender([job.start, trained], 1.0, rows), Contender([job.start], 1.0, rows)], 400
    )
    assert [choice.index for choice in choices] == [1, 0]


def test_the_base_is_not_changed_and_goes_on_to_carry_lora() -> None:
    base = tiny_base()
    lora = adapter_kind(AdapterSettings(rank=2), base, EngineSettings())
    adapter, rows = lora.starts({"one": 2}, 1)["one"], draw_rows(3, 4, 1)
    before = (
        lora.losses([adapter], [8.0], [rows], 400),
        {name: part.clone() for name, part in base.model.state_dict().items()},
    )
    for name in KINDS:
        kind = adapter_kind(settings_of(name), base, EngineSettings())
        kind.train([task(kind, rows)], LocalSettings(steps=1), 400)
        assert not any(
            parameter.requires_grad or parameter.grad is not None
            for parameter in base.model.parameters()
        )
    assert all(torch.equal(part, before[1][name]) for name, part in base.model.state_dict().items())
    assert lora.losses([adapter], [8.0], [rows], 400) == before[0]


def test_what_does_not_fit_is_refused_by_name() -> None:
    kind = kind_of("p-tuning")
    other = kind_of("prompt").starts({"one": 0}, 1)["one"]
    with pytest.raises(ModelError, match="made for another adapter.kind"):
        kind.losses([other], [1.0], [draw_rows(2, 2, 1)], 400)


def shapes(adapter: Adapter) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter.items()}


def test_a_prefix_has_as_many_heads_as_the_base_has_keys() -> None:
    # tiny Llama: 2 layers, 4 heads of 8 that share 2 heads of keys and values
    assert shapes(kind_of("prefix").starts({"one": 0}, 1)["one"]) == {
        "prompt_encoder.embedding.weight": (VIRTUAL, 2 * 2 * 2 * 8)
    }
