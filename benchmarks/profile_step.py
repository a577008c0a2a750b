"""Where the time of a round goes.

Torch's profiler on fedmira's training, its operators summed up by what they are for.

    python benchmarks/profile_step.py --workload shared --model 3m --output
    benchmarks/results/profile.json

An operator is placed by its name and the shapes it works on: a matrix product with a side of LoRA's
rank belongs to the factors, an update of the matrix of all adapters to the optimizer. What no name
tells is "rest": autograd's own work and Python functions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import provenance
from workload import MODELS, WORKLOADS, make_workload

HERE = Path(__file__).resolve().parent
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::linear",
    "aten::matmul",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::einsum",
)
VIEWS = (
    "slice",
    "transpose",
    "as_strided",
    "view",
    "t",
    "select",
    "reshape",
    "expand",
    "unsqueeze",
    "detach",
    "narrow",
    "split",
    "permute",
)
GROUPS = (
    "matmul",
    "attention",
    "lora",
    "elementwise and norm",
    "loss",
    "optimizer",
    "copies",
    "views",
    "rest",
)


def group_of(name: str, shapes: list[list[int]], rank: int, width: int, vocabulary: int) -> str:
    """The group of one operator.

    Args:
        width: entries of an adapter, the second side of the matrix of all adapters.
    """
    sides = [
        side
        for shape in shapes
        if isinstance(shape, list)
        for side in shape
        if isinstance(side, int)
    ]
    if name.removeprefix("aten::") in VIEWS:
        return "views"
    if width in sides:
        return "optimizer"
    if "scaled_dot_product" in name or "attention" in name.lower():
        return "attention"
    if name in PRODUCTS:
        return "lora" if rank in sides else "attention" if "bmm" in name else "matmul"
    if (
        "nll_loss" in name
        or "log_softmax" in name
        or "cross_entropy" in name
        or "logsumexp" in name
        or vocabulary in sides[-1:]
    ):
        return "loss"
    if "softmax" in name:
        return "attention"
    if name in (
        "aten::copy_",
        "aten::cat",
        "aten::clone",
        "aten::index",
        "aten::index_select",
        "aten::embedding",
        "aten::gather",
    ):
        return "copies"
    if name.removeprefix("aten::").rstrip("_") in (
        *(
            "mul",
            "add",
            "sub",
            "div",
            "neg",
            "pow",
            "mean",
            "rsqrt",
            "silu",
            "silu_backward",
            "sum",
            "sigmoid",
            "exp",
            "fill",
            "zero",
        ),
        *(
            "cos",
            "sin",
            "rms_norm",
            "native_layer_norm",
            "to",
            "where",
            "maximum",
            "lerp",
            "addcmul",
            "sqrt",
        ),
    ):
        return "elementwise and norm"
    return "rest"


def profile(workload: Path, threads: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Shares of the operators' own time, by group, with the heaviest operators of each."""
    sys.path.insert(0, str(HERE / "tools"))
    import torch
    from fedmira_cohort import load
    from workbench import read_work

    torch.set_num_threads(threads)
    work = read_work(workload)
    train_round = load(work, argparse.Namespace(dtype=dtype))
    adapter = work.start()
    adapter, _ = train_round(adapter, work.rounds[0])
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profiler:
        for parts in work.rounds[1:rounds]:
            adapter, _ = train_round(adapter, parts)
    width = sum(tensor.numel() for tensor in adapter.values())
    seconds = dict.fromkeys(GROUPS, 0.0)
    operators: dict[str, dict[str, float]] = {group: {} for group in GROUPS}
    for event in profiler.key_averages(group_by_input_shape=True):
        group = group_of(event.key, event.input_shapes, work.settings["rank"], width, 4096)
        own = event.self_cpu_time_total / 1e6
        seconds[group] += own
        operators[group][event.key] = operators[group].get(event.key, 0.0) + own
    total = sum(seconds.values())
    heaviest = {
        group: sorted(found.items(), key=lambda item: -item[1])[:6]
        for group, found in operators.items()
    }
    return {
        "seconds": total,
        "shares": {group: own / total for group, own in seconds.items()},
        "heaviest_operators": {
            group: {name: own / total for name, own in found} for group, found in heaviest.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="shared")
    parser.add_argument("--model", choices=MODELS, default="3m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="the first is not profiled")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "profile.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        make_workload(Path(scratch), arguments.workload, arguments.model, arguments.rounds)
        figures = profile(Path(scratch), arguments.threads, arguments.rounds, arguments.dtype)
    chosen = {
        key: getattr(arguments, key) for key in ("workload", "model", "dtype", "rounds", "threads")
    }
    report = {
        **provenance(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": chosen,
        **figures,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for group, share in sorted(figures["shares"].items(), key=lambda item: -item[1]):
        print(f"  {group:22} {share:6.1%}")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
