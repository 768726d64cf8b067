"""Patch objects of DeepSpeed, transformers or the program, and undo every patch in reverse order.

Nothing else in the package assigns ``forward``, a class or a loss to a foreign object, or registers a hook on one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any

OWNED = "_deepspeed_alst_engine"
"""Attribute of a model that an engine of this package has patched."""

ABSENT: Any = object()
"""Stands for an attribute or entry that there was not."""

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

        What the program has set in the place of an earlier patch becomes what is restored.
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
        self._note(Patch(owner, "__class__", "class"), setattr, owner, "__class__", type(owner))
        owner.__class__ = subclass(type(owner), attributes, *bases)

    def mixin(self, owner: Any, cls: type) -> None:
        """Give an object a subclass of its class in which another class's methods come first."""
        before = type(owner)
        self._note(Patch(owner, "__class__", "class"), setattr, owner, "__class__", before)
        owner.__class__ = type(before.__name__, (cls, before), {"__module__": before.__module__})

    def hook(self, owner: Any, kind: str, function: Callable[..., Any], **options: Any) -> None:
        """Register a hook by ``owner.register_<kind>_hook``."""
        handle = getattr(owner, f"register_{kind}_hook")(function, **options)
        self._note(Patch(owner, kind, "hook"), handle.remove)

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of a dict, or delete it if the value is ABSENT."""
        self._note(Patch(mapping, str(key), "entry"), set_entry, mapping, key, mapping.get(key, ABSENT))
        set_entry(mapping, key, value)


def subclass(cls: type, attributes: dict[str, Any], *bases: type) -> type:
    """Derive a class that goes by the same name, from it and further bases."""
    return type(cls.__name__, (cls, *bases), {"__module__": cls.__module__, **attributes})


def add_properties(owner: Any, **properties: property) -> None:
    """Give an object properties, for its life: an output of a forward, which nobody gives back."""
    owner.__class__ = _with_properties(type(owner), tuple(properties.items()))


@functools.cache
def _with_properties(cls: type, properties: tuple[tuple[str, property], ...]) -> type:
    return subclass(cls, dict(properties))


def wrap_once(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Wrap a function of a library for the life of the process; a second call does nothing."""
    original = vars(owner)[name]
    if not hasattr(original, _ORIGINAL):
        wrapped = functools.wraps(original)(wrapper(original))
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
