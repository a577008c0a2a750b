"""A client of a federation where its rows are: they, its base and its private memory.

Answers the server's messages.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from fedmira.clients import CohortSettings, LocalClients, SplitName, references_of
from fedmira.config import Config, cache_folder
from fedmira.data import ClientData, about_advantages, load_own
from fedmira.errors import ConfigError, WireError
from fedmira.experiment import client_ranks, prepare_kind, row_privacy, token_budget
from fedmira.experiment.scheme import method_of
from fedmira.federation.codes import Refused
from fedmira.federation.ends import serve
from fedmira.federation.policy import POLICY_FILE, NodePolicy
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
)
from fedmira.model import AdapterKind, check_ids, count_steps, tokenizer_hash
from fedmira.wire import (
    CHOICE,
    IDENTITY,
    LOSSES,
    SCORES,
    TRAIN,
    Encoded,
    Header,
    Line,
    decode,
)

__all__ = [
    "Node",
    "NodeSettings",
    "memory_beside",
    "memory_folder",
    "own_node",
    "read_node_settings",
]

_log = logging.getLogger("fedmira")


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What the operator of a node says.

    Attributes:
        name: the client's.
        data_path: of its rows, "" for what the policy says, or the demo.
        base: where the base lies, "" for the bundled one; it must be the server's, which its hash
            tells.
        device: to train on, "" for the best there is.
        memory: the folder of the client's private memory, "" for one in fedmira's cache folder.
        policy: the policy file, "" for policy.toml in the folder that holds `data_path`.
    """

    name: ClientId
    data_path: str = ""
    base: str = ""
    device: str = ""
    memory: str = ""
    policy: str = ""

    @property
    def policy_path(self) -> Path | None:
        """The node's policy; None where it has none."""
        if self.policy:
            return Path(self.policy)
        beside = Path(self.data_path).absolute().parent / POLICY_FILE if self.data_path else None
        return beside if beside is not None and beside.exists() else None

    @property
    def file_name(self) -> str:
        """The name as that of a file, whatever it is."""
        return quote(self.name, safe="")[:150]

    def own_settings(self, data: Mapping[str, object]) -> dict[str, object]:
        """What the node's config says of base, device and rows, by dotted key of the settings.

        Args:
            data: the node's own keys of [data] in its policy. Rows in a folder are read as jsonl
                where it names no source.
        """
        own: dict[str, object] = {
            "model.base": self.base or "bundled",
            "model.device": self.device or "auto",
        }
        if self.data_path:
            own["data.path"] = self.data_path
        if "source" not in data and (self.data_path or "path" in data):
            own["data.source"] = "jsonl"
        return own


def read_node_settings(values: Mapping[str, object]) -> NodeSettings:
    """The settings in a node's config.

    Raises:
        ConfigError: a key is unknown, the name is missing, or a value is no text; all of these
            together.
        Refused: the node is one of a simulation.
    """
    if "partition-id" in values and not values.get("name"):
        raise Refused(
            "this is a node of a Flower simulation, and the run is none; start it with "
            "--run-config 'simulation=true'"
        )
    keys = {
        "name": "name",
        "data-path": "data_path",
        "base": "base",
        "device": "device",
        "memory": "memory",
        "policy": "policy",
    }
    unknown = sorted(set(values) - set(keys) - {"resident"})
    problems = [
        f"node config: {key!r} is unknown; a node has {', '.join([*keys, 'resident'])}"
        for key in unknown
    ]
    problems += [
        f"node config: {key} is {values[key]!r}; must be a text in quotes"
        for key in keys
        if not isinstance(values.get(key, ""), str)
    ]
    if not values.get("name"):
        problems.append(
            "node config: name is missing; start the node with --node-config "
            "'name=\"clinic-north\"'"
        )
    if problems:
        raise ConfigError(problems)
    return NodeSettings(**{field: str(values.get(key, "")) for key, field in keys.items()})


class Node:
    """One client on one resident base.

    Args:
        config: the run's, the same on all machines.
        kind: the adapters on the base; nodes of one process may share them.
        data: the client's rows.
        rank: of its adapter.
        budget: most tokens in one forward pass.
        memory: the folder of the client's private memory.

    Attributes:
        name: of the client.
        rounds: of the run.
    """

    def __init__(
        self,
        config: Config,
        kind: AdapterKind,
        data: ClientData,
        rank: int,
        budget: int,
        memory: Path,
    ) -> None:
        self.name = data.client_id
        self.rounds = config.rounds.count
        self._memory = memory
        scales = {self.name: kind.scale(rank)}
        hidden = row_privacy(config, kind.base, {self.name: len(data.train)})
        settings = CohortSettings(config.local, scales, budget, config.rounds.count, hidden)
        self._clients = LocalClients(
            method_of(config),
            kind,
            {self.name: data},
            settings,
            references=references_of(kind, config.evaluation),
        )
        self._answers: Mapping[str, Callable[[Encoded], Encoded]] = {
            IDENTITY: self._identity,
            TRAIN: self._train,
            LOSSES: self._losses,
            CHOICE: self._choice,
            SCORES: self._scores,
        }

    def answer(self, kind: str, message: Encoded) -> Encoded:
        """Do what a message asks for.

        Args:
            kind: the message's type.
            message: as it came.

        Raises:
            FedmiraError: it cannot be done.
        """
        if kind not in self._answers:
            raise WireError(
                f"a message of kind {kind!r}; this fedmira answers {', '.join(self._answers)}"
            )
        return self._answers[kind](message)

    def _identity(self, message: Encoded) -> Encoded:
        """Name, task, counts of rows, and what must be equal on all machines."""
        base = self._clients.kind.base
        header: Header = {
            "party": json.dumps(asdict(self._clients.parties[self.name])),
            "base": base.sha256,
            "tokenizer": tokenizer_hash(base.tokenizer),
            "fedmira": metadata.version("fedmira"),
        }
        return Encoded({}, header)

    def _train(self, message: Encoded) -> Encoded:
        def work(
            request: Request, memory: Payload | None
        ) -> tuple[Reply | Failure, Payload | None]:
            self._clients.restore({} if memory is None else {self.name: memory})
            (answer,) = self._clients.train([request])
            return answer, self._clients.memories.get(self.name)

        return serve(message, self.name, self._memory, work)

    def _losses(self, message: Encoded) -> Encoded:
        payload, _ = decode(message, Line())
        split = cast(SplitName, message.header["split"])
        if self._clients.settings.privacy and split != "test":
            raise WireError(
                f"losses of {split} rows are asked for, which privacy.kind = 'row' does not cover; "
                "of a private client only those of test rows are told"
            )
        losses = self._clients.losses({self.name: payload.tensors["adapter"]}, split)
        return Encoded({}, {"total": losses[self.name].total, "tokens": losses[self.name].tokens})

    def _choice(self, message: Encoded) -> Encoded:
        payload, _ = decode(message, Line())
        chosen = self._clients.choose(
            [self.name],
            lambda _: {float(share): adapter for share, adapter in payload.tensors.items()},
        )
        return Encoded({}, {"chosen": chosen[self.name]})

    def _scores(self, message: Encoded) -> Encoded:
        payload, _ = decode(message, Line())
        scores = self._clients.score(
            {self.name: payload.tensors["adapter"]}, int(message.header["max_new_tokens"])
        )
        return Encoded({}, dict(scores[self.name]))


def own_node(config: Config, settings: NodeSettings, policy: NodePolicy) -> Node:
    """The client of one operator, with the rows and the base of this machine.

    Args:
        config: the run's as the policy admitted it, with this node's own settings.
        settings: of this node.
        policy: of this node.

    Raises:
        InputError: the base or the rows cannot be loaded, or the config does not fit them.
        Refused: what the run comes to here is beyond a limit of the policy.
    """
    here, name = _of_one(config, settings.name), settings.name
    kind = prepare_kind(here)
    policy.check_base(kind.base.sha256)
    data = _as_told(load_own(here.data, config.seed, kind.base.tokenizer, name), policy)
    check_ids(kind.base, {name: data.rows})
    for note in about_advantages([data], config.local.advantage_temperature, required=False):
        _log.warning("%s", note)
    rank = client_ranks(here.adapter, [name], kind.targets, config.seed)[name]
    rows = len(data.train)
    policy.check_size(rows, rank, count_steps(rows, config.local) if rows else 0)
    return Node(
        config=config,
        kind=kind,
        data=data,
        rank=rank,
        budget=token_budget(here, kind),
        memory=memory_folder(settings),
    )


def memory_folder(settings: NodeSettings) -> Path:
    """The folder in which a node remembers, and keeps its records.

    Args:
        settings: of the node.
    """
    if settings.memory:
        return Path(settings.memory)
    return (cache_folder() or Path(".fedmira")) / "nodes"


def memory_beside(output: Path) -> Path:
    """The folder of the private memories of simulated clients, beside the run folder.

    Whichever process serves a client next finds it.
    """
    return output.with_name(f"{output.name}-memory")


def _of_one(config: Config, name: ClientId) -> Config:
    """The run's config without what concerns other clients only."""
    adapter = config.adapter
    own: dict[str, Any] = {
        key: {client: value for client, value in of.items() if client == name}
        for key, of in (("ranks", adapter.ranks), ("rank_types", adapter.rank_types))
    }
    return config.model_copy(update={"adapter": adapter.model_copy(update=own)})


def _as_told(data: ClientData, policy: NodePolicy) -> ClientData:
    """The rows under what the operator calls them, without parts on which too little is measured.

    Task and category as the source has them are words of files and rows, so they stay here.
    """
    least = policy.limits.least_measured
    few = [part for part in ("test", "validation") if 0 < len(getattr(data, part)) < least]
    for part in few:
        _log.warning(
            "%s: %d %s rows are too few to tell what is measured on them "
            "(limits.least_measured = %d); this node says that it has none",
            data.client_id,
            len(getattr(data, part)),
            part,
            least,
        )
    return replace(
        data,
        task=policy.tells.task,
        category=policy.tells.category,
        validation=() if "validation" in few else data.validation,
        test=() if "test" in few else data.test,
        references=() if "test" in few else data.references,
    )
