"""Exceptions of this package. All are ValueErrors, so a handler of ValueError catches them."""


class AlstError(ValueError):
    """Base of all user-facing errors of this package."""


class ConfigError(AlstError):
    """Unsupported keys in a ds_config; the message lists each with its JSON path."""


class ShapeError(AlstError):
    """Inconsistent sizes: heads and ranks, lengths, dims."""


class UnsupportedModelError(AlstError):
    """Model, or a part of it, whose gradients under sequence parallelism are not verified."""


class DataError(AlstError):
    """Batch or loader that sequence parallelism cannot use."""


class CheckpointError(AlstError):
    """Checkpoint that cannot be written or loaded: missing, incomplete, of another model, not convertible."""


class SetupError(AlstError):
    """Bad environment: an untested DeepSpeed, a stale build lock, an engine with a wrong averaging factor."""


class OffloadError(AlstError):
    """Failed offload or fetch of activations: the disk is full, fails, or does not respond."""


class NonFiniteLossError(AlstError):
    """NaN or Inf loss, with its step, micro-step and batch. The whole optimizer step was dropped."""


class NonFiniteGradientError(NonFiniteLossError):
    """NaN or Inf gradient with finite losses, with its step and parameter. The whole optimizer step was dropped."""


class RankLostError(AlstError, RuntimeError):
    """Failed collective: another rank has exited or does not respond. Also a RuntimeError, like torch's."""
