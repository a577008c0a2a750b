"""Run folders built in code.

Families of related clients whose losses fall, overfit and are pulled together.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

FAMILIES = (
    "triage",
    "desks",
    "shelves",
    "dates",
    "sentence slots",
    "arithmetic",
    "code-words",
    "reviews",
    "units",
)
ADAPTER_BYTES = 4 * 43_008
ROUNDS = 20

Row = dict[str, Any]


class RunFolder:
    """Writes a run folder whose numbers come from a seeded formula.

    So a test can read every number back from the attributes.

    Args:
        folder: where to write.
        clients: how many.
        algorithm: "mira", "local", "fedavg", ...; local moves nothing and has no graph.
        names: client ids, in place of made-up ones.
    """

    def __init__(
        self, folder: Path, clients: int = 12, algorithm: str = "mira", names: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.algorithm = algorithm
        self.random = random.Random(f"{clients}")  # the same clients for every algorithm
        self.families = FAMILIES[: max(1, min(len(FAMILIES), clients // 4))]
        self.client_rows = [
            self._client(index, names[index] if names else "") for index in range(clients)
        ]
        self.names = [row["client"] for row in self.client_rows]
        self.events: list[Row] = []
        self.round_rows = [self._round(number) for number in range(1, ROUNDS + 1)]
        self.status, self.error = "finished", None
        self.validation_rows: list[Row] = []
        self.trained_parameters: int | None = 43_008
        self.more_settings = ""

    def _client(self, index: int, name: str) -> Row:
        family = self.families[index % len(self.families)]
        rows = (16, 32, 64, 128)[index % 4]
        base = 3.4 + 1.6 * self.random.random()
        alone = 1.2 + 0.8 * self.random.random() + 16 / rows
        shift = {"local": 0.0, "fedavg": self.random.uniform(-0.25, 0.6)}.get(
            self.algorithm, self.random.uniform(-0.35, 0.08) * 32 / rows
        )
        after = alone * (1 + shift)
        test_tokens = 32 * self.random.randint(3, 20)
        return {
            "client": name or f"{family.replace(' ', '-')}-{index // len(self.families) + 1}",
            "task": f"{family} task {index + 1}",
            "category": family,
            "rank": 16,
            "train_rows": rows,
            "test_rows": 32,
            "test_tokens": test_tokens,
            "rounds_trained": ROUNDS,
            "base_loss": base,
            "before_align_loss": alone,
            "after_align_loss": after,
            "best_round": 15,
            "best_validation_loss": after * 1.01,
            "best_test_loss": after * 0.98,
            "rouge_l": max(0.0, 1.1 - after / 3),
            "rouge_l_package": max(0.0, 1.05 - after / 3),
            "exact_match": max(0.0, 0.8 - after / 3),
        }

    def test_loss(self, row: Row, number: int) -> float:
        """Falls from the base loss to the loss after alignment."""
        return row["after_align_loss"] + (row["base_loss"] - row["after_align_loss"]) * math.exp(
            -number / 3
        ) * (number < ROUNDS)

    def _round(self, number: int) -> Row:
        travelled = 0 if self.algorithm == "local" else ADAPTER_BYTES
        for row in self.client_rows:
            client, test = row["client"], self.test_loss(row, number)
            event = {
                "event": "train",
                "round": number,
                "client": client,
                "loss": test * (1 - 0.03 * min(number, 16)),
                "steps": 7,
                "response_tokens": 310,
            }
            self.events.append(
                event | {"tokens": 2100, "rows": 16, "bytes_up": travelled, "bytes_down": travelled}
            )
            if self.algorithm == "mira":
                pull = {
                    "pull": 0.5,
                    "relative_pull": 0.3 * math.exp(-number / 15) * 64 / (64 + row["train_rows"]),
                    "degree": 0.8,
                }
                self.events.append({"event": "align", "round": number, "client": client} | pull)
            if number % 5 == 0 or number == 1:
                at = 0 if number == 1 else number
                losses = {
                    "test_loss": row["base_loss"] if at == 0 else test,
                    "validation_loss": None,
                    "test_tokens": row["test_tokens"],
                }
                self.events.append({"event": "evaluate", "round": at, "client": client} | losses)
        trained = [
            event["loss"]
            for event in self.events
            if event["event"] == "train" and event["round"] == number
        ]
        tested = [self.test_loss(row, number) for row in self.client_rows]
        self.events.append(
            {
                "event": "round",
                "round": number,
                "replies": len(self.names),
                "failures": 0,
                "guarded": 0.0,
            }
        )
        aligned = self.algorithm == "mira"
        return {
            "round": number,
            "clients": len(self.names),
            "train_loss": sum(trained) / len(trained),
            "train_loss_weighted": sum(trained) / len(trained),
            "test_loss": sum(tested) / len(tested) if number % 5 == 0 else "",
            "test_loss_weighted": sum(tested) / len(tested) if number % 5 == 0 else "",
            "disagreement_before": 40 * math.exp(-number / 9) if aligned else "",
            "disagreement_after": 28 * math.exp(-number / 9) if aligned else "",
            "pull": 0.2 * math.exp(-number / 15) if aligned else "",
            "train_seconds": 3.1,
            "evaluate_seconds": 1.4 if number % 5 == 0 else "",
            "tokens_per_second": 5120.4,
            "bytes_up": travelled * len(self.names),
            "bytes_down": travelled * len(self.names),
        }

    def graph(self) -> Row:
        """Members of a family are joined strongly, a few others weakly."""
        draw = random.Random(1)
        edges = []
        for first, one in enumerate(self.client_rows):
            for other in self.client_rows[first + 1 :]:
                same = one["category"] == other["category"]
                if same or draw.random() < 0.06:
                    weight = draw.uniform(0.3, 1.0) if same else draw.uniform(0.02, 0.12)
                    edges.append(
                        {"source": one["client"], "target": other["client"], "weight": weight}
                    )
        return {"kind": "similarity", "clients": self.names, "edges": edges}

    def statistics(self, column: str) -> Row:
        """Mean, weighted mean, worst tenth and spread of a column of the clients."""
        values = [row[column] for row in self.client_rows]
        mean = sum(values) / len(values)
        tokens = sum(row["test_tokens"] for row in self.client_rows)
        worst = sorted(values, reverse=column.endswith("_loss"))[: math.ceil(len(values) / 10)]
        return {
            "mean": mean,
            "weighted_mean": sum(row[column] * row["test_tokens"] for row in self.client_rows)
            / tokens,
            "worst_tenth": sum(worst) / len(worst),
            "spread": math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)),
        }

    def fail_early(self, reason: str) -> None:
        """Turns it into a run that stopped in round 2: no metrics, no summary."""
        self.status, self.error = "failed", reason
        self.events = [event for event in self.events if event["round"] < 2]
        self.client_rows, self.round_rows = [], []

    def provenance(self) -> Row:
        """run.json."""
        figures = (
            "base_loss",
            "before_align_loss",
            "after_align_loss",
            "rouge_l",
            "rouge_l_package",
            "exact_match",
        )
        summary = {name: self.statistics(name) for name in figures} if self.client_rows else {}
        return {
            "status": self.status,
            "error": self.error,
            "versions": {
                "fedmira": "0.1.0",
                "python": "3.12.3",
                "torch": "2.13.0",
                "transformers": "5.23.0",
                "peft": "0.21.0",
            },
            "seed": 0,
            "base": {"name": "bundled", "sha256": "ab" * 32, "parameters": 3_145_728},
            "data": {"sha256": "ef" * 32},
            "machine": {"cpu": "a processor", "cores": 2, "platform": "Linux"},
            "started": "2026-11-20T10:44:00+00:00",
            "wall_seconds": 192.5,
            "rounds_done": len(self.round_rows),
            "clients": len(self.names),
        } | ({"summary": summary} if summary else {})

    def write(self) -> Path:
        """Writes all files that such a run has, and returns the folder."""
        (self.folder / "metrics").mkdir(parents=True)
        settings = f'seed = 0\n\n[algorithm]\nname = "{self.algorithm}"\n\n[local]\nsteps = 7\n'
        settings += f"batch_size = 8\n{self.more_settings}"
        (self.folder / "config.toml").write_text(settings, encoding="utf-8")
        (self.folder / "run.json").write_text(json.dumps(self.provenance()), encoding="utf-8")
        lines = "".join(json.dumps(event) + "\n" for event in self.events)
        (self.folder / "events.jsonl").write_text(lines, encoding="utf-8")
        for name, rows in (
            ("clients", self.client_rows),
            ("rounds", self.round_rows),
            ("validation", self.validation_rows),
        ):
            if rows:
                with (self.folder / "metrics" / f"{name}.csv").open(
                    "w", encoding="utf-8", newline=""
                ) as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
        if self.algorithm == "mira" and self.client_rows:
            (self.folder / "graph.json").write_text(json.dumps(self.graph()), encoding="utf-8")
        if self.client_rows:
            (self.folder / "adapters").mkdir()
            index = {
                row["client"]: {
                    "category": row["category"],
                    "rank": row["rank"],
                    "parameters": 43_008,
                    "sha256": "cd" * 32,
                }
                | (
                    {}
                    if self.trained_parameters is None
                    else {"trained_parameters": self.trained_parameters}
                )
                for row in self.client_rows
            }
            (self.folder / "adapters" / "index.json").write_text(
                json.dumps(index), encoding="utf-8"
            )
        return self.folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., RunFolder]:
    """Makes run folders below the test's own folder: `run_folder("name", clients=21).write()`."""

    def make(
        name: str = "run", clients: int = 12, algorithm: str = "mira", names: Sequence[str] = ()
    ) -> RunFolder:
        return RunFolder(tmp_path / name, clients, algorithm, names)

    return make
