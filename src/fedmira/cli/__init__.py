"""The command line: a file per verb."""

from fedmira.cli.main import main

__all__ = ["main"]
