"""The exceptions this project raises on purpose.

    GnomeError
    ├── InvalidInput            a file, formula, filter or option that cannot be used
    │   └── InvalidCrystal      a crystal that fails a gate; `reason` is a stable code
    ├── InvalidCheckpoint       weights that are missing, truncated, altered or of another kind
    ├── TrainingDiverged        a training whose errors were no numbers in any epoch
    ├── OutOfMemory             memory that does not suffice for what was asked
    ├── DatabaseUnavailable     the database cannot be opened, read or written
    ├── RoundBusy               another process holds the lease on the round
    └── EvaluatorUnavailable    the evaluator or one of its references is not there

Messages say what is wrong, where, and what to do; they carry the offending value.
"""


class GnomeError(Exception):
    """Root of every deliberate error; the command line prints its message as one line."""


class InvalidInput(GnomeError):
    """Input from a user that cannot be used."""


class InvalidCrystal(InvalidInput):
    """A crystal that no step may work on."""

    def __init__(self, reason: str, message: str) -> None:
        """Keep the reason code beside the message."""
        super().__init__(message)
        self.reason = reason


class InvalidCheckpoint(GnomeError):
    """A model file that must not be loaded."""


class TrainingDiverged(GnomeError):
    """A training that left nothing to keep."""


class OutOfMemory(GnomeError):
    """Memory that does not suffice."""


class DatabaseUnavailable(GnomeError):
    """The database cannot be used."""


class RoundBusy(GnomeError):
    """A round is being run by another process."""


class EvaluatorUnavailable(GnomeError):
    """An evaluator that cannot answer at all, as opposed to a failed evaluation (which is a record)."""
