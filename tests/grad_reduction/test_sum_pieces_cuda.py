"""The CUDA kernel of sum_pieces without a GPU: compiled for three architectures, and its body run thread by thread.

Not shown here: that it runs on a GPU. What the body does with indices, tails and alignment is the same on both.
"""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepspeed_alst.grad_reduction.sum_pieces import sum_pieces, sum_pieces_reference
from deepspeed_alst.kernels.builder import cuda_flags, load, source_folder

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HARNESS = Path(__file__).parents[1] / "programs" / "sum_by_threads.cpp"
TORCH_HEADERS = f"-I{Path(torch.__file__).parent / 'include'}"
REGISTERED = """
import ctypes, os, sys, torch, deepspeed_alst.grad_reduction.sum_pieces
for library in (None, sys.argv[1]):
    ctypes.CDLL(library, mode=os.RTLD_LAZY)
    print(torch._C._dispatch_has_kernel_for_dispatch_key("deepspeed_alst::sum_pieces", "CUDA"))
"""
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here: the CUDA kernel is not compiled")


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The kernel's body as a program for this CPU; it stops at a misaligned access and at one beyond a tensor's end."""
    program = tmp_path_factory.mktemp("harness") / "sum_by_threads"
    strict = ["-Wall", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(
        ["c++", "-std=c++20", "-O1", "-ffp-contract=off", *strict, f"-I{source_folder()}", HARNESS, "-o", program],
        check=True,
        timeout=300,
    )
    return program


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def by_threads(harness, storage, P, n, stride, out_n, *, scale, accumulate, grid=(2, 4), misses=(0, 0)):
    """What the harness makes of P pieces in one storage; and whether it loaded and stored 16 bytes at a time."""
    types = [DTYPES.index(storage.dtype), DTYPES.index(out_n.dtype)]
    arguments = [*types, P, n, stride, scale, int(accumulate), *grid, *misses]
    done = subprocess.run(
        [str(harness), *(str(each) for each in arguments)],
        input=raw(storage) + raw(out_n),
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return torch.frombuffer(bytearray(done.stdout), dtype=out_n.dtype), done.stderr.decode()


def check(harness, dtype, out_dtype, P, n, gap, **options):
    """One case against the definition; the gap between two pieces is NaN, and so is out where it is not read."""
    stride = n + gap
    storage = torch.full((P * stride,), torch.nan).to(dtype)
    pieces_Pn = storage.view(P, stride)[:, :n]
    pieces_Pn.copy_(torch.randn(P, n) * torch.exp(3 * torch.randn(P, n)))
    before_n = torch.randn(n).to(out_dtype) if options["accumulate"] else torch.full((n,), torch.nan, dtype=out_dtype)
    got_n, widths = by_threads(harness, storage[: P * stride - gap], P, n, stride, before_n, **options)
    sum_pieces_reference(pieces_Pn, before_n, options["scale"], options["accumulate"])
    assert torch.equal(got_n, before_n)
    return widths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_all_threads_of_a_grid_together_are_the_definition(harness, dtype, out_dtype):
    torch.manual_seed(0)
    for P, n in itertools.product((1, 2, 3, 8), (1, 7, 63, 1000, 4097)):
        check(harness, dtype, out_dtype, P, n, 0, scale=0.5, accumulate=P == 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_pieces_and_out_may_miss_16_bytes(harness, dtype, out_dtype):
    torch.manual_seed(0)
    span = 16 // dtype.itemsize
    for gap, begin, out_begin in itertools.product((0, 1, span - 1000 % span), (0, 1, span // 2), (0, 1)):
        widths = check(harness, dtype, out_dtype, 3, 1000, gap, scale=0.3, accumulate=True, misses=(begin, out_begin))
        wide_loads = begin == 0 and (1000 + gap) % span == 0
        assert widths == f"loads {int(wide_loads)} stores {int(out_begin == 0)}"


@pytest.mark.parametrize("grid", [(1, 1), (1, 32), (3, 5), (64, 256)])
def test_a_grid_of_any_size_covers_everything_once(harness, grid):
    torch.manual_seed(0)
    for n in (63, 4097):
        check(harness, torch.bfloat16, torch.float32, 5, n, 7, scale=1.0, accumulate=True, grid=grid)


@pytest.mark.slow
@needs_nvcc
def test_the_kernel_compiles_for_three_architectures_without_spilling_and_registers_itself(tmp_path, capsys):
    flags = [*cuda_flags("nvcc"), "-Xcompiler", "-fPIC", TORCH_HEADERS]
    checks = ["-Xptxas", "-v,--warn-on-spills,--warning-as-error"]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-Xlinker", "-z,lazy"]
    library = tmp_path / "sum.so"
    done = subprocess.run(
        ["nvcc", "-shared", *flags, *checks, *libraries, "-o", library, source_folder() / "sum_pieces.cu"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = done.stderr
    assert report.count(" 0 bytes spill stores, 0 bytes spill loads") == report.count("spill stores") >= 9
    architectures = re.findall(r"for '(sm_\d+)'", report)
    registers = [int(each) for each in re.findall(r"Used (\d+) registers", report)]
    with capsys.disabled():
        for name in dict.fromkeys(architectures):
            used = [count for each, count in zip(architectures, registers, strict=True) if each == name]
            print(
                f"\nsum_pieces.cu, {name}: {len(used)} kernels, {min(used)} to {max(used)} registers, 0 spills", end=""
            )
    assert {"sm_80", "sm_90"} <= set(architectures)
    assert max(registers) <= 64  # 4 blocks of 256 threads on a multiprocessor
    # Bound lazily, it loads where torch has no CUDA; in a process of its own, because it cannot be unloaded.
    done = subprocess.run([sys.executable, "-c", REGISTERED, library], capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-2:] == ["False", "True"], done.stderr[-2000:]


@needs_nvcc
def test_every_kernel_loads_16_bytes_at_a_time(tmp_path):
    flags = [flag for flag in cuda_flags("nvcc") if not flag.startswith("-gencode")]
    ptx = tmp_path / "sum.ptx"
    subprocess.run(
        ["nvcc", "-ptx", *flags, "-arch=compute_80", TORCH_HEADERS, "-o", ptx, source_folder() / "sum_pieces.cu"],
        check=True,
        timeout=300,
    )
    kernels = ptx.read_text().split(".entry ")[1:]
    assert len(kernels) == 9
    assert all(kernel.count("ld.global.v4.") == 4 for kernel in kernels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the CUDA kernel is not run")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_on_a_gpu_the_kernel_is_the_definition_bit_by_bit(dtype, out_dtype):
    assert load("cuda") == "csrc op"
    torch.manual_seed(0)
    for P, n, gap, begin in itertools.product((1, 3, 8), (1, 63, 4097, 1_000_003), (0, 5), (0, 1)):
        pieces_Pn = torch.randn(P, n + gap, device="cuda").to(dtype)[:, :n]
        for accumulate in (False, True):
            got_n = torch.randn(n + begin, device="cuda").to(out_dtype)[begin:]
            want_n = got_n.clone()
            sum_pieces(pieces_Pn, got_n, 0.3, accumulate)
            sum_pieces_reference(pieces_Pn, want_n, 0.3, accumulate)
            assert torch.equal(got_n, want_n)
