"""When: the one round loop, who takes part, and from which seed."""

from fedmira.rounds.loop import Grown, RoundOutcome, run_rounds
from fedmira.rounds.sampling import cohort_size, sample_clients
from fedmira.rounds.screening import SCREENED, Screen, Screened

__all__ = [
    "SCREENED",
    "Grown",
    "RoundOutcome",
    "Screen",
    "Screened",
    "cohort_size",
    "run_rounds",
    "sample_clients",
]
