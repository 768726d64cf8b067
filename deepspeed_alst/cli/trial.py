"""Built-in program of ``ds_alst verify``: a plain DeepSpeed loop, run once per ds_config.

    deepspeed --num_gpus 2 --module deepspeed_alst.cli.trial FOLDER

FOLDER has ``spec.json`` and receives one folder of records per run.
"""

import gc
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch

from deepspeed_alst.cli.recorder import Recorder
from deepspeed_alst.verification.hf_tiny_models import build, load_config

LEARNING_RATE = 0.3
_SEED = 5
_IGNORED = -100


@dataclass(frozen=True)
class Spec:
    """Settings common to all runs, and the ds_config of each."""

    model: str
    """A config.json, a folder or a hub name."""
    small: bool
    loads_weights: bool
    core: str
    half: str
    """bf16 or fp16 if the user's run is in it, else empty."""
    seq_len: int
    steps: int
    data: str = ""
    """A .jsonl file with ``input_ids`` and optional ``labels``; random tokens if empty."""
    checkpointing: bool = False
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``spec.json``."""
        (folder / "spec.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: Path) -> "Spec":
        """Read the spec from ``spec.json``."""
        return Spec(**json.loads((folder / "spec.json").read_text()))


def samples(spec: Spec, vocab: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Return ``count`` samples of ``[S]``; random ones ignore every third label, every other one its second half."""
    if spec.data:
        with open(spec.data, encoding="utf-8") as lines:
            read = [json.loads(line) for line in lines if line.strip()]
        rows = [read[index % len(read)] for index in range(count)]
        ids = [torch.tensor(row["input_ids"][: spec.seq_len]) for row in rows]
        labels = [torch.tensor(row.get("labels", row["input_ids"])[: spec.seq_len]) for row in rows]
        if spec.small:  # a tiny model has a smaller vocabulary
            ids = [row.remainder(vocab) for row in ids]
            labels = [row.remainder(vocab).where(row >= 0, row) for row in labels]
        return [{"input_ids": row, "labels": own} for row, own in zip(ids, labels, strict=True)]
    make = torch.Generator().manual_seed(_SEED)
    found = []
    for index in range(count):
        ids = torch.randint(5, vocab - 1, (spec.seq_len,), generator=make)
        labels = ids.clone()
        labels[::3] = _IGNORED
        if index % 2:
            # Leaves the last shard without labels.
            labels[spec.seq_len // 2 :] = _IGNORED
        found.append({"input_ids": ids, "labels": labels})
    return found


def train(spec: Spec, ds_config: dict[str, Any], folder: Path) -> None:
    """Train a model for some steps and record it."""
    config = load_config(spec.model, spec.small)
    model = build(config, spec.model if spec.loads_weights else None, ds_config, spec.core, spec.half)
    if spec.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    a_step = ds_config["train_micro_batch_size_per_gpu"] * ds_config["gradient_accumulation_steps"]
    world_size = int(torch.distributed.get_world_size())
    sp_size = ds_config.get("sequence_parallel_size", 1)
    # Every step uses the same samples, so that the loss falls.
    data = samples(spec, config.get_text_config().vocab_size, a_step * world_size // sp_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    # No workers: the data is in memory and read again in each step, so starting workers would dominate.
    loader = engine.deepspeed_io(data, pin_memory=False, num_local_io_workers=0)
    done: list[bool] = []
    Recorder(engine, folder, spec.steps, then=lambda: done.append(True))
    while not done:
        for batch in loader:
            batch = {key: value.to(engine.device) for key, value in batch.items()}
            engine.backward(engine(**batch).loss)
            engine.step()
    engine.destroy()


def main() -> None:
    """Train every run of the spec in turn, in the same processes."""
    folder = Path(sys.argv[-1])
    spec = Spec.read(folder)
    deepspeed.init_distributed()
    for name, ds_config in spec.runs.items():
        (folder / name).mkdir(exist_ok=True)
        train(spec, ds_config, folder / name)
        gc.collect()


if __name__ == "__main__":
    main()
