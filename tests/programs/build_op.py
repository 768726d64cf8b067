"""Loads the compiled sum as an engine does at its start, and prints in JSON what came of it.

With ``--after-a-failure``, a first build in the same process fails for want of a working compiler.
"""

import json
import os
import sys
import time
import warnings
from unittest import mock

import torch

import deepspeed_alst
from deepspeed_alst.grad_reduction.sum_pieces import sum_pieces
from deepspeed_alst.kernels.builder import OpBuildError, load, load_or_build


def fail_once() -> str:
    with mock.patch.dict(os.environ, CXX="false"):
        try:
            load_or_build("cpu")
        except OpBuildError as error:
            return f"{error}. {error.fix}"
    return ""


if __name__ == "__main__":
    failure = fail_once() if "--after-a-failure" in sys.argv else ""
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words = [load("cpu"), load("cpu")]
    seconds = time.perf_counter() - begin
    out_n = torch.zeros(63)
    sum_pieces(torch.ones(3, 63), out_n, 0.5)
    report = {
        "words": sorted(set(words)),
        "warnings": [str(each.message) for each in caught if "deepspeed_alst" in str(each.message)],
        "compiled": torch._C._dispatch_has_kernel_for_dispatch_key("deepspeed_alst::sum_pieces", "CPU"),
        "right": bool((out_n == 1.5).all()),
        "package": os.path.dirname(deepspeed_alst.__file__),
        "seconds": seconds,
        "failure": failure,
    }
    print(json.dumps(report))
