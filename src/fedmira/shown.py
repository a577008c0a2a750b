"""Texts of others as they may be shown: on a terminal, in a table of CSV, on a page of Markdown.

Names of clients, categories, files and rows come from elsewhere, and so do the words of a node that
failed. Each form of output has one function here; HTML is escaped by its templates, after `plain`.
Imports nothing of the package, so every room may use it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence

__all__ = ["csv_text", "csv_value", "cut", "html_text", "json_text", "markdown_text", "plain"]

_CUT = " [...]"
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # controls, with ANSI's escape and the ends of lines
    "\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"  # of no width, or turning the writing
    "\u2028\u2029"  # ends of lines and paragraphs
    "\ud800-\udfff"  # halves of pairs, which no file holds
    "\U000e0000-\U000e007f]"  # tags, which nobody sees
)
"""What is not to be seen as itself. Joiners and marks that words and emoji need are not in it."""
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")
_MARKDOWN = re.compile(r"[\\`|\[\]]|<(?=[A-Za-z/!?])")


def plain(text: str, lines: bool = False) -> str:
    r"""The text with what cannot be seen written out, such as \x1b for ANSI's escape.

    >>> from fedmira.shown import plain
    >>> plain("red \x1b[31malert")
    'red \\x1b[31malert'

    Args:
        text: from anywhere.
        lines: keeps ends of lines and tabs, for texts that have several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return _HIDDEN.sub(lambda found: found[0] if found[0] in kept else _written(found[0]), text)


def cut(text: str, most: int) -> str:
    """The text, which says so where it had more characters than `most`.

    Args:
        text: from anywhere.
        most: characters that may stay, more than 6.
    """
    return text if len(text) <= most else text[: most - len(_CUT)] + _CUT


def csv_value(value: object) -> object:
    """A value of a table of CSV; no program that opens the table computes a text of it.

    A text that begins as a formula would gets an apostrophe in front, by which spreadsheets know a
    text. Numbers, also those that are written as texts, are as they were.

    >>> from fedmira.shown import csv_value
    >>> csv_value("=cmd|' /C calc'!A0"), csv_value("-1.5"), csv_value(-1.5)
    ("'=cmd|' /C calc'!A0", '-1.5', -1.5)

    Args:
        value: of a cell.
    """
    if not isinstance(value, str):
        return value
    shown = plain(value)
    return "'" + shown if value.startswith(_FORMULAS) and not _is_number(value) else shown


def csv_text(
    columns: Sequence[str], rows: Sequence[Mapping[str, object]], head: bool = True
) -> str:
    """A table of CSV, every cell of it as `csv_value` has it.

    Args:
        columns: in order.
        rows: column -> cell.
        head: whether the names of the columns stand above.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if head:
        writer.writerow([csv_value(column) for column in columns])
    writer.writerows([[csv_value(row[column]) for column in columns] for row in rows])
    return text.getvalue()


def markdown_text(text: str) -> str:
    """A text in a cell, a list or a sentence of Markdown.

    It stays one line and one cell, and begins neither a link nor an element of HTML.

    Args:
        text: from anywhere.
    """
    return _MARKDOWN.sub(lambda found: "\\" + found[0], plain(text))


def html_text(text: str) -> str:
    """A text that HTML's escapes are then put into: lines and tabs stay.

    Args:
        text: from anywhere.
    """
    return plain(text, lines=True)


def json_text(value: object) -> str:
    """A value as JSON, or as Python, in letters of all scripts; what is not to be seen is escaped.

    Args:
        value: of texts, numbers, lists and mappings.
    """
    return _HIDDEN.sub(
        lambda found: json.dumps(found[0])[1:-1], json.dumps(value, ensure_ascii=False)
    )


def _written(character: str) -> str:
    """The escape of a character, as Python writes it."""
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isprintable()
