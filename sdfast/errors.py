"""Every error sdfast raises on purpose.

A message names what was given, what is allowed, and what to do next. The command line prints the
message alone; anything that is not an `SdfastError` is a bug and keeps its traceback.
"""


class SdfastError(Exception):
    """The root: catch this to catch everything sdfast raises on purpose."""


class RequestError(SdfastError, ValueError):
    """A generation request that cannot be served: a bad value, an unknown name, a wrong shape."""


class CheckpointError(SdfastError):
    """A checkpoint that is missing, incomplete, corrupt, or of a kind that is not supported."""


class ExportError(SdfastError):
    """An export that could not be finished; nothing of it is visible."""


class EngineError(SdfastError):
    """An engine that is missing, damaged, or does not fit this machine or this request."""


class BackendError(SdfastError):
    """A backend that cannot run here: a missing provider, device, or a failure inside a module."""


class DependencyError(SdfastError, ImportError):
    """A package that an optional feature needs; the message says how to install it."""


class SettingsError(SdfastError):
    """A setting of the server that is unknown, wrong, or unsafe without another."""


class NumericalError(SdfastError):
    """A result that is not a number, so that no picture is made of it."""


class ValidationFailed(SdfastError):
    """An engine that does not make the reference pipeline's picture."""


def first_line(error: BaseException) -> str:
    """The first line of what another library raised, to be told in a message of ours."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """The innermost cause: exporters and compilers wrap it in pages about themselves."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def cause_line(error: BaseException) -> str:
    """The first line of the innermost cause."""
    return first_line(root_cause(error))
