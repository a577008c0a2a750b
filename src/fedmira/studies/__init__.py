"""What is done with whole runs: compared, planned, and used again."""

from fedmira.studies.comparison import Comparison, compare_algorithms, plan_methods
from fedmira.studies.decision import Decision, decide
from fedmira.studies.plan import Plan, make_plan
from fedmira.studies.referring import answer
from fedmira.studies.saved import SavedAdapters
from fedmira.studies.tuning.choices import Search
from fedmira.studies.tuning.search import Tuning, tune_methods, tune_settings

__all__ = [
    "Comparison",
    "Decision",
    "Plan",
    "SavedAdapters",
    "Search",
    "Tuning",
    "answer",
    "compare_algorithms",
    "decide",
    "make_plan",
    "plan_methods",
    "tune_methods",
    "tune_settings",
]
