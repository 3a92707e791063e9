"""The one exception that people meet: a line that says what is wrong and what to do. And the one warning."""


class PcrExportError(Exception):
    """Bad input or a refused action. The message is one line for a person; the command line prints it and exits with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ScheduleWarning(UserWarning):
    """Images are sampled with timesteps that were not calibrated: they are right, but not as good as they could be."""
