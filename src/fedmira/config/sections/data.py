"""[data]: where rows come from, how they become clients, and how they are split."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import field_validator, model_validator

from fedmira.config.section import Count, Positive, Section, setting
from fedmira.config.sources import SourceName

__all__ = ["ColumnSettings", "DataSettings"]


class ColumnSettings(Section):
    """[data.columns]: what a user's rows call the keys they are read by; "" is our own name."""

    instruction: str = setting("", help="The column of the instruction.")
    input: str = setting("", help="The column of what the instruction is about.")
    output: str = setting("", help="The column of the answer.")
    system: str = setting("", help="The column of the system's text.")
    messages: str = setting("", help="The column of the messages.")
    category: str = setting("", help="The column of the category.")
    advantage: str = setting("", help="The column of the advantage, a number.")


class DataSettings(Section):
    """[data]: where rows come from, how they become clients, and how these are split."""

    source: SourceName = setting(
        "demo",
        help=(
            'The reader. `"object"` stands for rows that were given from Python; no file '
            "holds them."
        ),
    )
    sha256: str | None = setting(
        None,
        help="Of rows that were given from Python; the run writes it, so that it knows them again.",
        read_by={"source": ("object",)},
    )
    path: str = setting(
        "",
        help=(
            "The source's file or folder, or a hub data set id. The demo reads none, and a path "
            "there is an error."
        ),
    )
    clients: Count = setting(
        0,
        help=(
            "Keep the first so many clients, in the order of the source; 0 keeps all. More than "
            "there are is an error."
        ),
    )
    partition: Literal["task", "category", "dirichlet", "column"] = setting(
        "task",
        help=(
            "How tasks become clients: one client a task; `clients_per_category` clients a "
            "category; `dirichlet_clients` clients with mixed categories; one client a value of "
            "`column` (jsonl and hub)."
        ),
    )
    clients_per_category: Positive = setting(
        1,
        help=(
            "Clients of each category. Rows are shuffled and dealt, so shares differ by at most "
            "one row."
        ),
        read_by={"partition": ("category",)},
    )
    dirichlet_clients: Positive = setting(
        10,
        help="How many clients there are.",
        read_by={"partition": ("dirichlet",)},
    )
    dirichlet_alpha: float = setting(
        0.5,
        gt=0,
        help=("Small values make clients more unlike each other."),
        read_by={"partition": ("dirichlet",)},
    )
    column: str = setting(
        "client",
        help=("The key that names a row's client, in one jsonl file and in hub data sets."),
        read_by={"source": ("jsonl", "hub"), "partition": ("task", "column")},
    )
    columns: ColumnSettings = setting(
        ColumnSettings(),
        help=(
            "What the rows call the keys that they are read by: "
            '`columns = {input = "Frage", output = "Antwort"}`.'
        ),
    )
    instruction: str = setting(
        "",
        help="The instruction of all rows that bring none; their question becomes the input.",
    )
    ignore: tuple[str, ...] = setting(
        (),
        help="Keys of rows that are not to reach the model; nothing is said of them.",
    )
    bad_rows: Literal["skip", "error"] = setting(
        "skip",
        help=(
            "Empty and unusable rows are left out and named, up to `bad_rows_share` of all rows, "
            "or are an error. Broken JSON is always an error."
        ),
    )
    bad_rows_share: float = setting(
        0.01,
        ge=0,
        le=1,
        help="Most rows that are left out as unusable, as a share of all rows.",
        read_by={"bad_rows": ("skip",)},
    )
    split: str = setting(
        "train",
        help="The split of a hub data set.",
        read_by={"source": ("hub",)},
    )
    split_list: str = setting(
        "",
        help=(
            "natural-instructions: a file with one task name a line; these tasks are read, in "
            "this order."
        ),
        read_by={"source": ("natural-instructions",)},
    )
    emit: Literal["planner", "executor", "both"] = setting(
        "both",
        help=(
            "trajectories: what a file of them makes: a client that learns the next sub-goal, one "
            "that learns the next action, or both, as two clients of one category."
        ),
        read_by={"source": ("trajectories",)},
    )
    min_rows: Positive = setting(
        4,
        help=(
            'A client with fewer rows (before the split) is left out and named; `"dirichlet"` '
            "draws again instead. natural-instructions needs 20 rows before `sample_fraction` "
            "in any case."
        ),
    )
    input_limit: Positive = setting(
        1024,
        help=(
            "natural-instructions: a row whose input has so many characters or more is left out "
            "(FedKSeed's rule)."
        ),
        read_by={"source": ("natural-instructions",)},
    )
    sample_fraction: float = setting(
        1.0,
        gt=0,
        le=1,
        help=(
            "Share of a task's rows that is used at all, rounded down (FedKSeed: 0.2). Rows "
            "that the source sets aside for testing are not thinned."
        ),
    )
    sample_least: Positive | None = setting(
        None,
        help=(
            "Of a task that `sample_fraction` thins, at least so many rows are used, or all "
            "there are."
        ),
    )
    train_fraction: float = setting(
        0.8,
        gt=0,
        lt=1,
        help="Share of a client's rows for training.",
    )
    validation_fraction: float = setting(
        0.0,
        ge=0,
        lt=1,
        help=(
            "Share for validation; what remains is the test set. Both shares together must stay "
            "below 1."
        ),
    )
    test_rows: Count = setting(
        0,
        help="Most test rows of a client; 0 does not cut.",
    )
    max_rows: Count | tuple[Count, ...] = setting(
        0,
        help=(
            "Most training rows of a client; 0 does not cut. A list is given to the clients in "
            "turn, sorted by id: `[16, 32, 64, 128]`. Validation rows are cut in proportion."
        ),
    )
    max_length: int = setting(
        512,
        ge=8,
        help=(
            "Most tokens of a row, prompt and response together. May not exceed what the base "
            "model reads."
        ),
    )
    prompt: Literal["alpaca", "chat", "plain"] = setting(
        "alpaca",
        help="The form of the prompt.",
    )
    train_on: Literal["all", "last"] = setting(
        "all",
        help=(
            "Of a conversation, all assistant turns are learned, each as a row of its own, or "
            "the last."
        ),
    )
    system: Literal["merge", "template", "error"] = setting(
        "merge",
        help=(
            "A leading system message that the chat template refuses or leaves out is put in "
            "front of the first user message, left to the template, or an error."
        ),
        read_by={"prompt": ("chat",)},
    )
    clock: str = setting(
        "",
        help=(
            "The time that chat templates are told, such as `2026-05-01T12:00:00`. Empty: the time "
            "at which the run begins, which config.toml then keeps where the template asks for it."
        ),
        read_by={"prompt": ("chat",)},
    )

    @field_validator("clock")
    @classmethod
    def _clock_is_a_time(cls, value: str) -> str:
        try:
            if value:
                datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError(
                f"clock is {value!r}; must be a time such as '2026-05-01T12:00:00', or '' for "
                "the time at which the run begins"
            ) from error
        return value

    @model_validator(mode="after")
    def _path_has_a_reader(self) -> DataSettings:
        if self.source == "demo" and self.path:
            raise ValueError(
                f"path is {self.path!r}, but source 'demo' reads no files; set source to "
                "'jsonl', 'natural-instructions', 'dolly', 'hub' or 'trajectories'"
            )
        return self

    @model_validator(mode="after")
    def _leaves_test_rows(self) -> DataSettings:
        if self.train_fraction + self.validation_fraction >= 1:
            total = self.train_fraction + self.validation_fraction
            raise ValueError(
                f"train_fraction + validation_fraction is {total:g}; must be below 1 so "
                "that test rows remain"
            )
        return self
