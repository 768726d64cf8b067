"""Modules whose weights ZeRO-3 gathers as one, before the module runs: in tiles, or with some of its experts."""

from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError


class Leaves:
    """Makes modules of one model ZeRO-3 leaves, before its engine is built; on other stages there is nothing to do.

    Args:
        model: that the modules are part of.
        stage: of ZeRO.
        patches: takes everything back.
    """

    def __init__(self, model: torch.nn.Module, stage: int, patches: PatchSet) -> None:
        self._model, self._stage, self._patches = model, stage, patches

    def __call__(self, module: torch.nn.Module) -> None:
        """Have the weights of a module and of those in it gathered once a pass.

        DeepSpeed 0.19.8 releases a leaf's weights when the gradient of its input is there: before those of the weights,
        if the input needs none (layers before it are frozen). So the input is given a gradient, which nobody looks at.

        Raises:
            UnsupportedModelError: another module has one of the weights too. DeepSpeed reduces a leaf's gradients when
                its backward ends, so that the other's part would be lost.
        """
        if self._stage != 3 or not list(module.children()):
            return  # a module without others in it is gathered as one in any case
        self._refuse_shared_weights(module)
        self._patches.set(module, "_z3_leaf", True)  # as deepspeed.utils.set_z3_leaf_module
        # Registered before DeepSpeed's own hooks, so it comes first.
        self._patches.hook(module, "forward_pre", _give_gradient, with_kwargs=True)

    def _refuse_shared_weights(self, module: torch.nn.Module) -> None:
        inside = {id(each) for each in module.modules()}
        own = {id(param) for param in module.parameters()}
        for name, other in self._model.named_modules():
            shared = [key for key, param in other.named_parameters(recurse=False) if id(param) in own]
            if shared and id(other) not in inside:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has a weight that is also {name}.{shared[0]}: under ZeRO-3 it cannot run "
                    "in tiles (alst.tiled_mlp_compute, alst.tiled_logits_loss), nor be a mixture with experts of their "
                    "own. Set the keys to false, or use ZeRO 2."
                )


def _give_gradient(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    trains = any(param.requires_grad for param in module.parameters())
    if not trains or not torch.is_grad_enabled() or not args or args[0].requires_grad:
        return None
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs
