"""Gated MLPs in closed form: ``down(act(gate(x)) * up(x))`` and its gradients, per tile, without a graph.

A tile's backward needs three values per row and inner feature, where autograd needs six or more (kernels/gated.py).

Legend: t rows of a tile, M model dim, F inner features.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import run_isolated, tolerance
from deepspeed_alst.tiling.weight_gradients import WeightGradients, refuse_foreign_weights

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Packages whose hooks do not change values.
_KNOWN_PACKAGES = ("deepspeed", "deepspeed_alst")
# Probe values of gate and up go up to sinh(10) = 11013; half of them are below 75.
_PROBE_VALUES, _PROBE_ROWS, _MAX_ASINH = 512, 4, 10.0


@dataclass(frozen=True)
class GatedMlp:
    """Linears of one gated MLP module."""

    activation: str
    """One of ``kernels.gated.ACTIVATIONS``."""
    gate_up: tuple[torch.nn.Linear, ...]
    """Linears of gate and up, or one Linear whose output has both as halves."""
    up_first: bool
    """True if up is the first of the two."""
    down: torch.nn.Linear

    def row_bytes(self, element_size: int) -> int:
        """Return the bytes per row in the backward: gate, up and ``d_a``. The forward needs the first two."""
        return 3 * self.down.in_features * element_size

    def forward(self, x_tM: torch.Tensor, out_tM: torch.Tensor) -> None:
        """Compute the module's output of one tile into ``out_tM``."""
        # Imported here to load Triton only if tiles are used.
        from deepspeed_alst.kernels.gated import gated_activation_

        gate_tF, up_tF = self.halves([_linear(x_tM, linear) for linear in self.gate_up])
        gated_activation_(gate_tF, up_tF, self.activation)
        _linear(gate_tF, self.down, out_tM)

    def backward(
        self, x_tM: torch.Tensor, grad_tM: torch.Tensor, sums: WeightGradients, out_tM: torch.Tensor | None
    ) -> None:
        """Compute gradients of one tile: of trainable weights into ``sums``, of ``x_tM`` into ``out_tM``, if any."""
        from deepspeed_alst.kernels.gated import gated_gradients_

        grads = [_linear(x_tM, linear) for linear in self.gate_up]  # outputs, overwritten by their gradients
        act_tF = grad_tM @ self.down.weight
        gated_gradients_(*self.halves(grads), act_tF, self.activation)
        add_linear_gradients(sums, self.down, grad_tM, act_tF)
        del act_tF
        for linear, grad in zip(self.gate_up, grads, strict=True):
            add_linear_gradients(sums, linear, grad, x_tM)
        if out_tM is not None:
            torch.mm(grads[0], self.gate_up[0].weight, out=out_tM)
            for linear, grad in zip(self.gate_up[1:], grads[1:], strict=True):
                torch.addmm(out_tM, grad, linear.weight, out=out_tM)

    def halves(self, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return gate and up, ``[t, F]``, as views of the outputs of ``gate_up``."""
        if len(outputs) == 1:
            outputs = outputs[0].split(self.down.in_features, 1)
        return outputs[::-1] if self.up_first else outputs


def _linear(x: torch.Tensor, linear: torch.nn.Linear, out: torch.Tensor | None = None) -> torch.Tensor:
    if linear.bias is None:
        return torch.mm(x, linear.weight.t(), out=out)
    return torch.addmm(linear.bias, x, linear.weight.t(), out=out)


def add_linear_gradients(sums: WeightGradients, linear: torch.nn.Linear, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Add the gradients of W and b in ``y = x W' + b``, from the gradient of y ``[t, features]``."""
    if linear.weight in sums:
        sums.add_product(linear.weight, grad, x)
    if linear.bias in sums:
        sums.add(linear.bias, grad.sum(0))


def allows_closed_form(module: torch.nn.Module, forward: Callable[..., Any], x: torch.Tensor) -> bool:
    """Return True if ``forward`` is the module's own, on plain tensors of one dtype, without user hooks or autocast."""
    if getattr(forward, "__func__", None) is not type(module).forward or torch.is_autocast_enabled(x.device.type):
        return False
    if any(_is_user_hook(hook) for kind in _HOOKS for hook in getattr(torch_modules, f"_global{kind}").values()):
        return False
    inner = [each for each in module.modules() if each is not module]
    if any("forward" in vars(each) or any(getattr(each, kind) for kind in _HOOKS) for each in inner):
        return False
    return all(
        param.dtype == x.dtype and param.device == x.device and not is_traceable_wrapper_subclass(param)
        for param in module.parameters()
    )


def has_user_hook(*modules: torch.nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Return True if a hook of the program sees the inputs or outputs of a module or of all.

    Args:
        modules: the modules.
        but: modules of the code whose hooks do not count, beside this package's and DeepSpeed's.
    """
    hooks = [*torch_modules._global_forward_hooks.values(), *torch_modules._global_forward_pre_hooks.values()]
    for module in modules:
        hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(_is_user_hook(hook) and hook.__module__ not in but for hook in hooks)


def _is_user_hook(hook: Any) -> bool:
    owner = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return owner.split(".")[0] not in _KNOWN_PACKAGES


def find_gated_mlp(
    module: torch.nn.Module, forward: Callable[..., Any], dims: int, device: torch.device
) -> GatedMlp | None:
    """Return the closed form of a module that computes exactly a gated MLP, or None.

    The code between the Linears runs in fp64 on values of all magnitudes, forward and backward, and must match a known
    activation. So a module with a factor, a clamp, an adapter or a norm has none. ``dims`` is the number of dims of its
    input.
    """
    linears = [each for each in module.modules() if type(each) is torch.nn.Linear]
    linear_params = {id(param) for linear in linears for param in linear.parameters()}
    if len(linears) not in (2, 3) or {id(param) for param in module.parameters()} != linear_params:
        return None
    if any(True for _ in module.buffers()):
        return None
    try:
        return run_isolated(_detect, forward, linears, dims, torch.device("cpu") if device.type == "meta" else device)
    except Exception:  # an arbitrary forward gets unexpected inputs
        return None


def _detect(
    forward: Callable[..., Any], linears: list[torch.nn.Linear], dims: int, device: torch.device
) -> GatedMlp | None:
    """Run a forward with Linears that return probe values, and find the closed form between them."""
    from deepspeed_alst.kernels.gated import ACTIVATIONS

    outputs = {linear: _probe_values(linear.out_features, dims, device, seed) for seed, linear in enumerate(linears)}
    x = _probe_values(linears[0].in_features, dims, device, len(linears))
    calls: list[tuple[torch.nn.Linear, torch.Tensor]] = []

    def record(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append((linear, x))
        return outputs[linear]

    with PatchSet() as patches:
        for linear in linears:
            patches.set(linear, "forward", functools.partial(record, linear))
        result = forward(x)
    *first, (down, act) = calls
    each_once = len(calls) == len(linears) == len({linear for linear, _ in calls})
    F, sizes = down.in_features, {linear.out_features for linear, _ in first}
    if not each_once or result is not outputs[down] or any(given is not x for _, given in first):
        return None
    if sizes != {F * 2 // len(first)} or act.shape[-1] != F:
        return None
    gate_up = [outputs[linear] for linear, _ in first]
    refuse_foreign_weights([act], gate_up, "the activation")
    grad = torch.cos(torch.arange(act.numel(), dtype=act.dtype, device=act.device)).view_as(act)
    grads = torch.autograd.grad(act, gate_up, grad)
    forms = (
        GatedMlp(activation, tuple(linear for linear, _ in first), up_first, down)
        for activation in ACTIVATIONS
        for up_first in (False, True)
    )
    return next((form for form in forms if _matches(form, gate_up, act, grad, grads)), None)


def _matches(
    form: GatedMlp, gate_up: list[torch.Tensor], act: torch.Tensor, grad: torch.Tensor, grads: tuple[torch.Tensor, ...]
) -> bool:
    """Return True if a closed form maps ``gate_up`` to ``act``, and the gradient ``grad`` of it to ``grads``."""
    from deepspeed_alst.kernels.gated import gated_gradients_

    *found, found_act = (each.detach().flatten(0, -2).clone() for each in (*gate_up, grad))
    gated_gradients_(*form.halves(found), found_act, form.activation)
    pairs = zip((found_act, *found), (act.detach(), *grads), strict=True)
    # FastGELU has ten-digit constants; another activation or a clamp differs by more than 1e-5.
    limit = tolerance(torch.float64)
    return all(torch.allclose(one, true.flatten(0, -2), rtol=limit, atol=limit) for one, true in pairs)


def _probe_values(features: int, dims: int, device: torch.device, seed: int) -> torch.Tensor:
    """Return shuffled values of all magnitudes, with the number of dims that the module expects."""
    rows = max(_PROBE_ROWS, -(-_PROBE_VALUES // features))
    order = torch.randperm(rows * features, generator=torch.Generator().manual_seed(seed), device="cpu")
    values = torch.linspace(-_MAX_ASINH, _MAX_ASINH, rows * features, dtype=torch.float64, device="cpu").sinh()[order]
    return values.view(*[1] * (dims - 2), rows, features).to(device).requires_grad_()
