"""The benchmark of ``make gpu`` on CPU: rows of its cheap parts, and what becomes of a part that fails."""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import count
from multiprocessing import active_children
from unittest import mock

import pytest
import torch

from benchmarks.figures import Figure
from benchmarks.gpu import DEEPSPEED, LEAN, PLAIN, SYSTEMS, TILES, layers
from benchmarks.gpu.jobs import LATE, Job, guarded, rows_of
from benchmarks.gpu.longest import bisect
from benchmarks.gpu.scale import batch_of, model_of, scale_of, system_on
from deepspeed_alst.attention.attention_kernels import FlashKernel
from deepspeed_alst.offload import activation_store

SCALE = scale_of("cpu", 1)


def verdicts(rows):
    return [figure.cells()[-1] for figure in rows]


def test_memory_lean_layers_are_as_exact_as_the_ordinary_path():
    assert verdicts(layers.errors(SCALE)) == ["ok", "ok"]


def test_a_wrong_gradient_is_missed():
    def one_percent_off(*args):
        return tuple(1.01 * each for each in backward(*args))

    backward = FlashKernel.backward
    with mock.patch.object(FlashKernel, "backward", one_percent_off):
        assert verdicts(layers.errors(SCALE))[0] == "MISSED"


def test_the_bytes_of_the_copies_are_exact_and_a_copy_too_many_is_missed():
    assert verdicts(layers.offload(SCALE)) == ["ok", "ok", "", ""]
    offload = activation_store.OffloadedTensor.offload

    def twice(self, tensor, packs=True):
        offload(self, tensor, packs)
        self._store.counts.bytes_out += 1

    with mock.patch.object(activation_store.OffloadedTensor, "offload", twice):
        assert verdicts(layers.offload(SCALE))[:2] == ["MISSED", "ok"]


@pytest.mark.parametrize("system", [LEAN, TILES, DEEPSPEED, PLAIN])
def test_the_systems_compute_the_same_loss(system):
    model, batch = model_of(SCALE, SCALE.shape, torch.float32), batch_of(SCALE, 301)
    expected = model(**batch, use_cache=False).loss
    with system_on(SCALE, system, model) as step:
        torch.testing.assert_close(step(batch), expected)


@pytest.mark.parametrize("longest", [1, 99, 640, 5000])
def test_bisect_finds_the_longest_length_within_an_eighth(longest):
    tried = []
    low, high = bisect(lambda tokens: tried.append(tokens) or tokens <= longest, 64, 60.0)
    assert low <= longest < high and high - low <= max(1, low // 8)
    assert len(tried) == len(set(tried)) < 16


def test_bisect_tries_no_length_that_would_take_too_long():
    now = [0.0]

    def fits(tokens):
        now[0] += (tokens / 64) ** 2
        return True

    with mock.patch("time.monotonic", lambda: now[0]):
        assert bisect(fits, 64, 30.0) == (256, None)  # 21 s; the next takes 64


def test_a_copys_time_begins_when_the_computation_is_done_and_a_wait_is_timed_on_its_stream():
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, method):
            return lambda *args: log.append((self.name, method)) or (args or [len(log)])[0]

    streams = {"Stream": lambda device: Stream("copies"), "current_stream": lambda: Stream("computation")}
    stand_ins = {"stream": lambda stream: nullcontext(), "Event": lambda enable_timing: "event"}
    with mock.patch.multiple(torch.cuda, **streams, **stand_ins):
        copies, target = layers.TimedCopies(), torch.zeros(3)
        copies.wait(copies.start(torch.ones(3), target))
    record, wait = ("copies", "record_event"), ("copies", "wait_stream")
    assert log[:5] == [wait, record, wait, record, record] and target.sum() == 3
    assert [method for name, method in log[5:] if name == "computation"] == [
        "record_event",
        "wait_event",
        "record_event",
    ]
    assert copies.copies == copies.waits == [("event", "event")]


def raises(scale):
    yield Figure("first", ("1",))
    raise torch.OutOfMemoryError("out of memory\nof much")


def ends(scale):
    yield Figure("first", ("1",))
    os._exit(7)


def hangs(scale):
    yield Figure("first", ("1",))
    time.sleep(600)


@pytest.mark.parametrize(
    ("function", "reason", "verdict"),
    [("ends", "its process ended with 7", ""), pytest.param("hangs", "", LATE, marks=pytest.mark.slow)],
)
def test_a_part_that_fails_is_a_missed_row(function, reason, verdict):
    end = time.monotonic() + 250
    rows = rows_of(Job("part", f"{__name__}:{function}", "cpu", 1), end)
    assert next(rows) == Figure("first", ("1",))
    with mock.patch("time.monotonic", count(end).__next__) if function == "hangs" else nullcontext():
        assert list(rows) == [Figure("part", (reason,), "a figure", False, verdict)]
    assert not [each for each in active_children() if each.name.startswith("SpawnProcess")]


def test_a_part_without_time_is_not_started():
    with mock.patch("benchmarks.gpu.jobs.get_context", side_effect=AssertionError):
        assert verdicts(rows_of(Job("part", f"{__name__}:ends", "cpu", 1), 0.0)) == [LATE]


def test_guarded_rows_before_an_error_stay():
    assert verdicts(guarded("part", raises, SCALE)) == ["", "MISSED"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_prints_and_writes_its_rows(tmp_path):
    words = [sys.executable, "-m", "benchmarks.gpu", "--cpu", "--minutes", "12", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["met"] for row in rows) and len(rows) > 40
    assert all(any(system in row["name"] for row in rows) for system in SYSTEMS)
