"""Flower's simulation on the Ray backend with its own FedAvg, for all Flower tools.

As many actors as threads, one thread each.
"""

from __future__ import annotations

import os
import time

from workbench import parse_arguments, read_work, write_result

__all__ = ["simulate"]


def simulate(cached: bool, trainer: str = "plain") -> None:
    """Run the workload and write the result.

    Args:
        cached: whether the model stays in the actor from one client to the next, or is loaded for
            each.
        trainer: "plain", the loop of tool (a), or "trl", TRL's SFTTrainer.
    """
    os.environ.update(
        FLWR_TELEMETRY_ENABLED="0",
        RAY_USAGE_STATS_ENABLED="0",
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
    )
    arguments = parse_arguments()
    begin = time.perf_counter()
    from flower_client import app as client_app
    from flwr.app import ArrayRecord, ConfigRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    imported = time.perf_counter()
    work = read_work(arguments.workload)
    clients = len(work.names)
    config = {
        "workload": str(arguments.workload.resolve()),
        "dtype": arguments.dtype,
        "cached": cached,
        "trainer": trainer,
    }
    ends: list[float] = []
    final: list[ArrayRecord] = []
    losses: list[float] = []
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        def note_time(_: int, arrays: ArrayRecord) -> None:
            ends.append(time.perf_counter())

        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        arrays = ArrayRecord(work.start())
        result = strategy.start(
            grid, arrays, arguments.rounds, train_config=ConfigRecord(config), evaluate_fn=note_time
        )
        final.append(result.arrays)
        losses.extend(
            float(record["loss"]) for _, record in sorted(result.train_metrics_clientapp.items())
        )

    backend = {
        "init_args": {"num_cpus": arguments.threads},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server_app, client_app, num_supernodes=clients, backend_config=backend)
    startup = {"import_seconds": imported - begin, "load_seconds": ends[0] - imported}
    write_result(
        arguments, work, final[0].to_torch_state_dict(), ends, {**startup, "losses": losses}
    )
