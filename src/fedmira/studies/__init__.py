"""What is done with whole runs: compared, planned, and used again."""

from fedmira.studies.comparison import Comparison, compare_algorithms, plan_methods
from fedmira.studies.decision import Decision, decide
from fedmira.studies.plan import Plan, make_plan
from fedmira.studies.saved import SavedAdapters, answer

__all__ = [
    "Comparison",
    "Decision",
    "Plan",
    "SavedAdapters",
    "answer",
    "compare_algorithms",
    "decide",
    "make_plan",
    "plan_methods",
]
