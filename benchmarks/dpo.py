"""Bytes and time of a DPO step that a program makes of ``outputs.logits``, beside the model's own loss and SP 1.

    python -m benchmarks.dpo [bytes] [time]

Bytes: one of 8 ranks that share a chosen and a rejected sequence, on fake tensors, as in benchmarks/memory.py on its
ordinary path. Time: a DeepSpeed loop on 2 gloo ranks. The reference's log-probabilities are numbers of the batch.

Legend: B rows, a chosen and a rejected one, S tokens of a row, s = S/P of a rank, V vocabulary.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.figures import Figure, Part, report
from benchmarks.ranks import Ranks

# transformers and deepspeed are imported in the functions, after benchmarks.ranks has set the environment.

SP_SIZE, BETA = 8, 0.1
KIB, GIB = 2**10, 2**30
_SFT, _DPO = "the model's own loss", "DPO of outputs.logits"
_MOST_MORE = 0.5  # KiB per token
_MOST_LOGITS = 4.0  # GiB: tiles of 1 GiB of fp32, their copies and gradients
_MOST_TIME = 1.15
_ROUNDS = 5


def loss_of(logits_BSV: Any, ids_BS: torch.Tensor, reference_BS: torch.Tensor) -> torch.Tensor:
    """Compute DPO's loss of a chosen and a rejected row; labels are the next tokens."""
    log_probs_BS = torch.gather(logits_BSV[:, :-1].log_softmax(-1), -1, ids_BS[:, 1:, None]).squeeze(-1)
    chosen, rejected = (log_probs_BS - reference_BS).sum(1)
    return -F.logsigmoid(BETA * (chosen - rejected))


# --- bytes


def measure(kind: str, tokens: int) -> tuple[Any, float, int]:
    """Run a step with so many tokens of a rank; return its peaks, the most GiB of logits, and bytes sent.

    The bytes are those of collectives but the all-to-alls of attention, gradients' reduction not included.
    """
    import deepspeed

    from benchmarks.memory import CASES, _peaks, host_store, put_ours
    from benchmarks.tally import Tally
    from benchmarks.tiles.systems import build
    from deepspeed_alst.core.patching import PatchSet
    from deepspeed_alst.profiler.fake import Known, fake_world
    from deepspeed_alst.profiler.ledger import Ledger
    from deepspeed_alst.whole_sequence.token_rows import Places

    def of_rows(places: Places) -> torch.Tensor:
        # Read from values, which fake tensors lack.
        return places.index.new_empty(places.tokens.batch * places.tokens.shard)

    rows, shape, tally = 2 if kind == _DPO else 1, CASES[0].shape, Tally()
    with fake_world(SP_SIZE), PatchSet() as undo:
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        model = build(shape.config(), shape.num_layers, torch.bfloat16)
        step = put_ours(model, SP_SIZE, undo, lean=None, store=host_store(undo))
        s = tokens // rows
        ids = torch.arange(s * SP_SIZE).remainder(shape.config().vocab_size).expand(rows, -1).contiguous()
        shard = {"input_ids": ids[:, :s].contiguous(), "position_ids": torch.arange(s).expand(rows, -1)}
        reference = torch.empty(rows, s * SP_SIZE - 1)
        undo.enter_context(mock.patch.object(Places, "of_rows", property(of_rows)))
        with tally.installed(), tally.phase("step"), Known(tokens), Ledger(model) as ledger:
            if kind == _DPO:
                loss = loss_of(_whole_logits(model, shard, s * SP_SIZE), ids, reference)
            else:
                loss = step(shard | dict.fromkeys(("labels", "shift_labels"), shard["input_ids"]))
            loss.backward()
    logits = max(sample.bytes["logits"] for sample in ledger.timeline)
    sent = sum(each.sent or 0 for each in tally.launched if "all_to_all" not in each.name)
    return _peaks(ledger, 1), logits / GIB, sent


def _whole_logits(model: Any, shard: dict[str, torch.Tensor], length: int) -> Any:
    """Return the logits of a whole batch, ``[B, S, V]``, as the engine does without its checks of real batches."""
    from deepspeed_alst.whole_sequence.batches import _whole_sequence

    group = dist.group.WORLD
    groups = SimpleNamespace(sp_size=SP_SIZE, sp_rank=0, sp_group=group, roll_group=group, ranks=[*range(SP_SIZE)])
    session = SimpleNamespace(groups=groups, outer=model, note_own_loss=lambda x: None)
    with model.alst_head.calls.having(gathers_tokens=True):
        output = model(**shard, use_cache=False)
    return _whole_sequence(session, output, shard, length, None).logits


def memory_rows() -> Iterator[Figure]:
    """Yield a row for each loss."""
    from benchmarks.memory import CASES, slopes

    vocab, lengths = CASES[0].shape.config().vocab_size, (16384, 32768)  # of 64K tokens a row, and twice that
    found = {}
    for kind in (_SFT, _DPO):
        runs = [measure(kind, tokens) for tokens in lengths]
        found[kind] = slopes(lengths, runs[0][0], runs[1][0])
        (_, logits, sent), whole = runs[1], lengths[1] * SP_SIZE * vocab * 2 / GIB
        more = found[kind].step - found[_SFT].step
        met = kind == _SFT or (more <= _MOST_MORE and logits <= _MOST_LOGITS)
        phases = (f"{found[kind].phases[name]:.1f}" for name in ("forward", "backward", "rest"))
        values = (*phases, f"{found[kind].fixed:.1f}", f"{logits:.2f} of {whole:.0f}", f"{sent / lengths[1]:.1f}")
        target = f"<= {_MOST_MORE} more; logits <= {_MOST_LOGITS:g}" if kind == _DPO else ""
        yield Figure(f"Llama-3.1-8B, SP {SP_SIZE}: {kind}", values, target, met)
    for owner, size in found[_DPO].longer.owners.most_common(5):
        yield Figure(f"at DPO's peak: {owner}", ("", f"{size / lengths[1] / KIB:.2f}", *[""] * 4))


# --- time

_LENGTH, _VOCAB = 4096, 2048
_engine: Any = None  # of this rank process


def put(sp_size: int) -> None:
    """Build the engine of a DPO loop. Runs on all ranks."""
    global _engine
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=_VOCAB, num_hidden_layers=2, use_cache=False)).train()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": sp_size,
        "zero_optimization": {"stage": 0},
    }
    if sp_size > 1:
        config["sequence_parallel_size"] = sp_size
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    _engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)


def seconds(length: int) -> tuple[float, float]:
    """Return the CPU seconds of one step on a pair of each rank, and its mean loss. Runs on all ranks."""
    import deepspeed_alst

    begin = time.process_time()
    make = torch.Generator().manual_seed(dist.get_rank())
    own = {"input_ids": torch.randint(0, _VOCAB, (2, length), generator=make)}
    own["reference"] = -torch.rand((2, length), generator=make)
    losses = []
    for batch in deepspeed_alst.shard_dataloader([own], _engine, whole=True):
        logits = _engine(input_ids=batch["input_ids"]).logits
        loss = loss_of(logits, batch["input_ids"], batch["reference"][:, 1:])
        _engine.backward(loss)
        _engine.step()
        losses.append(float(loss))
    return time.process_time() - begin, statistics.mean(losses)


def time_rows() -> Iterator[Figure]:
    """Yield the ratio of SP 2's seconds to SP 1's.

    Raises:
        RuntimeError: their losses differ, so their work does.
    """
    with ExitStack() as stack:
        ranks = [stack.enter_context(Ranks(2)) for _ in (1, 2)]
        for sp_size, each in enumerate(ranks, start=1):
            each.run(put, sp_size)
            each.run(seconds, _LENGTH // 8)  # warm-up, and the check of the model
        runs = [[each.run(seconds, _LENGTH) for each in ranks] for _ in range(_ROUNDS)]
    one, two = (statistics.mean(loss for _, loss in each) for each in runs[-1])
    if not abs(two - one) <= 1e-4 * abs(one):
        raise RuntimeError(f"the losses of the last step are {one} at SP 1 and {two} at SP 2")
    rounds = [[sum(spent for spent, _ in each) for each in pair] for pair in runs]
    medians = (f"{statistics.median(each):.2f}" for each in zip(*rounds, strict=True))
    ratio = statistics.median(two / one for one, two in rounds)
    values = (*medians, f"{ratio:.3f}")
    yield Figure(f"2 pairs of 2 x {_LENGTH:,} tokens", values, f"<= {_MOST_TIME}", ratio <= _MOST_TIME)


MEMORY = Part(
    memory_rows,
    ("forward", "backward", "rest", "fixed GiB", "logits, GiB", "sent, B"),
    "KiB of device memory that a token of a rank's shard adds, as in the table above, 64K to 128K tokens a row; "
    "GiB that do not grow; the most that logits take, of those of the whole batch in bf16, at the longer length; bytes "
    "that a rank sends per token of its shard, attention's all-to-alls aside. DPO: a chosen and a rejected row.",
)
TIME = Part(
    time_rows,
    ("SP 1, s", "SP 2, s", "ratio"),
    f"Medians of {_ROUNDS} pairs of steps, CPU seconds of 2 ranks, a pair of sequences for each rank in a step; 2 "
    f"layers of hidden size 256, vocabulary {_VOCAB:,}, fp32. SP 2 computes the head's forward again in the backward.",
)

if __name__ == "__main__":
    sys.exit(report(__doc__, {"bytes": MEMORY, "time": TIME}))
