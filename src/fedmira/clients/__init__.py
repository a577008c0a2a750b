"""Clients' work behind one seam: train, losses, choose, score."""

from fedmira.clients.base import Candidates, Clients, SplitName
from fedmira.clients.cohort import Cohort, CohortSettings
from fedmira.clients.local import LocalClients
from fedmira.clients.over_wire import OverWire
from fedmira.clients.references import References, references_of

__all__ = [
    "Candidates",
    "Clients",
    "Cohort",
    "CohortSettings",
    "LocalClients",
    "OverWire",
    "References",
    "SplitName",
    "references_of",
]
