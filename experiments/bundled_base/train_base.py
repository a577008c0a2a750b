"""Train the small base model that fedmira ships.

Byte-level BPE tokenizer, then a Llama of 3.1 M parameters.

    python experiments/bundled_base/train_base.py --data DIR --work DIR [--steps N]

DIR of --data holds instructions.jsonl.gz, templates.jsonl.gz (task, instruction, input, output) and
stories.txt.gz; generated rows come from `fedmira.data.sources.demo.pretraining_rows`. The stages
are `corpus` (tokenizer, token file), `train` and `export`; each is skipped when its result exists,
and training continues from its last checkpoint. One seed, one fixed order of the data and a fixed
schedule make a run repeatable on one machine and thread count. Wall time and data are written to
model_card.json beside the weights.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmira.data import Example
from fedmira.data.prompts import alpaca_prompt, plain_prompt
from fedmira.data.sources.demo import pretraining_rows

VOCABULARY = 4096
CONTEXT = 512
WINDOWS = 8  # windows of CONTEXT tokens a step
SHORT_SHARE = 0.6  # the first part of training cuts each window in two: attention costs half
PEAK_LEARNING_RATE = 4e-3
MUON_LEARNING_RATE = 0.02
WARMUP_STEPS = 100
DECAY_SHARE = 0.45  # the last part of training, where the learning rate falls to zero
RESPONSE_WEIGHT = 2
SEED = 7
Segment = tuple[str, int]  # text, loss weight


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def read_rows(data: Path) -> list[tuple[str, Example]]:
    rows = []
    for name in ("instructions", "templates"):
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                rows.append((row["task"], Example(row["instruction"], row["input"], row["output"])))
    return rows + list(pretraining_rows(9000, SEED))


def read_stories(data: Path) -> list[str]:
    with gzip.open(data / "stories.txt.gz", "rt", encoding="utf-8") as file:
        return [story.strip() for story in file.read().split("<|endoftext|>") if story.strip()]


def train_tokenizer(texts: Iterator[str], path: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=CONTEXT,
    ).save_pretrained(path)
    return tokenizer


def documents(rows: list[tuple[str, Example]], stories: list[str]) -> list[list[Segment]]:
    """One pass over the rows in random order.

    Half alone in the Alpaca form, half grouped by task under one instruction.
    """
    rng = random.Random(SEED)
    by_instruction: dict[str, list[Example]] = {}
    result: list[list[Segment]] = []
    for task, example in rows:
        if rng.random() < 0.5:
            result.append([(alpaca_prompt(example), 1), (example.output, RESPONSE_WEIGHT)])
        elif example.input:
            by_instruction.setdefault(task + "\0" + example.instruction, []).append(example)
        else:
            result.append([(plain_prompt(example), 1), (example.output, RESPONSE_WEIGHT)])
    for group in by_instruction.values():
        rng.shuffle(group)
        for start in range(0, len(group), 4):
            document: list[Segment] = [(group[start].instruction + "\n\n", 1)]
            for example in group[start : start + 4]:
                document += [
                    (example.input + "\n\n", 1),
                    (example.output + "\n\n", RESPONSE_WEIGHT),
                ]
            result.append(document)
    result += [[(story, 1)] for story in stories]
    rng.shuffle(result)
    return result


def build_corpus(data: Path, work: Path) -> None:
    if (work / "tokens.npy").exists():
        return
    rows, stories = read_rows(data), read_stories(data)
    sample = random.Random(SEED).sample(rows, 30000)
    texts = (text for _, row in sample for text in (alpaca_prompt(row), row.output))
    tokenizer = train_tokenizer(iter([*texts, *stories[:500]]), work / "tokenizer")
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    text_bytes = 0
    plan = documents(rows, stories)
    for start in range(0, len(plan), 2000):
        chunk = plan[start : start + 2000]
        segments = [segment for document in chunk for segment in document]
        encoded = iter(
            tokenizer.encode_batch_fast([text for text, _ in segments], add_special_tokens=False)
        )
        text_bytes += sum(len(text.encode()) for text, _ in segments)
        for document in chunk:
            tokens, marks = [1], [1]
            for _, weight in document:
                piece = next(encoded).ids
                tokens += piece
                marks += [weight] * len(piece)
            tokens.append(2)
            marks.append(document[-1][1])
            ids.append(np.array(tokens[: 4 * CONTEXT], dtype=np.uint16))
            weights.append(np.array(marks[: 4 * CONTEXT], dtype=np.uint8))
    np.save(work / "weights.npy", np.concatenate(weights))
    np.save(work / "tokens.npy", np.concatenate(ids))
    summary = {
        "rows": len(rows),
        "stories": len(stories),
        "documents": len(plan),
        "bytes": text_bytes,
        "tokens": int(sum(map(len, ids))),
    }
    (work / "corpus.json").write_text(json.dumps(summary, indent=1))
    print(summary, flush=True)


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up, constant, then a linear fall to zero."""
    decay = int(steps * DECAY_SHARE)
    return min((step + 1) / WARMUP_STEPS, 1.0, (steps - step) / decay)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    other = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    return [
        torch.optim.Muon(hidden, lr=MUON_LEARNING_RATE, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(other, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of a linear head, with logits that stay in the cache.

    That is why only a few rows are taken at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, mark):  # type: ignore[no-untyped-def]
        half = weight.to(torch.bfloat16)
        total, plain = torch.zeros(()), torch.zeros(())
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), 512):
            part = slice(start, start + 512)
            rows = hidden[part].to(torch.bfloat16)
            logits = (rows @ half.T).float()
            each = functional.cross_entropy(logits, target[part], reduction="none")
            total, plain = total + (each * mark[part]).sum(), plain + each.sum()
            gradient = torch.softmax(logits, dim=-1)
            gradient[torch.arange(len(rows)), target[part]] -= 1
            gradient = (gradient * mark[part][:, None]).to(torch.bfloat16)
            hidden_gradient[part] = gradient @ half
            weight_gradient += (gradient.T @ rows).float()
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total, plain.detach()

    @staticmethod
    def backward(ctx, scale, _):  # type: ignore[no-untyped-def]
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * scale, weight_gradient * scale, None, None


def train(work: Path, steps: int) -> None:
    if (work / "weights.pt").exists():
        return
    tokens, weights = (
        np.load(work / "tokens.npy", mmap_mode="r"),
        np.load(work / "weights.npy", mmap_mode="r"),
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(configuration())
    optimizers = make_optimizers(model)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    first, seconds = 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, seconds = saved["step"], saved["seconds"]
    span = WINDOWS * CONTEXT
    starts = np.random.default_rng(SEED).permutation((len(tokens) - 1) // CONTEXT)
    if steps * WINDOWS > len(starts):
        starts = np.concatenate([starts] * math.ceil(steps * WINDOWS / len(starts)))
    begun, running = time.monotonic(), None
    for step in range(first, steps):
        windows = starts[step * WINDOWS : (step + 1) * WINDOWS] * CONTEXT
        ids = torch.from_numpy(
            np.stack([tokens[s : s + CONTEXT + 1] for s in windows]).astype(np.int64)
        )
        mark = torch.from_numpy(
            np.stack([weights[s + 1 : s + CONTEXT + 1] for s in windows]).astype(np.float32)
        )
        share = learning_rate_share(step, steps)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * share
        length = CONTEXT // 2 if step < steps * SHORT_SHARE else CONTEXT
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(
                input_ids=ids[:, :-1].reshape(-1, length), use_cache=False
            ).last_hidden_state
        target, mark = ids[:, 1:].flatten(), mark.flatten()
        loss, plain = ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1).float(), model.lm_head.weight, target, mark / mark.sum()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = plain.item() / span
        running = mean if running is None else 0.95 * running + 0.05 * mean
        if step % 50 == 0 or step == steps - 1:
            spent = seconds + time.monotonic() - begun
            rate = (step + 1 - first) * span / (time.monotonic() - begun)
            print(
                f"step {step} loss {running:.4f} lr {share:.3f} seconds {spent:.0f} "
                f"tokens/s {rate:.0f}",
                flush=True,
            )
        if (step + 1) % 200 == 0:
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step + 1,
            }
            torch.save(
                {**state, "seconds": seconds + time.monotonic() - begun}, work / "checkpoint.tmp"
            )
            (work / "checkpoint.tmp").replace(checkpoint)
    torch.save(
        {"model": model.state_dict(), "seconds": seconds + time.monotonic() - begun},
        work / "weights.pt",
    )


def export(work: Path, steps: int) -> None:
    saved = torch.load(work / "weights.pt", weights_only=True)
    model = LlamaForCausalLM(configuration())
    model.load_state_dict(saved["model"])
    folder = work / "base"
    model.to(torch.float16).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(folder)
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens_trained": steps * WINDOWS * CONTEXT,
        "train_seconds": round(saved["seconds"]),
        "corpus": json.loads((work / "corpus.json").read_text()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": SEED,
    }
    (folder / "model_card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4800)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    build_corpus(arguments.data, arguments.work)
    train(arguments.work, arguments.steps)
    export(arguments.work, arguments.steps)


if __name__ == "__main__":
    main()
