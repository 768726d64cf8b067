"""Hooks at the import of DeepSpeed, transformers and accelerate: standard library only, a few milliseconds.

They run inside other imports (``torch``, through _deepspeed_alst_autoload.py, and ``deepspeed``), so that errors are
printed and not raised.
"""

import sys
from types import ModuleType

# Functions of hooks.py that hook a module once it is imported.
_HOOKS = {
    "deepspeed": ("hook_initialize",),
    "transformers.integrations.deepspeed": ("load_sharded_under_zero3", "hook_trainer_config"),
    "transformers.trainer": ("hook_trainer",),
    "accelerate.utils.dataclasses": ("hook_accelerate_config",),
    "accelerate.accelerator": ("hook_accelerator",),
}


def install() -> None:
    """Install the hooks of DeepSpeed, transformers and accelerate, now or at their import."""
    for name in _HOOKS:
        module = sys.modules.get(name)
        if module is None:
            if not any(isinstance(finder, _ImportHook) and finder.name == name for finder in sys.meta_path):
                sys.meta_path.insert(0, _ImportHook(name))
        elif not getattr(module.__spec__, "_initializing", False):
            _hook(module)
        elif type(module) is ModuleType:
            # `import deepspeed` before `import torch`: deepspeed's import of torch runs this, and `initialize` does
            # not exist yet. The first attribute access on the finished module installs the hook.
            module.__class__ = _PartlyImportedModule


def _hook(module: ModuleType) -> None:
    for function in _HOOKS[module.__name__]:
        try:
            from deepspeed_alst import hooks

            getattr(hooks, function)(module)
        except Exception as error:
            print(f"deepspeed_alst: {module.__name__} could not be hooked: {error!r}", file=sys.stderr)


class _PartlyImportedModule(ModuleType):
    def __getattribute__(self, name: str):
        read = super().__getattribute__
        if not getattr(read("__spec__"), "_initializing", False):
            self.__class__ = ModuleType
            _hook(self)
            return getattr(self, name)
        return read(name)


class _ImportHook:
    """Meta path finder for one module that hooks it after its execution, and stays installed until then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_searching = False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self._is_searching:
            return None
        import importlib.util

        self._is_searching = True
        try:
            spec = importlib.util.find_spec(name)  # by the other finders
        finally:
            self._is_searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _hook(module)

            spec.loader.exec_module = exec_module
        return spec
