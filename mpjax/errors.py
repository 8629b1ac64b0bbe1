"""Errors that the user can mend: one line that says what, where and the remedy."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, path or file that cannot be used as given.

    The message is one line: where, what was expected, what was found, what to do.
    Command line entry points print it without a traceback and exit with status 2.
    """


class TrainingStopped(RuntimeError):
    """Training cannot go on: the loss scale is at its minimum and gradients stay non-finite."""
