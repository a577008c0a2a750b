"""A finished run taken up again: its base, its data and its saved adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmira.adapters import Adapter, LazyAdapters
from fedmira.config import Config, load_config
from fedmira.data import Encoder, Example
from fedmira.errors import ConfigError, RunFolderError
from fedmira.evaluation import Evaluator
from fedmira.experiment import build_experiment
from fedmira.messages import ClientId
from fedmira.rounds import RunFolder

__all__ = ["SavedRun", "answer", "reload_run"]


@dataclass(frozen=True)
class SavedRun:
    """A run as it lies on disk, ready to be measured or asked; adapters are read when they are asked for."""

    config: Config
    evaluator: Evaluator
    adapters: Mapping[ClientId, Adapter]


def reload_run(path: Path) -> SavedRun:
    """Build what the run was made of.

    Raises:
        RunFolderError: it is no run folder, has no adapters, or the base model has changed since.
    """
    folder = RunFolder.reopen(path)
    index = folder.read_json("adapters/index.json")
    if not index:
        raise RunFolderError(f"{path}: the run has saved no adapters yet; finish it with: fedmira run --resume --output {path}")
    config = load_config(path / "config.toml")
    experiment = build_experiment(config)
    evaluator = experiment.evaluator
    assert isinstance(evaluator, Evaluator), "what build_experiment makes has all rows in this process"
    for client, entry in index.items():
        trained_on = entry["base_sha256"] if isinstance(entry, dict) else ""
        if trained_on != experiment.base.sha256:
            raise RunFolderError(
                f"{path}: the adapter of {client!r} was trained on another base (sha256 {trained_on[:12]}, {config.model.base!r} "
                f"has {experiment.base.sha256[:12]}); give the base it was trained on"
            )
    return SavedRun(config, evaluator, LazyAdapters(index, lambda client: experiment.kind.read(folder.adapters / client)))


def answer(saved: SavedRun, client: ClientId, text: str, instruction: str | None = None, max_new_tokens: int | None = None) -> str:
    """What a client's adapter says to an input, under the client's own instruction unless another is given.

    Raises:
        ConfigError: there is no such client.
    """
    if client not in saved.adapters:
        raise ConfigError(
            f"there is no client {client!r} in this run; its clients are "
            f"{', '.join(list(saved.adapters)[:12])}{' ...' if len(saved.adapters) > 12 else ''}"
        )
    evaluator = saved.evaluator
    own = evaluator.clients[client].instruction if instruction is None else instruction
    example = Example(own, text, "") if own else Example(text, "", "")
    prompt = Encoder(evaluator.kind.base.tokenizer, saved.config.data.prompt, saved.config.data.max_length).prompt(example)
    limit = max_new_tokens or saved.config.evaluation.max_new_tokens
    adapters, scales = [saved.adapters[client]], [evaluator.scales[client]]
    return evaluator.kind.generate(adapters, scales, [(0, prompt)], limit, evaluator.token_budget)[0]
