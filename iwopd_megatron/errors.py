"""Errors a user can mend: the message is one sentence, shown without a traceback."""

EXIT_STOPPED = 75  # EX_TEMPFAIL: what was done is saved, run again with --resume


class UserError(Exception):
    """Base of the errors below; `exit_code` is the command's."""

    exit_code = 1


class RecipeError(UserError, ValueError):
    """Input that cannot run: recipe, command line, folder or data file."""

    exit_code = 2


class GateError(UserError):
    """The run would go on with something untrue; it stops instead."""

    exit_code = 3


class ServiceError(UserError):
    """A server that the run needs is gone, or does not answer as it must."""

    exit_code = 4


class DiskError(UserError):
    """The disk takes no more; a run may go on from its last checkpoint when there is room."""

    exit_code = EXIT_STOPPED


class CheckpointError(UserError):
    """A checkpoint could not be written."""

    exit_code = 5
