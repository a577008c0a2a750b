"""Examples to clients: sources, partition, split, prompts and encoding."""

from __future__ import annotations

from fedmira.data.encoding import ClientData, EncodedExample, Encoder
from fedmira.data.examples import Example, RawTask, Reading
from fedmira.data.load import ClientSummary, Dataset, check_apart, id_problem, load_clients, load_own, read_summary, summary_of
from fedmira.data.prompts import PROMPTS
from fedmira.data.sources import SOURCES
from fedmira.data.tokenizer import Tokenizer

__all__ = [
    "PROMPTS",
    "SOURCES",
    "ClientData",
    "ClientSummary",
    "Dataset",
    "EncodedExample",
    "Encoder",
    "Example",
    "RawTask",
    "Reading",
    "Tokenizer",
    "check_apart",
    "id_problem",
    "load_clients",
    "load_own",
    "read_summary",
    "summary_of",
]
