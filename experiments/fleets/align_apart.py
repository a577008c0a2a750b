"""What alignment does to adapters that were trained apart, on their owners' test rows.

    python experiments/fleets/align_apart.py RUN... [--output FILE.json]

RUN are run folders of train_apart.py, of several seeds. Each fleet is aligned as `fedmira align`
does it: without rows (coupling 0.5), and by the validation rows of the run (coupling 1, each owner
keeps its own adapter unless its rows show a gain). Beside these stand coupling 1 without rows, and
two controls that share nothing of relatives: every moved adapter only made as short as the step
made it, and the same pulls towards adapters drawn at random.

Differences are aligned minus own on test rows, in nats a response token, a client's mean over the
seeds; their 95 % interval is a bootstrap over clients. Better and worse are clients with a mean
beyond 1 % of their own loss.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, quantiles

from fedmira.adapters import Adapter, folded, nearest, spare_directions, update_gram
from fedmira.fleet import AlignSettings, Fleet, OwnRows, align_fleet, decide, read_fleet
from fedmira.studies.saved import clients_of, reload_adapters

DRAWS = 4000
LIMIT = 0.01


def main() -> None:
    """Measures all runs and prints a table for each kind of run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    own: dict[str, list[float]] = defaultdict(list)
    for run in asked.runs:
        for way, losses in measure(run).items():
            for client, loss in losses.items():
                (own[client] if way == "own" else found[way][client]).append(loss)
    rows = [summary("own", own, own), *(summary(way, of, own) for way, of in found.items())]
    for control in ("only as short", "random relatives"):
        pair = f"without rows, minus {control}"
        rows.append(summary(pair, found["without rows"], found[control]))
    for row in rows:
        print(json.dumps(row))
    if asked.output:
        asked.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(run: Path) -> dict[str, dict[str, float]]:
    """Way -> client -> test loss."""
    fleet = read_fleet([run])
    clients = clients_of(reload_adapters(run))
    judging = OwnRows.of_clients(clients)
    tests = {name: client.test for name, client in clients.data.items()}
    testing = OwnRows(judging.kind, tests, judging.budget)
    before = {member.name: member.update for member in fleet.members}
    half, full = (align_fleet(fleet, AlignSettings(coupling)) for coupling in (0.5, 1.0))
    judged = decide(full, judging)
    taken = {n: u for n, u in full.updates().items() if judged.takes(n) == "aligned"}
    ways = {
        "without rows": half.updates(),
        "by rows": taken,
        "coupling 1, nobody asked": full.updates(),
        "only as short": shortened(fleet, half.updates()),
        "random relatives": strangers(fleet, half.moved),
    }
    own = {name: loss.per_token for name, loss in testing.losses(before).items()}
    told = {"own": own}
    for way, changed in ways.items():
        after = testing.losses(changed)
        told[way] = own | {name: loss.per_token for name, loss in after.items()}
        print(
            run.name, way, f"{len(changed)} changed", len(half.graph.edges()), "pairs", flush=True
        )
    return told


def shortened(fleet: Fleet, moved: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Each adapter times the share of its norm that the step left it."""
    result = {}
    for member in fleet.members:
        if member.name in moved:
            gram = update_gram([moved[member.name], member.update])
            share = float((gram[0, 0] / gram[1, 1]).sqrt())
            scales = {module: share * scale for module, scale in member.scales.items()}
            result[member.name] = folded(member.tensors, scales)
    return result


def strangers(fleet: Fleet, moved: Mapping) -> dict[str, Adapter]:
    """The same pulls towards adapters drawn at random, cut as in alignment."""
    draw = random.Random(0)
    updates = {member.name: member.update for member in fleet.members}
    result = {}
    for member in fleet.members:
        step = moved[member.name]
        if step.pull == 0:
            continue
        others = draw.sample([name for name in fleet.names if name != member.name], len(step.by))
        parts = [member.update, *(updates[name] for name in others)]
        weights = [1 - step.pull, *step.by.values()]
        spare = spare_directions(parts, member.ranks)
        mixed = nearest(parts, weights, member.ranks, member.scales, spare)
        result[member.name] = folded(mixed.adapter, member.scales)
    return result


def summary(way: str, losses: Mapping, own: Mapping) -> dict[str, object]:
    """Mean, paired difference with its interval, and who is better or worse."""
    means = {client: fmean(of) for client, of in losses.items()}
    base = {client: fmean(of) for client, of in own.items()}
    differences = [means[client] - base[client] for client in base]
    draw = random.Random(1)
    drawn = [fmean(draw.choices(differences, k=len(differences))) for _ in range(DRAWS)]
    low, high = quantiles(drawn, n=40)[0], quantiles(drawn, n=40)[-1]
    share = [means[client] / base[client] - 1 for client in base]
    return {
        "way": way,
        "clients": len(base),
        "seeds": max(len(of) for of in own.values()),
        "mean": round(fmean(means.values()), 4),
        "difference": round(fmean(differences), 4),
        "interval": [round(low, 4), round(high, 4)],
        "changed": sum(difference != 0 for difference in differences),
        "better": sum(each < -LIMIT for each in share),
        "worse": sum(each > LIMIT for each in share),
    }


if __name__ == "__main__":
    main()
