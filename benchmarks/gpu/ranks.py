"""Steps at SP 2 beside SP 1 over NCCL, or gloo on CPU, by ``ds_alst verify`` on a small Llama."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.figures import Figure
from benchmarks.gpu.scale import Scale
from deepspeed_alst.cli.main import main as ds_alst

_ALST = {"tiled_mlp_compute": True, "activation_checkpoint_cpu_offload": True, "memory_lean_layer": True}


def rows(scale: Scale) -> Iterator[Figure]:
    """Yield the largest difference of each kind from SP 1."""
    if scale.on_gpu and torch.cuda.device_count() < 2:
        yield Figure("SP 2 beside SP 1", ("needs two GPUs",))
        return
    ds_config = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "sequence_parallel_size": 2,
        "alst": _ALST,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        replace(scale.shape, num_layers=2).config().to_json_file(folder / "m.json")
        (folder / "ds.json").write_text(json.dumps(ds_config))
        words = ["--model", str(folder / "m.json"), "--ds_config", str(folder / "ds.json"), "--num_gpus", "2"]
        with contextlib.redirect_stdout(sys.stderr):
            ds_alst(["verify", *words, "--steps", "2", "--output", str(folder / "runs")])
        found = json.loads((folder / "runs" / "verify.json").read_text())["rows"]
    for row in found:
        text = f"{row['difference']:.1e} at {row['place']}"
        name = f"SP 2 over {'NCCL' if scale.on_gpu else 'gloo'}, ZeRO 3, bf16: {row['what']}"
        yield Figure(name, (text,), f"<= {row['allowed']:.1e}", bool(row["place"]) and not row["missed"])
