"""Greedy generation for many clients at once gives each row the tokens it gets alone.

Alone is with plain PEFT and transformers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import GenerationConfig

from fedmira.adapters import Adapter
from fedmira.model import (
    BaseModel,
    LoraBranch,
    StackedAdapters,
    TargetModule,
    find_targets,
    generate,
    generate_tokens,
    start_adapter,
    write_adapter,
)
from fedmira.model.generation.decoding import WaveDecoder
from fedmira.model.generation.generate import (
    _cache_shape,
    _padded_batches,
    _survivors,
    fit_prompts,
)
from fedmira.model.generation.probe import decoding_agrees
from fedmira.model.generation.waves import plan_waves
from fedmira.model.kinds.peft_files import lora_config
from fedmira.model.packed.packing import gather, pack, segment_rows
from tiny import ARCHITECTURES, draw_rows, tiny_base, tiny_model

ALPHA, RANKS = 8.0, (4, 2, 3)
END = 2
CONTEXT = 128

Asked = tuple[int, tuple[int, ...]]


class Federation:
    """A tiny base with three clients, and the same clients as plain PEFT models."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.base = tiny_base(architecture)
        self.targets = find_targets(self.base.model, ())
        self.adapters = [noisy(self.targets, rank, seed) for seed, rank in enumerate(RANKS)]
        self.models = []
        for client, (adapter, rank) in enumerate(zip(self.adapters, RANKS, strict=True)):
            config = lora_config(self.base, self.targets, rank, ALPHA, 0.0)
            write_adapter(folder / str(client), adapter, config)
            self.models.append(
                PeftModel.from_pretrained(tiny_model(architecture), folder / str(client)).eval()
            )

    def ask(
        self, asked: Sequence[Asked], new: int, base: BaseModel | None = None, **options: int
    ) -> list[list[int]]:
        stacked = StackedAdapters(
            self.targets,
            self.adapters,
            [ALPHA / rank for rank in RANKS],
            self.base.device,
            trainable=False,
        )
        with LoraBranch(self.base.model, stacked) as branch:
            return generate_tokens(base or self.base, branch, asked, new, **options)

    def alone(self, asked: Asked, new: int) -> list[int]:
        """transformers' own loop with plain PEFT, one row."""
        client, prompt = asked
        ids = torch.tensor([readable(prompt)])
        config = GenerationConfig(
            max_new_tokens=min(new, CONTEXT - ids.shape[1]),
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )
        with torch.no_grad():
            output = self.models[client].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        tokens: list[int] = output[0, ids.shape[1] :].tolist()
        return tokens[: tokens.index(END)] if END in tokens else tokens


def noisy(targets: Sequence[TargetModule], rank: int, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start_adapter(targets, rank, seed).items()
    }


def readable(prompt: Sequence[int]) -> list[int]:
    """Of a prompt that fills the context of 128.

    Its first 80 and its last 16 tokens, as in training, which leaves a quarter of the context.
    """
    return list(prompt) if len(prompt) < CONTEXT else [*prompt[:80], *prompt[-16:]]


def drawn(count: int, shared: int, seed: int, longest: int = 30) -> list[tuple[int, ...]]:
    return [row.prompt for row in draw_rows(count, shared, seed, longest)]


def prompts_of_all_kinds() -> list[Asked]:
    """Shared and unshared, short and long, one token, equal, and up to the context's end.

    And over that end.
    """
    asked: list[Asked] = [(0, prompt) for prompt in drawn(7, 25, 1)]
    asked += [(1, prompt) for prompt in drawn(5, 3, 2)]
    asked += [(2, prompt) for prompt in drawn(2, 0, 3, 60)]
    asked += [(1, (7,)), (2, (9, 10)), (0, asked[0][1]), (0, asked[0][1][:25])]
    asked += [
        (client, prompt[:size])
        for client, size in ((0, 125), (1, 127), (2, 128), (0, 200))
        for prompt in drawn(1, 220, size)
    ]
    random.Random(4).shuffle(asked)
    return asked


@contextmanager
def more_ends(base: BaseModel, ends: Sequence[int]) -> Iterator[None]:
    """As of a checkpoint that names several tokens that end an answer."""
    config = base.model.generation_config
    config.eos_token_id, before = list(ends), config.eos_token_id
    try:
        yield
    finally:
        config.eos_token_id = before


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def federation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    yield Federation(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation("llama", tmp_path_factory.mktemp("llama"))


def test_each_row_gets_the_tokens_that_plain_peft_gives_it_alone(federation: Federation) -> None:
    asked = prompts_of_all_kinds()
    assert federation.ask(asked, 9) == [federation.alone(one, 9) for one in asked]


def test_the_plain_path_gives_the_same_tokens(federation: Federation) -> None:
    asked = prompts_of_all_kinds()
    assert federation.ask(asked, 9, replace(federation.base, packed=False)) == federation.ask(
        asked, 9
    )


def test_all_tiny_architectures_decode_from_the_cache(federation: Federation) -> None:
    stacked = StackedAdapters(
        federation.targets,
        federation.adapters,
        [ALPHA / rank for rank in RANKS],
        federation.base.device,
    )
    with torch.no_grad(), LoraBranch(federation.base.model, stacked) as branch:
        assert decoding_agrees(federation.base, branch)


@contextmanager
def refusing(base: BaseModel, error: Exception) -> Iterator[None]:
    """Every pass over more than one row raises; packed prompts and plain passes have one."""

    def refuse(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        if options["input_ids"].shape[0] > 1:
            raise error

    handle = base.model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_no_clients_adapter_decides_how_everybody_is_answered() -> None:
    """Not even one that is not finite, though it is asked first."""
    base = tiny_base()
    targets = find_targets(base.model, ())
    broken = {name: tensor * float("nan") for name, tensor in start_adapter(targets, 4, 1).items()}
    with LoraBranch(base.model, StackedAdapters(targets, [broken], [2.0], base.device)) as branch:
        assert decoding_agrees(base, branch)
        assert len(branch._handles) == len(targets), "the branch is back where it was"


def test_decoding_that_is_lost_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    with LoraBranch(
        base.model, StackedAdapters(targets, [start_adapter(targets, 4, 1)], [2.0], base.device)
    ) as branch:
        with refusing(base, NotImplementedError("one row only")):
            assert not decoding_agrees(base, branch) and not decoding_agrees(base, branch)
        assert generate_tokens(base, branch, [(0, (5, 6, 7))], 3)
    said = (
        "tiny llama: decoding from the cache raises NotImplementedError: one row only; it answers "
        "by transformers' own loop"
    )
    assert [
        said in record.getMessage() for record in caplog.records if record.levelname == "WARNING"
    ] == [True]


def test_a_lack_of_memory_is_not_taken_for_an_architecture_that_cannot_decode() -> None:
    base = tiny_base()
    targets = find_targets(base.model, ())
    with LoraBranch(
        base.model, StackedAdapters(targets, [start_adapter(targets, 4, 1)], [2.0], base.device)
    ) as branch:
        with (
            refusing(base, torch.OutOfMemoryError("CUDA out of memory")),
            pytest.raises(torch.OutOfMemoryError),
        ):
            decoding_agrees(base, branch)
        assert decoding_agrees(base, branch)


def test_every_token_that_is_read_has_the_place_of_its_prompt(llama: Federation) -> None:
    """Shared tokens of a group stand once from the left; own ones end at the first new token."""
    asked: list[Asked] = [(0, prompt) for prompt in drawn(6, 25, 1)] + [
        (1, prompt) for prompt in drawn(3, 2, 2)
    ]
    for wave in plan_waves(fit_prompts(llama.base, asked, 5), _cache_shape(llama.base), 2**28):
        decoder = WaveDecoder(llama.base, wave)
        (block,) = decoder._blocks
        groups = wave.groups
        shared: dict[tuple[int, ...], int] = {}
        own: dict[tuple[int, ...], int] = {}
        for chosen in gather(
            [part for k, group in enumerate(groups) for part in segment_rows(k, group.prompts, 40)],
            40,
        ):
            batch = pack(chosen)
            parts = block.destinations(
                [
                    (part.client, part, start)
                    for part, start in zip(batch.segments, batch.starts, strict=True)
                ]
            )
            for tensors, found in ((parts[:3], shared), (parts[3:], own)):
                places = list(zip(*(tensor.tolist() for tensor in tensors[1:]), strict=True))
                assert not found.keys() & set(places), "no place is filled twice"
                found |= dict(zip(places, batch.ids[tensors[0]].tolist(), strict=True))
        assert shared == {
            (k, i): token
            for k, group in enumerate(groups)
            for i, token in enumerate(group.prompts[0].prompt[: group.prefix])
        }
        columns = wave.blocks[0].extent.own
        assert own == {
            (k, row, columns - len(prompt.prompt) + i): token
            for k, group in enumerate(groups)
            for row, prompt in enumerate(group.prompts)
            for i, token in enumerate(prompt.prompt)
            if i >= group.prefix
        }


def test_the_cache_takes_the_bytes_that_were_planned(federation: Federation) -> None:
    prompts = fit_prompts(federation.base, prompts_of_all_kinds(), 9)
    shape = _cache_shape(federation.base)
    stacked = StackedAdapters(
        federation.targets,
        federation.adapters,
        [ALPHA / rank for rank in RANKS],
        federation.base.device,
    )
    for wave in plan_waves(prompts, shape, 2**28):
        decoder = WaveDecoder(federation.base, wave)
        with torch.no_grad(), LoraBranch(federation.base.model, stacked) as branch:
            decoder.read(branch, 2048)
            with decoder.attached(), branch.rows(decoder.clients):
                decoder.step(decoder.places * 0)
        kept = [
            pair
            for block in decoder._blocks
            for layers in (block.own, block.shared)
            for pair in layers.values()
        ]
        assert sum(tensor.nbytes for pair in kept for tensor in pair) == replace(
            shape, row_bytes=0
        ).of(wave.size)


def test_bfloat16_decodes_from_the_cache() -> None:
    base = tiny_base()
    base.model.to(torch.bfloat16)
    targets = find_targets(base.model, ())
    stacked = StackedAdapters(targets, [noisy(targets, 4, 1)], [2.0], base.device)
    with torch.no_grad(), LoraBranch(base.model, stacked) as branch:
        assert decoding_agrees(base, branch)
        answers = generate_tokens(base, branch, [(0, prompt) for prompt in drawn(5, 6, 1)], 7)
    assert base.dtype == torch.bfloat16 and all(answers)


def test_a_window_slides_over_prefix_prompt_and_answer(tmp_path: Path) -> None:
    federation = Federation("gemma3", tmp_path)  # its window is 16 tokens
    asked: list[Asked] = [(0, prompt) for prompt in drawn(4, 20, 5, 6)] + [
        (1, prompt) for prompt in drawn(3, 1, 6, 24)
    ]
    assert federation.ask(asked, 40) == [federation.alone(one, 40) for one in asked]


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_no_row_depends_on_what_else_is_asked(llama: Federation, data: st.DataObject) -> None:
    pool = prompts_of_all_kinds()
    whole = dict(zip(pool, llama.ask(pool, 6), strict=True))
    chosen = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=len(pool)))
    budget = data.draw(st.sampled_from([1, 60, 2048]))
    cache = data.draw(st.sampled_from([1, 50_000, 2**28]))
    assert llama.ask(chosen, 6, budget=budget, cache_bytes=cache) == [whole[one] for one in chosen]


def test_rows_that_end_early_leave_the_others_running(llama: Federation) -> None:
    asked: list[Asked] = [
        (client, prompt) for client in range(3) for prompt in drawn(40, 8, client, 12)
    ]
    usual = llama.ask(asked, 48)
    ends = [
        END,
        *(
            token
            for token, _ in Counter(
                token for answer in usual for token in set(answer[:12])
            ).most_common(2)
        ),
    ]
    with more_ends(llama.base, ends):
        answers = llama.ask(asked, 48)
    assert answers == [list(takewhile(lambda token: token not in ends, answer)) for answer in usual]
    ended = sorted(len(answer) for answer in answers)
    assert (
        ended[40] < 24 and ended[-1] == 48
    )  # so a third of the rows could leave on the way, and some ran to the end
    some = range(0, len(asked), 8)
    assert [usual[i] for i in some] == [llama.alone(asked[i], 48) for i in some]


def test_the_rows_that_go_on_stand_in_a_smaller_rectangle() -> None:
    done = torch.tensor(
        [[True, False, True, False], [True, True, True, True], [True, True, True, False]]
    )
    kept = _survivors(done)
    assert kept is not None
    groups, rows = kept
    assert groups.tolist() == [0, 2] and rows.tolist() == [
        [1, 3],
        [3, 0],
    ]  # group 1 is gone; group 2 keeps a finished row beside its own
    assert (
        _survivors(torch.tensor([[False] * 4, [False, False, False, True]])) is None
    )  # 8 places of 8: nothing to gain
    nobody = _survivors(torch.ones(2, 3, dtype=torch.bool))
    assert nobody is not None and not len(nobody[0])


def test_texts_leave_special_tokens_out(llama: Federation) -> None:
    asked: list[Asked] = [(0, prompt) for prompt in drawn(3, 2, 1)]
    stacked = StackedAdapters(
        llama.targets, llama.adapters, [ALPHA / rank for rank in RANKS], llama.base.device
    )
    with LoraBranch(llama.base.model, stacked) as branch:
        texts = generate(llama.base, branch, asked, 5)
    words = [[token for token in tokens if token > END] for tokens in llama.ask(asked, 5)]
    assert texts == [" ".join(f"w{token - 3}" for token in tokens) for tokens in words]


def test_nothing_asked_is_nothing_answered(llama: Federation) -> None:
    assert llama.ask([], 5) == []


def test_generation_leaves_no_trace_on_the_base(llama: Federation) -> None:
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        before = llama.base.model(input_ids=ids).logits
        llama.ask([(0, (5, 6, 7)), (1, (8, 9))], 4)
        assert torch.equal(llama.base.model(input_ids=ids).logits, before)
    assert llama.base.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_padded_batches_keep_to_the_budget(budget: int) -> None:
    prompts = fit_prompts(tiny_base(), [(0, [3] * (5 + i % 9)) for i in range(100)], 4)
    batches = list(_padded_batches(prompts, budget))
    assert sorted(prompt.index for batch in batches for prompt in batch) == list(range(100))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (len(batch[0].prompt) + 1) <= budget
        assert len(batch) <= 64


def test_modules_that_are_given_all_rows_in_one_get_each_rows_own_branch() -> None:
    """As shared experts are: [rows * tokens, hidden] in place of [rows, tokens, hidden]."""
    base = tiny_base()
    targets = find_targets(base.model, ["q_proj"])
    adapters = [
        {name: torch.randn(tensor.shape) for name, tensor in start_adapter(targets, 2, k).items()}
        for k in range(2)
    ]
    module = base.model.get_submodule(targets[0].name)
    inputs = torch.randn(3, 4, targets[0].inputs)
    stacked = StackedAdapters(targets, adapters, [1.0, 2.0], base.device)
    with LoraBranch(base.model, stacked) as branch, torch.no_grad(), branch.rows([0, 1, 0]):
        assert torch.equal(module(inputs).flatten(0, 1), module(inputs.flatten(0, 1)))
