"""Texts of others as they may be shown: on a terminal, in a table of CSV, on a page of Markdown.

Names of clients, categories, files and rows come from elsewhere, and so do the words of a node that
failed. Each form of output has one function here; HTML is escaped by its templates, after `plain`.
Imports nothing of the package, so every room may use it.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["csv_value", "cut", "markdown_cell", "plain"]

_CUT = " [...]"
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode's categories of what is not to be seen as itself.

Controls (with ANSI's escape), formats (with the marks that turn the direction of writing), halves
of pairs, private characters, separators of lines and paragraphs.
"""
_JOINERS = frozenset({"\u200c", "\u200d"})
"""Formats that belong to the spelling of words and to emoji, and turn nothing."""
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#!|~&])")


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
    return "".join(
        character if character in kept or not _hidden(character) else _written(character)
        for character in text
    )


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
    if value.startswith(_FORMULAS) and not _is_number(value):
        return "'" + shown
    return shown


def markdown_cell(value: object) -> str:
    """A text in a table or a sentence of Markdown, where it stays one cell and formats nothing.

    Args:
        value: a text, or what becomes one.
    """
    return _MARKDOWN.sub(r"\\\1", plain(str(value)))


def _hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS


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
