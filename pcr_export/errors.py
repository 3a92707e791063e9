"""The one exception that people meet: a line that says what is wrong and what to do. And the warnings."""


class PcrExportError(Exception):
    """Bad input or a refused action. The message is one line for a person; the command line prints it and exits with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that holds anything, without its stop; the exception's type where it has no text."""
    lines = (line.strip(" .:") for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


class PcrExportWarning(UserWarning):
    """What was asked for is done, but not as a person may think. The message is one line; the command line prints it."""


class PromptWarning(PcrExportWarning):
    """Prompts are longer than the text encoders read: what comes after is not seen."""


class ScheduleWarning(PcrExportWarning):
    """Images are sampled with timesteps that were not calibrated: they are right, but not as good as they could be."""
