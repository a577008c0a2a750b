"""From rows in files to clients with token ids."""

from fedmira.data.advantages import about_advantages
from fedmira.data.answers import answer_text, turn_ends
from fedmira.data.chat_forms import asked, chat_template_of, messages_to_send, wrong_prompt
from fedmira.data.encoded import ClientData, EncodedExample, without_middle
from fedmira.data.encoding import Encoder
from fedmira.data.examples import Example, RawTask, Reading
from fedmira.data.few_rows import encode_few, rows_of_clients, rows_of_file, rows_of_objects
from fedmira.data.from_objects import ObjectRows, rows_from_objects
from fedmira.data.load import (
    ClientSummary,
    Dataset,
    Newcomer,
    check_apart,
    check_clock,
    load_clients,
    load_newcomer,
    load_own,
    make_encoder,
    read_summary,
    summary_of,
)
from fedmira.data.prompts import PROMPTS
from fedmira.data.reading import LEFT_OUT, ReadRows, id_problem, read_rows, told_left_out
from fedmira.data.rendering import clock_now, uses_clock
from fedmira.data.sources import Reader, reader
from fedmira.data.tokenizer import Tokenizer

__all__ = [
    "rows_of_file",
    "rows_of_objects",
    "rows_of_clients",
    "encode_few",
    "wrong_prompt",
    "messages_to_send",
    "chat_template_of",
    "asked",
    "ObjectRows",
    "rows_from_objects",
    "ClientData",
    "ClientSummary",
    "Dataset",
    "EncodedExample",
    "Encoder",
    "Example",
    "LEFT_OUT",
    "Newcomer",
    "PROMPTS",
    "RawTask",
    "ReadRows",
    "Reader",
    "Reading",
    "Tokenizer",
    "about_advantages",
    "answer_text",
    "check_apart",
    "check_clock",
    "clock_now",
    "id_problem",
    "load_clients",
    "load_newcomer",
    "load_own",
    "make_encoder",
    "read_rows",
    "reader",
    "read_summary",
    "summary_of",
    "told_left_out",
    "turn_ends",
    "uses_clock",
    "without_middle",
]
