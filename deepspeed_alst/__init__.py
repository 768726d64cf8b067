"""Arctic Long Sequence Training for Hugging Face models, enabled by keys in the ds_config JSON.

Importing this package (or ``torch``, through the ``torch.backends`` entry point) hooks ``deepspeed.initialize``. Names
load on first use (PEP 562), so that the import takes a few milliseconds.
"""

from deepspeed_alst.autoload import install as _install

_PUBLIC = {
    "AlstError": "deepspeed_alst.errors",
    "CheckpointError": "deepspeed_alst.errors",
    "ConfigError": "deepspeed_alst.errors",
    "DataError": "deepspeed_alst.errors",
    "NonFiniteGradientError": "deepspeed_alst.errors",
    "NonFiniteLossError": "deepspeed_alst.errors",
    "OffloadError": "deepspeed_alst.errors",
    "RankLostError": "deepspeed_alst.errors",
    "SetupError": "deepspeed_alst.errors",
    "ShapeError": "deepspeed_alst.errors",
    "UnsupportedModelError": "deepspeed_alst.errors",
    "gather_sequence": "deepspeed_alst.whole_sequence.sequence_tensor",
    "log_probs": "deepspeed_alst.whole_sequence.log_probs",
    "shard_dataloader": "deepspeed_alst.data.loader",
}

__all__ = ["__version__", *_PUBLIC]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted(__all__)


_install()
