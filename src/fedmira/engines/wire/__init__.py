"""What travels between machines: messages of named arrays, compressed on request, and both ends of the lines they go through."""

from fedmira.engines.wire.blobs import pack, unpack
from fedmira.engines.wire.codec import Encoded, Header, Line, decode, encode, joined, separated
from fedmira.engines.wire.ends import ServerEnd, Work, serve
from fedmira.engines.wire.envelopes import ACCEPTED_ROUND, RUN, WIRE_STAGE, decode_answer, decode_request, encode_answer, encode_request
from fedmira.engines.wire.headers import number, text, whole_number
from fedmira.engines.wire.kinds import CHOICE, IDENTITY, LOSSES, REFUSAL, SCORES, TRAIN

__all__ = [
    "ACCEPTED_ROUND",
    "CHOICE",
    "Encoded",
    "Header",
    "IDENTITY",
    "LOSSES",
    "Line",
    "REFUSAL",
    "RUN",
    "SCORES",
    "ServerEnd",
    "TRAIN",
    "WIRE_STAGE",
    "Work",
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
    "serve",
    "text",
    "unpack",
    "whole_number",
]
