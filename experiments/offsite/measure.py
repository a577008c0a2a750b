"""What adapters that were trained on an emulator are worth on the emulator and on the base.

    python experiments/offsite/measure.py TASKS OUTPUT.jsonl [--seeds 0 1 2] [--rounds 4]
    python experiments/offsite/measure.py --summary OUTPUT.jsonl

The bundled base has 6 layers: its emulator keeps the ends and the first and last of the four
between (left = right = 1, drop = 0.5). `ends` is LoRA on the base in the same two layers, `full`
LoRA in all layers. A line of OUTPUT is a seed: mean test loss of each arm over clients.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import fedmira
from fedmira.studies.offsite import emulate, plug_run
from fedmira.studies.saved import reload_adapters

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % at n - 1 degrees
ORDER = ("base", "emulator", "emulator_tuned", "plugged", "ends", "full")


def main() -> None:
    """Measures, or summarises what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", type=Path, nargs="+")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    if asked.summary:
        summarise(lines_of(asked.places[0]))
        return
    tasks, output = asked.places
    done = {line["seed"] for line in lines_of(output)}
    for seed in asked.seeds:
        if seed in done:
            continue
        settings = {
            "data.source": "natural-instructions",
            "data.path": str(tasks.resolve()),
            "data.clients": asked.clients,
            "data.max_rows": 32,
            "data.test_rows": 24,
            "data.max_length": 160,
            "local.batch_size": 4,
            "rounds.count": asked.rounds,
            "evaluation.every": 0,
            "evaluation.rouge": False,
            "seed": seed,
        }
        losses = measure(settings)
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seed": seed, "losses": losses}) + "\n")
        print(seed, losses, flush=True)


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Arm -> mean test loss over clients."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        made = emulate("bundled", place / "emulator", left=1, right=1, drop=0.5)
        last = len(made.emulator.layers) - 1
        whole = [
            target.replace(f".layers.{last}.", f".layers.{made.emulator.layers[last]}.")
            for target in made.targets
        ]
        offsite = {"model.base": str(made.folder), "adapter.targets": list(made.targets)}
        fedmira.run(method="local", settings={**settings, **offsite}, output=place / "offsite")
        found = plug_run(reload_adapters(place / "offsite"), "bundled").means
        for arm, targets in (("ends", whole), ("full", [])):
            own = {**settings, **({"adapter.targets": targets} if targets else {})}
            result = fedmira.run(method="local", settings=own, output=place / arm)
            found[arm] = fmean(float(row.after_align_loss) for row in result.clients.itertuples())
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def summarise(lines: list[dict[str, Any]]) -> None:
    """Means over seeds, and each arm minus the one above it, paired by seed."""
    print("| | test loss | minus the line above |\n|---|---|---|")
    before = ""
    for arm in ORDER:
        cell = ""
        if before:
            gained = [line["losses"][arm] - line["losses"][before] for line in lines]
            mean = fmean(gained)
            half = STUDENT[len(gained)] * stdev(gained) / len(gained) ** 0.5
            cell = f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
        print(f"| {arm} | {fmean(line['losses'][arm] for line in lines):.3f} | {cell} |")
        before = arm


if __name__ == "__main__":
    main()
