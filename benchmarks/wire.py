"""Communication of one decoder layer: collectives and bytes, against DeepSpeed's own ALST, on 8 gloo ranks.

    python -m benchmarks.wire

Both systems run the same model on the same sample, with gradient checkpointing. Every torch.distributed collective is
counted at launch, by phase; a layer's share is a 2-layer model's count minus a 1-layer model's, which cancels loss,
loader and checks. Gradients are not reduced: the one micro-step is the first of two.

Legend: B batch, S whole sequence, H query heads, K KV heads, D head dim, P = sp_size; lower case = one rank's share.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.figures import Figure, Part, report

# The ranks import deepspeed, transformers and benchmarks.upstream: a spawned rank imports this file before
# benchmarks.ranks sets the variables that DeepSpeed reads at import.
from benchmarks.ranks import Ranks
from benchmarks.tally import Collective, Tally
from deepspeed_alst.attention.head_plan import HeadPlan

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
    """One model and SP degree; each rank has a copy of a shared KV head."""

    sp_size: int
    num_kv_heads: int
    num_heads: int = H
    num_chunks: int = 0
    """Chunks of a memory-lean layer; 0 for the ordinary path."""
    host_size: int = 0
    """Ranks of each of two hosts, whose bytes to one another are counted; 0 counts those of a rank."""

    @property
    def least_bytes(self) -> int:
        """Minimum bytes sent per rank and pass: others' q, k, v heads and its output heads; or by a host."""
        P = self.sp_size
        if self.host_size:
            return B * (S // 2) * (H // 2 + 2 * max(1, self.num_kv_heads // 2) + H // 2) * D * 4
        h, k = H // P, max(1, self.num_kv_heads // P)
        return (P - 1) * B * (S // P) * (2 * h + 2 * k) * D * 4


CASES = [Case(sp_size, num_kv_heads) for sp_size in (2, 4, 8) for num_kv_heads in (2, 8)]
BETWEEN_HOSTS = [Case(8, num_kv_heads, host_size=4) for num_kv_heads in (2, 8)]
UNEVEN = [Case(2, 1, 7), Case(4, 2, 14), Case(4, 3, 6), Case(8, 4, 28), Case(4, 2, 2)]
IN_CHUNKS = [Case(sp_size, 8, num_chunks=chunks) for sp_size in (2, 4) for chunks in (1, 4)]


@dataclass(frozen=True)
class Traffic:
    """Communication in one phase."""

    num_collectives: int
    num_bytes: int


def measure(case: Case) -> dict[str, dict[str, Traffic]]:
    """Return one layer's traffic by system and phase, on this rank.

    Raises:
        RuntimeError: the systems' losses differ, so their work differs; or a layer launches a collective without a rule
            for its bytes.
    """
    traffic, losses = {}, []
    for system, run in {"ours": _run_ours, "upstream": _run_upstream}.items():
        shallow, deep = Tally(case.host_size), Tally(case.host_size)
        depths = ((1, shallow), (2, deep))
        with _launched_on(case.host_size or WORLD_SIZE):
            losses.append([run(_model(case, num_layers, tally), case, tally) for num_layers, tally in depths])
        count = _sent_to_other_hosts if case.host_size else _sent
        traffic[system] = {phase: _difference(shallow, deep, phase, count) for phase in PHASES}
    if not torch.allclose(*torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=0.0):
        raise RuntimeError(f"{case}: losses of 1 and 2 layers are {losses[0]} here and {losses[1]} upstream")
    return traffic


def measure_ours(case: Case) -> dict[str, Traffic]:
    """Return one layer's traffic by phase, the larger of sent and received bytes, on this rank."""
    shallow, deep = Tally(), Tally()
    with _launched_on(WORLD_SIZE):
        for num_layers, tally in ((1, shallow), (2, deep)):
            _run_ours(_model(case, num_layers, tally), case, tally)
    both = [[_difference(shallow, deep, phase, count) for phase in PHASES] for count in (_sent, _received)]
    return {phase: max(each, key=lambda traffic: traffic.num_bytes) for phase, *each in zip(PHASES, *both, strict=True)}


def _sent(each: Collective) -> int:
    return each.sent or 0


def _received(each: Collective) -> int:
    return each.received or 0


def _sent_to_other_hosts(each: Collective) -> int:
    return each.to_other_hosts or 0


def _launched_on(host_size: int) -> Any:
    """Set the launcher's variables of hosts with some ranks each."""
    local_rank = str(dist.get_rank() % host_size)
    return mock.patch.dict(os.environ, {"LOCAL_SIZE": str(host_size), "LOCAL_RANK": local_rank})


def _difference(shallow: Tally, deep: Tally, phase: str, count: Callable[[Collective], int]) -> Traffic:
    calls = Counter(each.name for each in deep.of(phase))
    calls.subtract(each.name for each in shallow.of(phase))
    unknown = {each.name for each in deep.of(phase) if each.sent is None and calls[each.name]}
    if unknown:
        raise RuntimeError(f"a layer's {phase} makes {sorted(unknown)}, for which benchmarks.tally has no rule")
    of_both = [sum(map(count, tally.of(phase))) for tally in (deep, shallow)]
    return Traffic(calls.total(), of_both[0] - of_both[1])


def _model(case: Case, num_layers: int, tally: Tally) -> torch.nn.Module:
    """Build a tiny Llama with fixed weights, whose recomputations the tally records as a phase."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = case.num_heads * D
    sizes = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": case.num_heads, "num_key_value_heads": case.num_kv_heads}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="sdpa")).train()
    checkpointing = {
        "use_reentrant": False,
        "context_fn": lambda: (contextlib.nullcontext(), tally.phase("recompute")),
    }
    model.activation_checkpointing_enable(checkpointing)
    return model


def _run(
    model: torch.nn.Module, case: Case, tally: Tally, config: dict, loader: Any, loss_of: Any, **mpu: Any
) -> float:
    """Run one micro-step; return the loss."""
    import deepspeed

    config = {**_DS_CONFIG, "sequence_parallel_size": case.sp_size, **config}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, **mpu)
    ids_BS = torch.randint(64, (B, S), generator=torch.Generator().manual_seed(dist.get_rank()))
    batch = next(iter(loader([{"input_ids": ids_BS, "labels": ids_BS.clone()}], engine)))
    if case.num_chunks:
        loss_of(engine, batch)  # the ranks agree in the first forward that a layer can run in chunks
    with tally.installed():
        with tally.phase("forward"):
            loss = loss_of(engine, batch)
        with tally.phase("backward"):
            engine.backward(loss)
    engine.destroy()
    return loss.item()


def _run_ours(model: torch.nn.Module, case: Case, tally: Tally) -> float:
    from deepspeed_alst import shard_dataloader

    # The model check runs once, in the first forward, which is the one that is counted here.
    alst: dict[str, Any] = {"pad_to_multiple_of": case.sp_size, "check_model": False}
    if case.num_chunks:
        sizes = {"chunk_tokens": S // case.sp_size // case.num_chunks, "tile_tokens": 4}
        alst |= {"memory_lean_layer": sizes, "save_attention_output": True}
    return _run(model, case, tally, {"alst": alst}, shard_dataloader, lambda engine, batch: engine(**batch).loss)


def _run_upstream(model: torch.nn.Module, case: Case, tally: Tally) -> float:
    from benchmarks import upstream

    with upstream.registered(model.config, case.sp_size, micro_batch_size=B) as mpu:
        return _run(model, case, tally, {}, upstream.loader, upstream.documented_loss, mpu=mpu)


def rows() -> Iterator[Figure]:
    """Yield a layer's collectives and bytes by case and phase.

    Raises:
        RuntimeError: the ranks count differently.
    """
    with Ranks(WORLD_SIZE) as ranks:
        for case in CASES:
            answers = ranks.run(measure, case)
            if any(answer != answers[0] for answer in answers):
                raise RuntimeError(f"{case}: ranks count differently: {answers}")
            for phase in PHASES:
                ours, upstream = (answers[0][system][phase] for system in ("ours", "upstream"))
                yield Figure(
                    f"SP {case.sp_size}, {case.num_kv_heads} KV heads, {phase}",
                    tuple(f"{each.num_collectives} / {each.num_bytes:,}" for each in (ours, upstream)),
                    f"{TARGET} / {case.least_bytes:,}",
                    ours == Traffic(TARGET, case.least_bytes) and ours.num_bytes <= upstream.num_bytes,
                )


def rows_between_hosts() -> Iterator[Figure]:
    """Yield a layer's collectives, and the bytes that a host of two sends to the other, by case and phase."""
    with Ranks(WORLD_SIZE) as ranks:
        for case in BETWEEN_HOSTS:
            answers = ranks.run(measure, case)
            for phase in PHASES:
                counts, sent = {}, {}
                for system in ("ours", "upstream"):
                    found = [answer[system][phase] for answer in answers]
                    counts[system] = max(each.num_collectives for each in found)
                    of_hosts = [sum(each.num_bytes for each in half) for half in (found[:4], found[4:])]
                    sent[system] = max(of_hosts)
                # K and V of heads that ranks of a host share are gathered there, and their gradients summed.
                allowed = TARGET + (case.num_kv_heads < case.sp_size)
                yield Figure(
                    f"SP {case.sp_size} on 2 hosts, {case.num_kv_heads} KV heads, {phase}",
                    tuple(f"{counts[system]} / {sent[system]:,}" for system in ("ours", "upstream")),
                    f"{allowed} / {case.least_bytes:,}",
                    (counts["ours"], sent["ours"]) == (allowed, case.least_bytes),
                )


def rows_of_uneven_heads() -> Iterator[Figure]:
    """Yield a layer's collectives and the bytes of the busiest rank, by heads and phase, against the plan's."""
    with Ranks(WORLD_SIZE) as ranks:
        for case in UNEVEN:
            plan, answers = HeadPlan(case.sp_size, case.num_heads, case.num_kv_heads), ranks.run(measure_ours, case)
            planned = plan.exchanged_heads * B * (S // case.sp_size) * D * 4
            for phase in PHASES:
                found = [answer[phase] for answer in answers]
                busiest = max(found, key=lambda each: each.num_bytes)
                mean = sum(each.num_bytes for each in found) / len(found)
                yield Figure(
                    f"{case.num_heads} query and {case.num_kv_heads} KV heads, SP {case.sp_size}, {phase}",
                    (f"{busiest.num_collectives} / {busiest.num_bytes:,}", f"{busiest.num_bytes / mean:.2f}"),
                    f"{TARGET} / {planned:,}",
                    busiest == Traffic(TARGET, planned),
                )


def rows_in_chunks() -> Iterator[Figure]:
    """Yield the collectives of a memory-lean layer by chunks and phase; its backward recomputes."""
    with Ranks(WORLD_SIZE) as ranks:
        for case in IN_CHUNKS:
            found, n, P = ranks.run(measure_ours, case)[0], case.num_chunks, case.sp_size
            for phase, wanted, of_ring in (("forward", 3 * n + 1, P - 1), ("backward", 4 * n, 2 * P - 1)):
                yield Figure(
                    f"SP {P}, {n} chunk(s), {phase}",
                    (f"{found[phase].num_collectives}", f"{of_ring}"),
                    f"{wanted}",
                    found[phase].num_collectives == wanted,
                )


_HEADS = ("this package", "DeepSpeed's")
_BETWEEN_HOSTS = (
    "Bytes: what the ranks of a host send to those of the other in one layer. Target: the least that q, the KV heads "
    "that the other host needs, each once, and the output need."
)
_UNEVEN = (
    "Bytes: the larger of what a rank sends and receives in one layer, of the busiest rank, and relative to the mean. "
    "Target: the plan's figure (HeadPlan.exchanged_heads). DeepSpeed's ALST refuses such heads."
)
_IN_CHUNKS = (
    "One layer with 8 KV heads whose attention output is saved: 3 all-to-alls per chunk in the forward and a byte over "
    "gloo by which replicas agree, 4 in the backward. Ring attention, computed: K and V to the next rank P-1 times, in "
    "the backward again, and their gradients P times."
)
PARTS = {
    "collectives / bytes of one decoder layer": Part(rows, _HEADS, _CONVENTION),
    "collectives / bytes between two hosts of 4 ranks": Part(rows_between_hosts, _HEADS, _BETWEEN_HOSTS),
    "collectives / bytes where heads are unequal": Part(rows_of_uneven_heads, ("busiest rank", "of mean"), _UNEVEN),
    "collectives in chunks": Part(rows_in_chunks, ("memory-lean layer", "ring"), _IN_CHUNKS),
}

if __name__ == "__main__":
    sys.exit(report(__doc__, PARTS))
