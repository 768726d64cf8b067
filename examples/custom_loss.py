"""Add terms of your own to the loss that the model returns, in a plain DeepSpeed loop.

    deepspeed --num_gpus 2 examples/custom_loss.py --deepspeed ds_configs/sp2.json

``outputs.loss`` is the loss of the whole sequence, on every rank. Two kinds of terms can be added to it:

- a term of the weights, which is equal on all ranks: as it is (``drift``; ZeRO 0 to 2, where weights are whole);
- a mean over tokens, of which each rank has a shard: by ``sequence_mean``.

A loss made without the model's own, or one that differs over the ranks of a sequence, is refused. With
ds_configs/sp1.json, without sequence parallelism, the same numbers are printed.
"""

import argparse
import json
import sysconfig
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM


def sequence_mean(values: torch.Tensor, counted: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Average ``values`` over the counted tokens of a sequence, which the ranks of ``group`` share.

    The value is the whole sequence's on every rank. The gradient is that of this rank's tokens times the number of
    ranks, as DeepSpeed averages gradients over ranks and those of one sequence must be added.
    """
    count = counted.sum()
    dist.all_reduce(count, group=group)
    share = (values * counted).sum() / count
    whole = share.detach().clone()
    dist.all_reduce(whole, group=group)
    scaled = share * dist.get_world_size(group)
    return scaled + (whole - scaled).detach()


def documents(count: int, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Cut the sources of Python's standard library into windows of ``seq_len`` bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)[: count * seq_len]
    rows = torch.tensor(list(text)).view(-1, seq_len)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Train with two terms beside the model's loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="the ds_config, ZeRO 0 to 2")
    parser.add_argument("--seq-len", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=documents(4 * args.steps, args.seq_len),
        config=args.deepspeed,
    )
    sp_size = json.loads(Path(args.deepspeed).read_text()).get("sequence_parallel_size", 1)
    group, _ = dist.new_subgroups(sp_size)  # ranks that follow one another share a sequence
    embedding = model.get_input_embeddings().weight
    start = embedding.detach().clone()

    step, totals = 0, []
    for batch in loader:
        batch = {key: value.to(engine.device) for key, value in batch.items()}
        outputs = engine(**batch, output_hidden_states=True)
        # Padding is not counted. A shard's labels are moved by one already, before the sequence was cut.
        labels = batch.get("shift_labels")
        if labels is None:
            labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        drift = (embedding - start).square().mean()
        activations = sequence_mean(outputs.hidden_states[-2].float().square().mean(-1), labels != -100, group)
        loss = outputs.loss + drift + 0.01 * activations
        engine.backward(loss)
        totals.append(torch.stack([loss, outputs.loss, drift, activations]).detach())
        last = engine.is_gradient_accumulation_boundary()
        engine.step()
        if last:
            step += 1
            total = torch.stack(totals).mean(0)
            dist.all_reduce(total)
            shown = "  ".join(f"{value:.4f}" for value in (total / dist.get_world_size()).tolist())
            if dist.get_rank() == 0:
                norm = float(engine.get_global_grad_norm())
                print(
                    f"step {step:3d}/{args.steps}  loss, model, drift, activations {shown}  norm {norm:.4f}", flush=True
                )
            totals = []
        if step == args.steps:
            break
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
