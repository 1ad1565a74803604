"""Errors that the user can fix: one sentence that says what is wrong, where, and what to do."""


class UserError(ValueError):
    """A setting or an input that cannot work. The commands print its text alone and exit with 1."""


class UsageError(UserError):
    """A command line or a configuration file that cannot be read. The commands exit with 2."""


class DataError(UserError):
    """A data root, split or archive that training must refuse before its first step."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable or of another shape than the network."""


class StorageError(UserError):
    """Something cannot be written: the disk is full, the folder read-only, or the path must not be changed by us."""


class TooManyFaultsError(DataError):
    """More distinct samples are broken than the run tolerates."""


class NonFiniteError(UserError):
    """A loss, a gradient or the weights are NaN or infinite; all ranks stop together."""


class PreemptedError(Exception):
    """The run was asked to stop (SIGTERM, SIGUSR1, Ctrl-C); its state is saved.

    Args:
        message: What was said.
        code: Exit code of the command: 143, or 130 after Ctrl-C.
    """

    def __init__(self, message: str, code: int = 143) -> None:
        super().__init__(message)
        self.code = code


class InterruptedRun(BaseException):
    """Ctrl-C where there is nothing to save; no ``except Exception`` on the way out catches it."""
