"""Build ahead of the first run: DeepSpeed's CPU communication op, otherwise built silently, and the csrc/ ops."""

from deepspeed.accelerator import get_accelerator

from deepspeed_alst.environment import check_build_lock
from deepspeed_alst.kernels.builder import load

if __name__ == "__main__":
    check_build_lock()
    device = get_accelerator().device_name()
    if device == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    print(f"csrc ops on {device}: {load(device)}")
