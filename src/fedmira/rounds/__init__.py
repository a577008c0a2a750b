"""When: the one round loop, who takes part, and from which seed."""

from fedmira.rounds.loop import RoundOutcome, run_rounds
from fedmira.rounds.sampling import cohort_size, sample_clients

__all__ = [
    "RoundOutcome",
    "cohort_size",
    "run_rounds",
    "sample_clients",
]
