"""Runs that are killed, refused by the system, or damaged, and what comes of them."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmira.config import dump_config
from fedmira.data.token_cache import TokenCache
from fedmira.errors import RunFolderError
from fedmira.federation.node_memory import NodeMemory
from fedmira.messages import Payload
from fedmira.runs import verify_folder
from small import adapter_bytes, events_of, make_config, table_of
from tiny import tiny_tokenizer
from torture.faults import ERRORS, Ended, apart, call, counting, failing_at, killing_at

__all__ = [
    "METHODS",
    "Arena",
    "Tally",
    "cache_trial",
    "fault_trial",
    "flip_trial",
    "kill_trial",
    "memory_trial",
    "named_trial",
]

SETTINGS: dict[str, Any] = {
    "rounds.count": 2,
    "rounds.participation": 0.8,
    "evaluation.every": 2,
    "local.steps": 1,
}
METHODS: dict[str, dict[str, Any]] = {
    "mira": {},
    "mira, kept moments": {"algorithm.space": "factor", "local.optimizer_state": "kept"},
    "mira, safeguard": {"algorithm.safeguard": True, "graph.kind": "uniform"},
    "mira, best adapters": {"evaluation.select": "best", "evaluation.every": 1},
    "mira, wire int8": {"engine.wire": "int8"},
    "two-level": {"algorithm.name": "two-level"},
    **{
        name: {"algorithm.name": name}
        for name in (
            "local fedavg fedit-finetune fedprox ditto share-factor flexlora hetlora fedex flora "
            "fedrot fedopt fedalt feddpa lora-fair rolora fedfomo"
        ).split()
    },
    "fedlease": {"algorithm.name": "fedlease", "rounds.participation": 1.0},
    "scaffold": {"algorithm.name": "scaffold", "local.optimizer": "sgd"},
    "fedkseed": {"algorithm.name": "fedkseed", "local.optimizer": "zeroth-order"},
}


class Tally(dict[str, int]):
    """How often something came out, and examples of what should not."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def note(self, what: str, wrong: str = "") -> None:
        self[what] = self.get(what, 0) + 1
        if wrong:
            self.bad.append(f"{what}: {wrong}"[:2000])


class Arena:
    """Finished runs of each method, to which others are compared.

    Args:
        place: an empty folder.
        base: of a base in files.
        rows: of clients.
    """

    def __init__(self, place: Path, base: Path, rows: Path) -> None:
        self.place, self.base, self.rows = place, base, rows
        self._known: dict[str, tuple[Path, int]] = {}
        self._trials = 0

    def config(self, method: str) -> Path:
        path = self.place / f"{method.replace(' ', '-')}.toml"
        if not path.exists():
            config = make_config(self.base, self.rows, {**SETTINGS, **METHODS[method]})
            path.write_text(dump_config(config), encoding="utf-8")
        return path

    def whole(self, method: str) -> tuple[Path, int]:
        """A run without any fault, and how many operations on files it took."""
        if method not in self._known:
            folder = self.place / f"{method.replace(' ', '-')}-whole"

            def work() -> tuple[int, str, int]:
                count = counting(folder)
                return (*call("run", self.config(method), "--output", folder), count())

            ended = apart(work)
            if (ended.signal, ended.code) != (0, 0):
                raise RuntimeError(f"{method} does not run at all: {ended}")
            self._known[method] = folder, ended.operations
        return self._known[method]

    def fresh(self) -> Path:
        self._trials += 1
        return self.place / f"trial-{self._trials}"

    def go_on(self, method: str, folder: Path, before: Callable[[], object] = int) -> Ended:
        """Begin the run, or continue it where it has a config.toml."""
        if (folder / "config.toml").is_file():
            arguments: tuple[str | Path, ...] = ("run", "--resume", "--output", folder)
        else:
            arguments = ("run", self.config(method), "--output", folder)

        def work() -> tuple[int, str, int]:
            before()
            return (*call(*arguments), 0)

        return apart(work)


def unequal(found: Path, expected: Path) -> str:
    """In which file two runs differ, apart from seconds and dates; "" where they are equal."""
    if adapter_bytes(found) != adapter_bytes(expected):
        return "adapters/"
    for name in ("clients", "rounds", "validation"):
        if table_of(found, name, timing=False) != table_of(expected, name, timing=False):
            return f"metrics/{name}.csv"
    if events_of(found, timing=False) != events_of(expected, timing=False):
        return "events.jsonl"
    for name in ("graph.json", "config.toml"):
        pair = [folder / name for folder in (found, expected)]
        if [path.exists() and path.read_bytes() for path in pair][0] != (
            pair[1].exists() and pair[1].read_bytes()
        ):
            return name
    return ""


def kill_trial(arena: Arena, method: str, draw: random.Random, tally: Tally) -> None:
    """Kill a run before a file operation, its resume perhaps too, and let it come to its end."""
    expected, operations = arena.whole(method)
    folder, places = arena.fresh(), []
    for chance in (1.0, 0.3, 0.3):
        if draw.random() < chance:
            number = draw.randrange(1, operations + 1)
            places.append(number)
            ended = arena.go_on(method, folder, lambda at=number: killing_at(folder, at))  # type: ignore[misc]
            tally.note("killed" if ended.signal == signal.SIGKILL else "ended before it was killed")
    ended = arena.go_on(method, folder)
    where = f"{method}, killed before operations {places} of {operations}"
    if (ended.signal, ended.code) != (0, 0):
        tally.note("did not resume", f"{where}: {ended}")
    elif difference := unequal(folder, expected):
        tally.note("other bytes", f"{where}: {difference}")
    elif found := verify_folder(folder).damaged:
        tally.note("equal, but called damaged", f"{where}: {found}")
    else:
        tally.note("resumed to equal bytes")
        shutil.rmtree(folder)


def fault_trial(arena: Arena, method: str, draw: random.Random, tally: Tally) -> None:
    """Let the system refuse an operation; then run on without the fault."""
    expected, operations = arena.whole(method)
    folder, number = arena.fresh(), draw.randrange(1, operations + 1)
    error, lasting = draw.choice(ERRORS), draw.random() < 0.5
    ended = arena.go_on(method, folder, lambda: failing_at(folder, number, error, lasting))
    where = f"{method}, {error} {'from' if lasting else 'at'} operation {number} of {operations}"
    lines = [line for line in ended.err.splitlines() if line.startswith("error:")]
    if ended.signal or "Traceback" in ended.err:
        tally.note("crash, hang or traceback", f"{where}: {ended}")
    elif ended.code not in (0, 3) or (ended.code == 3) != (len(lines) == 1):
        tally.note("other than one line and code 3", f"{where}: {ended}")
    else:
        tally.note("one line and code 3" if ended.code else "went on without what was refused")
    if ended.code and not lasting and (folder / "run.json").is_file():
        said = json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]
        if said == "running":
            tally.note("run.json stayed running", where)
    ended = arena.go_on(method, folder)
    if (ended.signal, ended.code) != (0, 0) or unequal(folder, expected):
        tally.note("was not resumed to equal bytes", f"{where}: {ended}")
    else:
        tally.note("resumed to equal bytes")
        shutil.rmtree(folder)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Content with a bit flipped, and now and then with its end cut off."""
    changed = bytearray(content)
    if not changed or draw.random() < 0.1:
        return content[: draw.randrange(len(content))] if content else b"\0"
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_trial(arena: Arena, method: str, cut: Path, draw: random.Random, tally: Tally) -> None:
    """Damage a file of a finished run or of one that was cut off, and use it.

    Args:
        cut: a run of the method that was killed in a later round.
    """
    expected, _ = arena.whole(method)
    finished = draw.random() < 0.5
    source, folder = expected if finished else cut, arena.fresh()
    shutil.copytree(source, folder)
    # A file is drawn first, and so small ones as often as large ones.
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    path = draw.choice(files)
    content = path.read_bytes()
    path.write_bytes(damaged(content, draw))
    where = f"{method}, {'finished' if finished else 'cut off'}, {path.relative_to(folder)}"
    named = path.name in " ".join(verify_folder(folder).damaged)
    unrecorded = path.relative_to(folder).as_posix() in verify_folder(source).unchecked
    if named:
        tally.note("named by verify")
    elif unrecorded:
        tally.note("not recorded yet, and made anew")
    else:
        tally.note("not named by verify", where)
    ended = arena.go_on(method, folder)
    if ended.signal or "Traceback" in ended.err:
        tally.note("crash, hang or traceback", f"{where}: {ended}")
    elif ended.code:
        said = any(part in ended.err for part in (path.name, path.parent.name))
        tally.note(
            "refused by name" if said else "refused otherwise",
            "" if said else f"{where}: {ended.err}",
        )
    elif difference := unequal(folder, expected):
        tally.note("other result without a word", f"{where}: {difference}")
    else:
        tally.note("equal bytes in the end")
    shutil.rmtree(folder)


def named_trial(folder: Path, draw: random.Random, tally: Tally) -> None:
    """Damage a file of a finished run, and let `verify` find it; then put it back."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    path = draw.choice(files)
    content = path.read_bytes()
    path.write_bytes(damaged(content, draw))
    if any(path.name in problem for problem in verify_folder(folder).damaged):
        tally.note("named by verify")
    else:
        tally.note("not named by verify", str(path.relative_to(folder)))
    path.write_bytes(content)


def memory_trial(place: Path, draw: random.Random, tally: Tally) -> None:
    """Damage a node's private memory, and recall it."""
    import torch

    node = NodeMemory(place, "run", f"client-{draw.randrange(10**9)}")
    tensors = {"own": {"A": torch.randn(4, 3), "B": torch.randn(2, 4)}, "more": {}}
    node.keep(3, Payload(tensors, {"steps": 7.0}))
    (path,) = node.folder.iterdir()
    path.write_bytes(damaged(path.read_bytes(), draw))
    try:
        found = node.recall(3)
    except RunFolderError as error:
        tally.note("named" if path.name in str(error) else "not named", "")
        return
    same = found is not None and all(
        torch.equal(found.tensors["own"][name], tensor) for name, tensor in tensors["own"].items()
    )
    tally.note(
        "no content was changed" if same else "used without a word", "" if same else str(path)
    )


def cache_trial(place: Path, draw: random.Random, tally: Tally) -> None:
    """Damage a file of the token cache, and use it."""
    texts = [f"{draw.random()}" * 2000 for _ in range(2)]
    cache, said = TokenCache(tiny_tokenizer(), place / "tokens"), _Said()
    expected = cache.ids(texts, _tokens)
    (path,) = (each for each in (place / "tokens").iterdir())
    path.write_bytes(damaged(path.read_bytes(), draw))
    log = logging.getLogger("fedmira")
    log.addHandler(said)
    try:
        found = cache.ids(texts, _tokens)
    finally:
        log.removeHandler(said)
    path.unlink()
    if found != expected:
        tally.note("used without a word", path.name)
    else:
        tally.note("named and made anew" if path.name in said.text else "made anew without a word")


class _Said(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def _tokens(texts: Any) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]
