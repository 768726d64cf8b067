"""Compile DeepSpeed's CPU communication op ahead of the first run, where DeepSpeed would otherwise do it silently."""

from deepspeed.accelerator import get_accelerator

from deepspeed_alst.engine.environment import check_build_lock

if __name__ == "__main__":
    check_build_lock()
    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
