"""Clients' work: local training, losses, choices and scores."""

from fedmira.clients.cohort import Cohort, CohortSettings
from fedmira.clients.engine import Engine
from fedmira.clients.evaluation import Evaluation, SplitName
from fedmira.clients.evaluator import Evaluator
from fedmira.clients.in_process import InProcessEngine

__all__ = [
    "Cohort",
    "CohortSettings",
    "Engine",
    "Evaluation",
    "Evaluator",
    "InProcessEngine",
    "SplitName",
]
