"""Record a run for comparison with another: losses, norms, layer outputs, gradients and weights.

Wraps a DeepSpeed engine from outside, with or without this package in it.

Legend: S tokens of the whole sequence, s of this rank's shard, H hidden.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from safetensors.torch import save_file

from deepspeed_alst.cli.launch import PROGRESS
from deepspeed_alst.core.patching import PatchSet

LARGEST = 2**20
"""Maximum number of recorded elements per parameter; a larger one is sampled at even spacing."""
_POSITIONS = 512


class Recorder:
    """Recorder of an engine's first steps. All ranks must create one: gathering weights is collective."""

    def __init__(self, engine: Any, folder: Path, steps: int, then: Callable[[], None]) -> None:
        """Wrap ``engine.backward`` and ``engine.step``.

        Args:
            engine: DeepSpeed engine.
            folder: receives ``record.json`` and ``.safetensors`` files.
            steps: number of optimizer steps.
            then: called after the last step.
        """
        self._engine, self._folder, self._steps, self._then = engine, folder, steps, then
        self._losses: list[torch.Tensor] = []
        self._curve: dict[str, list[float | None]] = {"loss": [], "norm": []}
        self._start = self._gather(_weight)
        self._backward, self._step = engine.backward, engine.step
        engine.backward, engine.step = self.backward, self.step
        self._layers = _LayerOutputs(engine.module)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Record the loss, then run ``engine.backward``."""
        # With scale_wrt_gas=False the caller has already divided by the accumulation steps.
        divided = kwargs.get("scale_wrt_gas") is False
        factor = self._engine.gradient_accumulation_steps() if divided else 1
        self._losses.append(loss.detach().double().cpu() * factor)
        self._layers.close()
        return self._backward(loss, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``engine.step``, and record at gradient accumulation boundaries."""
        if not self._engine.is_gradient_accumulation_boundary():
            return self._step(*args, **kwargs)
        if not self._curve["loss"]:
            self._save("gradients", self._gather(_gradient))
        result = self._step(*args, **kwargs)
        self._note_step()
        if len(self._curve["loss"]) == self._steps:
            self._finish()
        return result

    def _note_step(self) -> None:
        loss = torch.stack(self._losses).mean().to(self._engine.device, torch.float32)
        dist.all_reduce(loss)
        self._losses.clear()
        self._curve["loss"].append(float(loss) / dist.get_world_size())
        norm = self._engine.get_global_grad_norm()  # DeepSpeed has none at stage 0 in fp32
        self._curve["norm"].append(None if norm is None else float(norm))
        if dist.get_rank() == 0:
            done, mean = len(self._curve["loss"]), self._curve["loss"][-1]
            print(f"{PROGRESS} {self._folder.name}: step {done} of {self._steps}, loss {mean:.6g}", flush=True)

    def _finish(self) -> None:
        self._save("changes", {name: end - self._start[name] for name, end in self._gather(_weight).items()})
        self._layers.save(self._folder / f"layers-{dist.get_rank()}.safetensors")
        if dist.get_rank() == 0:
            record = {**self._curve, "parameters": list(self._start)}  # .safetensors files do not keep the order
            (self._folder / "record.json").write_text(json.dumps(record))
        dist.barrier()
        self._then()

    def _gather(self, read: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Read a tensor of each trainable parameter; rank 0 keeps at most ``LARGEST`` elements of each."""
        found = {}
        for name, param in self._engine.module.named_parameters():
            if param.requires_grad:
                whole = read(param)
                if dist.get_rank() == 0:
                    found[name.replace("_orig_mod.", "")] = _thinned(whole).float().cpu().clone()
        return found

    def _save(self, kind: str, tensors: dict[str, torch.Tensor]) -> None:
        if dist.get_rank() == 0:
            save_file(tensors, self._folder / f"{kind}.safetensors")


class _LayerOutputs:
    """Layer outputs of the first forward on this rank: ``[B, s, H]``, or a subset of its tokens."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._found: dict[str, torch.Tensor] = {}
        self._sizes: dict[str, str] = {}
        self._patches = PatchSet()
        for name, layer in layers_of(model).items():
            self._patches.hook(layer, "forward", partial(self._keep, name))

    def _keep(self, name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not torch.is_grad_enabled():  # model check or evaluation
            return
        if name in self._found or not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            return
        stride = max(1, hidden.shape[1] // _POSITIONS)
        self._found[name] = hidden.detach()[:, ::stride].float().cpu().contiguous()
        self._sizes[name] = f"{stride} {hidden.shape[1]}"

    def close(self) -> None:
        """Remove the hooks once the first forward is over."""
        self._patches.close()

    def save(self, path: Path) -> None:
        """Write the outputs, each with its stride and s."""
        save_file(self._found, path, self._sizes)


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the decoder layers by name, in order: the members of the model's outermost ModuleList."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            return {f"{name}.{index}".replace("_orig_mod.", ""): layer for index, layer in enumerate(module)}
    return {}


def _thinned(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    return flat[:: -(-flat.numel() // LARGEST)]


def _weight(param: torch.nn.Parameter) -> torch.Tensor:
    weight = safe_get_full_fp32_param(param)
    return param if weight is None else weight


def _gradient(param: torch.nn.Parameter) -> torch.Tensor:
    grad = safe_get_full_grad(param)
    return torch.zeros(1) if grad is None else grad


def record_engines(folder: Path, steps: int) -> None:
    """Patch ``deepspeed.initialize`` so that the next engine it returns is recorded."""
    original: Callable[..., Any] = deepspeed.initialize

    def initialize(*args: Any, **kwargs: Any) -> Any:
        results = original(*args, **kwargs)
        deepspeed.initialize = original
        Recorder(results[0], folder, steps, then=lambda: sys.exit(0))
        return results

    deepspeed.initialize = initialize


def main() -> None:
    """Run a program, recorded: ``deepspeed --module deepspeed_alst.cli.recorder FOLDER STEPS PROGRAM [ARGUMENTS]``."""
    import runpy

    _, local_rank, folder, steps, program, *arguments = sys.argv
    # Same argv and import path as started by the launcher itself.
    sys.argv = [program, local_rank, *arguments]
    sys.path[0] = str(Path(program).resolve().parent)
    record_engines(Path(folder), int(steps))
    runpy.run_path(program, run_name="__main__")
    raise SystemExit(f"{program} ended before {steps} optimizer steps were done")


if __name__ == "__main__":
    main()
