"""The ``torch.backends`` entry point: a post-import hook for ``deepspeed``, and nothing else.

Standard library only, a few milliseconds, and never an exception: whatever goes wrong here would break
``import torch`` for every program on the machine. Off with ``DEEPSPEED_ALST_AUTOLOAD=0`` or, for all of PyTorch's
extensions, ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

import os
import sys
from types import ModuleType

_TARGET = "deepspeed"


def entry_point() -> None:
    """What PyTorch calls at the end of ``import torch``; installs the hook unless the variable says 0."""
    if os.environ.get("DEEPSPEED_ALST_AUTOLOAD", "1") == "0":
        return
    try:
        install()
    except Exception as error:
        # stderr and not a raise: this runs inside `import torch`.
        print(f"deepspeed_alst: the import hook could not be installed: {error!r}", file=sys.stderr)


def install() -> None:
    """Hook ``deepspeed.initialize`` now, or as soon as ``deepspeed`` is imported. Calling it again does nothing."""
    module = sys.modules.get(_TARGET)
    if module is None:
        if not any(isinstance(finder, _DeepSpeedFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _DeepSpeedFinder())
    elif _is_half_imported(module):
        # `import deepspeed` before `import torch`: deepspeed's own import of torch brought us here, and its
        # `initialize` does not exist yet. The first look at the finished module installs the hook.
        if type(module) is ModuleType:
            module.__class__ = _HalfImportedModule
    else:
        _hook(module)


def _hook(module: ModuleType) -> None:
    from deepspeed_alst.plugin import hook_initialize

    hook_initialize(module)


def _is_half_imported(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _HalfImportedModule(ModuleType):
    def __getattribute__(self, name: str):
        read = super().__getattribute__
        if not getattr(read("__spec__"), "_initializing", False):
            self.__class__ = ModuleType
            _hook(self)
            return getattr(self, name)
        return read(name)


class _DeepSpeedFinder:
    """Finds ``deepspeed`` with the finders behind this one, and hooks the module when it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            # Not installed: stay, a later import may find it.
            sys.meta_path.insert(0, self)
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _hook(module)

        spec.loader.exec_module = exec_module
        return spec
