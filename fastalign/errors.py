"""Every error that fastalign raises on purpose, in one tree.

A message names the argument or the file and row, says what was expected and what came, and how to mend it.
"""


class FastalignError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class ConfigError(FastalignError, ValueError):
    """An option is unknown, ill-typed, out of range, or contradicts another one."""


class DataError(FastalignError, ValueError):
    """A data file or one of its rows cannot be used; the message names the file and the row."""


class TemplateError(DataError):
    """The tokenizer or its chat template cannot render the data (no template, no EOS, prefix not stable)."""


class ModelError(FastalignError, ValueError):
    """A model folder or architecture cannot be used."""


class HeadMismatchError(ModelError):
    """The fused head does not reproduce the model's own logits."""


class OutputError(FastalignError, OSError):
    """The output folder cannot be used: it holds another run, is not writable, or the disk is full."""


class CheckpointError(FastalignError, ValueError):
    """A checkpoint is truncated, of another model or of another run."""


class NumericsError(FastalignError, ArithmeticError):
    """The loss or the gradient stayed non-finite for longer than the run allows."""


class DeviceMemoryError(FastalignError, MemoryError):
    """The device has no room for a single sample."""


class JudgeError(FastalignError, RuntimeError):
    """A judge did not answer, or its answer holds no verdict."""


class RewardError(FastalignError, RuntimeError):
    """A reward function failed; the message names the function and the completion."""


class LossError(FastalignError, RuntimeError):
    """A loss of the user's own failed; the message names the function."""


class RolloutError(FastalignError, RuntimeError):
    """The server that answers prompts is away, refuses, or its reply is not what was asked for; the message names the server."""


class StoreError(FastalignError, RuntimeError):
    """The database of answers and feedback cannot be used; the message names the file."""


class StoreBusyError(StoreError):
    """The database is locked, or its disk full, for now: nothing of the call was written, and it may be tried again."""


class StoreConflictError(StoreError):
    """What was asked for contradicts what the database holds, such as a second version of one name."""


class NotFoundError(StoreError, LookupError):
    """The database holds no such answer, version or token."""


class DependencyError(FastalignError, ImportError):
    """An optional package is needed and absent; the message names the install command."""


class RankError(FastalignError, RuntimeError):
    """Another process of the run stopped; the message says which one and why."""
