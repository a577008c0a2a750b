"""Tool (e): pfl-research's simulated backend in PyTorch, one process, one resident PEFT model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from peft_model import adapter_of, load_model, put_adapter
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import AbstractDataset
from pfl.data.federated_dataset import FederatedDatasetBase
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from workbench import ClientRound, Work, padded_batch, parse_arguments, read_work, write_result


class LossModel(torch.nn.Module):
    """What pfl asks of a module: a loss, and metrics, of which none are taken here."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.train()

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss

    def metrics(self, **_: torch.Tensor) -> dict[str, Any]:
        return {}


class ClientDataset(AbstractDataset):
    """One client's batches of one round.

    Its length is that of all its rows, which weighs its update.
    """

    raw_data = metadata = None
    train_kwargs = eval_kwargs = {}

    def __init__(self, work: Work, part: ClientRound) -> None:
        self.work, self.part = work, part

    @property
    def user_id(self) -> str:
        return self.work.names[self.part.client]

    def __len__(self) -> int:
        return len(self.work.rows[self.part.client])

    def iter(self, batch_size: int | None) -> Iterator[dict[str, torch.Tensor]]:
        return map(padded_batch, self.work.batches(self.part))

    def split(self, *_: object, **__: object) -> Any:
        raise NotImplementedError("these rows are for training only")

    def get_worker_partition(self) -> ClientDataset:
        return self


class Cohorts(FederatedDatasetBase):
    """The workload's clients, round after round."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.rounds = work, iter(work.rounds)

    def __next__(self) -> Any:
        raise NotImplementedError("clients come by the cohort")

    def get_cohort(self, cohort_size: int) -> Iterator[tuple[ClientDataset, int]]:
        return ((ClientDataset(self.work, part), part.seed) for part in next(self.rounds))


class Clock(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self, ends: list[float]) -> None:
        self.ends = ends

    def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
        self.ends.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    begin = time.perf_counter()
    work = read_work(arguments.workload)
    settings = work.settings
    peft = load_model(work, arguments.dtype)
    put_adapter(peft, work.start())

    def new_optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, weight_decay=settings["weight_decay"])

    central = torch.optim.SGD(
        [parameter for parameter in peft.parameters() if parameter.requires_grad], lr=1.0
    )
    model = PyTorchModel(LossModel(peft), new_optimizer, central)
    cohorts = Cohorts(work)
    backend = SimulatedBackend(
        training_data=cohorts, val_data=cohorts, postprocessors=[WeightByDatapoints()]
    )
    ends = [time.perf_counter()]
    FederatedAveraging().run(
        NNAlgorithmParams(
            arguments.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=len(work.names),
            val_cohort_size=None,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_batch_size=settings["batch_size"],
            local_num_epochs=None,
            local_num_steps=settings["steps"],
            local_learning_rate=settings["learning_rate"],
            local_max_grad_norm=settings["max_grad_norm"],
        ),
        callbacks=[Clock(ends)],
        send_metrics_to_platform=False,
    )
    write_result(arguments, work, adapter_of(peft), ends, {"load_seconds": ends[0] - begin})


if __name__ == "__main__":
    main()
