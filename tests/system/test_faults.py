"""Lost ranks and full disks: what is left says who is missing, stops, and keeps its last whole checkpoint.

All nine faults, each through DeepSpeed's launcher, are in test_nine_faults.py; here are the parts.
"""

import contextlib
import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.ranks import fork_context
from benchmarks.resume import Job, build_engine
from deepspeed_alst.checkpoint.save import _name_latest
from deepspeed_alst.cli.launch import free_port
from deepspeed_alst.distributed.collectives import name_missing_ranks, world_timeout
from deepspeed_alst.distributed.mesh import build_control_group, build_groups
from deepspeed_alst.errors import AlstError, CheckpointError, RankLostError

JOB = Job.of(2, 2, 2)


# --- who is missing


def _lose(rank: int, lost: int, how: int, port: int, said) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3")
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    roll_group = build_control_group()
    dist.all_reduce(torch.ones(1))
    if rank == lost:
        os.kill(os.getpid(), how)
    try:
        with name_missing_ranks(roll_group, seconds=3):
            dist.all_reduce(torch.ones(1))
    except RankLostError as error:
        said.put((rank, str(error)))
    said.close()
    said.join_thread()
    os._exit(0)


@pytest.mark.parametrize(
    ("lost", "how", "words"),
    [
        (1, signal.SIGKILL, "has ended"),
        pytest.param(0, signal.SIGSTOP, "does not answer within 3 s", marks=pytest.mark.slow),
    ],
    ids=["killed", "stopped"],
)
def test_every_rank_that_is_left_names_the_one_that_is_missing(lost, how, words):
    context = fork_context()
    said, port = context.Queue(), free_port()
    ranks = [context.Process(target=_lose, args=(rank, lost, how, port, said)) for rank in range(3)]
    for each in ranks:
        each.start()
    try:
        messages = dict(said.get(timeout=300) for _ in range(2))
    finally:
        for each in ranks:
            each.kill()
            each.join()
    assert messages.keys() == {0, 1, 2} - {lost}
    # One who has heard enough ends, and may be found to have ended by one who is later.
    assert all(f"rank {lost} {words}" in message for message in messages.values()), messages


def _fail_in_the_check(rank: int, port: int, said) -> None:
    """Rank 1's model fails in the model check's forward of a shard, before the loss's collective."""
    import deepspeed

    import deepspeed_alst
    from tests.verification.test_model_check import CONFIG, build

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")

    def fail(module, args, output) -> None:
        calls = engine.alst.calls
        if rank == 1 and calls.checking and not calls.whole:
            raise KeyError("of the program")

    engine, *_ = deepspeed.initialize(model=(model := build()), config=CONFIG, model_parameters=model.parameters())
    model.model.layers[0].register_forward_hook(fail)
    ids = torch.arange(32)[None]
    try:
        for batch in deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine):
            engine(**batch)
    except (AlstError, RuntimeError) as error:
        said.put((rank, type(error).__name__, str(error)))
    said.close()
    said.join_thread()
    os._exit(0)


def test_a_rank_that_fails_alone_in_the_model_check_does_not_leave_the_others_waiting():
    context = fork_context()
    said, port = context.Queue(), free_port()
    ranks = [context.Process(target=_fail_in_the_check, args=(rank, port, said)) for rank in range(2)]
    for each in ranks:
        each.start()
    try:
        # The timeout of the ranks' collectives is longer.
        found = {rank: (kind, message) for rank, kind, message in (said.get(timeout=240) for _ in range(2))}
    finally:
        for each in ranks:
            each.kill()
            each.join()
    assert found[1][0] == "UnsupportedModelError" and "KeyError: 'of the program'" in found[1][1]
    assert found[0][0] == "RankLostError" and "rank 1 has ended" in found[0][1], found


def _error_of_a_program(kind: type[Exception], message: str) -> str:
    roll_group = build_control_group()
    start = time.monotonic()
    try:
        with name_missing_ranks(roll_group, seconds=200):
            raise kind(message)
    except Exception as error:
        assert time.monotonic() - start < 100  # nobody is waited for
        return f"{type(error).__name__}: {error}"
    finally:
        dist.destroy_process_group(roll_group)


def test_errors_of_another_kind_stay_what_they_are(ranks2):
    assert ranks2.run(_error_of_a_program, RuntimeError, "shapes differ") == ["RuntimeError: shapes differ"] * 2
    # All are there and one has failed all the same: the ranks called different collectives.
    both = ranks2.run(_error_of_a_program, RuntimeError, "[gloo/pair.cc:1] op.preamble.length <= op.nbytes. 8 vs 4")
    assert all("all 2 ranks answer" in each for each in both), both


def _timeouts() -> set[float]:
    groups = build_groups(2, build_control_group())
    all_groups = (groups.sp_group, groups.world_group, groups.self_group, groups.sp_control_group, groups.control_group)
    found = {each._get_backend(torch.device("cpu")).options._timeout.total_seconds() for each in all_groups}
    groups.destroy()
    return found | {world_timeout().total_seconds()}


def test_all_groups_wait_as_long_as_the_world_does(ranks2):
    from deepspeed.constants import default_pg_timeout

    assert ranks2.run(_timeouts) == [{default_pg_timeout.total_seconds()}] * 2


# --- checkpoints on a full disk


@contextlib.contextmanager
def _room_for(num_bytes: int, rank: int):
    """On one rank, the kernel refuses to write more than this to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _save_on_a_full_disk(folder: str, rank: int, tag: str) -> tuple[str, str | None, str, str]:
    engine = build_engine(JOB)
    engine.save_checkpoint(folder, tag="first")
    latest = Path(folder) / "latest"
    refusal = "nothing"
    with _room_for(4096, rank):
        try:
            engine.save_checkpoint(folder, tag=tag)
        except AlstError as error:
            assert isinstance(error, CheckpointError)
            refusal = str(error)
    dist.barrier()
    after = latest.read_text() if latest.exists() else None
    dist.barrier()
    loaded, _ = engine.load_checkpoint(folder) if after else (None, {})
    engine.save_checkpoint(folder, tag="second")
    names = " ".join(sorted(each.name for each in Path(folder).iterdir() if each.is_file() and "late" in each.name))
    result = refusal, after, Path(loaded).parent.name if loaded else "nothing", f"{latest.read_text()} of {names}"
    dist.barrier()
    engine.destroy()
    return result


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_that_one_rank_cannot_write_is_refused_by_all_and_latest_stays(rank, ranks2, tmp_path):
    results = ranks2.run(_save_on_a_full_disk, str(tmp_path), rank, "broken")
    for each, (refusal, after, loaded, last) in enumerate(results):
        assert "broken could not be written" in refusal and "still names first" in refusal
        assert refusal.startswith(f"rank {rank}: ") == (each != rank)
        assert (after, loaded, last) == ("first", "first", "second of latest")


def test_latest_is_flushed_to_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    flushed = []

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        flushed.append((path.name, path.read_text(), (tmp_path / "latest").read_text()))

    (tmp_path / "latest").write_text("step1")
    monkeypatch.setattr(os, "fsync", note)
    _name_latest(tmp_path, "step2")
    assert flushed == [("latest.new", "step2", "step1")] and (tmp_path / "latest").read_text() == "step2"


def test_a_checkpoint_that_is_written_over_has_no_name_until_it_is_whole(ranks2, tmp_path):
    for refusal, after, _, last in ranks2.run(_save_on_a_full_disk, str(tmp_path), 1, "first"):
        assert "there is no earlier checkpoint" in refusal
        assert after is None and last == "second of latest"
