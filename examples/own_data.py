"""Your own data from Python: four parties with a folder each, and an adapter for each of them.

    python examples/own_data.py [OUTPUT]

Writes a small federation (JSON Lines, one folder a party) into OUTPUT/data, runs MIRA on it with
the bundled base, and loads one of the adapters with plain PEFT. Takes about half a minute.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedmira
from fedmira.data.sources.demo import demo_tasks

PARTIES = ("clinic-north", "clinic-south", "clinic-east", "bank-app")


def write_parties(folder: Path) -> None:
    """One folder a party with train.jsonl and test.jsonl; the rows are those of the demo."""
    for task in demo_tasks():
        if task.name in PARTIES:
            (folder / task.name).mkdir(parents=True)
            for name, rows in (("train", task.examples), ("test", task.test or ())):
                lines = [
                    json.dumps(
                        {"instruction": row.instruction, "input": row.input, "output": row.output}
                    )
                    for row in rows
                ]
                (folder / task.name / f"{name}.jsonl").write_text(
                    "\n".join(lines) + "\n", encoding="utf-8"
                )


def main() -> None:
    """Run the example."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/departments")
    write_parties(output / "data")
    settings = {
        "data.source": "jsonl",
        "data.path": str(output / "data"),
        "rounds.count": 6,
        "evaluation.every": 0,
        "evaluation.rouge": False,
    }
    result = fedmira.run(settings, output=output / "run")
    for row in result.clients.to_dict("records"):
        print(
            f"{row['client']}: {row['base_loss']:.2f} before training, "
            f"{row['after_align_loss']:.2f} with its own adapter"
        )
    folder = result.folder / "adapters" / PARTIES[0]
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    model = PeftModel.from_pretrained(base, str(folder))
    print(
        f"{folder} loads with plain PEFT: "
        f"{sum(p.numel() for n, p in model.named_parameters() if 'lora' in n):,} adapter "
        "parameters"
    )


if __name__ == "__main__":
    main()
