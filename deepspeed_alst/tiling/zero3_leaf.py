"""ZeRO-3 leaf modules, gathered as a whole before they run: tiled modules, and modules that run some experts only."""

from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError


class ZeRO3Leaves:
    """Marks ZeRO-3 leaf modules of one model before its engine is built; a no-op on other stages."""

    def __init__(self, model: torch.nn.Module, stage: int, patches: PatchSet) -> None:
        self._model, self._stage, self._patches = model, stage, patches

    def __call__(self, module: torch.nn.Module) -> None:
        """Make a module a leaf module, so that its weights and its children's are gathered once per pass.

        DeepSpeed 0.19.8 releases a leaf's weights once the gradient of its input exists. Without one (the layers before
        it are frozen) that is before the weight gradients exist, so the input is made to require a gradient.

        Raises:
            UnsupportedModelError: another module shares one of the weights. DeepSpeed reduces a leaf's gradients at the
                end of its backward, so the other module's part would be lost.
        """
        if self._stage != 3 or not list(module.children()):
            return  # a module without children is gathered as a whole anyway
        self._refuse_shared_weights(module)
        self._patches.set(module, "_z3_leaf", True)  # as deepspeed.utils.set_z3_leaf_module
        # Runs first, because it is registered before DeepSpeed's hooks.
        self._patches.hook(module, "forward_pre", _require_input_grad, with_kwargs=True)

    def _refuse_shared_weights(self, module: torch.nn.Module) -> None:
        inside = {id(each) for each in module.modules()}
        own = {id(param) for param in module.parameters()}
        for name, other in self._model.named_modules():
            shared = [key for key, param in other.named_parameters(recurse=False) if id(param) in own]
            if shared and id(other) not in inside:
                raise UnsupportedModelError(
                    f"{type(module).__name__} shares a weight with {name}.{shared[0]}, which ZeRO-3 does not support "
                    "for a tiled module (alst.tiled_mlp_compute, alst.tiled_logits_loss) or a mixture with one module "
                    "per expert. Set the keys to false, or use ZeRO stage 2."
                )


def _require_input_grad(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    trains = any(param.requires_grad for param in module.parameters())
    if not trains or not torch.is_grad_enabled() or not args or args[0].requires_grad:
        return None
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs
