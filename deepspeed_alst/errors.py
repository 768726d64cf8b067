"""What this package raises. All are ValueErrors, so a program that catches those catches these."""


class AlstError(ValueError):
    """Base of every error that this package raises for a user to read."""


class ConfigError(AlstError):
    """A ds_config key that cannot be honoured; the message lists every such key with its JSON path."""


class ShapeError(AlstError):
    """Sizes that do not fit together: heads and ranks, lengths, dims."""


class UnsupportedModelError(AlstError):
    """A model, or a part of one, whose gradients under sequence parallelism are not verified."""


class DataError(AlstError):
    """A batch or a loader that sequence parallelism cannot use as it is."""


class CheckpointError(AlstError):
    """A checkpoint that cannot be written, or loaded: missing, incomplete, of another model, not convertible."""


class SetupError(AlstError):
    """The environment: an untested DeepSpeed, a stale build lock, an engine that averages by another number."""


class OffloadError(AlstError):
    """Activations that could not be put aside or brought back: a full disk, a failing one, one that does not answer."""


class NonFiniteLossError(AlstError):
    """A NaN or Inf loss: which step, micro-step and batch it is of. The optimizer step was dropped whole."""


class NonFiniteGradientError(NonFiniteLossError):
    """A NaN or Inf gradient with finite losses: which step and parameter. The optimizer step was dropped whole."""


class RankLostError(AlstError, RuntimeError):
    """A collective failed, as another rank has ended or does not answer. A RuntimeError, too, as torch's own is."""
