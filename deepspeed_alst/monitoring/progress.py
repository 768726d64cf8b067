"""Metrics of one report: event names for a monitor, and the progress line."""

from dataclasses import asdict, dataclass

from deepspeed_alst.formatting import format_bytes


@dataclass(frozen=True)
class Report:
    """Values of one report, None if absent. Per-rank values are means over ranks; peaks and waits are maxima."""

    loss: float | None
    """Loss of the step, in nats per token; mean over micro-steps and replicas."""
    grad_norm: float | None
    """Gradient norm of the step, before clipping."""
    lr: float | None
    """Learning rate of the step, of the first parameter group."""
    tokens_per_second: float
    """Rate of the whole job, without padding."""
    padding_share: float
    model_flops_per_second: float | None
    """Per rank, ``StepFlops.model`` of ``monitoring/step_flops.py``."""
    hardware_flops_per_second: float | None
    """Per rank in ALST's convention, ``StepFlops.alst``; includes padding, which is computed too."""
    peak_device_bytes: float | None
    peak_host_bytes: float
    """Peak of a rank's process."""
    wire_bytes: float | None
    """Sent by a rank per step, for the gradient reduction and the layers' all-to-alls."""
    offload_host_bytes: float | None
    """Sent to host memory by a rank per step."""
    offload_disk_bytes: float | None
    offload_wait_seconds: float | None
    """Time per step that waits for the disk."""

    def events(self) -> dict[str, float]:
        """Return values by a monitor's names."""
        return {f"alst/{name}": value for name, value in asdict(self).items() if value is not None}


def progress_line(step: int, report: Report) -> str:
    """Format one line; each number has its unit and, if there are several, its convention."""
    of_step = (("loss", report.loss, ".4f"), ("norm", report.grad_norm, ".4g"), ("lr", report.lr, ".3g"))
    parts = [
        f"alst: step {step}",
        *(f"{name} {value:{digits}}" for name, value, digits in of_step if value is not None),
    ]
    parts.append(f"{report.tokens_per_second:,.0f} tokens/s, padding {report.padding_share:.1%}")
    if report.model_flops_per_second is not None and report.hardware_flops_per_second is not None:
        model, hardware = _in_flops(report.model_flops_per_second), _in_flops(report.hardware_flops_per_second)
        parts.append(
            f"a rank: {model} model (6N, causal half), {hardware} hardware (ALST: whole square, recomputation)"
        )
    device = "" if report.peak_device_bytes is None else f"{format_bytes(report.peak_device_bytes)} device, "
    parts.append(f"peak {device}{format_bytes(report.peak_host_bytes)} host")
    if report.wire_bytes is not None:
        parts.append(f"wire {format_bytes(report.wire_bytes, 1, 1000)}")
    if report.offload_host_bytes is not None:
        parts.append(f"offload {format_bytes(report.offload_host_bytes)} host")
        if report.offload_disk_bytes:
            parts[-1] += f", {format_bytes(report.offload_disk_bytes)} disk, waited {report.offload_wait_seconds:.2f} s"
    return " | ".join(parts)


def _in_flops(per_second: float) -> str:
    return f"{per_second / 1e12:,.1f} TFLOP/s" if per_second >= 1e12 else f"{per_second / 1e9:,.1f} GFLOP/s"
