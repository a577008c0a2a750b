"""The long form: `make torture`, or PYTHONPATH=tests python tests/torture/long.py --help.

Writes what was tried and what came of it as JSON, and exits with 1 where something came that must
not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from small import write_base, write_clients  # noqa: E402 - one thread, before torch is loaded
from torture.faults import killing_at  # noqa: E402
from torture.fuzz import base_case, config_case, rows_case, wire_case  # noqa: E402
from torture.trials import (  # noqa: E402
    METHODS,
    Arena,
    Tally,
    cache_trial,
    fault_trial,
    flip_trial,
    kill_trial,
    memory_trial,
    named_trial,
)

_COUNTS = {
    "kills": 500,
    "faults": 150,
    "flips": 400,
    "named": 1000,
    "memories": 100,
    "caches": 60,
    "messages": 12000,
    "settings": 4000,
    "rows": 3000,
    "bases": 300,
}

_TOLD = 5
"""The figures are written after so many trials."""


def main() -> int:
    """Try everything; 1 where something came that must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"by default {count}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long")
    parser.add_argument("--output", type=Path, default=Path("torture.json"))
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as place:
        os.environ["FEDMIRA_CACHE"] = f"{place}/cache"
        found: dict[str, dict[str, object]] = {}
        for name, trial in _trials(Path(place), arguments.seed).items():
            tally, draw, begun = (
                Tally(),
                random.Random(f"{arguments.seed} {name}"),
                time.monotonic(),
            )
            wanted = getattr(arguments, name)
            done = 0
            while done < wanted and time.monotonic() < deadline:
                trial(done, draw, tally)
                done += 1
                if done % _TOLD == 0 or done == wanted:
                    found[name] = {
                        "wanted": wanted,
                        "done": done,
                        "seconds": round(time.monotonic() - begun, 1),
                        "came": dict(tally),
                        "wrong": tally.bad,
                    }
                    text = json.dumps({"seed": arguments.seed, "trials": found}, indent=1)
                    arguments.output.write_text(text + "\n", encoding="utf-8")
    return int(any(each["wrong"] for each in found.values()))


def _trials(place: Path, seed: int) -> dict[str, Callable[[int, random.Random, Tally], None]]:
    base = write_base(place / "base")
    rows = write_clients(place / "rows", {"apple-1": 14, "apple-2": 10, "birch-1": 12})
    arena, methods, cut = Arena(place, base, rows), list(METHODS), dict[str, Path]()
    for part in ("memory", "cache-of-tokens", "fuzzed"):
        (place / part).mkdir()

    def flip(number: int, draw: random.Random, tally: Tally) -> None:
        method = methods[::5][number % len(methods[::5])]
        if method not in cut:
            _, operations = arena.whole(method)
            folder, at = arena.fresh(), operations * 2 // 3
            arena.go_on(method, folder, lambda: killing_at(folder, at))
            cut[method] = folder
        flip_trial(arena, method, cut[method], draw, tally)

    return {
        "kills": lambda n, d, t: kill_trial(arena, methods[n % len(methods)], d, t),
        "flips": flip,
        "named": lambda n, d, t: named_trial(
            arena.whole(methods[::5][n % len(methods[::5])])[0], d, t
        ),
        "faults": lambda n, d, t: fault_trial(arena, methods[n % len(methods)], d, t),
        "memories": lambda n, d, t: memory_trial(place / "memory", d, t),
        "caches": lambda n, d, t: cache_trial(place / "cache-of-tokens", d, t),
        "messages": lambda n, d, t: wire_case(place / "fuzzed", d, t),
        "settings": lambda n, d, t: config_case(place / "fuzzed", d, t),
        "rows": lambda n, d, t: rows_case(place / "fuzzed", d, t),
        "bases": lambda n, d, t: base_case(base, place / "fuzzed", d, t),
    }


if __name__ == "__main__":
    sys.exit(main())
