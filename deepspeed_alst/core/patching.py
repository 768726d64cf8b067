"""Patch objects of DeepSpeed, transformers or the program, and undo every patch in reverse order.

Nothing else in the package assigns ``forward``, a class or a loss to a foreign object, registers a hook on one, or
builds a copy of a function. transformers' forwards call functions by global names that all models of a family share; a
copy for one model is the same code with another dict of globals.
"""

import builtins
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

OWNED = "_deepspeed_alst_engine"
"""Attribute of a model that an engine of this package has patched: a list of a weak reference to the engine."""

ABSENT: Any = object()
"""Stands for a missing attribute or entry."""

NamesFor = Callable[[FunctionType], Mapping[str, Any]]
"""Returns a function's replaced global names; empty if the function stays as it is."""

_ORIGINAL = "__deepspeed_alst__"


@dataclass(eq=False)
class Patch:
    """One change in a foreign object, as the journal lists it; of an attribute with its values."""

    owner: Any
    name: str
    kind: str
    before: Any = None
    value: Any = None


class PatchSet(ExitStack):
    """Own a set of patches; closing it undoes them, the last one first."""

    def __init__(self) -> None:
        super().__init__()
        self.journal: list[Patch] = []
        """The patches that are in place."""
        self._attributes: dict[tuple[int, str], Patch] = {}

    @contextlib.contextmanager
    def rollback_on_error(self) -> Iterator["PatchSet"]:
        """Undo everything if the body raises."""
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object, a class or a module; a property is set by its setter.

        A value that the program has set over an earlier patch becomes the one that is restored.
        """
        is_property = isinstance(getattr(type(owner), name, None), property)
        now = getattr(owner, name) if is_property else vars(owner).get(name, ABSENT)
        patch = self._attributes.get((id(owner), name))
        if patch is None:
            patch = self._attributes[id(owner), name] = Patch(owner, name, "attribute", now)
            self._note(patch, self._restore, patch)
        elif now is not patch.value:
            patch.before = now
        patch.value = value
        setattr(owner, name, value)

    def _note(self, patch: Patch, undo: Callable[..., Any], *args: Any) -> None:
        self.journal.append(patch)
        self.callback(self.journal.remove, patch)  # after the undo: callbacks run in reverse
        self.callback(undo, *args)

    def _restore(self, patch: Patch) -> None:
        del self._attributes[id(patch.owner), patch.name]
        if patch.before is not ABSENT:
            setattr(patch.owner, patch.name, patch.before)
        elif patch.name in vars(patch.owner):
            delattr(patch.owner, patch.name)

    def wrap(self, owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        """Replace a method by ``wrapper(method)``, on this object alone."""
        self.set(owner, name, wrapper(getattr(owner, name)))

    def forward(self, module: Any, forward: Callable[..., Any]) -> None:
        """Replace a module's forward by ``forward(self, ...)``; a copy of the module binds its own."""
        self.set(module, "forward", MethodType(forward, module))

    def subclass(self, owner: Any, attributes: dict[str, Any], *bases: type) -> None:
        """Give an object a subclass of its class that has other attributes, methods or further bases."""
        self._set_class(owner, subclass(type(owner), attributes, *bases))

    def mixin(self, owner: Any, cls: type) -> None:
        """Give an object a subclass of its class in which another class's methods come first."""
        before = type(owner)
        self._set_class(owner, type(before.__name__, (cls, before), {"__module__": before.__module__}))

    def _set_class(self, owner: Any, cls: type) -> None:
        self._note(Patch(owner, "__class__", "class"), setattr, owner, "__class__", type(owner))
        owner.__class__ = cls

    def hook(self, owner: Any, kind: str, function: Callable[..., Any], **options: Any) -> None:
        """Register a hook by ``owner.register_<kind>_hook``."""
        handle = getattr(owner, f"register_{kind}_hook")(function, **options)
        self._note(Patch(owner, kind, "hook"), handle.remove)

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of a dict, or delete it if the value is ABSENT."""
        self._note(Patch(mapping, str(key), "entry"), set_entry, mapping, key, mapping.get(key, ABSENT))
        set_entry(mapping, key, value)


def subclass(cls: type, attributes: dict[str, Any], *bases: type) -> type:
    """Derive a class of the same name from a class and further bases."""
    return type(cls.__name__, (cls, *bases), {"__module__": cls.__module__, **attributes})


def add_properties(owner: Any, **properties: property) -> None:
    """Give an object properties for its life: an output of a forward is never restored."""
    owner.__class__ = _with_properties(type(owner), tuple(properties.items()))


@functools.cache
def _with_properties(cls: type, properties: tuple[tuple[str, property], ...]) -> type:
    return subclass(cls, dict(properties))


def wrap_once(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Run ``around(original, ...)`` as a function of a library for the life of the process; not a second time."""
    original = vars(owner)[name]
    if hasattr(original, _ORIGINAL):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _ORIGINAL, original)
    setattr(owner, name, wrapped)


def unwrap(owner: Any, name: str) -> None:
    """Undo ``wrap_once``, if it was called."""
    setattr(owner, name, getattr(vars(owner)[name], _ORIGINAL, vars(owner)[name]))


def set_entry(mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    """Set an entry of a dict, or delete it if the value is ABSENT."""
    if value is ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def importing(name: str, wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Return builtins that give a function ``wrap(value)`` if its body imports a name; for ``copy_function``."""

    def own_import(*args: Any, **kwargs: Any) -> Any:
        module = builtins.__import__(*args, **kwargs)
        from_list = (args[3] if len(args) > 3 else kwargs.get("fromlist")) or ()
        if name not in from_list:
            return module
        return SimpleNamespace(
            **{each: getattr(module, each) for each in from_list} | {name: wrap(getattr(module, name))}
        )

    return {"__builtins__": {**vars(builtins), "__import__": own_import}}


def copy_function(
    function: Any,
    names_for: NamesFor = lambda function: {},
    replace: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Copy a callable with other global names or other bound objects; return it as it is if nothing changes.

    Args:
        function: function, method or partial. Functions in its closures and partials are copied the same way.
        names_for: called with each function.
        replace: called with each value that is bound to one, in a closure, as ``self`` or as a partial argument.
    """
    copies: dict[int, Any] = {}  # a function in its own closure is copied once

    def copy(value: Any) -> Any:
        if (other := replace(value)) is not value:
            return other
        if isinstance(value, MethodType):
            parts = copy(value.__func__), copy(value.__self__)
            return value if parts == (value.__func__, value.__self__) else MethodType(*parts)
        if isinstance(value, functools.partial):
            keywords = {name: copy(each) for name, each in value.keywords.items()}
            return functools.partial(copy(value.func), *map(copy, value.args), **keywords)
        if not isinstance(value, FunctionType):
            return value
        if id(value) not in copies:
            copies[id(value)] = value
            cells = tuple(_copy_cell(cell, copy) for cell in value.__closure__ or ())
            copies[id(value)] = _rebuild(value, names_for(value), cells, copies)
        return copies[id(value)]

    return copy(function)


def _copy_cell(cell: CellType, copy: Callable[[Any], Any]) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # still empty
        return cell
    other = copy(content)
    return cell if other is content else CellType(other)


def _rebuild(
    function: FunctionType, names: Mapping[str, Any], cells: tuple[CellType, ...], copies: dict[int, Any]
) -> FunctionType:
    if not names and all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True)):
        return function
    globals_ = {**function.__globals__, **names} if names else function.__globals__
    if names:  # with __name__ set, torch.compile would look up the names in that module
        globals_.pop("__name__", None)
    # torch.compile caches by code object.
    code = function.__code__.replace()
    copy = functools.update_wrapper(FunctionType(code, globals_, None, function.__defaults__, cells), function)
    copy.__kwdefaults__ = function.__kwdefaults__
    del copy.__wrapped__
    if hasattr(function, "__wrapped__"):
        copy.__wrapped__ = copies.get(id(function.__wrapped__), function.__wrapped__)
    return copy
