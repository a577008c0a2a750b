"""What one client, or two, can do to the others: honest losses under attacks, screened and not.

    python experiments/attackers/measure.py OUTPUT.jsonl [--methods mira two-level fedavg flexlora]
        [--attacks NAME ...] [--modes screened trusting] [--seeds 0] [--set KEY=VALUE ...]
    python experiments/attackers/measure.py --summary OUTPUT.jsonl

Six clients of the demo train on the bundled base, in this process. An attacker is a real client
behind a wrapper that changes what it sends; nothing else is changed. Each line of OUTPUT is a run:
test losses of the honest clients and how often who was left out. "absent" is the run in which the
attacker never answers: what the honest reach without its presence.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedmira.adapters import Adapter
from fedmira.clients import Clients, LocalClients
from fedmira.config import load_config
from fedmira.experiment import build_experiment, run_experiment
from fedmira.messages import Failure, Payload, Reply, Request
from fedmira.model import load_base

SETTINGS = [
    "data.clients=6",
    "rounds.count=4",
    "local.steps=4",
    "local.batch_size=4",
    "evaluation.every=0",
    "evaluation.rouge=false",
]
MODES: Mapping[str, list[str]] = {
    "screened": [],
    "trusting": ["server.screen=false"],
    "median": ["server.combine=median"],
    "trimmed": ["server.combine=trimmed"],
    "strict": ["server.norm_bound=3", "server.least_cosine=0"],
    "mixed": ["server.least_mixed=2"],
}
Forge = Callable[[Request, Reply, Mapping[str, Reply]], Reply]


def scaled(times: float) -> Forge:
    """The whole update times a number."""

    def forge(request: Request, reply: Reply, replies: Mapping[str, Reply]) -> Reply:
        before, after = request.payload.tensors["adapter"], reply.payload.tensors["adapter"]
        moved = {name: before[name] + times * (after[name] - before[name]) for name in after}
        return sending(reply, moved)

    return forge


def noise(request: Request, reply: Reply, replies: Mapping[str, Reply]) -> Reply:
    """Noise as long as what was learned, entry by entry."""
    before, after = request.payload.tensors["adapter"], reply.payload.tensors["adapter"]
    draw = torch.Generator().manual_seed(reply.round)
    noisy = {
        name: before[name]
        + torch.randn(after[name].shape, generator=draw)
        * (after[name] - before[name]).norm()
        / after[name].numel() ** 0.5
        for name in after
    }
    return sending(reply, noisy)


def imitating(request: Request, reply: Reply, replies: Mapping[str, Reply]) -> Reply:
    """What the first other client sends in this round."""
    victim = next(other for client, other in replies.items() if client != reply.client_id)
    return sending(reply, victim.payload.tensors["adapter"])


def rows_claimed(count: int) -> Forge:
    """What was learned, with a claim of so many training rows."""

    def forge(request: Request, reply: Reply, replies: Mapping[str, Reply]) -> Reply:
        return replace(reply, num_examples=count)

    return forge


def weak(request: Request, reply: Reply, replies: Mapping[str, Reply]) -> Reply:
    """Next to nothing, to be handed what others have learned."""
    return scaled(1e-4)(request, reply, replies)


def honest(request: Request, reply: Reply, replies: Mapping[str, Reply]) -> Reply:
    """What it trained."""
    return reply


def sending(reply: Reply, adapter: Adapter) -> Reply:
    """The reply with another adapter."""
    tensors = {**reply.payload.tensors, "adapter": dict(adapter)}
    return replace(reply, payload=Payload(tensors, reply.payload.scalars))


@dataclass(frozen=True)
class Attack:
    """How attackers behave.

    Attributes:
        forge: what they send.
        count: how many there are; they are the last of the clients.
        flipped: whether the answers of their rows are exchanged at random.
        together: whether all of them send what the first one does.
        sent: whether they answer at all.
    """

    forge: Forge = honest
    count: int = 1
    flipped: bool = False
    together: bool = False
    sent: bool = True


ATTACKS: Mapping[str, Attack] = {
    "absent": Attack(sent=False),
    "two absent": Attack(count=2, sent=False),
    "honest": Attack(),
    "x100": Attack(scaled(100.0)),
    "x-10": Attack(scaled(-10.0)),
    "x-4": Attack(scaled(-4.0)),
    "x-1": Attack(scaled(-1.0)),
    "imitation": Attack(imitating),
    "noise": Attack(noise),
    "labels": Attack(flipped=True),
    "rows 1e9": Attack(rows_claimed(10**9)),
    "x1e-4": Attack(weak),
    "two sybils x-4": Attack(scaled(-4.0), count=2, together=True),
}


@dataclass
class Attacked:
    """The clients of a run, of whom some are attackers."""

    inner: Clients
    attackers: Sequence[str]
    attack: Attack

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Has all train, and forges what the attackers send."""
        sent = {request.client_id: request for request in requests}
        answers = {answer.client_id: answer for answer in self.inner.train(requests)}
        replies = {name: answer for name, answer in answers.items() if isinstance(answer, Reply)}
        first: Reply | None = None
        for name in self.attackers:
            if name not in replies:
                continue
            if not self.attack.sent:
                answers[name] = Failure(name, requests[0].round, "train", "absent")
                continue
            forged = self.attack.forge(sent[name], replies[name], replies)
            if self.attack.together and first is not None:
                forged = sending(forged, first.payload.tensors["adapter"])
            first = first or forged
            answers[name] = forged
        return list(answers.values())


def with_flipped(clients: LocalClients, names: Sequence[str]) -> None:
    """Exchanges the answers of these clients' training rows at random."""
    data = dict(clients.data)
    for name in names:
        rows = list(data[name].train)
        answers = [row.response for row in rows]
        random.Random(name).shuffle(answers)
        flipped = tuple(
            replace(row, response=answer) for row, answer in zip(rows, answers, strict=True)
        )
        data[name] = replace(data[name], train=flipped)
    clients.data = data


def measure(method: str, name: str, mode: str, seed: int, base: Any, more: list[str]) -> Any:
    """One run: losses of the honest, and who was left out."""
    attack = ATTACKS[name]
    settings = [*SETTINGS, f"algorithm.name={method}", f"seed={seed}", *MODES[mode], *more]
    experiment = build_experiment(load_config(overrides=settings), base)
    names = list(experiment.ranks)
    attackers = names[-attack.count :]
    if attack.flipped:
        assert isinstance(experiment.clients, LocalClients)
        with_flipped(experiment.clients, attackers)
    clients: Any = Attacked(experiment.clients, attackers, attack)
    with tempfile.TemporaryDirectory() as place:
        result = run_experiment(replace(experiment, clients=clients), Path(place) / "run")
        lines = [
            json.loads(line)
            for line in (Path(place) / "run" / "events.jsonl").read_text("utf-8").splitlines()
        ]
    losses = {str(row["client"]): float(row["after_align_loss"]) for row in result.clients}
    screened = [line["client"] for line in lines if line.get("stage") == "screen"]
    return {
        "method": method,
        "attack": name,
        "mode": mode,
        "seed": seed,
        "honest": {client: losses[client] for client in names if client not in attackers},
        "left_out": {client: screened.count(client) for client in sorted(set(screened))},
    }


def summarise(lines: Sequence[Mapping[str, Any]]) -> None:
    """A table a mode: mean honest losses, and their rise over those without the attacker."""
    for mode in dict.fromkeys(line["mode"] for line in lines):
        own = [line for line in lines if line["mode"] == mode]
        methods = list(dict.fromkeys(line["method"] for line in own))
        print(f"\n{mode}\n\n| attack | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
        for attack in dict.fromkeys(line["attack"] for line in own):
            cells = [cell(own, method, attack) for method in methods]
            print(f"| {attack} | {' | '.join(cells)} |")


def cell(lines: Sequence[Mapping[str, Any]], method: str, attack: str) -> str:
    """Mean honest loss, its rise over a run without the attackers, and who was left out."""
    without = "two absent" if ATTACKS[attack].count == 2 else "absent"

    def mean_of(name: str) -> float | None:
        found = [
            fmean(line["honest"].values())
            for line in lines
            if line["method"] == method and line["attack"] == name
        ]
        return fmean(found) if found else None

    loss, least = mean_of(attack), mean_of(without)
    if loss is None:
        return ""
    times = sum(
        sum(line["left_out"].values())
        for line in lines
        if line["method"] == method and line["attack"] == attack
    )
    rise = f" ({loss / least - 1:+.1%})" if least and attack != without else ""
    return f"{loss:.3f}{rise}" + (f", left out {times}" if times else "")


def main() -> None:
    """Measures, or summarises what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--methods", nargs="+", default=["mira", "two-level", "fedavg", "flexlora"])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    parser.add_argument("--modes", nargs="+", default=["screened", "trusting"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", dest="more", action="append", default=[])
    asked = parser.parse_args()
    if asked.summary:
        text = asked.output.read_text(encoding="utf-8")
        summarise([json.loads(line) for line in text.splitlines()])
        return
    logging.getLogger("fedmira").setLevel(logging.ERROR)
    base = load_base(load_config().model)
    for seed in asked.seeds:
        for mode in asked.modes:
            for method in asked.methods:
                for attack in asked.attacks:
                    line = measure(method, attack, mode, seed, base, asked.more)
                    with asked.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
