"""Errors that a user can act on. The command line prints each as one line and exits with code 2."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class PrebenchError(Exception):
    """Base of every error that is the input's or the environment's fault, never the program's."""

    exit_code = 2
    """Of the command that ends with this error."""


class ConfigError(PrebenchError):
    """A configuration file, key or override is wrong; the message names file, field and fix."""


class DataError(PrebenchError):
    """A data file, image or mirror is missing, corrupt or does not have the expected schema."""


class StoreError(PrebenchError):
    """A results folder can't be read or written, or its content contradicts the request."""


class StudyMismatchError(StoreError):
    """A study on disk was made with another configuration than the one requested."""


class ModelError(PrebenchError):
    """A model folder can't be used: missing file, wrong variant, unsupported architecture."""


class TrainingError(PrebenchError):
    """Training can't go on: a non-finite loss, an impossible batch size."""


class InterruptedRunError(TrainingError):
    """A scheduler took the machine back (SIGTERM): what was computed is saved, and the same command goes on."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again."""


class EvaluationError(PrebenchError):
    """An evaluation can't be scored: too many failed documents, a missing task, a dead subprocess."""


class ComparisonError(PrebenchError):
    """Two sets of results can't be compared: variants that were not run, documents that differ."""


ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What a machine refuses, however right the program is: no room, no permission, a failing disk."""


def user_error(error: Exception) -> PrebenchError | None:
    """Return the error to print as one line; None where the program itself is at fault.

    Args:
        error: an error of prebench, or what the machine refused, in Python's class for it or, from safetensors and
            tokenizers, as a text that ends in "(os error 28)".
    """
    if isinstance(error, PrebenchError):
        return error
    named = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(named[1]) if named else None
    if number not in ENVIRONMENT:
        return None
    where = getattr(error, "filename", None)
    reason = f"{where}: {os.strerror(number)}" if where else str(error)
    return StoreError(f"{reason}; what is finished is kept: make room or mend it, and start again")


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something; its type where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return an error's type and first line."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `` (did you mean 'full'? known: full, smoke)`` for a misspelt name.

    Args:
        name: what the user wrote.
        known: the names that would have been right.
    """
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f" ({hint}known: {', '.join(choices) or 'none'})"
