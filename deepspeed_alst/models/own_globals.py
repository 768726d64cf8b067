"""Copies of a function that look some global names up elsewhere.

transformers' forwards call functions by a global name that all models of a family share. One model is given a copy of
its forward, the same code with another dict of globals, and the shared name stays what it is for every other model and
thread.
"""

import builtins
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

NamesFor = Callable[[FunctionType], Mapping[str, Any]]
"""Returns what a function is to find under some of its global names; nothing where it stays as it is."""


def with_names(function: Any, names_for: NamesFor) -> Any:
    """Copy a function, or a method, with other values of some global names.

    What it wraps, functions and methods in its closure, is copied in the same way. Returns the function itself where
    there is nothing to change.
    """
    return _copied(function, names_for, {})


def importing(name: str, wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Builtins by which a function that imports a name in its body gets ``wrap(value)``; for ``with_names``."""

    def own_import(*args: Any, **kwargs: Any) -> Any:
        module = builtins.__import__(*args, **kwargs)
        from_list = args[3] if len(args) > 3 else kwargs.get("fromlist")
        if name not in (from_list or ()):
            return module
        return SimpleNamespace(
            **{each: getattr(module, each) for each in from_list} | {name: wrap(getattr(module, name))}
        )

    return {"__builtins__": {**vars(builtins), "__import__": own_import}}


def _copied(function: Any, names_for: NamesFor, copies: dict[int, Any]) -> Any:
    if isinstance(function, MethodType):
        copy = _copied(function.__func__, names_for, copies)
        return function if copy is function.__func__ else MethodType(copy, function.__self__)
    if not isinstance(function, FunctionType):
        return function
    if id(function) not in copies:
        copies[id(function)] = function  # a function may be in its own closure
        copies[id(function)] = _copy(function, names_for, copies)
    return copies[id(function)]


def _copy(function: FunctionType, names_for: NamesFor, copies: dict[int, Any]) -> FunctionType:
    cells = tuple(_copied_cell(cell, names_for, copies) for cell in function.__closure__ or ())
    names = names_for(function)
    if not names and cells == (function.__closure__ or ()):
        return function
    globals_ = function.__globals__
    if names:
        globals_ = {**globals_, **names}
        # Where it finds a module's name, torch.compile looks up the names in that module.
        globals_.pop("__name__", None)
    # A code object of its own: torch.compile keeps what it has compiled by code.
    code = function.__code__.replace()
    copy = FunctionType(code, globals_, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__, copy.__qualname__ = function.__kwdefaults__, function.__qualname__
    copy.__module__, copy.__doc__ = function.__module__, function.__doc__
    vars(copy).update(vars(function))
    wrapped = getattr(function, "__wrapped__", None)
    if id(wrapped) in copies:
        copy.__wrapped__ = copies[id(wrapped)]
    return copy


def _copied_cell(cell: CellType, names_for: NamesFor, copies: dict[int, Any]) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # empty yet
        return cell
    copy = _copied(content, names_for, copies)
    return cell if copy is content else CellType(copy)
