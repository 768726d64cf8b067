"""What one decoder layer sends: collectives and bytes of this package beside DeepSpeed's own ALST, on 8 gloo ranks.

    python -m benchmarks.wire

Both systems run the same model on the same sample, with gradient checkpointing. Every collective of torch.distributed
is counted as it is launched, by phase; one layer's share is a 2-layer model's count less a 1-layer model's, in which
loss, loader and checks cancel. Gradients are not reduced: the one micro-step is the first of two.

Legend: B batch, S whole sequence, H query heads, K kv heads, D head dim, P = sp_size; lower case = one rank's share.
"""

import contextlib
import functools
import inspect
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed import distributed_c10d

# deepspeed, transformers and benchmarks.upstream are imported in the ranks: a spawned rank imports this file before
# benchmarks.ranks sets the variables that DeepSpeed reads at import.
from benchmarks.ranks import Ranks

WORLD_SIZE = 8
B, S, H, D = 2, 64, 8, 8
PHASES = ("forward", "recompute", "backward")
TARGET = 2
_DS_CONFIG = {
    "train_micro_batch_size_per_gpu": B,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 0},
}
_CONVENTION = (
    "Bytes: what one rank sends to the others in one layer; (P-1)/P of an all-to-all's buffer, P-1 times the shard of "
    f"an all-gather. fp32, B={B}, S={S}, H={H}, D={D}. Target: 2 collectives and the least bytes that q, k, v and the "
    "output need, (P-1) * B * S/P * (2h + 2k) * D * 4 with h = H/P query heads and k = max(1, K/P) kv heads a rank."
)


@dataclass(frozen=True)
class Case:
    """One model and SP degree. Kv heads below the SP degree travel as copies, one for each rank that needs them."""

    sp_size: int
    num_kv_heads: int

    @property
    def least_bytes(self) -> int:
        """What one rank must send in one pass: to each other rank its q, k, v heads of my tokens, and my o heads."""
        P = self.sp_size
        h, k = H // P, max(1, self.num_kv_heads // P)
        return (P - 1) * B * (S // P) * (2 * h + 2 * k) * D * 4


CASES = [Case(sp_size, num_kv_heads) for sp_size in (2, 4, 8) for num_kv_heads in (2, 8)]


@dataclass(frozen=True)
class Traffic:
    """What went over the wire in one phase."""

    num_collectives: int
    num_bytes: int


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


# Bytes that one rank sends, of a call's arguments by name. A collective that is not here is counted all the same, and
# refused if a layer makes one.
_SENT: dict[str, Callable[[dict[str, Any], int], int]] = {
    "all_to_all_single": lambda a, P: _size(a["input"]) // P * (P - 1),
    "all_gather": lambda a, P: _size(a["tensor"]) * (P - 1),
    "all_gather_into_tensor": lambda a, P: _size(a["input_tensor"]) * (P - 1),
    "all_reduce": lambda a, P: 2 * _size(a["tensor"]) * (P - 1) // P,  # a ring's; no layer makes one today
}
_COLLECTIVES = (
    *("all_to_all", "all_to_all_single", "all_reduce", "all_reduce_coalesced", "reduce", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_coalesced", "_all_gather_base"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base"),
    *("gather", "scatter", "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier", "monitored_barrier"),
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
)
# DeepSpeed's backend took these from torch.distributed when it was made.
_KEPT_BY_DEEPSPEED = {
    "all_gather_function": "all_gather_into_tensor",
    "reduce_scatter_function": "reduce_scatter_tensor",
}


class Tally:
    """Counts the collectives that this process launches inside a phase, by ``(phase, name)``."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._phase: str | None = None
        self._inside = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count under this name; a phase inside a phase takes over until it ends."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in front of every collective, for torch.distributed's users and for its own functions."""
        import deepspeed

        with ExitStack() as undo:
            for name in _COLLECTIVES:
                counting = self._counting(name, getattr(distributed_c10d, name))
                for owner in (owner for owner in (dist, distributed_c10d) if hasattr(owner, name)):
                    undo.enter_context(mock.patch.object(owner, name, counting))
            for attribute, name in _KEPT_BY_DEEPSPEED.items():
                counting = getattr(distributed_c10d, name)
                undo.enter_context(mock.patch.object(deepspeed.comm.comm.cdb, attribute, counting))
            yield

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            # all_gather_object and its kind are made of other collectives: what the caller asked for counts once.
            if self._phase is None or self._inside:
                return original(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            self.calls[self._phase, name] += 1
            if name in _SENT:
                num_ranks = dist.get_world_size(arguments.get("group"))
                self.bytes[self._phase, name] += _SENT[name](arguments, num_ranks)
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        return collective


def measure(case: Case) -> dict[str, dict[str, Traffic]]:
    """One layer's traffic by system and phase, on this rank.

    Raises:
        RuntimeError: the systems disagree about the loss, so they did not do the same work; or a layer makes a
            collective that has no rule for its bytes.
    """
    traffic, losses = {}, []
    for system, run in {"ours": _run_ours, "upstream": _run_upstream}.items():
        shallow, deep = Tally(), Tally()
        depths = ((1, shallow), (2, deep))
        losses.append([run(_model(case, num_layers, tally), case, tally) for num_layers, tally in depths])
        traffic[system] = {phase: _difference(shallow, deep, phase) for phase in PHASES}
    if not torch.allclose(*torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=0.0):
        raise RuntimeError(f"{case}: losses of 1 and 2 layers are {losses[0]} here and {losses[1]} upstream")
    return traffic


def _difference(shallow: Tally, deep: Tally, phase: str) -> Traffic:
    names = {name for at, name in deep.calls | shallow.calls if at == phase}
    calls = {name: deep.calls[phase, name] - shallow.calls[phase, name] for name in names}
    if unknown := [name for name, number in calls.items() if number and name not in _SENT]:
        raise RuntimeError(f"a layer's {phase} makes {unknown}, for which _SENT has no rule")
    sent = sum(deep.bytes[phase, name] - shallow.bytes[phase, name] for name in names)
    return Traffic(sum(calls.values()), sent)


def _model(case: Case, num_layers: int, tally: Tally) -> torch.nn.Module:
    """A small Llama with the same weights every time, whose recomputations the tally knows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=H * D,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=H,
            num_key_value_heads=case.num_kv_heads,
            attn_implementation="sdpa",
        )
    ).train()
    checkpointing = {
        "use_reentrant": False,
        "context_fn": lambda: (contextlib.nullcontext(), tally.phase("recompute")),
    }
    model.activation_checkpointing_enable(checkpointing)
    return model


def _sample() -> dict[str, torch.Tensor]:
    ids_BS = torch.randint(64, (B, S), generator=torch.Generator().manual_seed(dist.get_rank()))
    return {"input_ids": ids_BS, "labels": ids_BS.clone()}


def _run_ours(model: torch.nn.Module, case: Case, tally: Tally) -> float:
    """One micro-step of this package; returns the loss."""
    import deepspeed

    from deepspeed_alst import shard_dataloader

    keys = {"sequence_parallel_size": case.sp_size, "alst": {"pad_to_multiple_of": case.sp_size}}
    config = {**_DS_CONFIG, **keys}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    batch = next(iter(shard_dataloader([_sample()], engine)))
    with tally.installed():
        with tally.phase("forward"):
            loss = engine(**batch).loss
        with tally.phase("backward"):
            engine.backward(loss)
    engine.destroy()
    return loss.item()


def _run_upstream(model: torch.nn.Module, case: Case, tally: Tally) -> float:
    """One micro-step of DeepSpeed's own ALST; returns the loss."""
    import deepspeed

    from benchmarks.upstream import Upstream

    upstream = Upstream(model.config, case.sp_size, micro_batch_size=B)
    config = {**_DS_CONFIG, "sequence_parallel_size": case.sp_size}
    with upstream.active():
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config, mpu=upstream.mpu
        )
        batch = next(upstream.loader([_sample()]))
        with tally.installed():
            with tally.phase("forward"):
                loss = upstream.loss(engine, batch)
            with tally.phase("backward"):
                engine.backward(loss)
        engine.destroy()
    upstream.close()
    return loss.item()


def _add_row(table: Table, case: Case, phase: str, ours: Traffic, upstream: Traffic) -> bool:
    """One line of the table; returns whether the target is met."""
    met = ours == Traffic(TARGET, case.least_bytes) and ours.num_bytes <= upstream.num_bytes
    ratio = (
        f"{upstream.num_collectives / max(1, ours.num_collectives):.1f} / "
        f"{upstream.num_bytes / max(1, ours.num_bytes):.3f}"
    )
    table.add_row(
        *(str(case.sp_size), str(case.num_kv_heads), phase),
        *(f"{each.num_collectives} / {each.num_bytes:,}" for each in (ours, upstream)),
        *(ratio, f"{TARGET} / {case.least_bytes:,}", "ok" if met else "MISSED"),
        end_section=phase == PHASES[-1],
    )
    return met


def main() -> int:
    """Measure, print, and return the exit status: 1 if this package misses a target."""
    started = time.perf_counter()
    title = "One decoder layer on the wire: collectives / bytes"
    table = Table(title=title, caption=_CONVENTION, title_justify="left", caption_justify="left")
    for header in ("SP", "kv heads", "phase", "ours", "upstream", "upstream : ours", "target", ""):
        table.add_column(header, justify="left" if header in ("phase", "") else "right")
    all_met = True
    with Ranks(WORLD_SIZE) as ranks:
        for case in CASES:
            answers = ranks.run(measure, case)
            if any(answer != answers[0] for answer in answers):
                raise RuntimeError(f"{case}: ranks count differently: {answers}")
            for phase in PHASES:
                all_met &= _add_row(table, case, phase, *(answers[0][system][phase] for system in ("ours", "upstream")))
    console = Console(width=120)
    console.print(table)
    console.print(f"{'All targets met' if all_met else 'Targets MISSED'}; {time.perf_counter() - started:.0f} s.")
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
