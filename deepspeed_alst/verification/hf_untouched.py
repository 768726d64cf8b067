"""Context manager that restores a live model, its config and the RNG states bit for bit."""

import contextlib
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedConfig

# DeepSpeed swaps the weights' storage under ZeRO-3; submodules are saved on their own.
_SKIPPED = ("_parameters", "_modules")
_CONTAINERS = (dict, list, set)


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Restore buffers, attributes, hooks, training flags, configs and RNG states on exit; weights are not saved."""
    with ExitStack() as restore:
        holders: dict[int, Any] = {}
        for module in model.modules():
            holders[id(module)] = module
            holders |= {id(each): each for each in vars(module).values() if isinstance(each, PreTrainedConfig)}
        saved: set[int] = set()
        for holder in holders.values():
            _save(holder, saved, restore)
        restore.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            restore.callback(numpy.random.set_state, numpy.random.get_state())
        devices = {param.device.index for param in model.parameters() if param.device.type == "cuda"}
        restore.enter_context(torch.random.fork_rng([each for each in devices if each is not None]))
        yield


def _save(holder: Any, saved: set[int], restore: ExitStack) -> None:
    """Restore an object's attributes on exit, and the contents of their tensors and containers."""
    attributes = vars(holder)
    for name, value in attributes.items():
        if name not in _SKIPPED:
            _save_contents(value, saved, restore)
    restore.callback(_refill, attributes, dict(attributes))


def _save_contents(value: Any, saved: set[int], restore: ExitStack) -> None:
    if id(value) in saved:
        return
    if isinstance(value, torch.Tensor):
        if not isinstance(value, torch.nn.Parameter) and not value.is_meta and type(value) is torch.Tensor:
            saved.add(id(value))
            restore.callback(_put_back, value, value.detach().clone())
    elif isinstance(value, _CONTAINERS):
        saved.add(id(value))
        for inner in value.values() if isinstance(value, dict) else value:
            _save_contents(inner, saved, restore)
        # copy() keeps an OrderedDict and so the order of hooks.
        restore.callback(_refill, value, value.copy())


def _refill(container: Any, contents: Any) -> None:
    """Restore the contents of a container in place, unless they are unchanged."""
    if isinstance(container, list):
        if len(container) != len(contents) or any(a is not b for a, b in zip(container, contents, strict=True)):
            container[:] = contents
    elif isinstance(container, set):
        if container != contents:
            container.clear()
            container.update(contents)
    elif list(container) != list(contents) or any(container[key] is not contents[key] for key in contents):
        container.clear()
        container.update(contents)


def _put_back(tensor: torch.Tensor, values: torch.Tensor) -> None:
    if tensor.shape != values.shape or not torch.equal(tensor, values):
        with torch.no_grad():
            tensor.set_(values.clone()) if tensor.shape != values.shape else tensor.copy_(values)
