"""fedmira: prompts of all clients in common batches, each row with its own client's adapter."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from generation_bench import NEW_TOKENS, run
from workbench import Adapter, Work


def load(
    work: Work, adapters: list[Adapter], arguments: argparse.Namespace
) -> Callable[[], list[list[str]]]:
    from fedmira.clients import CohortSettings, LocalClients
    from fedmira.config import LocalSettings, ModelSettings
    from fedmira.data import ClientData, EncodedExample
    from fedmira.model import LoraKind, find_targets, load_base

    base = load_base(ModelSettings(base=work.base, dtype=arguments.dtype, device="cpu"))
    clients = {}
    for name, prompts in zip(work.names, work.prompts, strict=True):
        test = tuple(
            EncodedExample(tuple(prompt), (base.tokenizer.eos_token_id,)) for prompt in prompts
        )
        clients[name] = ClientData(name, name, "", (), (), test, ("",) * len(test))
    kind = LoraKind(
        base, find_targets(base.model, work.settings["targets"]), work.settings["alpha"]
    )
    scales = dict.fromkeys(clients, work.settings["alpha"] / work.settings["rank"])
    settings = CohortSettings(LocalSettings(), scales, kind.token_budget())
    workers = LocalClients(None, kind, clients, settings)
    by_name = dict(zip(work.names, adapters, strict=True))

    def generate() -> list[list[str]]:
        texts = workers.generations(by_name, NEW_TOKENS)
        return [texts[name] for name in work.names]

    return generate


if __name__ == "__main__":
    run(("fedmira.metrics", "transformers.models.llama.modeling_llama"), load)
