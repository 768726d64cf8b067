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

ORIGINAL = "__deepspeed_alst__"
"""The attribute of a wrapper by ``wrap_once`` that holds what it wraps."""

ABSENT: Any = object()
"""Stands for an attribute or entry that there was not."""


@dataclass(eq=False)
class Patch:
    """One change in somebody else's object, as the journal lists it."""

    owner: Any
    name: str
    kind: str
    before: Any = None
    value: Any = None


class PatchSet(ExitStack):
    """Own a set of patches; closing it undoes them, the last one first."""

    def __init__(self) -> None:
        super().__init__()
        self._patches: dict[tuple[int, str, str], Patch] = {}
        self._absorbed: list[PatchSet] = []

    @property
    def journal(self) -> list[Patch]:
        """Return the patches that are in place."""
        return [*self._patches.values(), *(patch for each in self._absorbed for patch in each.journal)]

    @contextlib.contextmanager
    def rollback_on_error(self) -> Iterator["PatchSet"]:
        """Undo everything if the body raises."""
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def absorb(self, other: "PatchSet") -> None:
        """Undo another set's patches together with this one's."""
        self._absorbed.append(other)
        self.callback(other.close)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object, a class or a module; a property is set by its setter.

        What the program has set in the place of an earlier patch becomes what is restored.
        """
        is_property = isinstance(getattr(type(owner), name, None), property)
        now = getattr(owner, name) if is_property else vars(owner).get(name, ABSENT)
        patch = self._patches.get((id(owner), name, "attribute"))
        if patch is None:
            patch = Patch(owner, name, "attribute", now)
            self._add(patch, _restore_attribute, patch)
        elif now is not patch.value:
            patch.before = now
        patch.value = value
        setattr(owner, name, value)

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

    def hook(self, owner: Any, kind: str, function: Callable[..., Any], **options: Any) -> None:
        """Register a hook by ``owner.register_<kind>_hook``."""
        handle = getattr(owner, f"register_{kind}_hook")(function, **options)
        self._add(Patch(owner, f"{kind} {handle.id}", "hook"), handle.remove)

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of a dict."""
        before = mapping.get(key, ABSENT)
        mapping[key] = value
        self.record_entry(mapping, key, before)

    def remove_entry(self, mapping: MutableMapping[Any, Any], key: Any) -> None:
        """Delete an entry of a dict."""
        self.record_entry(mapping, key, mapping.pop(key))

    def record_entry(self, mapping: MutableMapping[Any, Any], key: Any, before: Any) -> None:
        """Record a change of a dict's entry that a library has made; ``before`` is ABSENT if there was none."""
        self._add(Patch(mapping, str(key), "entry", before), set_entry, mapping, key, before)

    def _set_class(self, owner: Any, cls: type) -> None:
        before = type(owner)
        owner.__class__ = cls
        self._add(Patch(owner, "__class__", "class", before), setattr, owner, "__class__", before)

    def _add(self, patch: Patch, undo: Callable[..., Any], *args: Any) -> None:
        key = (id(patch.owner), patch.name, patch.kind)
        self._patches[key] = patch

        def undo_it() -> None:
            undo(*args)
            self._patches.pop(key, None)

        self.callback(undo_it)


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
    if not hasattr(original, ORIGINAL):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, ORIGINAL, original)
        setattr(owner, name, wrapped)


def unwrap(owner: Any, name: str) -> None:
    """Undo ``wrap_once``, if it was called."""
    setattr(owner, name, getattr(vars(owner)[name], ORIGINAL, vars(owner)[name]))


def set_entry(mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    """Set an entry of a dict, or delete it if the value is ABSENT."""
    if value is ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _restore_attribute(patch: Patch) -> None:
    if patch.before is not ABSENT:
        setattr(patch.owner, patch.name, patch.before)
    elif patch.name in vars(patch.owner):
        delattr(patch.owner, patch.name)
