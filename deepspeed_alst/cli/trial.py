"""Ranks of ``ds_alst verify``: train the built-in program (OUTPUT), or run the user's (FOLDER STEPS PROGRAM [WORDS]).

    deepspeed --num_gpus 2 --module deepspeed_alst.cli.trial OUTPUT | FOLDER STEPS PROGRAM [WORDS]

Legend: S tokens of the whole sequence, s of this rank's shard, H hidden.
"""

import gc
import importlib
import itertools
import json
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from deepspeed_alst.cli.launch import PROGRESS, half_of
from deepspeed_alst.config.compatibility import GAS, MICRO
from deepspeed_alst.config.schema import block_of
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet

# Recorded elements per parameter and tokens per layer, at most; of more, a sample at even spacing.
_ELEMENTS, _TOKENS = 2**20, 512
_LEARNING_RATE = 0.3
_SEED = 5
_IGNORED = -100


class Recorder:
    """Recorder of an engine's first ``steps`` steps, then calls ``then``. Collective: it gathers weights.

    Writes ``record-RANK.pt`` to ``folder``: losses, norms, gradients, weight updates and layer outputs.
    """

    def __init__(self, engine: Any, folder: Path, steps: int, then: Callable[[], None]) -> None:
        self._engine, self._folder, self._steps, self._then = engine, folder, steps, then
        self._losses: list[torch.Tensor] = []
        # Of the first forward, each layer's stride, s and outputs [B, s, H].
        self._record: dict[str, Any] = {"loss": [], "norm": [], "layers": {}}
        self._start = self._gather(safe_get_full_fp32_param)
        self._backward, self._step = engine.backward, engine.step
        engine.backward, engine.step = self.backward, self.step
        self._hooks = PatchSet()
        for name, layer in ModelSpec(engine.module).layers.items():
            self._hooks.hook(layer, "forward", partial(self._keep, name))

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Record the loss, then run ``engine.backward``."""
        self._hooks.close()
        scaled = self._backward(loss, *args, **kwargs)
        # The loss that is differentiated, whoever divides it by the accumulation steps: the engine or the HF Trainer.
        self._losses.append(scaled.detach().double().cpu() * self._engine.gradient_accumulation_steps())
        return scaled

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``engine.step``, and record at gradient accumulation boundaries."""
        if not self._engine.is_gradient_accumulation_boundary():
            return self._step(*args, **kwargs)
        if not self._record["loss"]:
            self._record["gradients"] = self._gather(safe_get_full_grad)
        result = self._step(*args, **kwargs)
        loss = torch.stack(self._losses).mean().to(self._engine.device, torch.float32)
        dist.all_reduce(loss)
        self._losses.clear()
        self._record["loss"].append(float(loss) / dist.get_world_size())
        norm = self._engine.get_global_grad_norm()  # DeepSpeed has none at stage 0 in fp32
        self._record["norm"].append(None if norm is None else float(norm))
        done, mean = len(self._record["loss"]), self._record["loss"][-1]
        if dist.get_rank() == 0:
            print(f"{PROGRESS} {self._folder.name}: step {done} of {self._steps}, loss {mean:.6g}", flush=True)
        if done == self._steps:
            end = self._gather(safe_get_full_fp32_param)
            self._record["changes"] = {name: end[name] - start for name, start in self._start.items()}
            torch.save(self._record, self._folder / f"record-{dist.get_rank()}.pt")
            dist.barrier()
            self._then()
        return result

    def _gather(self, read: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Read the weight or gradient of each trainable parameter, for rank 0; without a gradient it is zero."""
        found = {}
        for name, param in self._engine.module.named_parameters():
            if param.requires_grad:
                whole = read(param)
                if whole is None:
                    whole = param if read is safe_get_full_fp32_param else torch.zeros(1)
                if dist.get_rank() == 0:
                    flat = whole.detach().flatten()
                    sample = flat[:: -(-flat.numel() // _ELEMENTS)]
                    found[name.replace("_orig_mod.", "")] = sample.float().cpu().clone()
        return found

    def _keep(self, name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not torch.is_grad_enabled():  # model check or evaluation
            return
        layers = self._record["layers"]
        if name not in layers and isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
            s = hidden.shape[1]
            stride = max(1, s // _TOKENS)
            layers[name] = (stride, s, hidden.detach()[:, ::stride].float().cpu().clone())


def samples(spec: Namespace, vocab: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Return ``count`` samples ``[S]``, of the data file or random with some labels ignored."""
    if spec.data:
        with open(spec.data, encoding="utf-8") as lines:
            read = [json.loads(line) for line in lines if line.strip()]
        found = []
        for row in itertools.islice(itertools.cycle(read), count):
            ids = torch.tensor(row["input_ids"][: spec.seq_len])
            labels = torch.tensor(row.get("labels", row["input_ids"])[: spec.seq_len])
            if not spec.full:  # a tiny model has a smaller vocabulary
                ids, labels = (each.remainder(vocab).where(each >= 0, each) for each in (ids, labels))
            found.append({"input_ids": ids, "labels": labels})
        return found
    make = torch.Generator().manual_seed(_SEED)
    ids_BS = torch.randint(5, vocab - 1, (count, spec.seq_len), generator=make)
    labels_BS = ids_BS.clone()
    labels_BS[:, ::3] = _IGNORED
    labels_BS[1::2, spec.seq_len // 2 :] = _IGNORED  # leaves the last shard without labels
    return [{"input_ids": row, "labels": own} for row, own in zip(ids_BS, labels_BS, strict=True)]


def train(spec: Namespace, ds_config: dict[str, Any], folder: Path) -> None:
    """Train a model for some steps and record it."""
    from deepspeed_alst.verification.hf_tiny_models import build, has_weights, load_config

    config = load_config(spec.model, not spec.full)
    weights = spec.model if spec.full and has_weights(spec.model) else None
    model = build(config, weights, ds_config, spec.attn_implementation, spec.half)
    if spec.checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    replicas = int(dist.get_world_size()) // ds_config["sequence_parallel_size"]
    # Every step uses the same samples, so that the loss falls.
    data = samples(spec, config.get_text_config().vocab_size, ds_config[MICRO] * ds_config[GAS] * replicas)
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    # Workers would take longer to start than to load data that is in memory.
    loader = engine.deepspeed_io(data, pin_memory=False, num_local_io_workers=0)
    done: list[bool] = []
    Recorder(engine, folder, spec.steps, then=lambda: done.append(True))
    while not done:
        for batch in loader:
            batch = {key: value.to(engine.device) for key, value in batch.items()}
            engine.backward(engine(**batch).loss)
            engine.step()
    engine.destroy()


def train_all(output: Path) -> None:
    """Train every run of ``spec.json`` in turn, in the same processes."""
    spec = Namespace(**json.loads((output / "spec.json").read_text()))
    configs = {name: json.loads((output / name / "ds_config.json").read_text()) for name in spec.runs}
    whole, split, *_ = configs.values()
    spec.half = half_of(whole)
    block = block_of(split)
    spec.checkpoints = block.get("activation_checkpoint_cpu_offload") or block.get("save_attention_output") is True
    deepspeed.init_distributed()
    for name, ds_config in configs.items():
        train(spec, ds_config, output / name)
        gc.collect()


def run_program(folder: Path, steps: int, words: list[str]) -> None:
    """Run a program, and record the first engine that ``deepspeed.initialize`` returns to it."""
    patches = PatchSet()

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        def initialize(*args: Any, **kwargs: Any) -> Any:
            results = original(*args, **kwargs)
            patches.close()
            Recorder(results[0], folder, steps, then=lambda: sys.exit(0))
            return results

        return initialize

    patches.wrap(deepspeed, "initialize", recorded)
    # Same argv and import path as started by the launcher itself.
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")
    raise SystemExit(f"{words[0]} ended before {steps} optimizer steps")


def main() -> None:
    """Run the command line (see the module's docstring)."""
    _, local_rank, folder, *program = sys.argv
    if program:
        run_program(Path(folder), int(program[0]), [program[1], local_rank, *program[2:]])
    else:
        train_all(Path(folder))


if __name__ == "__main__":
    # By its full name: hooks of a module "__main__" are the program's to the model check, which copies them.
    importlib.import_module("deepspeed_alst.cli.trial").main()
