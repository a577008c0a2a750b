"""fedmira: one process trains the whole cohort side by side on one resident base."""

from __future__ import annotations

import argparse

from workbench import Adapter, ClientRound, TrainRound, Work, run


def load(work: Work, arguments: argparse.Namespace) -> TrainRound:
    from fedmira.clients import CohortSettings, LocalClients
    from fedmira.config import LocalSettings, ModelSettings
    from fedmira.data import ClientData, EncodedExample
    from fedmira.messages import Reply, Request
    from fedmira.methods import FedAvg, ServerState
    from fedmira.model import LoraKind, find_targets, load_base
    from fedmira.model.training.batches import batch_indices

    settings = work.settings
    local = LocalSettings.model_validate(
        {key: settings[key] for key in LocalSettings.model_fields if key in settings}
    )
    clients = {}
    for name, rows in zip(work.names, work.rows, strict=True):
        train = tuple(EncodedExample(tuple(prompt), tuple(response)) for prompt, response in rows)
        clients[name] = ClientData(name, name, "", train, (), (), ())
    for part in (part for parts in work.rounds for part in parts):
        if list(batch_indices(len(work.rows[part.client]), local, part.seed)) != part.batches:
            raise SystemExit(
                "the workload's batches are not those that fedmira draws now; make the "
                "workload again"
            )

    base = load_base(ModelSettings(base=work.base, dtype=arguments.dtype, device="cpu"))
    scales = dict.fromkeys(clients, settings["alpha"] / settings["rank"])
    algorithm = FedAvg()
    kind = LoraKind(base, find_targets(base.model, settings["targets"]), settings["alpha"])
    cohort_settings = CohortSettings(local, scales, token_budget=kind.token_budget())
    workers = LocalClients(algorithm, kind, clients, cohort_settings)

    def train_round(adapter: Adapter, parts: list[ClientRound]) -> tuple[Adapter, float]:
        state = ServerState(adapters={"shared": adapter})
        requests = [
            Request(
                work.names[part.client],
                1,
                part.seed,
                algorithm.instruct(state, work.names[part.client]),
            )
            for part in parts
        ]
        replies = workers.train(requests)
        failures = [reply for reply in replies if not isinstance(reply, Reply)]
        if failures:
            raise SystemExit(f"clients failed: {failures}")
        state = algorithm.combine(state, replies).state
        return dict(state.adapters["shared"]), sum(
            reply.metrics["loss"] for reply in replies
        ) / len(replies)

    return train_round


if __name__ == "__main__":
    run(("fedmira.clients", "fedmira.model", "transformers.models.llama.modeling_llama"), load)
