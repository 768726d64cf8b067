"""The ``torch.backends`` entry point, which PyTorch calls at the end of ``import torch``.

A module of its own: loading an entry point of ``deepspeed_alst`` would import that package before the switch is read.
"""

import os
import sys


def entry_point() -> None:
    """Import ``deepspeed_alst``, which hooks deepspeed, unless ``DEEPSPEED_ALST_AUTOLOAD=0``. Never raises."""
    if os.environ.get("DEEPSPEED_ALST_AUTOLOAD", "1") == "0":
        return
    try:
        import deepspeed_alst  # noqa: F401
    except Exception as error:
        # stderr and not a raise: that would break `import torch` for every program on the machine.
        print(f"deepspeed_alst: could not be loaded: {error!r}", file=sys.stderr)
