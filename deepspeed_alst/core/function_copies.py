"""Copies of a function that resolve some global names differently, or work on other objects.

transformers' forwards call functions by a global name that all models of a family share; a copy for one model is the
same code with another dict of globals.
"""

import builtins
import functools
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

NamesFor = Callable[[FunctionType], Mapping[str, Any]]
"""Returns a function's replaced global names; empty if the function stays as it is."""


def with_names(function: Any, names_for: NamesFor) -> Any:
    """Copy a function or method with other values of some global names.

    Functions and methods in its closure are copied the same way. Returns the function itself if nothing changes.
    """
    return _Copier(names_for, lambda value: value).copy(function)


def importing(name: str, wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Return builtins that give a function ``wrap(value)`` if its body imports a name; for ``with_names``."""

    def own_import(*args: Any, **kwargs: Any) -> Any:
        module = builtins.__import__(*args, **kwargs)
        from_list = args[3] if len(args) > 3 else kwargs.get("fromlist")
        if name not in (from_list or ()):
            return module
        return SimpleNamespace(
            **{each: getattr(module, each) for each in from_list} | {name: wrap(getattr(module, name))}
        )

    return {"__builtins__": {**vars(builtins), "__import__": own_import}}


def with_objects(function: Any, replaced: Callable[[Any], Any]) -> Any:
    """Copy a callable with ``replaced(value)`` for each value bound to it, in closures or as partial arguments.

    Returns the callable itself if nothing changes.
    """
    return _Copier(lambda _: {}, replaced).copy(function)


class _Copier:
    """Copier of a callable and all functions in it; one that is in its own closure is copied once."""

    def __init__(self, names_for: NamesFor, replaced: Callable[[Any], Any]) -> None:
        self._names_for, self._replaced = names_for, replaced
        self._copies: dict[int, Any] = {}

    def copy(self, value: Any) -> Any:
        if (other := self._replaced(value)) is not value:
            return other
        if isinstance(value, MethodType):
            parts = self.copy(value.__func__), self.copy(value.__self__)
            return value if parts == (value.__func__, value.__self__) else MethodType(*parts)
        if isinstance(value, functools.partial):
            keywords = {name: self.copy(each) for name, each in value.keywords.items()}
            return functools.partial(self.copy(value.func), *map(self.copy, value.args), **keywords)
        if not isinstance(value, FunctionType):
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = value
            self._copies[id(value)] = self._copy(value)
        return self._copies[id(value)]

    def _copy(self, function: FunctionType) -> FunctionType:
        cells = tuple(self._copy_cell(cell) for cell in function.__closure__ or ())
        names = self._names_for(function)
        if not names and all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True)):
            return function
        globals_ = function.__globals__
        if names:
            globals_ = {**globals_, **names}
            # With __name__ set, torch.compile would look up the names in that module.
            globals_.pop("__name__", None)
        # torch.compile caches by code object.
        code = function.__code__.replace()
        copy = FunctionType(code, globals_, function.__name__, function.__defaults__, cells)
        copy.__kwdefaults__, copy.__qualname__ = function.__kwdefaults__, function.__qualname__
        copy.__module__, copy.__doc__ = function.__module__, function.__doc__
        vars(copy).update(vars(function))
        wrapped = getattr(function, "__wrapped__", None)
        if id(wrapped) in self._copies:
            copy.__wrapped__ = self._copies[id(wrapped)]
        return copy

    def _copy_cell(self, cell: CellType) -> CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # still empty
            return cell
        copy = self.copy(content)
        return cell if copy is content else CellType(copy)
