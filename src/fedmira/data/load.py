"""From the [data] settings to encoded clients: read, split, encode.

Each stage reports all its problems together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from fedmira.config import DataSettings
from fedmira.data.ahead import Ahead, parts_of
from fedmira.data.encoded import ClientData, EncodedExample, EncodedTurn
from fedmira.data.encoding import Encoder
from fedmira.data.from_objects import ObjectRows
from fedmira.data.partition import ClientRows
from fedmira.data.problems import Problems
from fedmira.data.reading import ReadRows, check_ids, read_all, read_one, read_rows, split_all
from fedmira.data.rendering import uses_clock
from fedmira.data.split import Split, kept_whole, split_rows
from fedmira.data.tokenizer import Tokenizer
from fedmira.errors import DataError

__all__ = [
    "CUT_SHARE",
    "ClientSummary",
    "Dataset",
    "Newcomer",
    "check_apart",
    "check_clock",
    "load_clients",
    "load_newcomer",
    "load_own",
    "make_encoder",
    "read_summary",
    "summary_of",
]

CUT_SHARE = 0.05
"""Cut prompts are worth a warning above this share of all rows."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientSummary:
    """What a client says of itself: rows of each part, their tokens, and what was cut or dropped.

    Counts, and nothing of a row.

    Attributes:
        test_response_tokens: tokens that carry loss in its test rows.
        longest_row: tokens of the longest row, prompt and response together, of all parts.
        client_id: names the client and its folders.
        task: what the client does; empty where nothing says it.
        category: the group of tasks it belongs to; empty where none is given.
        train_rows: how many rows are trained on.
        validation_rows: how many rows choose.
        test_rows: how many rows measure.
        train_tokens: tokens of the training rows, prompts and responses.
        train_response_tokens: tokens of the training rows that are learned.
        truncated_prompts: rows whose prompt was cut.
        truncated_responses: rows whose response was cut.
        duplicates: copies of rows of the same part that were left out.
        overlaps: training and validation rows left out because their prompt is tested or chosen by.
    """

    client_id: str
    task: str
    category: str
    train_rows: int
    validation_rows: int
    test_rows: int
    train_tokens: int
    train_response_tokens: int
    test_response_tokens: int
    longest_row: int
    truncated_prompts: int
    truncated_responses: int
    duplicates: int
    overlaps: int


@dataclass(frozen=True, slots=True)
class Dataset:
    """All clients, sorted by id, and what was left out.

    Attributes:
        skipped: tasks and clients that a rule left out, one "name: reason" each.
        notes: what was done to the rows that the user should know, a sentence each.
        clients: the clients, sorted by id.
    """

    clients: tuple[ClientData, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def summaries(self) -> tuple[ClientSummary, ...]:
        """One summary for each client, in the same order."""
        return tuple(summary_of(client) for client in self.clients)

    def untested(self) -> Dataset:
        """The same clients without their test rows, so that nothing can be measured on these."""
        return replace(
            self,
            clients=tuple(replace(client, test=(), references=()) for client in self.clients),
            notes=(*self.notes, "test rows were set aside: nothing here is measured on them"),
        )


def load_clients(
    settings: DataSettings,
    seed: int,
    tokenizer: Tokenizer,
    rows: ObjectRows | ReadRows | None = None,
) -> Dataset:
    """Reads the source and makes the clients of a run.

    Logs what was done to the rows, which is also kept as the notes of the data set.

    Args:
        settings: the [data] section.
        seed: of the run; the same settings and seed give the same rows on every machine.
        tokenizer: of the base model.
        rows: of a run whose rows are objects, or what `read_rows` gave for these settings.

    Raises:
        DataError: all problems of the first stage that has any.
    """
    if not isinstance(rows, ReadRows):
        rows = read_rows(settings, seed, rows)
    clients, notes = _encoded(rows.clients, rows.splits, settings, seed, tokenizer)
    return Dataset(clients, rows.skipped, (*rows.notes, *notes))


def load_own(settings: DataSettings, seed: int, tokenizer: Tokenizer, name: str) -> ClientData:
    """The rows of one client, read where only its own rows need be.

    The same as `load_clients` gives that client.

    Args:
        settings: the [data] section, with the path of this machine.
        name: the client's; of a source that holds one client only, that one is taken whatever it is
            called there.
        seed: the seed of the run.
        tokenizer: that of the base.

    Raises:
        DataError: the source holds several clients and none of this name, or the settings deal rows
            among clients.
    """
    check_apart(settings)
    check_clock(settings, tokenizer)
    problems = Problems()
    rows, _, said = read_all(settings.model_copy(update={"clients": 0}), seed)
    found = [client for client in rows if client.client_id == name] or (
        rows if len(rows) == 1 else []
    )
    if not found:
        held = ", ".join(client.client_id for client in rows[:8])
        problems.add(
            f"data.path {settings.path!r} holds {len(rows)} clients, and none is called "
            f"{name!r}; it holds {held}"
        )
    problems.raise_if_any()
    own = [replace(found[0], client_id=name)]
    check_ids(own)
    return _encoded(own, split_all(own, settings, seed), settings, seed, tokenizer)[0][0]


@dataclass(frozen=True, slots=True)
class Newcomer:
    """The rows of a client that comes to a run that is over.

    Attributes:
        data: its rows; all train but those that the source sets aside for testing.
        groups: of each training row, equal numbers for rows that must not be told apart: turns of
            one conversation, and rows that ask the same.
        notes: what was left out of the rows or done to them, a sentence each.
    """

    data: ClientData
    groups: tuple[int, ...]
    notes: tuple[str, ...] = ()


def load_newcomer(
    settings: DataSettings,
    seed: int,
    tokenizer: Tokenizer,
    name: str,
    rows: ObjectRows | None = None,
) -> Newcomer:
    """The rows of one client, none of which is left to chance: there is no split.

    Args:
        settings: the [data] section of the run, with the path of the rows; how a run thins, deals
            and splits rows does not count here.
        seed: of the run.
        tokenizer: that of the base.
        name: what the client will be called.
        rows: where they are objects.

    Raises:
        DataError: rows cannot be read, are of several clients, or none is left to train on.
    """
    check_clock(settings, tokenizer)
    client, left_out, said = read_one(settings, seed, name, rows)
    split, problems = kept_whole(client), Problems()
    encoder = make_encoder(settings, tokenizer)
    parts = [encoder.turns(part, problems) for part in (split.train, (), split.test)]
    problems.raise_if_any()
    data = encoder.encode_client(client, split, parts)
    if not data.train:
        raise DataError(f"{name}: no row is left to train on; all of them are test rows")
    same = _groups(parts[0])
    notes = (*left_out, *said, *_notes([data], settings, encoder))
    return Newcomer(data, tuple(same[row] for row in data.train), notes)


def _groups(turns: Sequence[EncodedTurn]) -> dict[EncodedExample, int]:
    """Row -> the number of its group: turns of one row, and turns that read the same."""
    groups: dict[Hashable, int] = {}
    for number, turn in enumerate(turns):
        keys = (("row", turn.source.prompt), ("reading", turn.reading), ("tokens", turn.row))
        first, *others = sorted({groups[key] for key in keys if key in groups}) or [number]
        if others:
            groups |= {key: first for key, group in groups.items() if group in others}
        groups |= dict.fromkeys(keys, first)
    return {turn.row: groups["tokens", turn.row] for turn in turns}


def check_clock(settings: DataSettings, tokenizer: Tokenizer) -> None:
    """Refuse a chat template that asks for the time where several machines render with it.

    Args:
        settings: the [data] section.
        tokenizer: that of the base.

    Raises:
        DataError: it does, and data.clock is not set.
    """
    if settings.prompt == "chat" and not settings.clock and uses_clock(tokenizer):
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} asks for the time, which each "
            "machine would answer for itself; set data.clock in the config of the run"
        )


def check_apart(settings: DataSettings) -> None:
    """Refuse settings that deal rows among clients.

    That cannot be done where each client's rows are on its own machine.

    Raises:
        DataError: with all of them.
    """
    problems = Problems()
    if settings.partition in ("category", "dirichlet"):
        problems.add(
            f"data.partition = {settings.partition!r} deals the rows of all clients, and "
            "this machine has its own; use 'task' or 'column'"
        )
    if not isinstance(settings.max_rows, int):
        problems.add(
            "data.max_rows is a list, given to the clients in turn, and this machine does "
            "not know its turn; set it to one number"
        )
    problems.raise_if_any()


def make_encoder(settings: DataSettings, tokenizer: Tokenizer) -> Encoder:
    """The encoder that the [data] section asks for.

    Args:
        settings: the [data] section.
        tokenizer: that of the base.

    Raises:
        DataError: the tokenizer does not go with the prompt form.
    """
    return Encoder(
        tokenizer,
        settings.prompt,
        settings.max_length,
        train_on=settings.train_on,
        system=settings.system,
        clock=settings.clock,
    )


def _encoded(
    rows: Sequence[ClientRows],
    splits: Sequence[Split],
    settings: DataSettings,
    seed: int,
    tokenizer: Tokenizer,
) -> tuple[tuple[ClientData, ...], tuple[str, ...]]:
    """Each client's parts as tokens, and what is to be said of them all."""
    encoder = make_encoder(settings, tokenizer)
    problems = Problems()
    clients = []
    ahead = Ahead(encoder, splits, problems)
    for position, (client, split) in enumerate(zip(rows, splits, strict=True)):
        parts = ahead.parts(position)
        apart = _apart_as_read(client, split, parts, settings, seed, position, encoder, problems)
        if apart is not None and len(problems) == 0:
            clients.append(encoder.encode_client(client, *apart))
            _check_parts(clients[-1], settings, problems)
    problems.raise_if_any()
    notes = _notes(clients, settings, encoder)
    for note in notes:
        _log.warning("%s", note)
    return tuple(clients), notes


def _apart_as_read(
    client: ClientRows,
    split: Split,
    parts: list[list[EncodedTurn]],
    settings: DataSettings,
    seed: int,
    position: int,
    encoder: Encoder,
    problems: Problems,
) -> tuple[Split, list[list[EncodedTurn]]] | None:
    """A client's split and its turns, with no prompt on two sides as the model reads it.

    Prompts that differ in the file may be one once they are rendered and cut. Where such rows came
    on two sides, they are made one group and the client is split again.
    """
    same: dict[Hashable, Hashable] = {}
    while True:
        joined = _joined(parts, same)
        if not joined or len(problems):
            return split, parts
        same = joined
        again = split_rows(client, settings, seed, position, problems, same)
        if again is None:
            return None
        split = again
        parts = [encoder.turns(part, problems) for part in parts_of(split)]


def _joined(
    parts: Sequence[Sequence[EncodedTurn]], same: Mapping[Hashable, Hashable]
) -> dict[Hashable, Hashable]:
    """`same` with those prompts joined that read the same on two sides; empty where none do."""
    places: dict[Hashable, set[int]] = {}
    prompts: dict[Hashable, dict[Hashable, None]] = {}
    for place, part in enumerate(parts):
        for turn in part:
            if turn.last:
                key = turn.source.prompt
                places.setdefault(turn.reading, set()).add(place)
                prompts.setdefault(turn.reading, {}).setdefault(same.get(key, key))
    crossing = [
        list(prompts[reading])
        for reading, found in places.items()
        if len(found) > 1 and len(prompts[reading]) > 1
    ]
    if not crossing:
        return {}
    result = dict(same)
    for first, *others in crossing:
        target = result.get(first, first)
        for other in others:
            source = result.get(other, other)
            if source != target:
                result |= {key: target for key, value in result.items() if value == source}
                result[source] = target
    return result


def _check_parts(client: ClientData, settings: DataSettings, problems: Problems) -> None:
    wanted = {"training": client.train, "test": client.test} | (
        {"validation": client.validation} if settings.validation_fraction else {}
    )
    for name, part in wanted.items():
        if not part:
            problems.add(
                f"client {client.client_id!r} has no {name} rows left once rows that read the same "
                "are on one side; add rows, or leave the client out with data.min_rows"
            )


def _notes(
    clients: Sequence[ClientData], settings: DataSettings, encoder: Encoder
) -> tuple[str, ...]:
    """What the user should know before training, a sentence each."""
    total = sum(
        len(part) for client in clients for part in (client.train, client.validation, client.test)
    )
    notes = []
    prompts = sum(client.truncated_prompts for client in clients)
    if prompts > CUT_SHARE * total:
        notes.append(
            f"{prompts} of {total} prompts lose their middle: with its response each is longer "
            f"than data.max_length ({settings.max_length} tokens; the longest has "
            f"{encoder.longest_row}); raise data.max_length"
        )
    if responses := sum(client.truncated_responses for client in clients):
        notes.append(
            f"{responses} of {total} responses lose their end and the token that ends them, so "
            "that the model does not learn from them where an answer ends: they are longer than "
            f"data.max_length ({settings.max_length} tokens; the longest row has "
            f"{encoder.longest_row}) leaves room for; raise data.max_length"
        )
    counted: Counter[str] = Counter()
    for client in clients:
        for note, count in client.notes:
            counted[note] += count
    notes += [f"{count} of {total} {note}" for note, count in counted.items()]
    elsewhere, tested = _tested_elsewhere(clients)
    if elsewhere:
        notes.append(
            f"{elsewhere} of {tested} test rows also stand among the training rows of other "
            "clients, prompt and response alike; what a client gains from others on them may be "
            "memory"
        )
    return tuple(notes)


def _tested_elsewhere(clients: Sequence[ClientData]) -> tuple[int, int]:
    """Test rows that other clients train on, and all test rows."""
    # Rows are equal by their tokens, whatever their advantages.
    trainers: dict[EncodedExample, set[int]] = {}
    tested = {row for client in clients for row in client.test}
    for number, client in enumerate(clients):
        for row in client.train:
            if row in tested:
                trainers.setdefault(row, set()).add(number)
    found = sum(
        bool(trainers.get(row, set()) - {number})
        for number, client in enumerate(clients)
        for row in client.test
    )
    return found, sum(len(client.test) for client in clients)


def read_summary(values: object) -> ClientSummary:
    """A summary that was written elsewhere.

    Args:
        values: a mapping of the fields' names to texts and to whole numbers, 0 or more.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    expected = {field.name: str if field.type == "str" else int for field in fields(ClientSummary)}
    if not isinstance(values, dict) or set(values) != set(expected):
        raise ValueError(f"a client's summary has the fields {', '.join(expected)}")
    for name, kind in expected.items():
        value = values[name]
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"{name} is {str(value)[:200]!r}; must be a "
                f"{'text' if kind is str else 'whole number, 0 or more'}"
            )
    return ClientSummary(**values)


def summary_of(client: ClientData) -> ClientSummary:
    """What this client says of itself."""
    rows = (*client.train, *client.validation, *client.test)
    return ClientSummary(
        client_id=client.client_id,
        task=client.task,
        category=client.category,
        train_rows=len(client.train),
        validation_rows=len(client.validation),
        test_rows=len(client.test),
        train_tokens=client.train_tokens,
        train_response_tokens=client.train_response_tokens,
        test_response_tokens=sum(len(row.response) for row in client.test),
        longest_row=max(len(row.prompt) + len(row.response) for row in rows),
        truncated_prompts=client.truncated_prompts,
        truncated_responses=client.truncated_responses,
        duplicates=client.duplicates,
        overlaps=client.overlaps,
    )
