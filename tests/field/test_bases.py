"""A base is trained as what it is, or refused in one line before anything is made."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.templates import TEMPLATES
from field.inputs import (
    Asked,
    Reads,
    byte_tokenizer,
    call,
    options,
    refused,
    run,
    watering,
    write_clients,
    write_lines,
    write_random_base,
)
from small import table_of

CLIENTS = {name: watering(name) for name in ("fern", "moss")}
GATED = ["gate_proj", "up_proj", "down_proj"]
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clients(tmp_path_factory.mktemp("field") / "rows", CLIENTS)


@pytest.fixture
def own_base(plain_base: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may change."""
    return Path(shutil.copytree(plain_base, tmp_path / "base"))


@contextmanager
def without_warnings() -> Iterator[None]:
    """For what other packages say of models that are made by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def both_refused(base: Path, rows: Path, output: Path, *words: str, **more: object) -> str:
    """Asserts that `check` and `run` refuse a base alike, and that no run folder is made."""
    said = [
        refused(ended, *words)
        for ended in (
            call("check", *options(base, rows, **more)),
            call("run", *options(base, rows, **more), "--output", output),
        )
    ]
    assert said[0] == said[1] and not output.exists()
    return said[0]


def changed_weights(change: Callable[[dict[str, Any]], object]) -> Change:
    def act(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return act


def changed_config(**changes: object) -> Change:
    def act(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return act


# Kind C: the base is not the base.

KEYS = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_weights(lambda all_: all_.pop("lm_head.weight")), ("lack", "lm_head.weight")),
        (changed_weights(lambda all_: all_.pop(KEYS)), ("lack", KEYS)),
        (changed_weights(lambda all_: all_.pop("model.norm.weight")), ("lack", "norm.weight")),
        (changed_weights(lambda all_: all_.update(spare=torch.ones(3))), ("hold spare",)),
        (changed_weights(lambda all_: all_[KEYS][3].fill_(float("nan"))), ("NaN", KEYS)),
        (
            changed_weights(lambda all_: all_.update({KEYS: all_[KEYS].to(torch.int8)})),
            (KEYS, "I8"),
        ),
        (changed_config(tie_word_embeddings=True, num_hidden_layers=1), ("hold", "layers.1")),
        (changed_config(num_hidden_layers=4), ("lack", "layers.2")),
    ],
    ids=[
        "no head",
        "no keys",
        "no norm",
        "one more",
        "not a number",
        "whole numbers",
        "too many layers",
        "too few layers",
    ],
)
def test_weights_that_are_not_those_of_the_base_are_named(
    change: Change, words: tuple[str, ...], own_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Kind C."""
    change(own_base)
    both_refused(own_base, rows, tmp_path / "run", *words)


# Kind D: bases that are not causal.


def encoder(kind: str, size: int, **more: Any) -> Any:
    """The settings of a small encoder."""
    from transformers import AutoConfig

    made: Any = AutoConfig
    return made.for_model(
        kind,
        vocab_size=size,
        hidden_size=32,
        embedding_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=600,
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **more},
    )


def test_a_decoder_that_was_set_to_look_ahead_is_refused(
    own_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Kind D."""
    from transformers import AutoModelForCausalLM

    changed_config(is_causal=False)(own_base)
    made: Any = AutoModelForCausalLM
    model = made.from_pretrained(own_base).eval()
    ids = torch.arange(20, 32)[None]
    other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    with torch.no_grad():
        first, second = model(ids).logits[0, 0], model(other).logits[0, 0]
    assert (first - second).abs().max() > 0.01, "it does look ahead"
    both_refused(own_base, rows, tmp_path / "run", "not causal", "is_causal is false")


ENCODERS = ["bert", "roberta", "electra", "xlm-roberta", "camembert"]


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused_as_one(
    kind: str, rows: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Kinds D and M."""
    with without_warnings():
        base = write_random_base(
            tmp_path / "base", tokenizer, encoder(kind, len(tokenizer), is_decoder=False)
        )
    both_refused(base, rows, tmp_path / "run", "not causal", "is_decoder is false")


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_an_encoder_that_was_made_a_decoder_is_trained(
    kind: str, rows: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Kind M."""
    base = write_random_base(
        tmp_path / "base", tokenizer, encoder(kind, len(tokenizer), is_decoder=True)
    )
    run(tmp_path / "run", base, rows)


# Kind J: padded answers depend on neighbours.


def shape(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """What the settings of most architectures have in common."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **more,
    }


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARING = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "minimax": {
        "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
    },
    "lfm2": {"tie_word_embeddings": False, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {
        "tie_word_embeddings": False,
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 64,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "qwen3_next": {
        **EXPERTS,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v2": {
        **SHARING,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": SHARING,
}


def made_base(kind: str, folder: Path, tokenizer: Any) -> Path:
    """A small random base of an architecture."""
    from transformers import AutoConfig

    made: Any = AutoConfig
    with without_warnings():
        return write_random_base(
            folder, tokenizer, made.for_model(kind, **shape(tokenizer, **ARCHITECTURES[kind]))
        )


@pytest.mark.parametrize("kind", ["minimax", "lfm2", "recurrent_gemma", "falcon_h1", "qwen3_next"])
def test_an_answer_does_not_depend_on_what_else_is_asked(
    kind: str, tokenizer: Any, asked: Asked, tmp_path: Path
) -> None:
    """Kind J."""
    base = made_base(kind, tmp_path / "base", tokenizer)
    write_lines(tmp_path / "rows" / "fern" / "train.jsonl", CLIENTS["fern"])
    tested = [
        {"instruction": "Say when to water.", "input": f"{'dry ' * size}{size}", "output": "now"}
        for size in (0, 3, 9, 17, 28)
    ]
    write_lines(tmp_path / "rows" / "fern" / "test.jsonl", tested)
    output = tmp_path / "run"
    more = {"evaluation__rouge": True, "evaluation__max_new_tokens": 10}
    run(output, base, tmp_path / "rows", local__learning_rate=0.01, **more)
    together = dict(zip(asked.prompts, asked.answers, strict=True))
    assert len({len(prompt) for prompt in together}) == len(tested)
    assert len(set(together.values())) > 1, "answers differ"
    for row in tested:
        ended = call("generate", output, "--client", "fern", row["input"])
        assert ended.code == 0 and asked.answers[-1] == together[asked.prompts[-1]]


# Kind K: parameters nobody trains.


def seeing(kind: str, tokenizer: Any) -> Any:
    """The settings of a base that also reads pictures."""
    from transformers import Gemma3Config, GitConfig

    text = shape(tokenizer, sliding_window=64)
    sight = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    makers: dict[str, Any] = {"gemma3": Gemma3Config, "git": GitConfig}
    if kind == "git":
        return makers[kind](**text, vision_config=sight)
    marks = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    return makers[kind](text_config=text, vision_config=sight, mm_tokens_per_image=4, **marks)


@pytest.mark.parametrize(
    ("kind", "targets", "told"),
    [
        ("gemma3", None, ()),
        ("gemma3", ["q_proj", "v_proj"], ("4 of 8", "vision_tower")),
        ("gemma3", ["self_attn.o_proj", "fc1"], ("vision_tower", "fc1")),
        pytest.param(
            *("git", None, ()),
        ),
        ("git", ["query", "q_proj"], ("2 of 4", "image_encoder")),
    ],
)
def test_layers_that_text_never_reads_are_no_targets(
    kind: str,
    targets: list[str] | None,
    told: tuple[str, ...],
    rows: Path,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    """Kind K."""
    base = write_random_base(tmp_path / "base", tokenizer, seeing(kind, tokenizer))
    output = tmp_path / "run"
    more = {} if targets is None else {"adapter.targets": targets}
    ended = run(output, base, rows, local__learning_rate=0.01, **more)
    said = [line for line in ended.err.splitlines() if "adapter.targets" in line]
    assert len(said) == bool(told) and all(word in line for word in told for line in said)
    saved = load_file(output / "adapters" / "fern" / "adapter_model.safetensors")
    assert saved and not any("vision" in name or "image" in name for name in saved)
    assert all(bool(part.any()) for name, part in saved.items() if "lora_B" in name)
    numbers = sum(part.numel() for part in saved.values())
    assert json.loads((output / "adapters" / "index.json").read_text())["fern"]["parameters"] == (
        numbers
    )


def test_targets_of_which_text_reads_none_are_refused(
    rows: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Kind K."""
    base = write_random_base(tmp_path / "base", tokenizer, seeing("gemma3", tokenizer))
    more = {"adapter.targets": ["fc1", "fc2"]}
    both_refused(base, rows, tmp_path / "run", "no", "gradient", "fc1", "fc2", **more)


# Kind L: tracebacks.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_config(vocab_size=322), ("embed_tokens", "lm_head", "321", "322")),
        (changed_config(vocab_size=300), ("embed_tokens", "321", "300")),
        (changed_config(intermediate_size=40), ("down_proj", "48", "40")),
        (changed_config(num_key_value_heads=4), ("k_proj", "[16, 32]", "[32, 32]")),
        (changed_config(hidden_size=64), ("norm.weight", "[32]", "[64]")),
    ],
    ids=["one token more", "fewer tokens", "narrower", "more keys", "wider"],
)
def test_sizes_that_differ_in_config_and_weights_are_named(
    change: Change, words: tuple[str, ...], own_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Kind L."""
    change(own_base)
    said = both_refused(own_base, rows, tmp_path / "run", *words)
    assert len(said.splitlines()) == 1


FAILING = {
    "adds what is not there": "{{ messages[0].content + messages[0].get('name') }}",
    "asks for a missing message": "{{ messages[7].content }}",
    "divides by nothing": "{{ 5 // (messages | length - 1) }}{{ 5 // (1 - messages | length) }}"
    "{{ 1 / 0 }}",
    "calls what is no function": "{{ messages[0].content.shout() }}",
    "sorts what has no order": "{{ messages | sort }}",
    "goes round for ever": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "counts too far": "{{ range(10000000) | list }}",
    "is no template": "{% for m in messages %}{{ m.content }}",
    "has an unknown filter": "{{ messages | pretty }}",
    "turns a word into a number": "{{ [1, 2][messages[0].content] + 'x' | int }}{{ 1 + 'x' }}",
}
GREEDY = "{{ 'x' * 1000000000000000000 }}"


@pytest.mark.parametrize(
    "chat",
    [
        *(pytest.param(FAILING[name], id=name) for name in sorted(FAILING)),
        pytest.param(
            GREEDY,
            id="takes more memory than there is",
        ),
    ],
)
def test_a_template_that_fails_in_any_way_is_one_line(
    chat: str, own_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Kind L."""
    byte_tokenizer(chat).save_pretrained(own_base)
    said = both_refused(own_base, rows, tmp_path / "run", "the chat template", data__prompt="chat")
    assert len(said.splitlines()) == 1


def gapped(folder: Path, token: str, gap: int, chat: str | None = None) -> Path:
    """A base for as many tokens as its tokenizer has, one of which has a far larger id."""
    tokenizer = byte_tokenizer(chat)
    write_random_base(folder, tokenizer)
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary[token] = len(vocabulary) + gap
    for added in written["added_tokens"]:
        if added["content"] == token:
            added["id"] = vocabulary[token]
    path.write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("place", ["input", "output"])
def test_a_token_id_beyond_the_embeddings_is_named_before_anything_is_made(
    place: str, tmp_path: Path
) -> None:
    """Kind L."""
    base = gapped(tmp_path / "base", "%", 6)
    own = {name: [dict(row) for row in watering(name)] for name in ("fern", "moss")}
    own["moss"][4][place] = "80 % wet"
    rows = write_clients(tmp_path / "rows", own)
    size = len(byte_tokenizer())
    words = ("'moss'", f"token id {size + 6}", f"{size} embeddings")
    said = both_refused(base, rows, tmp_path / "run", *words)
    assert len(said.splitlines()) == 1 and "fern" not in said


def test_a_token_of_the_template_beyond_the_embeddings_is_named(rows: Path, tmp_path: Path) -> None:
    """Kind L."""
    base = gapped(tmp_path / "base", "<|im_end|>", 3, TEMPLATES["chatml"][0])
    size = len(byte_tokenizer())
    words = (f"token id {size + 3}", "<|im_end|>", f"{size} embeddings")
    both_refused(base, rows, tmp_path / "run", *words, data__prompt="chat")
    # Rows that do not use it are trained.
    run(tmp_path / "plain", base, rows)


def test_a_question_with_a_token_beyond_the_embeddings_is_refused(
    rows: Path, tmp_path: Path
) -> None:
    """Kind L."""
    base, output = gapped(tmp_path / "base", "%", 6), tmp_path / "run"
    run(output, base, rows)
    ended = call("generate", output, "--client", "fern", "80 % wet")
    refused(ended, f"token id {len(byte_tokenizer()) + 6}")
    assert call("generate", output, "--client", "fern", "80 wet").code == 0


# Kind M: unclear or needless errors about bases.


def more_padding(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[nothing]"})
    tokenizer.save_pretrained(folder)


def padding_far_away(folder: Path) -> None:
    more_padding(folder)
    changed_config(pad_token_id=900)(folder)


@pytest.mark.parametrize(
    "change",
    [
        more_padding,
        padding_far_away,
        changed_config(pad_token_id=900),
        changed_config(pad_token_id=None),
    ],
    ids=["of the tokenizer", "of both", "of the config", "none"],
)
def test_a_padding_token_without_an_embedding_pads_all_the_same(
    change: Change, own_base: Path, plain_base: Path, rows: Path, asked: Asked, tmp_path: Path
) -> None:
    """Kind M."""
    change(own_base)
    more = {"evaluation__rouge": True, "evaluation__max_new_tokens": 6}
    for base in (plain_base, own_base):
        run(tmp_path / f"run of {base.parent.name}", base, rows, **more)
    half = len(asked.answers) // 2
    assert half and asked.answers[:half] == asked.answers[half:]


def test_a_run_of_relative_paths_is_taken_up_from_anywhere(
    plain_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kind M."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(plain_base, here / "base")
    write_clients(here / "rows", CLIENTS)
    monkeypatch.chdir(here)
    run(Path("out"), Path("base"), Path("rows"), local__learning_rate=0.01)
    losses = {row["client"]: row["after_align_loss"] for row in table_of(here / "out", "clients")}
    monkeypatch.chdir(elsewhere)
    ended = call("evaluate", here / "out", "--format", "json")
    assert ended.code == 0 and ended.err == ""
    for row in json.loads(ended.out):
        assert row["test_loss"] == pytest.approx(float(losses[row["client"]]), rel=1e-5)
    assert call("generate", here / "out", "--client", "fern", "pot 1 of fern").code == 0
    saved = json.loads((here / "out" / "adapters" / "fern" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(here / "base")


def test_a_relative_base_that_is_gone_is_said_to_have_been_one(
    plain_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kind M."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain_base, "base")
    run(Path("out"), Path("base"), write_clients(tmp_path / "rows", CLIENTS))
    Path("base").rename("moved")
    said = refused(call("evaluate", "out"), "'base'", str(tmp_path / "base"))
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_tokenizer_of_pieces_alone_names_the_package_that_is_missing(
    name: str, own_base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kind M."""
    monkeypatch.setattr("fedmira.model.base.files.find_spec", lambda package: None)
    (own_base / "tokenizer.json").rename(own_base / name)
    said = both_refused(own_base, rows, tmp_path / "run", "sentencepiece", "pip install")
    assert "tiktoken" not in said and "hub id" not in said


def as_peft_saves(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"])
    with without_warnings():
        get_peft_model(made.from_pretrained(folder), settings).save_pretrained(str(folder))


def as_a_run_saves(folder: Path) -> None:
    run(folder.parent / "first", folder, write_clients(folder.parent / "given", CLIENTS))
    shutil.copytree(folder.parent / "first" / "adapters" / "fern", folder, dirs_exist_ok=True)


@pytest.mark.parametrize("add", [as_peft_saves, as_a_run_saves], ids=["of PEFT", "of a run"])
def test_a_base_folder_that_also_holds_an_adapter_is_refused(
    add: Change, own_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Kind M."""
    add(own_base)
    both_refused(own_base, rows, tmp_path / "run", "adapter_config.json", "merge")


# Saved adapters act in plain PEFT as they were trained, or nothing is trained.


def peft_loss(base: Path, adapter: Path, reads: Reads, client: str) -> float:
    """Nats a response token of a client's test rows, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    with without_warnings():
        model = PeftModel.from_pretrained(made.from_pretrained(base), str(adapter)).eval()
    losses: list[float] = []
    for row in reads.rows(client, "test"):
        ids = torch.tensor([*row.prompt, *row.response])
        with torch.no_grad():
            told = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        losses += [
            -float(told[place - 1, ids[place]]) for place in range(len(row.prompt), len(ids))
        ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "targets", [GATED, ["up_proj"], []], ids=["gates, ups and downs", "ups", "the usual ones"]
)
@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "deepseek_v2", "qwen3_next", "qwen2_moe", "glm4_moe", "mixtral"]
)
def test_an_adapter_of_experts_is_refused_at_the_start_or_acts_in_plain_peft(
    kind: str, targets: list[str], rows: Path, tokenizer: Any, reads: Reads, tmp_path: Path
) -> None:
    """Kind M."""
    base, output = made_base(kind, tmp_path / "base", tokenizer), tmp_path / "run"
    more: dict[str, object] = {"adapter.targets": targets} if targets else {}
    ended = call(
        *("run", *options(base, rows, local__learning_rate=0.05, local__steps=6, **more)),
        *("--output", output),
    )
    if ended.code:
        refused(ended, "adapter.targets")
        assert not output.exists()
        return
    row = {each["client"]: each for each in table_of(output, "clients")}["fern"]
    trained, before = float(row["after_align_loss"]), float(row["base_loss"])
    assert abs(trained - before) > 0.05, "training has moved the loss"
    found = peft_loss(base, output / "adapters" / "fern", reads, "fern")
    assert found == pytest.approx(trained, rel=1e-4)


def test_layers_in_front_of_a_kept_state_are_trained(
    rows: Path, tokenizer: Any, reads: Reads, tmp_path: Path
) -> None:
    """Kind M."""
    base = made_base("recurrent_gemma", tmp_path / "base", tokenizer)
    output = tmp_path / "run"
    run(output, base, rows, local__learning_rate=0.05, **{"adapter.targets": GATED})
    row = {each["client"]: each for each in table_of(output, "clients")}["fern"]
    found = peft_loss(base, output / "adapters" / "fern", reads, "fern")
    assert found == pytest.approx(float(row["after_align_loss"]), rel=1e-4)
