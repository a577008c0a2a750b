"""The composition root: from a config to everything built, and the run of it."""

from fedmira.experiment.build import Experiment, build_experiment
from fedmira.experiment.clock import with_clock
from fedmira.experiment.door import Door
from fedmira.experiment.newcomers import with_newcomers
from fedmira.experiment.places import where_they_lay
from fedmira.experiment.privacy import privacy_plan, row_privacy
from fedmira.experiment.ranks import client_ranks
from fedmira.experiment.run import (
    held_after,
    resume_experiment,
    run_experiment,
    start_experiment,
)
from fedmira.experiment.scheme import Scheme, make_scheme, prepare_kind, token_budget

__all__ = [
    "Door",
    "Experiment",
    "Scheme",
    "build_experiment",
    "client_ranks",
    "held_after",
    "make_scheme",
    "prepare_kind",
    "privacy_plan",
    "resume_experiment",
    "row_privacy",
    "run_experiment",
    "start_experiment",
    "token_budget",
    "where_they_lay",
    "with_clock",
    "with_newcomers",
]
