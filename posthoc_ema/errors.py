"""Exceptions of the library, each also a built-in kind.

Catch :class:`PosthocEMAError` for all of them. Arguments outside their domain raise plain
``ValueError`` or ``TypeError`` as everywhere in Python.
"""


class PosthocEMAError(Exception):
    """Base of every exception that is specific to this library."""


class StructureError(PosthocEMAError, ValueError):
    """Parameters appeared, vanished or changed shape, or names do not pair up."""


class StateError(PosthocEMAError, RuntimeError):
    """An operation came at a time when it cannot be carried out."""


class SnapshotError(PosthocEMAError, ValueError):
    """A snapshot file or folder cannot be used as asked; the message names it."""


class CorruptSnapshotError(SnapshotError):
    """A file is truncated, damaged or not a snapshot at all."""


class MissingInputError(SnapshotError):
    """A snapshot is stored as a difference from others, of which one is gone."""


class SnapshotVersionError(SnapshotError):
    """A file was written by a newer format version than this library reads."""


class ForeignSnapshotError(SnapshotError):
    """Files of another run, or duplicates, where those of one run were expected."""


class UnsafePickleError(SnapshotError):
    """A foreign file refers to code that weights have no need of; none of it was executed."""


class NonFiniteError(PosthocEMAError, ArithmeticError):
    """NaN or infinity where finite weights were expected."""


class SnapshotWriteError(PosthocEMAError, OSError):
    """A snapshot could not be written; those on disk before are unharmed."""
