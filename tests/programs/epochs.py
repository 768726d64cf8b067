"""Runs a function of test_input_loader.py on the cases of a folder, as one of two ranks, and leaves its result.

epochs.py FUNCTION FOLDER
"""

import json
import sys
from pathlib import Path

import deepspeed

from tests.data import test_input_loader

if __name__ == "__main__":
    function, folder = sys.argv[1], Path(sys.argv[2])
    deepspeed.init_distributed("gloo")
    result = getattr(test_input_loader, function)(json.loads((folder / "cases.json").read_text()))
    (folder / f"rank{deepspeed.comm.get_rank()}.json").write_text(json.dumps(result))
