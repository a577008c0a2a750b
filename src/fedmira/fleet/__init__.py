"""What is done with adapters that exist already: merged, compressed, aligned, joined."""

from fedmira.fleet.align import Aligned, AlignSettings, Moved, align_fleet
from fedmira.fleet.compress import Compressed, CompressedFleet, compress_fleet
from fedmira.fleet.decide import DecidedFleet, decide
from fedmira.fleet.folders import Fleet, read_fleet, rows_of_run
from fedmira.fleet.join import Joined, Joining, JoinSettings, Trial, best_way, check_enough
from fedmira.fleet.merge import STRENGTHS, WAYS, Merged, merge_fleet
from fedmira.fleet.rows import OwnRows
from fedmira.fleet.starts import RULES, SHARED, Pool

__all__ = [
    "RULES",
    "SHARED",
    "STRENGTHS",
    "WAYS",
    "AlignSettings",
    "Aligned",
    "Compressed",
    "CompressedFleet",
    "DecidedFleet",
    "Fleet",
    "JoinSettings",
    "Joined",
    "Joining",
    "Merged",
    "Moved",
    "OwnRows",
    "Pool",
    "Trial",
    "align_fleet",
    "best_way",
    "check_enough",
    "compress_fleet",
    "decide",
    "merge_fleet",
    "read_fleet",
    "rows_of_run",
]
