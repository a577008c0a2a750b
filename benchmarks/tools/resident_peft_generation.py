"""Tool (a): one resident PEFT model.

Each client's adapter is copied in and its prompts are generated as one batch, padded on the left.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from generation_bench import NEW_TOKENS, run
from peft_model import load_model, put_adapter
from workbench import Adapter, Work


def load(
    work: Work, adapters: list[Adapter], arguments: argparse.Namespace
) -> Callable[[], list[list[str]]]:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.base)
    model = load_model(work, arguments.dtype).eval()

    def one_client(prompts: list[list[int]]) -> list[str]:
        size = max(map(len, prompts))
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * (size - len(prompt)) + prompt for prompt in prompts]
        )
        mask = torch.tensor([[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        return [
            text.strip()
            for text in tokenizer.batch_decode(output[:, size:], skip_special_tokens=True)
        ]

    def generate() -> list[list[str]]:
        texts = []
        for adapter, prompts in zip(adapters, work.prompts, strict=True):
            put_adapter(model, adapter)
            texts.append(one_client(prompts))
        return texts

    return generate


if __name__ == "__main__":
    run(("transformers.models.llama.modeling_llama", "peft"), load)
