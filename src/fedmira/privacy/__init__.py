"""Differential privacy: what a run spends, and the server's noise on clients' updates."""

from fedmira.privacy.accountant import epsilon_of, least_noise
from fedmira.privacy.clients import ClientNoise
from fedmira.privacy.plan import PrivacyPlan, Spending, plan_of

__all__ = [
    "ClientNoise",
    "PrivacyPlan",
    "Spending",
    "epsilon_of",
    "least_noise",
    "plan_of",
]
