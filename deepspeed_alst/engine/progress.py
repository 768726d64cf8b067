"""The metrics of one report: their names for a monitor, and their line for people."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from deepspeed_alst.words import in_words


@dataclass(frozen=True)
class Report:
    """One value each; None where there is none. Of a rank: the mean over ranks; peaks and waits: the highest."""

    loss: float | None
    """Of the step, in nats a token; mean over micro-steps and replicas."""
    grad_norm: float | None
    """Of the step, before clipping."""
    lr: float | None
    """That the step was made with, of the first parameter group."""
    tokens_per_second: float
    """Of the whole job, padding left out."""
    padding_share: float
    model_flops_per_second: float | None
    """Of a rank, ``model_flops`` of ``ledger/step_flops.py``."""
    hardware_flops_per_second: float | None
    """The same in ALST's convention, ``alst_flops``; padding is computed too, and counts."""
    peak_device_bytes: float | None
    peak_host_bytes: float
    """Of a rank's process."""
    wire_bytes: float | None
    """Sent by a rank in a step, by the gradients' reduction and the layers' all-to-alls."""
    offload_host_bytes: float | None
    """Sent to the host's memory by a rank in a step."""
    offload_disk_bytes: float | None
    offload_wait_seconds: float | None
    """That a step stood still for the disk."""

    def events(self) -> Iterator[tuple[str, float]]:
        """Names and values for a monitor."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield f"alst/{field.name}", value


def progress_line(step: int, report: Report) -> str:
    """One line, each number with its unit and, where there are several, its convention."""
    parts = [f"alst: step {step}"]
    if report.loss is not None:
        parts.append(f"loss {report.loss:.4f}")
    if report.grad_norm is not None:
        parts.append(f"norm {report.grad_norm:.4g}")
    if report.lr is not None:
        parts.append(f"lr {report.lr:.3g}")
    parts.append(f"{report.tokens_per_second:,.0f} tokens/s, padding {report.padding_share:.1%}")
    if report.model_flops_per_second is not None and report.hardware_flops_per_second is not None:
        model, hardware = _in_flops(report.model_flops_per_second), _in_flops(report.hardware_flops_per_second)
        parts.append(
            f"a rank: {model} model (6N, causal half), {hardware} hardware (ALST: whole square, recomputation)"
        )
    device = "" if report.peak_device_bytes is None else f"{in_words(report.peak_device_bytes)} device, "
    parts.append(f"peak {device}{in_words(report.peak_host_bytes)} host")
    if report.wire_bytes is not None:
        parts.append(f"wire {in_words(report.wire_bytes, 1, 1000)}")
    if report.offload_host_bytes is not None and report.offload_disk_bytes is not None:
        disk = f", {in_words(report.offload_disk_bytes)} disk" if report.offload_disk_bytes else ""
        waited = f", waited {report.offload_wait_seconds:.2f} s" if report.offload_disk_bytes else ""
        parts.append(f"offload {in_words(report.offload_host_bytes)} host{disk}{waited}")
    return " | ".join(parts)


def _in_flops(per_second: float) -> str:
    unit = "TFLOP/s" if per_second >= 1e12 else "GFLOP/s"
    return f"{per_second / (1e12 if unit == 'TFLOP/s' else 1e9):,.1f} {unit}"
