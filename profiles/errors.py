"""The errors that leave the house: what is wrong, where, and what to do next, in one sentence.

    QwenfitError
      UnknownName   no such device, model, engine, format or version; carries the nearest names
      BadInput      a file, header, value or log is wrong; names the file and the field
      Unsupported   valid, but this combination does not exist; names the nearest that does

All three leave the commands with exit status 2. "Does not fit" is not an error: it is a plan with `fits = False`.
"""


class QwenfitError(Exception):
    """Any sentence that qwenfit says instead of a traceback."""


class UnknownName(QwenfitError, LookupError):
    """A name that is in no catalog."""


class BadInput(QwenfitError, ValueError):
    """Bytes or values that cannot be used as they are."""


class Unsupported(QwenfitError, ValueError):
    """A valid request for something that no engine, format or device offers."""


def install_hint(extra: str) -> str:
    """How what an extra brings is installed, as the end of a sentence: from an index, or from a clone."""
    return f"pip install 'qwenfit[{extra}]', or in a clone pip install '.[{extra}]'"
