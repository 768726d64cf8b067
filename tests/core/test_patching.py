"""PatchSet: every change in somebody else's object goes through it, and is undone."""

import ast
import copy

import pytest
import torch

from deepspeed_alst.core.patching import ABSENT, PatchSet, add_properties, unwrap, wrap_once
from tests.test_layers import SOURCES

# What may change objects in other ways, and why.
EXEMPT = {
    "core.patching": "it is the service",
    "autoload": "runs within `import torch`, before anything of the package can be imported",
    "tiling.experts": "an expert's shell is the package's own module",
}
_BUILDERS = {"MethodType", "FunctionType", "setattr", "delattr", "exec", "eval"}
_ATTRIBUTES = {"forward", "__class__", "loss_function", "_loss_function", "__dict__"}


def other_ways(source: str) -> list[str]:
    """Places that change an object's behaviour without a PatchSet."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr in _ATTRIBUTES and ast.unparse(target.value) != "self":
                found.append(ast.unparse(node))
            if isinstance(target, ast.Subscript) and _is_namespace(target.value):
                found.append(ast.unparse(node))
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in _BUILDERS and (isinstance(function, ast.Name) or name.endswith("Type")):
            found.append(ast.unparse(node))
        if name in ("update", "pop", "setdefault") and isinstance(function, ast.Attribute):
            found += [ast.unparse(node)] if _is_namespace(function.value) else []
        # A tensor's own hook dies with its graph.
        if name.startswith("register_") and name.endswith("_hook") and name != "register_hook":
            found.append(ast.unparse(node))
    return found


def _is_namespace(node: ast.expr) -> bool:
    """Whether an expression is ``vars(x)`` or ``x.__dict__`` of anything but ``self``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars":
        return bool(node.args) and ast.unparse(node.args[0]) != "self"
    return isinstance(node, ast.Attribute) and node.attr == "__dict__" and ast.unparse(node.value) != "self"


@pytest.mark.parametrize(
    "source",
    [
        "module.forward = f",
        "output.__class__ = Other",
        "model.loss_function = f",
        "vars(module)['forward'] = f",
        "module.__dict__['forward'] = f",
        "vars(module).update(forward=f)",
        "vars(module).pop('forward')",
        "del module.forward",
        "setattr(module, name, f)",
        "types.MethodType(f, module)",
        "FunctionType(code, {})",
        "exec('module.forward = f')",
        "module.register_forward_hook(f)",
        "param.register_post_accumulate_grad_hook(f)",
    ],
)
def test_another_way_to_change_an_object_is_found(source):
    assert other_ways(source)


@pytest.mark.parametrize("source", ["self.forward = f", "patches.set(module, 'forward', f)", "loss.register_hook(f)"])
def test_what_changes_no_foreign_object_is_not_found(source):
    assert not other_ways(source)


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - EXEMPT.keys()))
def test_every_change_goes_through_a_patch_set(name):
    assert other_ways(SOURCES[name]) == []


@pytest.mark.parametrize("name", EXEMPT)
def test_an_exemption_is_needed(name):
    assert other_ways(SOURCES[name])


class Thing:
    """An object with an attribute, a method and a property."""

    value = 1

    def __init__(self) -> None:
        self.own = 2
        self._level = 3

    def method(self) -> int:
        """Return the class's number."""
        return self.value

    @property
    def level(self) -> int:
        """Return what the setter was given."""
        return self._level

    @level.setter
    def level(self, level: int) -> None:
        self._level = level


class Louder:
    """Methods that come before an object's own."""

    def shout(self) -> str:
        """Return the object's name and attribute."""
        return f"{type(self).__name__.upper()} {self.own}"


def test_everything_is_undone_in_reverse_order():
    thing, mapping, module = Thing(), {"a": 1, "b": 2}, torch.nn.Linear(2, 2)
    before = dict(vars(thing)), dict(mapping), dict(vars(module)), type(module)
    with PatchSet() as patches:
        patches.set(thing, "own", 20)
        patches.set(thing, "new", 21)
        patches.set(thing, "level", 22)
        patches.set(Thing, "value", 10)
        patches.wrap(thing, "method", lambda method: lambda: method() + 1)
        patches.wrap(thing, "method", lambda method: lambda: method() * 2)
        patches.entry(mapping, "a", 10)
        patches.entry(mapping, "c", 11)
        patches.entry(mapping, "b", ABSENT)
        patches.forward(module, lambda self, x: x + self.in_features)
        patches.subclass(module, {"extra": 5})
        patches.hook(module, "forward", lambda module, args, output: output * 10)
        patches.mixin(thing, Louder)
        assert (thing.own, thing.new, thing.level, thing.method()) == (20, 21, 22, 22)
        assert thing.shout() == "THING 20" and type(thing).__name__ == "Thing"
        assert mapping == {"a": 10, "c": 11}
        assert module(torch.ones(1)).item() == 30 and module.extra == 5
        assert len(patches.journal) == 12  # both wrappers are of one method
    assert patches.journal == []
    assert (
        (dict(vars(thing)), mapping, dict(vars(module)), type(module)) == before
        and type(thing) is Thing
        and Thing.value == 1
    )


def test_a_method_of_the_programs_own_is_given_back_also_if_it_came_later():
    thing = Thing()
    patches = PatchSet()
    patches.set(thing, "own", 20)
    thing.own = 30
    patches.set(thing, "own", 21)
    patches.close()
    assert thing.own == 30


def test_an_error_undoes_and_its_absence_does_not():
    thing = Thing()
    with pytest.raises(KeyError), PatchSet().rollback_on_error() as patches:
        patches.set(thing, "own", 20)
        raise KeyError
    assert thing.own == 2
    with PatchSet().rollback_on_error() as patches:
        patches.set(thing, "own", 20)
    assert thing.own == 20
    patches.close()
    assert thing.own == 2


def test_a_copy_of_a_module_binds_a_forward_of_its_own():
    module = torch.nn.Linear(2, 2)
    with PatchSet() as patches:
        patches.forward(module, lambda self: self)
        twin = copy.deepcopy(module)
        assert module.forward() is module and twin.forward() is twin


def test_a_library_is_wrapped_once_and_unwrapped():
    original = Thing.method
    for _ in range(2):
        wrap_once(Thing, "method", lambda method, self: method(self) + 1)
    assert Thing().method() == 2
    unwrap(Thing, "method")
    unwrap(Thing, "method")
    assert Thing.method is original


def test_an_output_is_given_properties_and_objects_of_its_class_are_not():
    thing, double = Thing(), property(lambda self: self.own * 2)
    add_properties(thing, double=double)
    assert thing.double == 4 and isinstance(thing, Thing) and not hasattr(Thing(), "double")
