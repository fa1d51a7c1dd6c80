"""Errors a user can mend: the message is one sentence, shown without a traceback."""

EXIT_STOPPED = 75  # EX_TEMPFAIL: what was done is saved, run again with --resume


class UserError(Exception):
    """The base of the errors below; a command that meets one ends with its `exit_code`."""

    exit_code = 1


class RecipeError(UserError, ValueError):
    """Raised for input that cannot run: recipe, command line, folder or data file."""

    exit_code = 2


class GateError(UserError):
    """Raised where a round does not pass a check of batch/gates.py or the like; the run stops."""

    exit_code = 3


class ServiceError(UserError):
    """Raised when a server that the run needs is gone, or does not answer as it must."""

    exit_code = 4


class DiskError(UserError):
    """Raised when the disk takes no more; with room, a run goes on from its last checkpoint."""

    exit_code = EXIT_STOPPED


class CheckpointError(UserError):
    """Raised when a checkpoint could not be written."""

    exit_code = 5
