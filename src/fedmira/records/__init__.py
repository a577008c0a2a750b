"""What files should hold: hashes written with them, and one reader that compares."""

from fedmira.records.folder import RecordedFolder, changed, sha256_of
from fedmira.records.growing import GrowingFile, lost_lines
from fedmira.records.hashes import RECORD, Hashes, parse_hashes
from fedmira.records.machine import machine_errors, told
from fedmira.records.sealed import SealedFiles
from fedmira.records.whole_folder import check_files, check_new, new_folder

__all__ = [
    "RECORD",
    "GrowingFile",
    "Hashes",
    "RecordedFolder",
    "SealedFiles",
    "changed",
    "check_files",
    "check_new",
    "lost_lines",
    "machine_errors",
    "new_folder",
    "parse_hashes",
    "sha256_of",
    "told",
]
