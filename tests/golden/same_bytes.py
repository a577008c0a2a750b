"""Hold two states of the code together, byte for byte.

Every method, adapter kind, optimizer and wire, and a federation.

    PYTHONPATH=tests python tests/golden/same_bytes.py record before.json    # one state
    PYTHONPATH=tests python tests/golden/same_bytes.py compare before.json   # another, same machine

Both make small runs with one thread and note the SHA-256 of every file of their folders, apart from
what differs between two runs of one state: seconds, dates, the machine, and the page made of them.
Where Flower is installed, the messages of a federation and its nodes' memories are noted too.
`compare` prints what differs and exits with 1. Numbers depend on the machine, so the result is
compared and not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

__all__ = ["RUNS", "fingerprints"]

BASE: dict[str, Any] = {
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
    "rounds.participation": 0.8,
    "evaluation.every": 2,
    "evaluation.max_new_tokens": 4,
    "engine.token_budget": 400,
    "model.device": "cpu",
    "algorithm.name": "mira",  # of the runs that name none; the settings below are its own
}

METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "fedavg": {},
    "fedit-finetune": {},
    "fedprox": {},
    "ditto": {},
    "share-factor": {},
    "flexlora": {},
    "hetlora": {"adapter.ranks": {"apple-1": 2}},
    "fedex": {},
    "flora": {"adapter.ranks": {"apple-1": 6}},
    "fedrot": {},
    "fedopt": {},
    "scaffold": {"local.optimizer": "sgd"},
    "fedlease": {},
    "fedalt": {},
    "feddpa": {},
    "lora-fair": {},
    "rolora": {},
    "fedfomo": {},
    "fedkseed": {"local.optimizer": "zeroth-order"},
    "mira": {},
}

RUNS: dict[str, dict[str, Any]] = {
    **{f"method {name}": {"algorithm.name": name, **more} for name, more in METHODS.items()},
    "share-factor, B, frozen A": {
        "algorithm.name": "share-factor",
        "algorithm.shared_factor": "B",
        "algorithm.private_factor": "frozen",
    },
    "fedalt on a learned graph, sketched": {"algorithm.name": "fedalt", "graph.sketch": 32},
    "fedalt, factors and learned shares": {
        "algorithm.name": "fedalt",
        "algorithm.rest_space": "factor",
        "algorithm.learned_share": True,
        "graph.kind": "uniform",
    },
    "flexlora, unequal ranks": {"algorithm.name": "flexlora", "adapter.ranks": {"apple-1": 2}},
    "mira, safeguard": {"algorithm.safeguard": True},
    "mira, as published": {
        "algorithm.space": "factor",
        "algorithm.server_step": 0.2,
        "algorithm.size_scale": 0.0,
        "algorithm.neighbours": "fresh",
        "graph.kind": "random",
        "rounds.sampling": "shepherd",
        "local.weight_decay": 0.1,
    },
    "mira, rescaled": {"algorithm.neighbours": "rescaled", "graph.kind": "category"},
    "mira, kept moments": {"algorithm.space": "factor", "local.optimizer_state": "kept"},
    "mira, best adapters": {"evaluation.select": "best", "evaluation.every": 1},
    "mira, sketched": {"graph.sketch": 32},
    "pfedgraph, principal angles": {"graph.kind": "pfedgraph", "graph.measure": "principal-angles"},
    "mira, shuffled": {"graph.shuffled": True},
    "pfedgraph": {"graph.kind": "pfedgraph"},
    "uniform graph": {"graph.kind": "uniform"},
    **{
        f"kind {kind}": {
            "adapter.kind": kind,
            "algorithm.space": "factor",
            "adapter.virtual_tokens": 3,
        }
        for kind in ("p-tuning", "prompt", "prefix")
    },
    "drawn ranks": {"adapter.rank_distribution": "uniform", "adapter.type_ranks": [2, 4, 6]},
    "dropout": {"adapter.dropout": 0.1},
    "epochs": {"local.epochs": 1},
    **{f"optimizer {name}": {"local.optimizer": name} for name in ("adam", "sgd", "sophia")},
    "optimizer zeroth-order": {"local.optimizer": "zeroth-order", "graph.kind": "uniform"},
    **{f"wire {name}": {"engine.wire": name} for name in ("float16", "int8")},
    "wire int8, fedavg": {"engine.wire": "int8", "algorithm.name": "fedavg"},
    "recompute": {"engine.recompute": True},
}
"""Name of a run -> its settings; the rest is `BASE`."""

FEDERATIONS: dict[str, dict[str, Any]] = {
    "federation": {"federation.nodes": 5},
    "federation, ditto": {"federation.nodes": 5, "algorithm.name": "ditto"},
    "federation, int8": {
        "federation.nodes": 5,
        "engine.wire": "int8",
        "algorithm.space": "factor",
        "local.optimizer_state": "kept",
    },
}

_TIMES = (
    "train_seconds",
    "combine_seconds",
    "evaluate_seconds",
    "tokens_per_second",
    "wall_seconds",
)
_OF_THIS_MACHINE = ("id", "versions", "machine", "started", "resumed", "wall_seconds", "command")


def fingerprints(place: Path) -> dict[str, str]:
    """Make all runs below `place`.

    Returns:
        "run: file" -> SHA-256 of what must not change in that file.
    """
    from small import call_main, write_base, write_clients

    base, data = write_base(place / "base"), write_clients(place / "clients")
    found: dict[str, str] = {}
    for number, (name, more) in enumerate(RUNS.items()):
        settings = _settings(more, base, data)
        folder = place / f"run-{number}"
        overrides = [
            part for key, value in settings.items() for part in ("--set", f"{key}={_toml(value)}")
        ]
        ended = call_main("run", *overrides, "--output", folder)
        if ended.code:
            raise SystemExit(f"{name}: exit code {ended.code}\n{ended.err}")
        found |= {f"{name}: {file}": sha for file, sha in _of_folder(folder, place)}
        print(name, flush=True)
    if find_spec("flwr"):
        for name, more in FEDERATIONS.items():
            found |= _federation(name, _settings(more, base, data), place, data)
            print(name, flush=True)
    return found


def _settings(more: Mapping[str, Any], base: Path, data: Path) -> dict[str, Any]:
    settings = {**BASE, "model.base": str(base), "data.path": str(data), **more}
    if "adapter.rank_distribution" in settings:
        del settings["adapter.rank"]
    if "local.epochs" in settings:
        del settings["local.steps"]
    return settings


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(inner)}' for key, inner in value.items()) + "}"
    return json.dumps(value)


def _federation(name: str, settings: Mapping[str, Any], place: Path, data: Path) -> dict[str, str]:
    """A run over Flower's own messages, within this process."""
    import secrets

    from fedmira.federation.server import run_federation
    from loopback import LoopbackGrid
    from small import CLIENTS, make_config

    folder, memory = place / name, place / f"{name} memory"
    given = {
        key: value for key, value in settings.items() if key not in ("model.base", "data.path")
    }
    config = make_config(settings["model.base"], settings["data.path"], given)
    messages: list[bytes] = []

    def note(_: str, message: Any, reply: Any) -> Any:
        for each in (message, reply):
            messages.append(bytes(each.content.array_records["fedmira"]["message"].data))
        return reply

    nodes = {
        100 + i: {"name": client, "data-path": str(data), "memory": str(memory)}
        for i, client in enumerate(CLIENTS)
    }
    drawn, secrets.token_hex = secrets.token_hex, lambda _: "0123456789abcdef"  # the run's id
    try:
        run_federation(config, LoopbackGrid(config, nodes, note), folder, resume=False)
    finally:
        secrets.token_hex = drawn
    found = {f"{name}: {file}": sha for file, sha in _of_folder(folder, place)}
    found |= {f"{name}: message {i:04d}": _sha(message) for i, message in enumerate(messages)}
    found |= {
        f"{name}: memory {path.relative_to(memory).as_posix()}": _sha(_memory(path))
        for path in sorted(memory.rglob("*.safetensors"))
    }
    return found


def _memory(path: Path) -> bytes:
    """A node's memory; the order of the entries in its header changes from run to run."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = sorted((file.metadata() or {}).items())
        tensors = [(key, file.get_tensor(key).tobytes().hex()) for key in sorted(file.keys())]
    return json.dumps([about, tensors]).encode()


def _of_folder(folder: Path, place: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in ("report.html", ".lock"):
            yield name, _sha(_lasting(path).replace(str(place).encode(), b"PLACE"))


def _lasting(path: Path) -> bytes:
    """What of a file must not change."""
    content = path.read_bytes()
    if path.name == "events.jsonl":
        return "\n".join(
            json.dumps(_without(json.loads(line), _TIMES)) for line in content.decode().splitlines()
        ).encode()
    if path.name == "rounds.csv":
        rows = [line.split(",") for line in content.decode().splitlines()]
        kept = [i for i, name in enumerate(rows[0]) if name not in _TIMES]
        return "\n".join(",".join(row[i] for i in kept) for row in rows).encode()
    if path.name == "run.json":
        return json.dumps(_without(json.loads(content), _OF_THIS_MACHINE)).encode()
    if path.name == "values.json":  # sizes of files that hold seconds
        document = json.loads(content)
        document["values"] = _without(document["values"], (*_TIMES, "sizes"))
        return json.dumps(document).encode()
    return content


def _without(document: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in names}


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    verb, file = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as place:
        os.environ["FEDMIRA_CACHE"] = str(Path(place) / "cache")
        found = fingerprints(Path(place))
    if verb == "record":
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    differ = [
        name for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)
    ]
    for name in differ:
        how = "is new" if name not in before else "is gone" if name not in found else "differs"
        print(f"{name} {how}")
    print(f"{len(found)} files and messages, of which {len(differ)} differ")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
