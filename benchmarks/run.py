"""Times fedmira beside the tools that people use, and writes one JSON file.

All do the same work, in turn.

    python benchmarks/run.py --size full --output benchmarks/results/full.json
    python benchmarks/run.py --tools resident_peft,fedmira_cohort --workload shared --model 3m
    --repeats 3 --output /tmp/quick.json

Every tool runs in a process of its own. A first pass, whose times are thrown away, warms the disk
cache and measures memory; then come the timed passes, each of them all tools one after another. The
first round of a process counts as start-up only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import provenance
from processes import Failed, run_script
from workload import MODELS, WORKLOADS, make_workload

__all__ = ["TOOLS", "main"]

HERE = Path(__file__).resolve().parent
REFERENCE = "resident_peft"

TOOLS: dict[str, tuple[str, tuple[str, ...]]] = {
    # script: what it is, and the modules without which it cannot run
    "resident_peft": ("one resident PEFT model, adapters copied by hand", ()),
    "fedmira_cohort": ("fedmira", ()),
    "trainer_per_client": ("transformers.Trainer per client", ("accelerate",)),
    "trl_per_client": ("TRL SFTTrainer per client", ("trl", "accelerate")),
    "reload_per_client": ("base reloaded per client", ()),
    "flower_cached": ("Flower simulation, model cached in the actor", ("flwr", "ray")),
    "flower_reload": ("Flower simulation, model loaded per client", ("flwr", "ray")),
    "flowertune": (
        "Flower simulation as FlowerTune: model and SFTTrainer per client",
        ("flwr", "ray", "trl"),
    ),
    "pfl_research": ("pfl-research simulation", ("pfl",)),
}

CASES = {
    "small": [("shared", "3m", "float32")],
    "full": [
        ("shared", "3m", "float32"),
        ("dolly", "3m", "float32"),
        ("ragged", "3m", "float32"),
        ("shared", "25m", "float32"),
        ("shared", "25m", "bfloat16"),
    ],
}


@dataclass(frozen=True)
class Case:
    """A workload folder and how the tools run on it.

    Tool (a) computes in `reference_dtype`, or like the others.
    """

    folder: Path
    outputs: Path
    rounds: int
    threads: int
    dtype: str
    reference_dtype: str = ""

    def run(self, tool: str, sample_memory: bool = False, rounds: int = 0) -> dict[str, Any]:
        script = HERE / "floor.py" if tool == "floor" else HERE / "tools" / f"{tool}.py"
        dtype = self.reference_dtype or self.dtype if tool == REFERENCE else self.dtype
        options = [
            "--rounds",
            str(rounds or self.rounds),
            "--threads",
            str(self.threads),
            "--dtype",
            dtype,
        ]
        out = self.outputs / tool
        return run_script(
            script, [str(self.folder), str(out), *options], out, self.threads, sample_memory
        )

    def first_use(self, tools: Sequence[str]) -> dict[str, float]:
        """fedmira finds out its token budget on first use of a base and keeps it.

        Time that apart from all later runs.
        """
        if "fedmira_cohort" not in tools:
            return {}
        try:
            return {
                "first_use_until_first_round_seconds": self.run("fedmira_cohort", rounds=1)[
                    "until_first_round_seconds"
                ]
            }
        except Failed:
            return {}  # the passes that follow say why


def measure(case: Case, tools: Sequence[str], repeats: int) -> dict[str, Any]:
    """Run all tools in turn; figures of each, with a reason for those that are not available."""
    missing = {tool: _missing(tool) for tool in tools if _missing(tool)}
    running = [tool for tool in tools if tool not in missing]
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in ("floor", *running)}
    memory: dict[str, dict[str, Any]] = {}
    first_use = case.first_use(running)
    for repeat in range(repeats + 1):
        for tool in [tool for tool in runs if tool not in missing]:
            try:
                result = case.run(tool, sample_memory=repeat == 0)
            except Failed as error:
                missing[tool] = str(error)
                print(f"  {tool}: not available: {error}", flush=True)
                continue
            if repeat:
                runs[tool].append(result)
            else:
                memory[tool] = {key: result.get(key) for key in ("peak_memory_bytes", "processes")}
            print(f"  {repeat}/{repeats} {tool}: {_progress(result)}", flush=True)
    floors = _floors(runs["floor"]) if runs["floor"] else {}
    of_reference = runs.get(REFERENCE, [])
    reference = _seconds(of_reference)
    figures: dict[str, Any] = {}
    for tool in tools:
        title = {"title": TOOLS[tool][0], "available": tool not in missing}
        if tool in missing:
            figures[tool] = {**title, "reason": missing[tool]}
        elif runs[tool]:
            summary = _summary(runs[tool], reference, floors)
            losses = _loss_difference(runs[tool], of_reference)
            figures[tool] = {
                **title,
                **summary,
                **memory[tool],
                **losses,
                **_difference(case, tool),
            }
    return {"floor": floors, **first_use, "tools": figures}


def _summary(
    runs: Sequence[dict[str, Any]], reference: Sequence[float], floors: dict[str, Any]
) -> dict[str, Any]:
    """Medians over the repeats; a spread is [least, most]."""
    seconds = _seconds(runs)
    last = runs[-1]
    ratios = [own / other for own, other in zip(seconds, reference, strict=False)]
    return {
        "seconds_per_round": _middle(seconds),
        "steps_per_second": statistics.mean(last["steps_per_round"][1:])
        / statistics.median(seconds),
        "response_tokens_per_second": statistics.mean(last["response_tokens_per_round"][1:])
        / statistics.median(seconds),
        "tokens_per_second": statistics.mean(last["tokens_per_round"][1:])
        / statistics.median(seconds),
        **{
            name: _middle([run[name] for run in runs])
            for name in ("import_seconds", "load_seconds", "until_first_round_seconds")
            if name in last
        },
        "ratio_to_resident_peft": _middle(ratios) if ratios else None,
        "ratio_to_floor": {
            name: statistics.median(seconds) / floors["seconds_per_round"][name]
            for name in floors.get("seconds_per_round", {})
        },
        "losses": last.get("losses"),
        "all_seconds": [run["seconds_per_round"] for run in runs],
    }


def _floors(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rate = _middle([run["operations_per_second"] for run in runs])
    rounds = runs[-1]["operations_per_round"][1:]
    per_round = {name: statistics.mean(each[name] for each in rounds) for name in rounds[0]}
    return {
        "operations_per_second": rate,
        "operations_per_round": per_round,
        "seconds_per_round": {
            name: operations / rate["median"] for name, operations in per_round.items()
        },
    }


def _seconds(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Of each repeat the mean round, without the first one."""
    return [statistics.mean(run["seconds_per_round"][1:]) for run in runs]


def _middle(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "spread": [min(values), max(values)]}


def _loss_difference(
    runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The largest difference of a round's training loss, as a share of the reference's."""
    own, other = (each[-1].get("losses") if each else None for each in (runs, reference))
    if not own or not other:
        return {}
    return {
        "largest_loss_difference": max(
            abs(left - right) / abs(right) for left, right in zip(own, other, strict=True)
        )
    }


def _difference(case: Case, tool: str) -> dict[str, Any]:
    """How far the tool's final adapter is from the reference's.

    The largest entry, and the norm beside the norm of the update.
    """
    from safetensors.torch import load_file

    paths = [case.outputs / name / "adapter.safetensors" for name in (tool, REFERENCE)]
    if not all(path.is_file() for path in paths):
        return {}
    own, other = map(load_file, paths)
    start = load_file(case.folder / "start.safetensors")
    # Rounding apart, equal work gives equal adapters; AdamW turns a gradient entry near zero into a
    # full step either way.
    squares = [float((left - right).double().square().sum()) for left, right in _pairs(own, other)]
    update = [float((left - right).double().square().sum()) for left, right in _pairs(other, start)]
    return {
        "largest_adapter_difference": max(
            float((left - right).abs().max()) for left, right in _pairs(own, other)
        ),
        "adapter_difference_by_update": (sum(squares) / sum(update)) ** 0.5,
    }


def _pairs(left: dict[str, Any], right: dict[str, Any]) -> Iterable[tuple[Any, Any]]:
    if left.keys() != right.keys():
        raise SystemExit(
            f"adapters hold different tensors: {sorted(left.keys() ^ right.keys())[:4]}"
        )
    return [(left[name], right[name]) for name in left]


def _missing(tool: str) -> str:
    absent = [module for module in TOOLS[tool][1] if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _progress(result: dict[str, Any]) -> str:
    if "seconds_per_round" not in result:
        return f"{result['operations_per_second'] / 1e9:.1f} GFLOP/s"
    return " ".join(f"{seconds:.2f}" for seconds in result["seconds_per_round"]) + " s a round"


def _table(figures: dict[str, Any]) -> str:
    lines = []
    for tool, row in figures["tools"].items():
        if not row["available"]:
            lines.append(f"  {tool:20} not available: {row['reason']}")
            continue
        ratio = (
            row["ratio_to_resident_peft"]["median"]
            if row["ratio_to_resident_peft"]
            else float("nan")
        )
        floors = " ".join(f"{name} {value:.2f}" for name, value in row["ratio_to_floor"].items())
        lines.append(
            f"  {tool:20} {row['seconds_per_round']['median']:7.2f} s a round, "
            f"{ratio:5.2f} of {REFERENCE}, x floor: {floors}, "
            f"{(row['peak_memory_bytes'] or 0) / 2**20:6.0f} MiB, first round after "
            f"{row['until_first_round_seconds']['median']:.1f} s, "
            f"largest difference {row.get('largest_adapter_difference', float('nan')):.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=CASES, default="small")
    parser.add_argument("--repeats", type=int, help="timed passes (small: 1, full: 5)")
    parser.add_argument(
        "--rounds", type=int, help="of each process; the first is start-up (small: 2, full: 3)"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "run.json")
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--workload", choices=WORKLOADS, help="this one only")
    parser.add_argument("--model", choices=MODELS, help="this one only")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="this one only")
    parser.add_argument(
        "--reference-dtype",
        choices=("float32", "bfloat16"),
        default="",
        help="of tool (a); the default is that of all",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clients", type=int, default=8, help="of a round; fewer where a pass would take too long"
    )
    parser.add_argument("--steps", type=int, default=5, help="of each client in a round")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for workloads, logs and adapters; the default is thrown away",
    )
    arguments = parser.parse_args()
    tools = arguments.tools.split(",")
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        parser.error(f"--tools: there is no {', '.join(unknown)}; choose from {', '.join(TOOLS)}")
    full = arguments.size == "full"
    repeats, rounds = (
        arguments.repeats or (5 if full else 1),
        arguments.rounds or (3 if full else 2),
    )
    if rounds < 2:
        parser.error("--rounds: at least 2, since the first is start-up")
    cases = CASES[arguments.size]
    if arguments.workload or arguments.model or arguments.dtype:
        cases = [
            (arguments.workload or "shared", arguments.model or "3m", arguments.dtype or "float32")
        ]
    settings = {
        "size": arguments.size,
        "repeats": repeats,
        "rounds": rounds,
        "threads": arguments.threads,
        "clients": arguments.clients,
    }
    settings |= {"steps": arguments.steps, "reference_dtype": arguments.reference_dtype}
    report: dict[str, Any] = {
        **provenance(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "cases": [],
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        for workload, model, dtype in cases:
            place = (arguments.keep or Path(scratch)) / f"{workload}-{model}-{dtype}"
            print(f"{workload} rows, {model} base, {dtype}", flush=True)
            make_workload(
                place / "workload",
                workload,
                model,
                rounds,
                arguments.clients,
                steps=arguments.steps,
            )
            case = Case(
                place / "workload",
                place / "out",
                rounds,
                arguments.threads,
                dtype,
                arguments.reference_dtype,
            )
            figures = measure(case, tools, repeats)
            report["cases"].append(
                {"workload": workload, "model": model, "dtype": dtype, **figures}
            )
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(_table(figures), flush=True)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
