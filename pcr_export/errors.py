"""The one exception that people meet: a line that says what is wrong and what to do. And the warnings."""

import errno

FAILED = 1  # exit code where the machine is at fault: a disk, its memory
FAULT = 70  # where a program is, as sysexits.h has it
OUT_OF_MEMORY = (
    "not enough memory",
    "out of memory",
    "llocate memory",
    "bad_alloc",
    "bad allocation",
    "failed to map segment",
    "start new thread",
)


class PcrExportError(Exception):
    """Bad input or a refused action. The message is one line for a person; the command line prints it and exits with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that holds anything, without its stop; the exception's type where it has no text."""
    lines = (line.strip(" .:") for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def explain(error: BaseException) -> tuple[str, int]:
    """What tells a person of `error`: a line, and the exit code."""
    if isinstance(error, PcrExportError):
        return str(error), error.exit_code
    if is_short_of_memory(error):
        what = "free some, raise its limit or take a machine with more; the same command goes on from here"
        return f"not enough memory ({first_line(error)}): {what}", FAILED
    if isinstance(error, OSError):
        return f"{error}: mend that, the same command goes on from here", FAILED
    what = "this is a fault of pcr-export or of a library that it uses: run it again with -v for the traceback"
    return f"{first_line(error)} ({type(error).__name__}): {what}", FAULT


def is_short_of_memory(error: BaseException | None) -> bool:
    """Whether memory was refused, to a library that made another error of it, too; each has words of its own for that."""
    while error is not None:
        refused = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        if refused or any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


class PcrExportWarning(UserWarning):
    """What was asked for is done, but not as a person may think. The message is one line; the command line prints it."""


class PromptWarning(PcrExportWarning):
    """Prompts are longer than the text encoders read: what comes after is not seen."""


class ScheduleWarning(PcrExportWarning):
    """Images are sampled with timesteps that were not calibrated: they are right, but not as good as they could be."""
