"""A simulation of Flower's with real Ray processes.

Each actor loads the base once, and the adapters are those of one process.
"""

from __future__ import annotations

import pytest

pytest.importorskip(
    "flwr", reason="Flower is not installed; pip install 'fedmira[flower-simulation]'"
)
pytest.importorskip("ray", reason="Ray is not installed; pip install 'fedmira[flower-simulation]'")

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedmira.config import dump_config
from fedmira.experiment import build_experiment, run_experiment
from flower_processes import Federation, wait_until
from small import CLIENTS, adapter_bytes, events_of, local_of, make_config, with_clients

ACTORS = 2


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    ray = tempfile.mkdtemp(
        prefix="fedmira-ray-"
    )  # Ray's sockets are in it, whose paths may have 107 letters
    variables = {"RAY_TMPDIR": ray, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    processes = Federation(tmp_path / "flower", secure=False, variables=variables)
    try:
        yield processes
    finally:
        processes.close()
        wait_until(lambda: not processes.running(), "the end of all processes", 30)
        shutil.rmtree(ray)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_five_clients_on_two_actors_end_with_the_adapters_of_the_run_in_one_process(
    federation: Federation,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
    one_thread: None,
) -> None:
    """Clients keep moments from round to round, and any actor may be given any client."""
    settings = {
        "algorithm.space": "factor",
        "local.optimizer_state": "kept",
        "federation.wait_s": 300,
        "federation.reply_s": 120,
    }
    config = make_config(base_folder, clients_folder, settings)
    (tmp_path / "run.toml").write_text(dump_config(config), encoding="utf-8")
    app, output = tmp_path / "app", tmp_path / "run"
    federation.call(
        "fedmira",
        "flower",
        "init",
        app,
        "--config",
        tmp_path / "run.toml",
        "--output",
        output,
        "--simulation",
    )
    federation.start_superlink("--simulation")
    sizes = f"num-supernodes={len(CLIENTS)} client-resources-num-cpus=1 init-args-num-cpus={ACTORS}"
    run = federation.start_run(app, "run", "--federation-config", sizes)
    wait_until(lambda: run.poll() is not None, "the run", 400)

    log = federation.log("run")
    assert (output / "report.html").is_file(), log
    assert events_of(output, "failure") == []
    assert [event["round"] for event in events_of(output, "round")] == [1, 2, 3]
    loads = re.findall(r"process (\d+) holds the base and the data now", log)
    assert len(loads) == len(set(loads)) == ACTORS, (
        f"each actor loads once, and no message does again: {log}"
    )
    experiment = build_experiment(config)
    run_experiment(
        with_clients(experiment, local_of(experiment, 1)),
        tmp_path / "together",
    )
    apart, together = (
        {
            name: content
            for name, content in adapter_bytes(folder).items()
            if name.endswith(".safetensors")
        }
        for folder in (output, tmp_path / "together")
    )
    assert len(apart) == len(CLIENTS) and apart == together
