"""The composition root: from a config to everything built, in the order the data flows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedmira.adapters import Adapter
from fedmira.clients import (
    BaseLosses,
    Clients,
    CohortSettings,
    Crew,
    LocalClients,
    OverWire,
    references_of,
    share_size,
    threads_of,
)
from fedmira.config import Config
from fedmira.config.methods import written_form
from fedmira.data import (
    ClientSummary,
    Dataset,
    ObjectRows,
    ReadRows,
    about_advantages,
    load_clients,
    read_rows,
    told_left_out,
    turn_ends,
)
from fedmira.experiment.clock import with_clock
from fedmira.experiment.door import Door
from fedmira.experiment.places import where_they_lay
from fedmira.experiment.privacy import privacy_plan, row_privacy
from fedmira.experiment.processors import choose_crew
from fedmira.experiment.scheme import Scheme, make_scheme, prepare_kind, token_budget
from fedmira.graphs import GraphSource
from fedmira.messages import ClientId
from fedmira.methods import Method
from fedmira.model import (
    AdapterKind,
    BaseModel,
    TargetModule,
    check_ids,
    end_tokens,
    load_base,
    load_tokenizer,
    most_side_by_side,
)
from fedmira.privacy import PrivacyPlan
from fedmira.rounds import cohort_size
from fedmira.runs import Ground, RunFolder, hash_of_rows

_log = logging.getLogger("fedmira")

__all__ = ["Experiment", "build_experiment"]


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs, built and checked; nothing has been trained.

    Attributes:
        config: the resolved settings.
        kind: the adapters, on their base.
        parties: what each client says of itself, by client id.
        ranks: client id -> LoRA rank, 0 for kinds without one.
        starts: client id -> the adapter that it starts from.
        graph: who is related, round by round.
        algorithm: the method, built for these clients.
        clients: who trains and measures, with the client half of the algorithm.
        data_sha256, token_budget, federation: as in `Ground`.
        skipped: what was left out of the data, one "name: reason" each.
        crew: the processes and threads that train and measure; None where other machines do.
        verify_adapters: whether every saved adapter is loaded with plain PEFT, and not one alone.
        prompts, notes, privacy: as in `Ground`.
        door: through which newcomers come between rounds; None where nobody can.
        came: newcomer -> the first round that it can train in; they are the last of `parties`.
    """

    config: Config
    kind: AdapterKind
    parties: Mapping[ClientId, ClientSummary]
    ranks: Mapping[ClientId, int]
    starts: Mapping[ClientId, Adapter]
    graph: GraphSource
    algorithm: Method
    clients: Clients
    data_sha256: str
    token_budget: int | None
    skipped: tuple[str, ...] = ()
    federation: Mapping[str, object] = field(default_factory=dict)
    verify_adapters: bool = False
    crew: Crew | None = None
    prompts: Mapping[ClientId, Mapping[str, object]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    privacy: PrivacyPlan | None = None
    door: Door | None = None
    came: Mapping[ClientId, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a method that its papers or its clients do not know.

        Raises:
            ValueError: the algorithm is not that of the config, or not that of the clients.
        """
        if self.clients.method not in (None, self.algorithm):
            raise ValueError(
                f"algorithm {self.algorithm.name!r}: these clients run the client half of another "
                "method; build the experiment anew on fedmira.config.with_method(config, method)"
            )
        if written_form(self.algorithm) != written_form(self.config.algorithm):
            raise ValueError(
                f"algorithm {self.algorithm.name!r}: the config names "
                f"{self.config.algorithm.name!r}; build the experiment anew on "
                "fedmira.config.with_method(config, method)"
            )

    @property
    def base(self) -> BaseModel:
        """The frozen base model."""
        return self.kind.base

    @property
    def targets(self) -> Sequence[TargetModule]:
        """The layers that carry a LoRA branch."""
        return self.kind.targets

    @property
    def ground(self) -> Ground:
        """What the run stands on."""
        return Ground(
            kind=self.kind,
            data_sha256=self.data_sha256,
            token_budget=self.token_budget,
            federation=self.federation,
            prompts=self.prompts,
            notes=self.notes,
            crew=self.crew,
            privacy=self.privacy,
        )

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Ends worker processes behind the block."""
        try:
            yield
        finally:
            if self.crew is not None:
                self.crew.release()


def build_experiment(
    config: Config,
    base: BaseModel | None = None,
    resumed: Path | None = None,
    dataset: Dataset | None = None,
    rows: ObjectRows | ReadRows | None = None,
) -> Experiment:
    """Load the data and the base and build the parts on them.

    Rows are read and encoded before the weights of the base are loaded, so that a wrong one is told
    soon.

    Args:
        config: the resolved settings.
        base: a base that is loaded already, to share it between runs.
        resumed: the folder of a run that is to be continued: with its token budget, so that it goes
            on bit for bit.
        dataset: what `load_clients` gave for this config's [data] and seed, to share it between
            runs.
        rows: of a run whose rows are objects, or what `read_rows` gave for this config.

    Raises:
        InputError: something in the config cannot work; nothing was trained.
    """
    places = config
    if resumed is not None:  # perhaps from another folder than the one it was started in
        places = where_they_lay(config, RunFolder(resumed).run_json())
    if dataset is None and not isinstance(rows, ReadRows):
        rows = read_rows(places.data, config.seed, rows)
    tokenizer = base.tokenizer if base else load_tokenizer(places.model)
    config = with_clock(config, tokenizer)
    if dataset is None:
        read = places.data.model_copy(update={"clock": config.data.clock})
        dataset = load_clients(read, config.seed, tokenizer, rows)
    base = base or replace(load_base(places.model, tokenizer), name=config.model.base)
    kind = prepare_kind(config, base)
    data = {client.client_id: client for client in dataset.clients}
    check_ids(kind.base, {name: client.rows for name, client in data.items()})
    parties = {party.client_id: party for party in dataset.summaries()}
    scheme = make_scheme(config, kind, parties)
    before = RunFolder(resumed).run_json() if resumed else {}
    threads = _count(before.get("threads"))
    crew = choose_crew(config, kind, scheme.algorithm, dataset.clients, threads)
    with threads_of(crew.threads):
        budget = _token_budget(config, kind, dataset, before)
    clients = _at_work(config, kind, scheme, dataset, budget, crew)
    rows_of = {client: party.train_rows for client, party in parties.items()}
    notes = [
        *_about_answers(config, kind.base, dataset),
        *_about_rows(config, dataset),
        *about_advantages(dataset.clients, config.local.advantage_temperature),
    ]
    for note in notes:
        _log.warning("%s", note)
    return Experiment(
        config=config,
        kind=kind,
        parties=parties,
        ranks=scheme.ranks,
        starts=scheme.starts,
        graph=scheme.graph,
        algorithm=scheme.algorithm,
        clients=clients,
        data_sha256=hash_of_rows(data),
        token_budget=budget,
        crew=crew,
        skipped=dataset.skipped,
        # What a client's prompts share is text of its rows, which nothing else here tells.
        prompts={client.client_id: client.shared_prompt for client in dataset.clients}
        if config.privacy.kind == "none"
        else {},
        privacy=privacy_plan(config, rows_of),
        notes=(*told_left_out(dataset.skipped), *dataset.notes, *notes),
    )


def _at_work(  # noqa: PLR0913 - all that clients work with meets here
    config: Config, kind: AdapterKind, scheme: Scheme, dataset: Dataset, budget: int, crew: Crew
) -> Clients:
    """The clients of a run with their rows here, behind a wire where messages are compressed."""
    largest = max(
        sum(tensor.numel() for tensor in start.values()) for start in scheme.starts.values()
    )
    at_once = 1 if config.engine.apart else most_side_by_side(largest, kind.base.device)
    if kind.base.device.type == "cpu":
        at_once = share_size(dataset.clients, config.local.batch_size, budget, at_once)
    scales = {client: kind.scale(rank) for client, rank in scheme.ranks.items()}
    rows = {party.client_id: party.train_rows for party in dataset.summaries()}
    hidden = row_privacy(config, kind.base, rows)
    settings = CohortSettings(config.local, scales, budget, config.rounds.count, hidden)
    clients = LocalClients(
        scheme.algorithm,
        kind,
        {client.client_id: client for client in dataset.clients},
        settings,
        at_once,
        references=references_of(kind, config.evaluation),
        crew=crew,
        base_losses=BaseLosses(),
    )
    wire = config.engine.wire
    return clients if wire == "float32" else OverWire(clients, wire, at_once)


def _about_rows(config: Config, dataset: Dataset) -> list[str]:
    """What evaluations during the run leave out."""
    most = config.evaluation.rows
    counts = [len(part) for client in dataset.clients for part in (client.test, client.validation)]
    left_out = sum(max(0, count - most) for count in counts) if most else 0
    if not left_out:
        return []
    return [
        f"evaluations during the run measure at most {most} test and {most} validation rows of a "
        f"client (evaluation.rows) and leave out {left_out} of {sum(counts)}: losses of rounds and "
        "best rounds are of those rows, and losses of the tables at the end of all"
    ]


def _about_answers(config: Config, base: BaseModel, dataset: Dataset) -> list[str]:
    """What will keep generated answers from being right, a sentence each."""
    own = {base.tokenizer.eos_token_id, *turn_ends(base.tokenizer)}
    ends = set(end_tokens(base))
    rows = [
        row
        for client in dataset.clients
        for row in (*client.train, *client.validation, *client.test)
    ]
    broken = [row for row in rows if _length(row.response, ends) < _length(row.response, own)]
    notes = []
    if broken:
        first = base.tokenizer.decode([broken[0].response[_length(broken[0].response, ends)]])
        notes.append(
            f"{len(broken)} of {len(rows)} responses hold a token that ends an answer, {first!r}: "
            "answers are cut there, and text metrics cannot be right; mend eos_token_id in the "
            "base's generation_config.json"
        )
    most = config.evaluation.max_new_tokens
    tested = [_length(row.response, own) for client in dataset.clients for row in client.test]
    longer = sum(length > most for length in tested)
    if config.evaluation.rouge and longer:
        notes.append(
            f"{longer} of {len(tested)} test responses are longer than evaluation.max_new_tokens = "
            f"{most} (the longest has {max(tested)} tokens): generated answers end before them, "
            "and text metrics suffer; raise it"
        )
    return notes


def _length(response: Sequence[int], ends: set[int]) -> int:
    """Tokens before the first that ends the response."""
    return next((place for place, token in enumerate(response) if token in ends), len(response))


def _token_budget(
    config: Config, kind: AdapterKind, dataset: Dataset, before: Mapping[str, object]
) -> int:
    """As set, else that of the run that is continued, else what is fastest."""
    recorded = _count(before.get("token_budget"))
    if recorded is not None and config.engine.token_budget == "auto":
        return recorded
    tokens = sum(client.train_tokens for client in dataset.clients)
    rows = sum(len(client.train) for client in dataset.clients)
    step = config.local.batch_size * tokens / max(1, rows)
    cohort = cohort_size(len(dataset.clients), config.rounds)
    return token_budget(config, kind, step, 1 if config.engine.apart else cohort)


def _count(recorded: object) -> int | None:
    """A whole number that run.json holds, or None."""
    return recorded if isinstance(recorded, int) and recorded > 0 else None
