"""A policy file as it is first written: every key with what it means."""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel

from fedmira.atomic import replace_file
from fedmira.config import Config, dump_config
from fedmira.errors import ConfigError
from fedmira.federation.policy import POLICY_FILE, Limits, NodePolicy, is_own

__all__ = ["policy_for", "policy_text", "write_policy"]

_WIDTH = 96
_HEAD = """\
The policy of a node: what a server may choose here, and what it is told (docs/security.md).
No server reads or writes this file. The node reads it again when it was changed.
Keep it closed to others: chmod 600."""


def write_policy(folder: Path, config: Config) -> tuple[Path, list[str]]:
    """Write the policy with which a node can take part in a run.

    Args:
        folder: beside the node's rows; made where it is missing.
        config: the run's settings, as they were sent to the party.

    Returns:
        The file, and what its operator should look at, a sentence each.

    Raises:
        ConfigError: there is a policy already.
    """
    path = folder / POLICY_FILE
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: exists already and is never overwritten; edit it")
    policy, widened = policy_for(config)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, policy_text(policy), mode=0o600)
    told = ", ".join(f"{key} = {value!r}" for key, value in policy.data.items())
    rows = f"rows of this node: {told or 'as its node config says'}"
    return path, [*(f"wider than usual: {sentence}" for sentence in widened), rows]


def policy_for(config: Config) -> tuple[NodePolicy, list[str]]:
    """The strict policy with which a node can take part in a run, for its operator to read.

    Args:
        config: the run's settings, as they were sent to the party; its [data] is what the party
            reads its rows by.

    Returns:
        The policy, and a sentence for each limit that had to be widened.
    """
    written = tomllib.loads(dump_config(config))["data"]
    default = tomllib.loads(dump_config(Config()))["data"]
    data = {
        key: value
        for key, value in written.items()
        if is_own(f"data.{key}") and value != default.get(key)
    }
    for key in ("path", "split_list"):  # those of the machine on which the run was written
        if data.get("source") != "hub" and key in data:
            if Path(data[key]).exists():
                data[key] = str(Path(data[key]).resolve())
            else:
                del data[key]
    widest = {
        "most_rounds": (config.rounds.count, max, "rounds.count"),
        "most_new_tokens": (config.evaluation.max_new_tokens, max, "evaluation.max_new_tokens"),
        "most_steps": (config.local.steps, max, "local.steps"),
        "least_batch": (config.local.batch_size, min, "local.batch_size"),
    }
    limits = Limits()
    changes: dict[str, Any] = {}
    said = []
    for name, (value, wider, key) in widest.items():
        default_limit = getattr(limits, name)
        if wider(value, default_limit) != default_limit:
            changes[name] = value
            said.append(f"limits.{name} is {value}, as the run's {key}; it is {default_limit} else")
    if config.algorithm.name not in limits.methods:
        changes["methods"] = (*limits.methods, config.algorithm.name)
        said.append(f"limits.methods names {config.algorithm.name}, which is another package's")
    return NodePolicy(limits=limits.model_copy(update=changes), data=data), said


def policy_text(policy: NodePolicy) -> str:
    """A policy as TOML, each key under what it means.

    Args:
        policy: to be written.
    """
    values = policy.model_dump(mode="json")
    blocks = [_comment(_HEAD), *_block(NodePolicy, values, ("limits", "tells", "data"))]
    for name in ("limits", "tells"):
        section: type[BaseModel] = type(getattr(policy, name))
        blocks += [f"[{name}]", *_block(section, values[name], ())]
    about = NodePolicy.model_fields["data"].description or ""
    rows = tomli_w.dumps({"data": values["data"]}).strip()
    blocks += [_comment(about) + "\n" + (rows or "[data]")]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _block(
    section: type[BaseModel], values: Mapping[str, Any], without: tuple[str, ...]
) -> list[str]:
    """Each key of a section under its description."""
    return [
        _comment(field.description or "") + "\n" + tomli_w.dumps({name: values[name]}).strip()
        for name, field in section.model_fields.items()
        if name not in without
    ]


def _comment(text: str) -> str:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, _WIDTH)]
    return "\n".join(f"# {line}" for line in lines)
