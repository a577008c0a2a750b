"""Messages as named arrays and a header.

Compression, the bytes of one message, and what a reply must be.
"""

from fedmira.wire.blobs import pack, unpack
from fedmira.wire.codec import Encoded, Header, Line, decode, encode, joined, separated
from fedmira.wire.envelopes import (
    ACCEPTED_ROUND,
    RUN,
    WIRE_STAGE,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from fedmira.wire.headers import LONGEST_TEXT, number, text, whole_number
from fedmira.wire.kinds import CHOICE, IDENTITY, LOSSES, REFUSAL, SCORES, TRAIN
from fedmira.wire.replies import WITHHELD, address_problem, checked_reply

__all__ = [
    "ACCEPTED_ROUND",
    "CHOICE",
    "Encoded",
    "Header",
    "IDENTITY",
    "LONGEST_TEXT",
    "LOSSES",
    "Line",
    "REFUSAL",
    "RUN",
    "SCORES",
    "TRAIN",
    "WIRE_STAGE",
    "WITHHELD",
    "address_problem",
    "checked_reply",
    "decode",
    "decode_answer",
    "decode_request",
    "encode",
    "encode_answer",
    "encode_request",
    "joined",
    "number",
    "pack",
    "separated",
    "text",
    "unpack",
    "whole_number",
]
