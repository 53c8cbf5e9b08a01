"""What a user can get wrong, as exceptions whose text is meant for the user.

An entry script catches :class:`UserError`, prints its message and ends with exit code 2; every other exception is a
defect of this program and keeps its traceback. A message is one sentence each for: the flag or file, its value, what
that leads to, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot work; the message says what and how to mend it."""


class SettingsError(UserError):
    """A flag, a ``--config_file`` key or a combination of them is wrong."""


class ModelFileError(UserError):
    """A model file or folder is missing, broken, or holds another model."""


class DatasetError(UserError):
    """The dataset file, a picture folder or a caption is wrong."""


class DrawingError(UserError):
    """The models gave no picture."""


class NetworkError(UserError):
    """A network argument or a LoRA file is wrong."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the candidate most like ``name``, or ``""`` where none is close."""
    known = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f" (did you mean '{known[close[0]]}'?)" if close else ""


def some(names: Iterable[str], limit: int = 5) -> str:
    """Returns the first names and how many more there are: ``"a, b and 3 more"``."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
