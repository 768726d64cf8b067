"""Small training run with an injectable fault, started through DeepSpeed's launcher by benchmarks/faults/runs.py.

A Llama at ZeRO 2 on two ranks that share a sequence. Each rank writes to ``--notes``: its process id, a line of JSON
per step (the exact loss), the time of the fault, and at the end a digest of its weights.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_alst

STEPS, SAVE_EVERY = 5, 2
FAULT_STEP = 4
"""Step of the fault, counted from 1 and followed by a save: the fault loses all since the checkpoint of step 2."""
FAULT_RANK = 1
_GAS = 2
_VOCAB = 256
# Longer samples in the later steps need more disk space than was allocated for the first ones.
_TOKENS, _LONG_TOKENS = 400, 2000


class Notes:
    """Files in which one rank reports to its parent."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._write("pid", str(os.getpid()))

    def step(self, step: int, losses: list[torch.Tensor]) -> None:
        """Record a finished step."""
        with (self._folder / f"steps{self._rank}").open("a") as file:
            file.write(json.dumps({"step": step, "losses": [loss.item().hex() for loss in losses]}) + "\n")

    def fault(self) -> None:
        """Record the time of the fault."""
        self._write("fault", repr(time.time()))

    def weights(self, model: torch.nn.Module) -> None:
        """Record a digest of all bits of all weights."""
        digest = hashlib.sha256()
        for param in model.parameters():
            digest.update(param.detach().numpy().tobytes())
        self._write("weights", digest.hexdigest())

    def _write(self, name: str, words: str) -> None:
        new = self._folder / f"{name}{self._rank}.new"
        new.write_text(words)
        new.replace(self._folder / f"{name}{self._rank}")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed", required=True)
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--fault", choices=sorted({*IN_STEP, *IN_SAVE, "disk"}))
    parser.add_argument("--fill", type=Path, help="the folder whose disk the fault 'disk' fills")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that ranks wait for one another")
    parser.add_argument("--local_rank", type=int, default=0)
    return parser.parse_args()


def _hold() -> None:
    # Leaves time for a signal to arrive within a step or write; those of a real run are long enough.
    time.sleep(60)


def _raise() -> None:
    raise RuntimeError(f"rank {FAULT_RANK} breaks in its own program")


IN_STEP: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stalled": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": _raise,
    "held": _hold,
    "nan": lambda: None,
}
IN_SAVE: dict[str, Callable[[], None]] = {
    "killed-in-save": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "held-in-save": _hold,
    "short-file": lambda: None,
}


def break_step(model: torch.nn.Module, notes: Notes, fault: str) -> Any:
    """Make the next forward fail in the middle of the model; return the hook's handle."""

    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        notes.fault()
        IN_STEP[fault]()
        return output * float("nan") if fault == "nan" else output

    return model.model.layers[0].mlp.register_forward_hook(hook)


def break_save(engine: Any, notes: Notes, fault: str) -> None:
    """Make this rank's next checkpoint file stop halfway."""

    def save(state_dict: Any, path: str) -> None:
        whole = io.BytesIO()
        torch.save(state_dict, whole)
        half = whole.getvalue()[: whole.tell() // 2]
        notes.fault()
        if fault == "short-file":  # the kernel rejects further writes, as on a full disk, where none can be mounted
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(half), resource.RLIM_INFINITY))
            torch.save(state_dict, path)
        with open(path, "wb") as file:
            file.write(half)
            file.flush()
            IN_SAVE[fault]()

    engine.checkpoint_engine.save = save


def fill_disk(folder: Path) -> None:
    """Fill all free space of a folder's disk."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def own_batch(step: int, micro: int, tokens: int) -> dict[str, torch.Tensor]:
    """Create one rank's sample of one refill, reproducible across restarts."""
    make = torch.Generator().manual_seed(1000 * step + 10 * micro + dist.get_rank())
    ids = torch.randint(0, _VOCAB, (1, tokens), generator=make)
    return {"input_ids": ids, "labels": ids.clone()}


def build_engine(config: str) -> Any:
    """Build the model and engine; gradient checkpointing enables offload of layer inputs if configured."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    model.gradient_checkpointing_enable()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train_step(engine: Any, step: int, notes: Notes, fault: str | None, tokens: int) -> None:
    """Run one optimizer step of one sample per rank, with the fault in its second micro-step."""
    losses = []
    batches = deepspeed_alst.shard_dataloader([own_batch(step, 0, tokens)], engine)
    for micro, batch in enumerate(batches):
        broken = break_step(engine.module, notes, fault) if fault in IN_STEP and micro == 1 else None
        loss = engine(**batch).loss
        if broken is not None:
            broken.remove()
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    assert len(losses) == _GAS, losses
    notes.step(step, losses)


def train(
    config: str,
    notes: Notes,
    load: Path | None = None,
    save: Path | None = None,
    fault: str | None = None,
    fill: Path | None = None,
) -> None:
    """Run all steps, or those after a checkpoint; runs on every rank.

    Args:
        config: path of the ds_config.
        notes: of this rank.
        load: checkpoint folder to resume from.
        save: checkpoint folder to save to.
        fault: fault in step ``FAULT_STEP`` or in the save after it.
        fill: folder whose disk the fault "disk" fills before that step.
    """
    engine, first = build_engine(config), 0
    if load is not None:
        _, state = engine.load_checkpoint(str(load))
        first = state["step"]
    for step in range(first + 1, STEPS + 1):
        broken = fault if step == FAULT_STEP and dist.get_rank() == FAULT_RANK else None
        if fill is not None:
            if broken == "disk":
                notes.fault()
                fill_disk(fill)
            dist.barrier()
        train_step(engine, step, notes, broken, _LONG_TOKENS if step >= FAULT_STEP else _TOKENS)
        if broken in IN_SAVE:
            break_save(engine, notes, broken)
        if save is not None and step % SAVE_EVERY == 0:
            if broken == "disk":
                notes.fault()
            engine.save_checkpoint(str(save), client_state={"step": step})
    notes.weights(engine.module)
    dist.barrier()
    engine.destroy()


def main() -> None:
    """Train with the fault of the command line."""
    args = parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=args.timeout))
    train(args.deepspeed, Notes(args.notes, dist.get_rank()), None, args.save, args.fault, args.fill)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
