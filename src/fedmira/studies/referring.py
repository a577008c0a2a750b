"""What saved adapters answer, alone or leaning on the rows that their clients were trained on."""

from __future__ import annotations

from collections.abc import Sequence

from fedmira.clients import references_of
from fedmira.config import EvaluationSettings
from fedmira.data import ObjectRows, asked, load_clients, make_encoder
from fedmira.errors import ConfigError, RunFolderError
from fedmira.messages import ClientId
from fedmira.model import check_prompt_ids
from fedmira.runs import hash_of_rows
from fedmira.studies.saved import SavedAdapters, quick_budget, shared_prompt

__all__ = ["Referring", "answer", "referring_of"]


class Referring:
    """Answers of a run's clients under Reference Trustable Decoding.

    Args:
        saved: what the run has saved; its rows must be here, as stores are made of them.
        settings: the [evaluation] section, with a share above 0.
        rows: of a run whose rows were objects.

    Raises:
        ConfigError: the share cannot be used, or the adapters are no LoRA.
        DataError: the rows cannot be read.
        RunFolderError: the rows here are not those of the run.
    """

    def __init__(
        self, saved: SavedAdapters, settings: EvaluationSettings, rows: ObjectRows | None = None
    ) -> None:
        references = references_of(saved.kind, settings)
        assert references is not None, "the share is above 0"
        config, tokenizer = saved.config, saved.kind.base.tokenizer
        clients = load_clients(config.data, config.seed, tokenizer, rows).clients
        data = {client.client_id: client for client in clients}
        if hash_of_rows(data) != saved.data_sha256:
            raise RunFolderError(
                f"{saved.path}: reference decoding stores the rows that an adapter was trained on, "
                "and the rows here are not those of the run: they have changed, are split in "
                "another way, or were elsewhere, so that test rows could be among them; restore "
                "them, or ask without --reference-share"
            )
        self._saved, self._references, self._data = saved, references, data

    def answers(
        self, client: ClientId, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[str]:
        """What a client's adapter answers.

        Args:
            client: its id.
            prompts: token ids of each.
            max_new_tokens: longest answer in tokens.
        """
        saved = self._saved
        return self._references.answers(
            self._data[client],
            saved.adapters[client],
            saved.kind.scale(saved.ranks[client]),
            prompts,
            max_new_tokens=max_new_tokens,
            budget=quick_budget(saved),
        )


def referring_of(
    saved: SavedAdapters, share: float | None, rows: ObjectRows | None = None
) -> Referring | None:
    """Who answers with references; None where the share is 0.

    Args:
        saved: what the run has saved.
        share: of the reference; None takes the run's `evaluation.reference_share`.
        rows: of a run whose rows were objects.

    Raises:
        ConfigError: the share is not 0 or more and below 1, or the adapters are no LoRA.
        DataError: the rows cannot be read.
        RunFolderError: the rows here are not those of the run.
    """
    settings = saved.config.evaluation
    if share is not None:
        if not 0 <= share < 1:
            raise ConfigError(f"reference share {share:g}: must be 0 or more and below 1")
        settings = settings.model_copy(update={"reference_share": share})
    return Referring(saved, settings, rows) if settings.reference_share else None


def answer(
    saved: SavedAdapters,
    client: ClientId,
    text: str,
    instruction: str | None = None,
    max_new_tokens: int | None = None,
    rows: ObjectRows | None = None,
    reference_share: float | None = None,
) -> str:
    """What a client's adapter says to an input.

    The client's own instruction is used unless another is given.

    Args:
        saved: what the run has saved.
        client: its id.
        text: the input.
        instruction: in place of the client's own.
        max_new_tokens: longest answer in tokens; None takes evaluation.max_new_tokens.
        rows: of a run whose rows were objects.
        reference_share: of each token's probability that comes from the client's training rows;
            None takes evaluation.reference_share.

    Raises:
        ConfigError: there is no such client, no instruction is given and its rows are not on this
            machine, or the share cannot be used.
        RunFolderError: a share is asked for, and the rows here are not those of the run.
    """
    kind, config = saved.kind, saved.config
    shared = shared_prompt(saved, client, instruction, rows)
    prompt = make_encoder(config.data, kind.base.tokenizer).prompt(asked(shared, text))
    check_prompt_ids(kind.base, prompt)
    limit = max_new_tokens or config.evaluation.max_new_tokens
    if referring := referring_of(saved, reference_share, rows):
        return referring.answers(client, [prompt], limit)[0]
    scales = [kind.scale(saved.ranks[client])]
    budget = quick_budget(saved)
    return kind.generate([saved.adapters[client]], scales, [(0, prompt)], limit, budget)[0]
