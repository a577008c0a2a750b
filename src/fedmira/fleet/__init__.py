"""What is done with adapters that exist already: merged, compressed, aligned."""

from fedmira.fleet.align import Aligned, AlignSettings, Moved, align_fleet
from fedmira.fleet.compress import Compressed, CompressedFleet, compress_fleet
from fedmira.fleet.decide import DecidedFleet, decide
from fedmira.fleet.folders import Fleet, read_fleet
from fedmira.fleet.merge import STRENGTHS, WAYS, Merged, merge_fleet
from fedmira.fleet.output import check_new
from fedmira.fleet.rows import OwnRows

__all__ = [
    "STRENGTHS",
    "WAYS",
    "AlignSettings",
    "Aligned",
    "Compressed",
    "CompressedFleet",
    "DecidedFleet",
    "Fleet",
    "Merged",
    "Moved",
    "OwnRows",
    "align_fleet",
    "check_new",
    "compress_fleet",
    "decide",
    "merge_fleet",
    "read_fleet",
]
