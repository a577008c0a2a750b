"""Each client's reference store, kept beside its rows and made anew when its adapter is another."""

from __future__ import annotations

from collections.abc import Sequence

from fedmira.adapters import Adapter, content_hash
from fedmira.config import EvaluationSettings
from fedmira.data import ClientData
from fedmira.errors import ConfigError
from fedmira.messages import ClientId
from fedmira.model import AdapterKind, LoraKind, ReferenceStore, Row

__all__ = ["References", "references_of"]


class References:
    """Measures and answers with Reference Trustable Decoding.

    Stores are in this process alone: no file, no message and no checkpoint has them.

    Args:
        kind: the adapters, on their base.
        settings: the share, and how neighbours are found.
    """

    def __init__(self, kind: LoraKind, settings: EvaluationSettings) -> None:
        self._kind, self._settings = kind, settings
        self._stores: dict[ClientId, ReferenceStore] = {}

    def of(self, client: ClientData, adapter: Adapter, scale: float) -> ReferenceStore:
        """The store of a client's training rows under this adapter.

        Args:
            client: whose rows; none but those that train are read.
            adapter: its adapter as it is now.
            scale: s of the adapter.

        Raises:
            ModelError: the client has no training row, or the base cannot be referred to.
        """
        kept = self._stores.get(client.client_id)
        if kept is None or kept.adapter_sha256 != content_hash(adapter):
            kept = self._kind.reference(adapter, scale, client.train, self._settings)
            self._stores[client.client_id] = kept
        return kept

    def losses(
        self, client: ClientData, adapter: Adapter, scale: float, rows: Sequence[Row]
    ) -> list[float]:
        """The summed response loss of each row, in nats.

        Args:
            client: whose rows refer.
            adapter: its adapter.
            scale: s of the adapter.
            rows: to measure on.
        """
        store, share = self.of(client, adapter, scale), self._settings.reference_share
        return self._kind.referred_losses(adapter, scale, rows, store, share)

    def answers(
        self,
        client: ClientData,
        adapter: Adapter,
        scale: float,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        budget: int,
    ) -> list[str]:
        """Greedy answers to prompts.

        Args:
            client: whose rows refer.
            adapter: its adapter.
            scale: s of the adapter.
            prompts: token ids of each.
            max_new_tokens: longest answer in tokens.
            budget: most tokens in one pass.
        """
        return self._kind.referred_answers(
            adapter,
            scale,
            prompts,
            max_new_tokens=max_new_tokens,
            budget=budget,
            store=self.of(client, adapter, scale),
            share=self._settings.reference_share,
        )


def references_of(kind: AdapterKind, settings: EvaluationSettings) -> References | None:
    """What refers for clients of this process; None where nothing does.

    Args:
        kind: the adapters, on their base.
        settings: the [evaluation] section.

    Raises:
        ConfigError: a share is set for adapters that are no LoRA.
    """
    if not settings.reference_share:
        return None
    if not isinstance(kind, LoraKind):
        raise ConfigError(
            f"evaluation.reference_share = {settings.reference_share:g} reads the states behind "
            "LoRA adapters, and these are of another kind; set it to 0"
        )
    return References(kind, settings)
