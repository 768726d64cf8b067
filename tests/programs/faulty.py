"""Small training run with an injectable fault, started through DeepSpeed's launcher by system/test_nine_faults.py.

A Llama at ZeRO 2 on two ranks that share a sequence. Each rank writes to ``--notes``: a line of JSON per step (the
exact loss), an empty file at the fault, and at the end a digest of its weights.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
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
# Longer samples in the later steps need more disk space than was allocated for the first ones.
_TOKENS, _LONG_TOKENS = 400, 2000


def _raise() -> None:
    raise RuntimeError(f"rank {FAULT_RANK} breaks in its own program")


FAULTS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stalled": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": _raise,
    # Leaves time for a signal to arrive within a step or write; those of a real run are long enough.
    "held": lambda: time.sleep(60),
    "nan": lambda: None,
    "disk": lambda: None,
}


def break_step(model: torch.nn.Module, notes: Path, fault: str) -> Any:
    """Make the next forward fail in the middle of the model; return the hook's handle."""

    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        (notes / "fault").touch()
        FAULTS[fault]()
        return output * float("nan") if fault == "nan" else output

    return model.model.layers[0].mlp.register_forward_hook(hook)


def break_save(engine: Any, notes: Path, fault: str) -> None:
    """Make this rank's next checkpoint file stop halfway."""

    def save(state_dict: Any, path: str) -> None:
        whole = io.BytesIO()
        torch.save(state_dict, whole)
        (notes / "fault").touch()
        with open(path, "wb") as file:
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            FAULTS[fault]()

    engine.checkpoint_engine.save = save


def fill_disk(folder: Path) -> None:
    """Fill all free space of a folder's disk."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def build_engine(config: str) -> Any:
    """Build the model and engine; gradient checkpointing enables offload of layer inputs if configured."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.activation_checkpointing_enable()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train_step(engine: Any, step: int, notes: Path, fault: str) -> None:
    """Run one optimizer step of one sample per rank, with the fault in its second micro-step."""
    make = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    ids = torch.randint(0, 256, (1, _LONG_TOKENS if step >= FAULT_STEP else _TOKENS), generator=make)
    losses = []
    for micro, batch in enumerate(deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine)):
        broken = break_step(engine.module, notes, fault) if fault and micro == 1 else contextlib.nullcontext()
        with broken:  # a hook's handle removes it
            loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item().hex())
    with (notes / f"steps{dist.get_rank()}").open("a") as file:
        file.write(json.dumps({"step": step, "losses": losses}) + "\n")


def train(
    config: str, notes: Path, load: str = "", save: str = "", fault: str = "", in_save: bool = False, fill: str = ""
) -> None:
    """Run all steps, or those after a checkpoint; runs on every rank.

    Args:
        config: path of the ds_config.
        notes: folder of the ranks' notes.
        load: checkpoint folder to resume from.
        save: checkpoint folder to save to.
        fault: fault of ``FAULT_RANK`` in step ``FAULT_STEP``, a key of ``FAULTS``.
        in_save: put the fault in the save after the step.
        fill: folder whose disk the fault "disk" fills before the step.
    """
    engine, first = build_engine(config), 0
    if load:
        first = engine.load_checkpoint(load)[1]["step"]
    for step in range(first + 1, STEPS + 1):
        breaks = fault and step == FAULT_STEP and dist.get_rank() == FAULT_RANK
        if breaks and fill:
            (notes / "fault").touch()
            fill_disk(Path(fill))
        dist.barrier()
        train_step(engine, step, notes, fault if breaks and not in_save and fault != "disk" else "")
        if breaks and in_save:
            if fault == "disk":
                (notes / "fault").touch()
            else:
                break_save(engine, notes, fault)
        if save and step % SAVE_EVERY == 0:
            engine.save_checkpoint(save, client_state={"step": step})
    digest = hashlib.sha256()
    for param in engine.module.parameters():
        digest.update(param.detach().numpy().tobytes())
    (notes / f"weights{dist.get_rank()}").write_text(digest.hexdigest())
    dist.barrier()
    engine.destroy()


def main() -> None:
    """Train with the fault of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--save", required=True)
    parser.add_argument("--fault", choices=FAULTS, required=True)
    parser.add_argument("--in_save", action="store_true")
    parser.add_argument("--fill", default="")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that ranks wait for one another")
    parser.add_argument("--local_rank")
    arguments = vars(parser.parse_args())
    del arguments["local_rank"]
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=arguments.pop("timeout")))
    train(**arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
