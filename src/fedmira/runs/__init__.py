"""The folder of a run: its files, checkpoints, events, results and cards."""

from fedmira.runs.cards import AdapterCards
from fedmira.runs.checkpoint import Checkpoint, CheckpointFolder
from fedmira.runs.folder import RunFolder
from fedmira.runs.pages import write_page
from fedmira.runs.provenance import Ground, Provenance, hash_of_rows
from fedmira.runs.recorder import NEWCOMERS, Recorder
from fedmira.runs.results import Result, trained_parameters, write_results
from fedmira.runs.verify import Verification, accept_files, verify_folder

__all__ = [
    "NEWCOMERS",
    "AdapterCards",
    "Checkpoint",
    "CheckpointFolder",
    "Ground",
    "Provenance",
    "Recorder",
    "Result",
    "RunFolder",
    "Verification",
    "accept_files",
    "hash_of_rows",
    "trained_parameters",
    "verify_folder",
    "write_page",
    "write_results",
]
