"""When: the round loop, sampling, randomness, checkpoints and the run folder."""

from fedmira.rounds.checkpoint import Checkpoint, CheckpointFolder
from fedmira.rounds.loop import RoundOutcome, run_rounds
from fedmira.rounds.randomness import seed_for
from fedmira.rounds.recorder import Progress, Recorder
from fedmira.rounds.run_folder import RunFolder
from fedmira.rounds.sampling import cohort_size, sample_clients

__all__ = [
    "Checkpoint",
    "CheckpointFolder",
    "Progress",
    "Recorder",
    "RoundOutcome",
    "RunFolder",
    "cohort_size",
    "run_rounds",
    "sample_clients",
    "seed_for",
]
