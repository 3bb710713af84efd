"""Named errors: what a user can get wrong, told apart from a bug."""

from __future__ import annotations


class BTNetError(Exception):
    """Base of every error this package raises on purpose."""


class DataError(BTNetError, ValueError):
    """A file, record, image or label is not what its format says; the message names it."""


class ConfigError(BTNetError, ValueError):
    """An argument or a configuration field has a value that cannot work."""


class CheckpointError(BTNetError, ValueError):
    """Saved weights or training state do not fit, are damaged, or are of another version."""


class TrainingError(BTNetError, RuntimeError):
    """Training had to stop (non-finite loss, full disk); the message says at which step and why."""


class WriteError(BTNetError, OSError):
    """A file or folder cannot be written; what it held before is as it was."""


class BusyError(BTNetError, RuntimeError):
    """Another process works in the folder; the message says which."""


class ReproduceError(BTNetError, RuntimeError):
    """A notebook of the reproduction could not run or failed."""
