"""How far apart two recorded runs are: their losses, norms, layers' outputs, gradients and weights.

A difference is relative: of a tensor, the norm of the difference over the norm. Legend: S tokens of the whole sequence,
s of a shard, P = sp_size, H hidden.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

# Of all gradients' norm: what is less is rounding, as of a bias of keys, which softmax does not see.
_NOTHING = 1e-4
# Two runs in half precision each err by about the yardstick.
_SLACK = 3.0
KINDS = {
    "loss": "loss",
    "norm": "gradient norm",
    "layers": "layers' outputs, first sample",
    "gradients": "gradients, first step",
    "changes": "weights' change, all steps",
}
"""What is compared, and its name in words."""
# Differences that are rounding: in fp32, and in half precision where no run in fp32 says how much of it there is.
FP32 = {"loss": 1e-4, "norm": 3e-4, "layers": 3e-4, "gradients": 3e-4, "changes": 3e-3}
HALF = {"loss": 5e-3, "norm": 3e-2, "layers": 5e-2, "gradients": 1e-1, "changes": 2e-1}


@dataclass(frozen=True)
class Differences:
    """Of two runs, by kind (``KINDS``) and then by step, layer or parameter, each in the order of the model."""

    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)

    def worst(self, kind: str) -> tuple[float, str]:
        """The largest difference of a kind and its place; NaN counts as the largest."""
        found = self.by_kind[kind]
        place = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name], default="")
        return found.get(place, 0.0), place


def differences(run: Path, truth: Path, sp_size: int) -> Differences:
    """How far a run is from another one.

    Args:
        run: folder of a run with ``sp_size`` ranks to a sequence.
        truth: folder of one without sequence parallelism, on the same samples.
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
    """The largest difference that is rounding.

    Args:
        kind: one of ``KINDS``.
        place: a step, layer or parameter.
        half: whether the runs are in bf16 or fp16.
        rounding: of such a run without sequence parallelism, what it is from one in fp32.
    """
    if rounding is None:
        return (HALF if half else FP32)[kind]
    values = rounding.by_kind[kind]
    # A single number, or a parameter of few elements, may be right by luck; curves cross.
    usual = (max if kind in ("loss", "norm") else statistics.median)(values.values() or [0.0])
    return max(_SLACK * max(values.get(place, 0.0), usual), FP32[kind])


def _layer_differences(run: Path, truth: Path, sp_size: int) -> dict[str, float]:
    whole = _read_outputs([truth / "layers-0.safetensors"])
    split = _read_outputs([run / f"layers-{rank}.safetensors" for rank in range(sp_size)])
    found = {}
    for name, tokens in whole.items():
        # Padding is in one of them only, and of a long sequence each has tokens of its own choice.
        common = sorted(tokens.keys() & split.get(name, {}).keys())
        if common:
            a, b = (torch.stack([each[place] for place in common]) for each in (split[name], tokens))
            found[name] = float((a - b).norm() / b.norm()) if a.shape == b.shape else math.inf
    return found


def _read_outputs(files: list[Path]) -> dict[str, dict[int, torch.Tensor]]:
    """By layer and by place in the whole sequence: ``[B, H]``."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rank, path in enumerate(files):
        with safe_open(path, "pt") as file:
            for name, size in (file.metadata() or {}).items():
                stride, length = map(int, size.split())
                outputs = file.get_tensor(name)
                places = {rank * length + index * stride: outputs[:, index] for index in range(outputs.shape[1])}
                found.setdefault(name, {}).update(places)
    return dict(sorted(found.items(), key=lambda item: int(item[0].rsplit(".", 1)[1])))
