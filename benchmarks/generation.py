"""Times evaluation by generation, fedmira beside one resident PEFT model, in turn.

8 clients x 16 prompts x 32 new tokens, equal texts.

python benchmarks/generation.py --output benchmarks/results/generation.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import provenance
from processes import run_script
from workload import MODELS, WORKLOADS, make_workload

HERE = Path(__file__).resolve().parent
TOOLS = ("resident_peft", "fedmira")


def measure(
    workload: Path, outputs: Path, repeats: int, passes: int, threads: int
) -> dict[str, Any]:
    """Figures of both tools; the first pass of each process is a warm-up.

    So is the first repeat, which measures memory.
    """
    script = {"resident_peft": "resident_peft_generation.py", "fedmira": "fedmira_generation.py"}
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    memory = {}
    # On first use of a base fedmira tries out a token budget, by training steps, and keeps it: that
    # is no part of generation.
    trial = [str(workload), str(outputs / "first use"), "--rounds", "1", "--threads", str(threads)]
    first_use = run_script(
        HERE / "tools" / script["fedmira"],
        trial,
        outputs / "first use",
        threads,
        sample_memory=True,
    )
    for repeat in range(repeats + 1):
        for tool in TOOLS:
            arguments = [
                str(workload),
                str(outputs / tool),
                "--rounds",
                str(passes),
                "--threads",
                str(threads),
            ]
            result = run_script(
                HERE / "tools" / script[tool],
                arguments,
                outputs / tool,
                threads,
                sample_memory=repeat == 0,
            )
            if repeat:
                runs[tool].append(result)
            else:
                memory[tool] = result["peak_memory_bytes"]
            print(
                f"  {repeat}/{repeats} {tool}: "
                f"{' '.join(f'{seconds:.2f}' for seconds in result['seconds_per_round'])} "
                "s a pass",
                flush=True,
            )
    seconds = {
        tool: [statistics.mean(run["seconds_per_round"][1:]) for run in runs[tool]]
        for tool in TOOLS
    }
    texts = {
        tool: [text for client in runs[tool][-1]["texts"] for text in client] for tool in TOOLS
    }
    ratios = [
        own / other for own, other in zip(seconds["fedmira"], seconds["resident_peft"], strict=True)
    ]
    timed = {
        tool: [spent for run in runs[tool] for spent in run["seconds_per_round"][1:]]
        for tool in TOOLS
    }
    return {
        "prompts": runs["fedmira"][-1]["prompts"],
        "new_tokens": runs["fedmira"][-1]["new_tokens"],
        "first_use_peak_memory_bytes": first_use["peak_memory_bytes"],
        "equal_texts": sum(
            own == other
            for own, other in zip(texts["fedmira"], texts["resident_peft"], strict=True)
        ),
        "ratio_to_resident_peft": {
            "median": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        },
        "ratio_of_every_pass": [
            own / other for own, other in zip(timed["fedmira"], timed["resident_peft"], strict=True)
        ],
        "tools": {
            tool: {
                "seconds": {
                    "median": statistics.median(seconds[tool]),
                    "spread": [min(seconds[tool]), max(seconds[tool])],
                },
                "peak_memory_bytes": memory[tool],
                "new_tokens_per_second": runs[tool][-1]["new_tokens"]
                / statistics.median(seconds[tool]),
            }
            for tool in TOOLS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="shared")
    parser.add_argument("--model", choices=MODELS, default="3m")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument(
        "--repeats", type=int, help="timed processes of each tool (small: 1, full: 5)"
    )
    parser.add_argument(
        "--passes", type=int, default=3, help="of each process; the first is a warm-up"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "generation.json")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (5 if arguments.size == "full" else 1)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        place = Path(scratch)
        make_workload(place / "workload", arguments.workload, arguments.model, rounds=1)
        figures = measure(
            place / "workload",
            place / "out",
            arguments.repeats,
            arguments.passes,
            arguments.threads,
        )
    chosen = {
        key: getattr(arguments, key)
        for key in ("workload", "model", "repeats", "passes", "threads")
    }
    report = {
        **provenance(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": chosen,
        **figures,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    ratio = figures["ratio_to_resident_peft"]["median"]
    print(
        f"fedmira takes {ratio:.2f} of the time of one resident PEFT model; equal texts: "
        f"{figures['equal_texts']} of {figures['prompts']}"
    )
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
