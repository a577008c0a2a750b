"""LoRA as a kind of adapter: everything packed, the clients of a cohort side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fedmira.adapters import (
    Adapter,
    HashedAdapter,
    all_finite,
    modules,
    scale,
    truncate_rank,
)
from fedmira.config import EvaluationSettings, LocalSettings
from fedmira.model.base.memory import PassLimits, within_memory
from fedmira.model.base.rows import Row
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.generation.generate import choose_decoding, generate, most_cache_bytes
from fedmira.model.generation.reference import (
    ReferenceStore,
    build_store,
    reference_losses,
    referred,
)
from fedmira.model.kinds.peft_files import (
    ADAPTER_WEIGHTS,
    CONFIG,
    config_text,
    lora_config,
    read_adapter,
    weights,
    write_files,
)
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.lora.stack import StackedAdapters, start_adapter
from fedmira.model.packed.passes import response_losses
from fedmira.model.packed.token_budget import choose_token_budget
from fedmira.model.training.measure import (
    Choice,
    Contender,
    choose_adapters,
    row_losses_with,
    summed_losses,
)
from fedmira.model.training.steps import train_cohort
from fedmira.model.training.tasks import LocalOutcome, LocalTask

__all__ = ["LoraKind"]


@dataclass(frozen=True)
class LoraKind:
    """LoRA (Hu et al. 2021) on some linear layers; clients of a cohort train side by side.

    Attributes:
        alpha, dropout, rslora: of the branches.
        limits: how much memory was seen to hold.
        configs: rank -> the text of adapter_config.json, once it was written.
        last_weights: content hash -> the file of the weights that were written last.
        base: the frozen base.
        targets: the linear layers that carry adapters, in the model's order.
        virtual_tokens: always 0: LoRA takes no places of the context, as prompt encoders do.
    """

    base: BaseModel
    targets: Sequence[TargetModule]
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    virtual_tokens: int = 0
    limits: PassLimits = field(default_factory=PassLimits, repr=False, compare=False)
    configs: dict[int, str] = field(default_factory=dict, repr=False, compare=False)
    last_weights: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def packed(self) -> bool:
        """Where the base's architecture allows it."""
        return self.base.packed

    @property
    def summary(self) -> str:
        """How many layers carry an adapter."""
        return f"{len(self.targets)} layers"

    def scale(self, rank: int) -> float:
        """The factor alpha / rank in front of the product B A, or alpha / sqrt(rank)."""
        return scale(self.alpha, rank, self.rslora)

    def starts(self, ranks: Mapping[str, int], seed: int) -> dict[str, Adapter]:
        """Cuts of one adapter of the largest rank."""
        largest = max(ranks.values())
        common = start_adapter(self.targets, largest, seed)
        of_rank = {
            rank: common if rank == largest else truncate_rank(common, rank)
            for rank in set(ranks.values())
        }
        return {client: of_rank[rank] for client, rank in ranks.items()}

    def train(
        self, tasks: Sequence[LocalTask], settings: LocalSettings, budget: int
    ) -> list[LocalOutcome]:
        """Side by side, packed where the architecture allows it."""
        return train_cohort(
            self.base, self.targets, tasks, settings, self.dropout, budget, self.limits.train
        )

    def losses(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        rows: Sequence[Sequence[Row]],
        budget: int,
    ) -> list[float]:
        """In the same passes."""
        return summed_losses(
            self.base, self.targets, adapters, scales, rows, budget, self.limits.measure
        )[0]

    def row_losses(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        rows: Sequence[Sequence[Row]],
        budget: int,
    ) -> list[list[float]]:
        """In the same passes."""
        branch = LoraBranch(
            self.base.model,
            StackedAdapters(self.targets, adapters, scales, self.base.device, trainable=False),
        )
        passes = partial(response_losses, self.base, branch)
        return row_losses_with(branch, passes, rows, budget, self.limits.measure)

    def changes_nothing(self, adapter: Adapter) -> bool:
        """Where all B are zero, as at the start."""
        return all_finite(adapter) and not any(up.any() for _, up in modules(adapter).values())

    def choose(self, contenders: Sequence[Contender], budget: int) -> list[Choice]:
        """In the same passes."""
        return choose_adapters(self.base, self.targets, contenders, budget, self.limits.measure)

    def generate(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        prompts: Sequence[tuple[int, Sequence[int]]],
        max_new_tokens: int,
        budget: int,
    ) -> list[str]:
        """Prompts of all clients in common batches.

        Where memory runs out, fewer tokens are read and fewer answered at a time.
        """
        stacked = StackedAdapters(self.targets, adapters, scales, self.base.device, trainable=False)
        with LoraBranch(self.base.model, stacked) as branch:

            def answers(tokens: int) -> list[str]:
                cache_bytes = most_cache_bytes(self.base.device) * tokens // budget
                return generate(self.base, branch, prompts, max_new_tokens, tokens, cache_bytes)

            found, _ = within_memory(answers, budget, self.limits.generate)
        return found

    def reference(
        self, adapter: Adapter, scale: float, rows: Sequence[Row], settings: EvaluationSettings
    ) -> ReferenceStore:
        """The states behind a client's training rows under its adapter.

        Args:
            adapter: the client's.
            scale: s of the adapter.
            rows: training rows of the client, and none else.
            settings: neighbours, heads and temperature.

        Raises:
            ModelError: there is no row, or the base cannot be referred to.
        """
        with self._alone(adapter, scale) as branch:
            return build_store(
                self.base,
                branch,
                adapter,
                rows,
                neighbours=settings.reference_neighbours,
                heads=settings.reference_heads,
                temperature=settings.reference_temperature,
            )

    def referred_losses(
        self,
        adapter: Adapter,
        scale: float,
        rows: Sequence[Row],
        store: ReferenceStore,
        share: float,
    ) -> list[float]:
        """The summed response loss of each row where a share of each probability is referred.

        Args:
            adapter: the client's.
            scale: s of the adapter.
            rows: to measure on.
            store: made with this adapter.
            share: of the reference, from 0 up to 1.

        Raises:
            RunError: the store was made with another adapter.
        """
        store.check(adapter)
        with self._alone(adapter, scale) as branch:
            return reference_losses(self.base, branch, rows, store, share)

    def referred_answers(
        self,
        adapter: Adapter,
        scale: float,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        budget: int,
        store: ReferenceStore,
        share: float,
    ) -> list[str]:
        """Greedy answers of one client where a share of each probability is referred.

        Args:
            adapter: the client's.
            scale: s of the adapter.
            prompts: token ids of each.
            max_new_tokens: longest answer in tokens.
            budget: most tokens in one pass.
            store: made with this adapter.
            share: of the reference, from 0 up to 1.

        Raises:
            RunError: the store was made with another adapter.
        """
        store.check(adapter)
        asked = [(0, prompt) for prompt in prompts]
        with self._alone(adapter, scale) as branch:
            choose_decoding(self.base, branch)  # a trial is of the model's own scores
            with referred(self.base, store, share):
                return generate(self.base, branch, asked, max_new_tokens, budget)

    def _alone(self, adapter: Adapter, scale: float) -> LoraBranch:
        stacked = StackedAdapters(
            self.targets, [adapter], [scale], self.base.device, trainable=False
        )
        return LoraBranch(self.base.model, stacked)

    def token_budget(self, step_tokens: float = 0.0, cohort: int = 1) -> int:
        """The budget that a short trial on this machine finds."""
        return choose_token_budget(self.base, self.targets, step_tokens, cohort)

    def write(self, folder: Path, adapter: Adapter, *, lasting: bool = True) -> None:
        """As LoRA weights of the adapter's own rank."""
        rank = next(iter(modules(adapter).values()))[0].shape[0]
        if rank not in self.configs:
            config = lora_config(
                self.base, self.targets, rank, self.alpha, self.dropout, self.rslora
            )
            self.configs[rank] = config_text(config)
        files: dict[str, str | bytes] = {
            CONFIG: self.configs[rank],
            ADAPTER_WEIGHTS: self._weights(adapter),
        }
        write_files(folder, files, lasting=lasting)

    def _weights(self, adapter: Adapter) -> bytes:
        """The content of the file of weights; of the adapter before, where this one is equal."""
        if not isinstance(adapter, HashedAdapter):
            return weights(adapter)
        if adapter.sha256 not in self.last_weights:
            self.last_weights.clear()
            self.last_weights[adapter.sha256] = weights(adapter)
        return self.last_weights[adapter.sha256]

    def read(self, folder: Path) -> Adapter:
        """The factors A and B of every layer, from a PEFT folder."""
        return read_adapter(folder)
