"""Relative differences between two recorded runs: losses, norms, layer outputs, gradients and weights.

A tensor's difference is the norm of the difference over the norm. Legend: S tokens of the whole sequence, s tokens of a
shard, P = sp_size, H hidden.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

# Fraction of the global gradient norm below which a gradient is rounding, e.g. of a key bias, which softmax cancels.
_NOTHING = 1e-4
# Each of the two half-precision runs deviates by about the measured rounding.
_SLACK = 3.0
KINDS = {
    "loss": "loss",
    "norm": "gradient norm",
    "layers": "layers' outputs, first sample",
    "gradients": "gradients, first step",
    "changes": "weights' change, all steps",
}
"""Compared quantities and their names in the table."""
# Differences up to these are rounding: in fp32, and in half precision without a run in fp32 to measure it.
FP32 = {"loss": 1e-4, "norm": 3e-4, "layers": 3e-4, "gradients": 3e-4, "changes": 3e-3}
HALF = {"loss": 5e-3, "norm": 3e-2, "layers": 5e-2, "gradients": 1e-1, "changes": 2e-1}


@dataclass(frozen=True)
class Differences:
    """Differences of two runs by kind (``KINDS``), then by step, layer or parameter, each in model order."""

    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)

    def worst(self, kind: str) -> tuple[float, str]:
        """Return the largest difference of a kind and its place; NaN counts as the largest."""
        found = self.by_kind[kind]
        place = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name], default="")
        return found.get(place, 0.0), place


def differences(run: Path, truth: Path, sp_size: int) -> Differences:
    """Return the differences of a run from a reference run.

    Args:
        run: folder of a run with ``sp_size`` ranks per sequence.
        truth: folder of a run without sequence parallelism, on the same samples.
        sp_size: P.
    """
    curves = [json.loads((folder / "record.json").read_text()) for folder in (run, truth)]
    found = {
        kind: {
            f"step {step}": abs(a - b) / abs(b)
            for step, (a, b) in enumerate(zip(*(curve[kind] for curve in curves), strict=True), start=1)
            if a is not None and b is not None  # DeepSpeed has no norm at stage 0 in fp32
        }
        for kind in ("loss", "norm")
    }
    found["layers"] = _layer_differences(run, truth, sp_size)
    for kind in ("gradients", "changes"):
        ours, theirs = (load_file(folder / f"{kind}.safetensors") for folder in (run, truth))
        floor = _NOTHING * math.sqrt(sum(float(each.norm()) ** 2 for each in theirs.values()))
        found[kind] = {
            name: float((ours[name] - theirs[name]).norm()) / max(float(theirs[name].norm()), floor)
            for name in curves[1]["parameters"]
        }
    return Differences(found)


def allowed(kind: str, place: str, half: bool, rounding: Differences | None) -> float:
    """Return the largest difference that counts as rounding.

    Args:
        kind: one of ``KINDS``.
        place: a step, layer or parameter.
        half: True if the runs are in bf16 or fp16.
        rounding: differences of a run without sequence parallelism from the same run in fp32.
    """
    if rounding is None:
        return (HALF if half else FP32)[kind]
    values = rounding.by_kind[kind]
    # A scalar or a parameter of few elements may agree by chance, and curves cross.
    usual = (max if kind in ("loss", "norm") else statistics.median)(values.values() or [0.0])
    return max(_SLACK * max(values.get(place, 0.0), usual), FP32[kind])


def _layer_differences(run: Path, truth: Path, sp_size: int) -> dict[str, float]:
    whole = _read_outputs([truth / "layers-0.safetensors"])
    split = _read_outputs([run / f"layers-{rank}.safetensors" for rank in range(sp_size)])
    found = {}
    for name, tokens in whole.items():
        # Only one of the runs has padding, and each samples its own tokens of a long sequence.
        common = sorted(tokens.keys() & split.get(name, {}).keys())
        if common:
            a, b = (torch.stack([each[place] for place in common]) for each in (split[name], tokens))
            found[name] = float((a - b).norm() / b.norm()) if a.shape == b.shape else math.inf
    return found


def _read_outputs(files: list[Path]) -> dict[str, dict[int, torch.Tensor]]:
    """Read layer outputs ``[B, H]`` by layer and by position in the whole sequence."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rank, path in enumerate(files):
        with safe_open(path, "pt") as file:
            for name, size in (file.metadata() or {}).items():
                stride, length = map(int, size.split())
                outputs = file.get_tensor(name)
                places = {rank * length + index * stride: outputs[:, index] for index in range(outputs.shape[1])}
                found.setdefault(name, {}).update(places)
    return dict(sorted(found.items(), key=lambda item: int(item[0].rsplit(".", 1)[1])))
