"""A node's policy: what its operator allows a server to choose, to ask for and to be told.

The settings of a run come from the server, the rows are the node's. Where rows come from and how
they are read is therefore never the server's: a server that sends such a key is refused, whatever
its value is, so that it cannot guess values either. A node without a policy file has the defaults,
which are strict.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from fedmira.config import (
    METHODS,
    Config,
    DataSettings,
    Section,
    flattened,
    setting,
    unflattened,
    with_settings,
)
from fedmira.errors import ConfigError
from fedmira.federation.codes import Refused
from fedmira.shown import cut, plain

__all__ = [
    "POLICY_FILE",
    "SERVER_ONLY",
    "Limits",
    "NodePolicy",
    "Tells",
    "admitted",
    "is_own",
    "policy_stamp",
    "read_policy",
]

POLICY_FILE = "policy.toml"
"""The name of a node's policy, in the folder that holds its `data-path`."""

SERVER_ONLY = "server-only."
"""The beginning of keys of an app that its server alone reads; a node does not look at them."""

_FROM_A_SERVER = (
    "adapter.*",
    "algorithm.*",
    "data.clock",
    "data.max_length",
    "data.max_rows",
    "data.prompt",
    "data.system",
    "data.test_rows",
    "data.train_fraction",
    "data.train_on",
    "data.validation_fraction",
    "engine.*",
    "evaluation.*",
    "federation.*",
    "graph.*",
    "local.*",
    "model.dtype",
    "model.quantization",
    "privacy.*",
    "rounds.*",
    "seed",
    "server.*",
)
"""All that a policy can leave to a server. Every other key, and a new one too, is a node's own."""

_NEVER = frozenset({"graph.path"})
_KEY = re.compile(r"[a-z]{1,40}(\.[A-Za-z0-9_-]{1,80}){0,2}")
_NAMED = 8
_LONGEST_KEY = 80


class Limits(Section):
    """[limits]: how far the server's choices may go on this node."""

    methods: tuple[str, ...] = setting(
        tuple(METHODS),
        help="Methods that may train here; those of other packages only where they are named.",
    )
    bases: tuple[str, ...] = setting(
        (),
        help="SHA-256 of the bases that may be trained on; empty allows the one that is loaded.",
    )
    least_rows: int = setting(
        8, ge=1, help="A node with fewer training rows, as the run would cut them, takes no part."
    )
    least_measured: int = setting(
        4,
        ge=1,
        help=(
            "With fewer test or validation rows than this, the node has none: what is measured on "
            "few rows tells of each."
        ),
    )
    least_batch: int = setting(4, ge=1, help="The smallest local.batch_size.")
    most_rounds: int = setting(1000, ge=1, help="The highest rounds.count.")
    most_steps: int = setting(1000, ge=1, help="Most local steps in a round, as epochs or as such.")
    most_rank: int = setting(256, ge=1, help="The highest rank of this node's adapter.")
    most_new_tokens: int = setting(512, ge=1, help="The longest answer that is generated.")


class Tells(Section):
    """[tells]: what this node says of itself beside its name, its counts and its adapter."""

    task: str = setting("", help="What the client does, in the operator's words.")
    category: str = setting(
        "", help='Its group of tasks, in the operator\'s words; graph.kind = "category" needs it.'
    )
    losses: tuple[Literal["test", "validation", "train"], ...] = setting(
        ("test", "validation"), help="Parts whose mean loss the server may ask for."
    )
    scores: bool = setting(
        True, help="Whether answers to the test rows are scored; the answers stay here."
    )

    @field_validator("task", "category")
    @classmethod
    def _is_a_short_line(cls, value: str) -> str:
        if len(value) > 80 or plain(value) != value:
            raise ValueError(f"must be at most 80 characters that can be seen, not {value[:80]!r}")
        return value


class NodePolicy(Section):
    """A node's policy file; the defaults are those of a node that has none."""

    server_may_choose: tuple[str, ...] = setting(
        _FROM_A_SERVER,
        help=(
            "Keys of the run's settings that the server may set; `local.*` stands for a section. "
            "A value of another key must be the one that the node has, in `[data]` or by default."
        ),
    )
    limits: Limits = Limits()
    tells: Tells = Tells()
    data: dict[str, Any] = Field(
        default_factory=dict,
        description="This node's own settings of [data]: the source, its columns, what is read.",
    )

    @field_validator("server_may_choose")
    @classmethod
    def _none_is_the_nodes_own(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if own := [key for key in value if is_own(key)]:
            raise ValueError(
                f"{own[0]} is always the node's own, which no server may choose; take it out"
            )
        return value

    @field_validator("data")
    @classmethod
    def _has_keys_of_data(cls, value: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(value) - set(DataSettings.model_fields)):
            raise ValueError(f"{unknown[0]!r} is no key of [data]; docs/configuration.md has them")
        return value

    def check_message(self, kind: str, header: Mapping[str, object], rounds: int) -> None:
        """Refuse a message that asks for more than the policy allows.

        Args:
            kind: of the message.
            header: of the message, as it came.
            rounds: of the run.

        Raises:
            Refused: it does.
        """
        if kind == "evaluate.losses" and header.get("split") not in self.tells.losses:
            raise Refused("policy: this loss is not told (tells.losses)")
        if kind == "evaluate.scores":
            tokens = header.get("max_new_tokens")
            if not self.tells.scores:
                raise Refused("policy: answers are not scored (tells.scores)")
            if type(tokens) is not int or not 1 <= tokens <= self.limits.most_new_tokens:
                raise Refused(
                    "policy: max_new_tokens must be a whole number from 1 to "
                    f"{self.limits.most_new_tokens} (limits.most_new_tokens)"
                )
        if kind == "train":
            number = header.get("round")
            if type(number) is not int or not 1 <= number <= rounds:
                raise Refused("policy: the round is none of the run's (rounds.count)")

    def check_base(self, sha256: str) -> None:
        """Refuse a base that is not allowed.

        Args:
            sha256: of the base that was loaded.

        Raises:
            Refused: it is not.
        """
        if self.limits.bases and sha256 not in self.limits.bases:
            raise Refused("policy: this base may not be trained on (limits.bases)")

    def check_size(self, rows: int, rank: int, steps: int) -> None:
        """Refuse what the settings come to on this node.

        Args:
            rows: training rows.
            rank: of the adapter, 0 for a kind without one.
            steps: local steps in a round.

        Raises:
            Refused: a limit is broken; it names the key, and no count of the node's.
        """
        limits = self.limits
        if rows < limits.least_rows:
            raise Refused(
                f"policy: fewer than {limits.least_rows} training rows (limits.least_rows)"
            )
        if rank > limits.most_rank:
            raise Refused(f"policy: adapter.rank is above {limits.most_rank} (limits.most_rank)")
        if steps > limits.most_steps:
            raise Refused(f"policy: local.steps is above {limits.most_steps} (limits.most_steps)")


def is_own(key: str) -> bool:
    """Whether a key of the settings, or a pattern of keys, is a node's own whatever a policy says.

    Args:
        key: dotted.
    """
    return key in _NEVER or not any(fnmatchcase(key, pattern) for pattern in _FROM_A_SERVER)


def read_policy(path: Path | None) -> NodePolicy:
    """The policy in a file, or the defaults where there is none.

    Args:
        path: of the file; None for a node without one.

    Raises:
        ConfigError: the file cannot be read, others may change it, or it says something wrong.
    """
    if path is None:
        return NodePolicy()
    try:
        about = path.stat()
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: the node's policy cannot be read ({error}); write one with: fedmira flower "
            "init DIR --node"
        ) from error
    if about.st_uid not in (0, os.getuid()) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path}: the node's policy must belong to this user and be written by nobody else; "
            "chmod 600 it"
        )
    try:
        return NodePolicy.model_validate(document)
    except ValidationError as error:
        raise ConfigError(
            [
                f"{path}: {'.'.join(map(str, found['loc'])) or 'policy'}: "
                f"{found['msg'].removeprefix('Value error, ')}"
                for found in error.errors()
            ]
        ) from error


def policy_stamp(path: Path | None) -> str:
    """A text that differs once the file was changed.

    Args:
        path: of the policy; None for a node without one.
    """
    if path is None or not path.exists():
        return ""
    about = path.stat()
    return f"{about.st_ino} {about.st_mtime_ns} {about.st_size}"


def admitted(policy: NodePolicy, sent: Mapping[str, object], own: Mapping[str, object]) -> Config:
    """The run's settings on this node: the server's where it may choose, the node's elsewhere.

    Args:
        policy: of the node.
        sent: what the server sent, by dotted key.
        own: the node's base, device and path by dotted key.

    Raises:
        Refused: the server sent a key that is the node's own, or a value beyond a limit.
        ConfigError: a value is wrong, or the settings do not go together.
    """
    _refuse_keys([key for key in sent if not _KEY.fullmatch(key) or is_own(key)])
    _refuse_method(policy, sent)
    mine = {f"data.{key}": value for key, value in policy.data.items()} | dict(own)
    config = with_settings(unflattened(sent), mine)
    # What the node has: its own settings, and elsewhere the defaults.
    present = flattened(with_settings(Config(), mine))
    _refuse_keys(
        [
            key
            for key, value in flattened(unflattened(sent)).items()
            if not is_own(key) and _is_fixed(policy, key) and present.get(key) != value
        ]
    )
    _refuse_sizes(policy.limits, config)
    _hold_fast(config, mine)
    return config


def _is_fixed(policy: NodePolicy, key: str) -> bool:
    """Whether the node has said what a key is that a server could choose elsewhere."""
    chosen = any(fnmatchcase(key, pattern) for pattern in policy.server_may_choose)
    return not chosen or key.removeprefix("data.") in policy.data


def _refuse_keys(keys: list[str]) -> None:
    """Refuse settings that the server may not choose.

    Raises:
        Refused: there are some; it names them.
    """
    if not keys:
        return
    named = ", ".join(plain(cut(key, _LONGEST_KEY)) for key in sorted(keys)[:_NAMED])
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    raise Refused(
        f"policy: the server may not choose {named}{more}; what is a node's own stands behind "
        f"'{SERVER_ONLY}' in an app that fedmira flower init writes now"
    )


def _refuse_method(policy: NodePolicy, sent: Mapping[str, object]) -> None:
    """Refuse a method before its module is imported.

    Raises:
        Refused: the policy does not name it, or it is an object.
    """
    name = sent.get("algorithm.name", Config().algorithm.name)
    if "algorithm.method" in sent or name not in policy.limits.methods:
        raise Refused("policy: algorithm.name is none of the allowed methods (limits.methods)")


def _refuse_sizes(limits: Limits, config: Config) -> None:
    """Refuse what is too much or too little on any rows.

    Raises:
        Refused: a limit is broken.
    """
    if config.rounds.count > limits.most_rounds:
        raise Refused(f"policy: rounds.count is above {limits.most_rounds} (limits.most_rounds)")
    if config.local.batch_size < limits.least_batch:
        raise Refused(
            f"policy: local.batch_size is below {limits.least_batch} (limits.least_batch)"
        )
    if config.evaluation.max_new_tokens > limits.most_new_tokens:
        raise Refused(
            f"policy: evaluation.max_new_tokens is above {limits.most_new_tokens} "
            "(limits.most_new_tokens)"
        )


def _hold_fast(config: Config, mine: Mapping[str, object]) -> None:
    """Hold what came out against what is the node's own, however a text was read.

    Raises:
        Refused: an own setting is not the node's.
    """
    expected = flattened(with_settings(Config(), mine))
    found = flattened(config)
    _refuse_keys(
        [
            key
            for key in sorted(set(expected) | set(found))
            if is_own(key) and found.get(key) != expected.get(key)
        ]
    )
