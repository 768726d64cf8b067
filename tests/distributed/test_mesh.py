import subprocess
import sys

PROGRAM = """
import threading, time
import torch.distributed as dist
from deepspeed_alst.distributed.mesh import build_control_group

def ask_for_the_gil():
    threading.main_thread().join()
    time.sleep(0.05)  # as a worker thread of gloo that the machine gives no core for so long
    print("had the GIL", flush=True)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
build_control_group()
threading.Thread(target=ask_for_the_gil, daemon=True).start()
"""


def test_a_thread_that_needs_the_gil_shortly_after_the_programs_last_line_gets_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "had the GIL\n"), done.stderr
