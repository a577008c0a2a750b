"""Shares of clients' work, and who does them: this process, or worker processes.

A share is a few clients whose passes are made together. Which clients form one depends on the run
alone, never on who computes it, so that a run gives the same bits with any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from fedmira.data import ClientData
from fedmira.messages import ClientId
from fedmira.model import AdapterKind

__all__ = ["LEAST_SHARE", "Crew", "Done", "InTurn", "Share", "share_size", "threads_of"]

LEAST_SHARE = 4
"""Clients of the smallest share.

Below it the passes of a small base no longer fill the token budget, and every share costs its own
hooks and stacks.
"""

Result = TypeVar("Result")

Done = Callable[[int], None]


def _nobody(place: int) -> None:
    """Is told that a share is done, and does nothing."""


@dataclass(frozen=True, slots=True)
class Share(Generic[Result]):
    """Work on a few clients.

    Attributes:
        clients: whose work it is.
        cost: about how long it takes, in any unit: the longest shares begin first.
        work: is called when the share begins, so that no more adapters are read than are needed,
            and gives what is done with the base: a picklable call of an adapter kind.
    """

    clients: Sequence[ClientId]
    cost: float
    work: Callable[[], Callable[[AdapterKind], Result]]


class Crew(Protocol):
    """Whoever does the shares of a run, in one process or in several, to the same bits."""

    @property
    def count(self) -> int:
        """Processes that do them."""
        ...

    @property
    def threads(self) -> int | None:
        """Threads of PyTorch in each; None leaves them as they are."""
        ...

    def do(
        self, kind: AdapterKind, shares: Sequence[Share[Result]], done: Done = _nobody
    ) -> Iterator[Result]:
        """The result of each share, in their order.

        Args:
            kind: the adapters, on their base.
            shares: of one kind of work.
            done: is called with the place of each share when it is done, in any order.

        Raises:
            RunError: a share could not be done.
        """
        ...

    def release(self) -> None:
        """Lets go of whatever the crew holds; it is taken again when there is work."""
        ...


@dataclass(frozen=True, slots=True)
class InTurn:
    """Shares one after another, in this process.

    Attributes:
        threads: of PyTorch meanwhile; None leaves them as they are.
    """

    threads: int | None = None

    @property
    def count(self) -> int:
        """Always 1: the process at hand."""
        return 1

    def do(
        self, kind: AdapterKind, shares: Sequence[Share[Result]], done: Done = _nobody
    ) -> Iterator[Result]:
        """The result of each share as it is asked for."""
        for place, share in enumerate(shares):
            with threads_of(self.threads):
                result = share.work()(kind)
            done(place)
            yield result
            del result

    def release(self) -> None:
        """Does nothing, as no process was started."""


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Within the block PyTorch computes with so many threads.

    Args:
        count: None leaves them as they are.
    """
    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def share_size(clients: Iterable[ClientData], batch_size: int, budget: int, most: int) -> int:
    """Clients of a share on a CPU: as few as fill a forward pass in each local step.

    Args:
        clients: all clients of the run.
        batch_size: rows of a local step.
        budget: token positions in one forward pass.
        most: clients whose adapters and moments memory holds together.

    Returns:
        Between 4 and `most`, or `most` where that is below 4.
    """
    lengths = [len(row.prompt) + len(row.response) for client in clients for row in client.train]
    in_a_step = batch_size * sum(lengths) / len(lengths) if lengths else budget
    return min(most, max(LEAST_SHARE, math.ceil(budget / max(in_a_step, 1))))
