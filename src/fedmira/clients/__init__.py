"""Clients' work behind one seam: train, losses, choose, score."""

from fedmira.clients.base import Candidates, Clients, Measuring, SplitName
from fedmira.clients.base_losses import BaseLosses
from fedmira.clients.cohort import Cohort, CohortSettings
from fedmira.clients.crews import LEAST_SHARE, Crew, InTurn, Share, share_size, threads_of
from fedmira.clients.local import LocalClients
from fedmira.clients.over_wire import OverWire
from fedmira.clients.references import References, references_of
from fedmira.clients.workers import Workers, unsafe_main

__all__ = [
    "LEAST_SHARE",
    "BaseLosses",
    "Candidates",
    "Clients",
    "Cohort",
    "CohortSettings",
    "Crew",
    "InTurn",
    "LocalClients",
    "Measuring",
    "OverWire",
    "Share",
    "References",
    "SplitName",
    "Workers",
    "share_size",
    "threads_of",
    "unsafe_main",
    "references_of",
]
