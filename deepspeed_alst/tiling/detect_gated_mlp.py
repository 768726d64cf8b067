"""Detection of gated MLPs, by running a module with Linears that return chosen values.

Modules are not recognized by name. The code between the Linears runs in fp64 on values of all magnitudes, forward and
backward, and must match a known activation to the last digits; the module must have no weights but its Linears'. So a
module with anything more (a factor, a clamp, an adapter, a norm) runs unchanged.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.tiling.gated_mlp import GatedMlp
from deepspeed_alst.tiling.weight_gradients import refuse_foreign_weights

# Packages whose hooks do not change values: DeepSpeed's gather weights, this package's are known.
_HARMLESS = ("deepspeed", "deepspeed_alst")
# Values of gate and up go up to sinh(10) = 11013, half of them below 75.
_PROBED_VALUES, _PROBED_ROWS, _REACH = 512, 4, 10.0
# FastGELU has ten-digit constants; another activation or a clamp differs by more than 1e-5.
_EXACT = 1e-9
# Relative to a value's norm, in roundings of its dtype; TF32, used by both paths, has 10 bits.
_ROUNDINGS, _LEAST = 8, 1e-3


class ClosedForm:
    """Closed form of one module, detected on first use and again when the module changes.

    Args:
        module: the module.
        forward: forward of the module.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward
        self._state: tuple[Any, ...] | None = None
        self._found: GatedMlp | None = None
        self._disagrees = False

    def now(self, x: torch.Tensor, dims: int) -> GatedMlp | None:
        """Return the module as a gated MLP; None if it is not one, or if hooks observe its calls.

        Args:
            x: a tensor like its input.
            dims: number of dims of its input.
        """
        if self._disagrees or not self._is_plain(x):
            return None
        state = (self._module.training, dims, *dropout_rates(self._module).values(), *self._module.modules())
        if state != self._state:
            self._found, self._state = find_gated_mlp(self._module, self._forward, dims, x.device), state
        return self._found

    def check(self, x_tM: torch.Tensor, dims: int, value_tM: torch.Tensor) -> None:
        """Compare with the module's own output on some rows; disable the closed form if they differ beyond rounding."""
        form = self.now(x_tM, dims)
        if form is not None:
            made_tM = torch.empty_like(value_tM)
            form.forward(x_tM, made_tM)
            most = max(_ROUNDINGS * torch.finfo(x_tM.dtype).eps, _LEAST)
            self._disagrees = not (made_tM - value_tM).norm() <= most * value_tM.norm()

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Return True if the module's own forward runs on plain tensors of one dtype, without foreign hooks."""
        if getattr(self._forward, "__func__", None) is not type(self._module).forward:
            return False
        if torch.is_autocast_enabled(x.device.type) or any(is_foreign(hook) for hook in _global_hooks()):
            return False
        if any(_is_touched(inner) for inner in self._module.modules() if inner is not self._module):
            return False
        return all(
            param.dtype == x.dtype and param.device == x.device and not is_traceable_wrapper_subclass(param)
            for param in self._module.parameters()
        )


def dropout_rates(module: torch.nn.Module) -> dict[str, float]:
    """Return the dropout rates in a module by location; a program may change them."""
    dropouts = [(name, each) for name, each in module.named_modules() if isinstance(each, torch.nn.Dropout)]
    own = {name: rate for name, rate in vars(module).items() if "dropout" in name and isinstance(rate, float)}
    return {f"{name}.p": each.p for name, each in dropouts} | own


def is_foreign(hook: Any) -> bool:
    """Return True if a hook is neither this package's nor DeepSpeed's."""
    owner = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return owner.split(".")[0] not in _HARMLESS


def _global_hooks() -> Iterable[Any]:
    for hooks in (
        torch_modules._global_forward_pre_hooks,
        torch_modules._global_forward_hooks,
        torch_modules._global_backward_pre_hooks,
        torch_modules._global_backward_hooks,
    ):
        yield from hooks.values()


def _is_touched(module: torch.nn.Module) -> bool:
    """Return True if a module has a replaced forward or hooks."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return "forward" in vars(module) or any(hooks)


def find_gated_mlp(
    module: torch.nn.Module, forward: Callable[..., Any], dims: int, device: torch.device
) -> GatedMlp | None:
    """Return the module as a gated MLP; None if it is not one.

    Args:
        module: two or three Linears, and modules without weights.
        forward: forward of the module.
        dims: number of dims of its input.
        device: device to run the code between the Linears on.
    """
    linears = [each for each in module.modules() if type(each) is torch.nn.Linear]
    of_linears = {id(param) for linear in linears for param in linear.parameters()}
    if len(linears) not in (2, 3) or {id(param) for param in module.parameters()} != of_linears:
        return None
    if any(True for _ in module.buffers()):
        return None
    try:
        return run_isolated(_prove, forward, linears, dims, torch.device("cpu") if device.type == "meta" else device)
    except Exception:  # an arbitrary forward gets inputs that it does not expect
        return None


def _prove(
    forward: Callable[..., Any], linears: list[torch.nn.Linear], dims: int, device: torch.device
) -> GatedMlp | None:
    outputs = {linear: _probe(linear.out_features, dims, device, seed) for seed, linear in enumerate(linears)}
    x = _probe(linears[0].in_features, dims, device, len(linears))
    calls: list[tuple[torch.nn.Linear, torch.Tensor]] = []

    def returning(linear: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        def returns(given: torch.Tensor) -> torch.Tensor:
            calls.append((linear, given))
            return outputs[linear]

        return returns

    with PatchSet() as patches:
        for linear in linears:
            patches.set(linear, "forward", returning(linear))
        value = forward(x)
    (*first, (down, act)) = calls
    each_once = len(calls) == len(linears) == len({id(linear) for linear, _ in calls})
    if not each_once or value is not outputs[down] or any(given is not x for _, given in first):
        return None
    made = [outputs[linear] for linear, _ in first]
    refuse_foreign_weights([act], made, "what lies between them")
    return _by_activation([linear for linear, _ in first], down, made, act)


def _by_activation(
    first: list[torch.nn.Linear], down: torch.nn.Linear, made: list[torch.Tensor], act: torch.Tensor
) -> GatedMlp | None:
    """Return the closed form whose activation and order map ``made`` to ``act``, with the same gradients."""
    from deepspeed_alst.kernels.gated import ACTIVATIONS

    if sum(linear.out_features for linear in first) != 2 * down.in_features or act.shape[-1] != down.in_features:
        return None
    if any(linear.out_features % down.in_features for linear in first):
        return None
    seed = torch.cos(torch.arange(act.numel(), dtype=act.dtype, device=act.device)).view_as(act)
    grads = torch.autograd.grad(act, made, seed)
    for activation in ACTIVATIONS:
        for turned in (False, True):
            pairs = first[::-1] if turned else first
            form = GatedMlp(activation, tuple(pairs), turned and len(first) == 1, down)
            if _makes(form, made[::-1] if turned else made, act, grads[::-1] if turned else grads, seed):
                return form
    return None


def _makes(
    form: GatedMlp, made: Iterable[torch.Tensor], act: torch.Tensor, grads: Iterable[torch.Tensor], seed: torch.Tensor
) -> bool:
    from deepspeed_alst.kernels.gated import gated_gradients_

    rows = [each.detach().flatten(0, -2).clone() for each in made]
    found = seed.flatten(0, -2).clone()
    with torch.no_grad():
        gated_gradients_(*form.halves(rows), found, form.activation)
    pairs = zip((found, *rows), (act.detach(), *grads), strict=True)
    return all(
        bool(((one - true.flatten(0, -2)).abs() <= _EXACT * (1 + true.flatten(0, -2).abs())).all())
        for one, true in pairs
    )


def _probe(features: int, dims: int, device: torch.device, seed: int) -> torch.Tensor:
    """Return shuffled values of all magnitudes, with the number of dims that the module expects."""
    rows = max(_PROBED_ROWS, -(-_PROBED_VALUES // features))
    order = torch.randperm(rows * features, generator=torch.Generator().manual_seed(seed), device="cpu")
    values = torch.linspace(-_REACH, _REACH, rows * features, dtype=torch.float64, device="cpu").sinh()[order]
    return values.view(*[1] * (dims - 2), rows, features).to(device).requires_grad_()
