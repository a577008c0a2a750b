"""Small federations: a tiny base, made-up clients, and settings for runs of seconds.

The clients are JSON Lines. Readers of run folders are here too.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedmira.clients import Clients, Cohort, LocalClients, OverWire
from fedmira.config import Config, with_method
from fedmira.experiment import Experiment, build_experiment, run_experiment
from fedmira.messages import Payload
from fedmira.methods import Method, ServerState, Start, Trained
from fedmira.model import BaseModel
from fedmira.rounds import RoundOutcome, run_rounds
from tiny import tiny_model, tiny_tokenizer

__all__ = [
    "CLIENTS",
    "Wrapping",
    "cohort_of",
    "Ended",
    "PROGRAM",
    "adapter_bytes",
    "adapters_of",
    "call_main",
    "local_of",
    "over_wire",
    "command",
    "environment",
    "events_of",
    "laplacian_of",
    "lenient_node",
    "make_config",
    "make_run",
    "run_loop",
    "table_of",
    "with_clients",
    "with_method_object",
    "write_base",
    "write_clients",
]

CLIENTS = {"apple-1": 14, "apple-2": 22, "apple-3": 10, "birch-1": 18, "birch-2": 12}
"""Client id -> its rows; the word before the dash is its category.

3 + 2 clients, so that degrees of the category graph differ.
"""

SETTINGS: dict[str, Any] = {
    "data.source": "jsonl",
    "data.prompt": "plain",
    "data.max_length": 64,
    "data.train_fraction": 0.6,
    "data.validation_fraction": 0.2,
    "adapter.rank": 4,
    "adapter.alpha": 8.0,
    "local.steps": 2,
    "local.batch_size": 4,
    "local.learning_rate": 0.02,
    "rounds.count": 3,
    "evaluation.every": 0,
    "evaluation.rouge": False,
    "evaluation.max_new_tokens": 4,
    "engine.token_budget": 400,
    "model.device": "cpu",
}

PROGRAM = str(Path(sys.executable).with_name("fedmira"))
"""The command as it was installed beside this Python."""

TIMING = ("train_seconds", "combine_seconds", "evaluate_seconds", "tokens_per_second")


def write_base(folder: Path) -> Path:
    """The tiny Llama and its tokenizer in Hugging Face format."""
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_clients(folder: Path, clients: Mapping[str, int] | None = None) -> Path:
    """FOLDER/<client>/train.jsonl.

    Clients of a category share an instruction and two of the three words that they answer.
    """
    for name, count in (CLIENTS if clients is None else clients).items():
        category = name.partition("-")[0]
        family = sorted({other.partition("-")[0] for other in CLIENTS} | {category}).index(category)
        draw = random.Random(name)
        lines = []
        for _ in range(count):
            words = [draw.randrange(80) for _ in range(draw.randint(2, 5))]
            row = {
                "instruction": " ".join(f"w{10 * family + i}" for i in range(6)),
                "input": " ".join(f"w{word}" for word in words),
                "output": f"w{60 + 8 * family} w{61 + 8 * family} "
                f"w{(words[0] + 7 * family + 1) % 90}",
                "category": category,
            }
            lines.append(json.dumps(row) + "\n")
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_config(
    base: Path | str, data: Path | str, settings: Mapping[str, Any] | None = None
) -> Config:
    """`SETTINGS` with dotted keys on top; data.path and model.base are filled in."""
    nested: dict[str, Any] = {}
    for key, value in {
        **SETTINGS,
        "model.base": str(base),
        "data.path": str(data),
        **(settings or {}),
    }.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    nested.setdefault("algorithm", {}).setdefault("name", "mira")
    return Config.model_validate(nested)


def lenient_node(config: Config, folder: Path) -> dict[str, str]:
    """What a node's config says of base and policy, for a node with a handful of rows.

    It reads them as the config says; the policy is written into the folder.
    """
    from fedmira.federation.policy_file import policy_for, policy_text

    policy, _ = policy_for(config)
    few = {"least_rows": 1, "least_measured": 1, "least_batch": 1}
    policy = policy.model_copy(update={"limits": policy.limits.model_copy(update=few)})
    path = folder / "policy.toml"
    path.write_text(policy_text(policy), encoding="utf-8")
    path.chmod(0o600)
    return {"base": config.model.base, "device": config.model.device, "policy": str(path)}


def make_run(base: Path, clients: Path, output: Path, settings: Mapping[str, Any]) -> Path:
    """A finished run of two rounds, or as many as the settings say; its folder."""
    config = make_config(base, clients, {"rounds.count": 2, **settings})
    run_experiment(build_experiment(config), output)
    return output


def with_clients(experiment: Experiment, clients: Clients) -> Experiment:
    """The same experiment with others at work."""
    return replace(experiment, clients=clients)


def with_method_object(experiment: Experiment, method: Method, at_once: int = 64) -> Experiment:
    """The experiment built anew with a method that is not in the table, on server and clients."""
    anew = build_experiment(with_method(experiment.config, method), experiment.base)
    return with_clients(anew, local_of(anew, at_once))


def local_of(experiment: Experiment, at_once: int = 64, **changes: Any) -> LocalClients:
    """The clients of an experiment that lies in this process, with other memories."""
    found = experiment.clients
    inner = found.inner if isinstance(found, OverWire) else found
    assert isinstance(inner, LocalClients)
    parts = {
        "method": inner.method,
        "kind": inner.kind,
        "data": inner.data,
        "settings": inner.settings,
    }
    return LocalClients(**{**parts, "at_once": at_once, **changes})


def cohort_of(experiment: Experiment, method: Any) -> Cohort:
    """The clients of an experiment at local training alone, by any method."""
    local = local_of(experiment)
    return Cohort(method, local.kind, local.data, local.settings)


class Wrapping:
    """A method seen through: what a subclass does not change is the inner method's."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def started(self, payload: Payload, memory: Payload | None) -> Start:
        return self.begin(payload, memory)  # type: ignore[no-any-return]

    def finished(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        return self.finish(payload, memory, trained)  # type: ignore[no-any-return]


def over_wire(experiment: Experiment, at_once: int = 64) -> Clients:
    """The same behind the wire that the config asks for."""
    local, wire = local_of(experiment, at_once), experiment.config.engine.wire
    return local if wire == "float32" else OverWire(local, wire, at_once)


def run_loop(
    config: Config, base: BaseModel
) -> tuple[Experiment, list[ServerState], list[RoundOutcome]]:
    """The round loop alone, without a run folder.

    The states before round 1 and after each round, and what each round produced.
    """
    experiment = build_experiment(config, base)
    states, outcomes = [experiment.algorithm.initial_state(experiment.starts)], []

    def note(outcome: RoundOutcome) -> None:
        outcomes.append(outcome)
        states.append(outcome.combined.state)

    run_rounds(
        experiment.algorithm,
        experiment.clients,
        states[0],
        list(experiment.ranks),
        config.rounds,
        config.seed,
        note,
    )
    return experiment, states, outcomes


def adapter_bytes(folder: Path, cards: bool = True) -> dict[str, bytes]:
    """Every file under adapters/ as bytes.

    Without the cards, which name the method, where runs of two methods are held together.
    """
    paths = [
        path
        for path in sorted((folder / "adapters").rglob("*"))
        if path.is_file() and (cards or path.name != "README.md")
    ]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def adapters_of(folder: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """client -> parameter name -> float64 array, from the saved PEFT folders."""
    paths = sorted((folder / "adapters").glob("*/adapter_model.safetensors"))
    return {
        path.parent.name: {
            name: array.astype(np.float64) for name, array in load_file(path).items()
        }
        for path in paths
    }


def laplacian_of(folder: Path, clients: Sequence[str]) -> tuple[np.ndarray[Any, Any], float]:
    """L = D - M of graph.json, in the order of the clients, and the largest degree."""
    document = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    weights = np.zeros((len(clients), len(clients)))
    for edge in document["edges"]:
        k, other = clients.index(edge["source"]), clients.index(edge["target"])
        assert weights[k, other] == 0, "a symmetric pair stands in graph.json once"
        weights[k, other] = weights[other, k] = edge["weight"]
    degrees = weights.sum(axis=1)
    return np.diag(degrees) - weights, float(degrees.max())


def events_of(folder: Path, kind: str | None = None, timing: bool = True) -> list[dict[str, Any]]:
    """The lines of events.jsonl, of one kind where given."""
    lines = [
        json.loads(line)
        for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    chosen = [line for line in lines if kind in (None, line["event"])]
    return (
        chosen
        if timing
        else [{key: value for key, value in line.items() if key not in TIMING} for line in chosen]
    )


def table_of(folder: Path, name: str, timing: bool = True) -> list[dict[str, str]]:
    """The rows of metrics/NAME.csv, as text."""
    with (folder / "metrics" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [
            {key: value for key, value in row.items() if timing or key not in TIMING}
            for row in csv.DictReader(file)
        ]


def environment() -> dict[str, str]:
    """The environment of a command.

    One thread, so that two processes add numbers in the same order, and no downloads.
    """
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
        "NO_COLOR": "1",
    }


def command(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`fedmira` in a process of its own."""
    return subprocess.run(
        [PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=timeout,
        check=False,
    )


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def call_main(*arguments: str | Path) -> Ended:
    """The command line's own `main` inside this process, which needs no start of a process."""
    from fedmira.cli import main

    before, out, err, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = ["fedmira", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as ending:
        code = int(ending.code or 0)
    finally:
        sys.argv = before
    return Ended(code, out.getvalue(), err.getvalue())
