"""A client of a federation where its rows are: they, its base and its private memory.

Answers the server's messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from fedmira.clients import CohortSettings, LocalClients, SplitName
from fedmira.config import Config, cache_folder
from fedmira.data import ClientData, load_own
from fedmira.errors import ConfigError, WireError
from fedmira.experiment import client_ranks, prepare_kind, row_privacy, token_budget
from fedmira.experiment.scheme import method_of
from fedmira.federation.ends import serve
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Request,
)
from fedmira.model import AdapterKind, check_ids, tokenizer_hash
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

__all__ = ["Node", "NodeSettings", "memory_beside", "own_node", "read_node_settings"]


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What the operator of a node says.

    Attributes:
        name: the client's.
        data_path: replaces data.path, "" keeps it.
        base: replaces model.base, "" keeps it; it must be the same base, which its hash tells.
        device: replaces model.device, "" keeps it.
        memory: the folder of the client's private memory, "" for one in fedmira's cache folder.
    """

    name: ClientId
    data_path: str = ""
    base: str = ""
    device: str = ""
    memory: str = ""


def read_node_settings(values: Mapping[str, object]) -> NodeSettings:
    """The settings in a node's config.

    Raises:
        ConfigError: a key is unknown, the name is missing, or a value is no text; all of these
            together.
    """
    if "partition-id" in values and not values.get("name"):
        raise ConfigError(
            "this is a node of a Flower simulation, and the run is none; start it with "
            "--run-config 'simulation=true'"
        )
    keys = {
        "name": "name",
        "data-path": "data_path",
        "base": "base",
        "device": "device",
        "memory": "memory",
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
        self._memory = memory
        scales = {self.name: kind.scale(rank)}
        hidden = row_privacy(config, kind.base, {self.name: len(data.train)})
        settings = CohortSettings(config.local, scales, budget, config.rounds.count, hidden)
        self._clients = LocalClients(method_of(config), kind, {self.name: data}, settings)
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


def own_node(config: Config, settings: NodeSettings) -> Node:
    """The client of one operator, with the rows and the base of this machine.

    Args:
        config: the run's, the same on all machines.
        settings: of this node.

    Raises:
        InputError: the base or the rows cannot be loaded, or the config does not fit them.
    """
    here, name = _on_this_machine(config, settings), settings.name
    kind = prepare_kind(here)
    data = load_own(here.data, config.seed, kind.base.tokenizer, name)
    check_ids(kind.base, {name: data.rows})
    rank = client_ranks(here.adapter, [name], kind.targets, config.seed)[name]
    memory = (
        Path(settings.memory) if settings.memory else (cache_folder() or Path(".fedmira")) / "nodes"
    )
    return Node(
        config=config,
        kind=kind,
        data=data,
        rank=rank,
        budget=token_budget(here, kind),
        memory=memory,
    )


def memory_beside(output: Path) -> Path:
    """The folder of the private memories of simulated clients, beside the run folder.

    Whichever process serves a client next finds it.
    """
    return output.with_name(f"{output.name}-memory")


def _on_this_machine(config: Config, settings: NodeSettings) -> Config:
    """The run's config with this machine's paths and device.

    What concerns other clients only is left out.
    """
    given = {"path": settings.data_path} if settings.data_path else {}
    places = {
        key: value for key, value in (("base", settings.base), ("device", settings.device)) if value
    }
    adapter = config.adapter
    own: dict[str, Any] = {
        key: {name: value for name, value in of.items() if name == settings.name}
        for key, of in (("ranks", adapter.ranks), ("rank_types", adapter.rank_types))
    }
    changes = {
        "data": config.data.model_copy(update=given),
        "model": config.model.model_copy(update=places),
        "adapter": adapter.model_copy(update=own),
    }
    return config.model_copy(update=changes)
