"""Save a run, and resume it at another SP degree or on another number of ranks, in a plain DeepSpeed loop.

    deepspeed --num_gpus 2 examples/resume.py --deepspeed ds_configs/sp2.json --checkpoint runs/resume --steps 5
    deepspeed --num_gpus 1 examples/resume.py --deepspeed ds_configs/sp1.json --checkpoint runs/resume --steps 10

The second line goes on where the first has stopped, with the samples that come next. Each run measures the loss of one
document: before it saves, and after it has loaded. On another number of ranks rank 0 converts the checkpoint once.
"""

import argparse
import json
import sysconfig
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

SAMPLES_A_STEP = 2


def documents(count: int, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Cut the sources of Python's standard library into windows of ``seq_len`` bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)[: count * seq_len]
    rows = torch.tensor(list(text)).view(-1, seq_len)
    return [{"input_ids": row, "labels": row} for row in rows]


@torch.no_grad()
def measure(engine: deepspeed.DeepSpeedEngine, document: dict[str, torch.Tensor]) -> float:
    """Return the loss of a document; every rank gives it, and with sequence parallelism takes a shard of it."""
    loader = engine.deepspeed_io([document] * dist.get_world_size(), batch_size=1, route="eval")
    engine.eval()
    losses = [engine(**{key: x.to(engine.device) for key, x in batch.items()}).loss for batch in loader]
    engine.train()
    return torch.stack(losses).mean().item()


def main() -> None:
    """Load a checkpoint if there is one, train, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="the ds_config")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="folder to resume from if it has one, and to save to"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps, those before the checkpoint included")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args = parser.parse_args()

    deepspeed.init_distributed()
    ds_config = json.loads(Path(args.deepspeed).read_text())
    sp_size = ds_config.get("sequence_parallel_size", 1)
    # Without the block a run at SP 1 is DeepSpeed's alone, which loads checkpoints of as many ranks only.
    ds_config.setdefault("alst", {})
    # The same samples in a step at any SP degree and on any number of ranks.
    ds_config["gradient_accumulation_steps"] = SAMPLES_A_STEP * sp_size // dist.get_world_size()
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    held_out, *data = documents(201, args.seq_len)
    engine, _, loader, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=data, config=ds_config
    )
    layout = f"SP {sp_size} on {dist.get_world_size()} ranks"

    def say(words: str) -> None:
        if dist.get_rank() == 0:
            print(words, flush=True)

    done = 0
    if (args.checkpoint / "latest").exists():
        _, state = engine.load_checkpoint(str(args.checkpoint))
        done = state["step"]
        say(f"saved after step {done} at {state['layout']}: held-out loss {state['held_out']:.4f}")
        say(f"resumed at {layout}: held-out loss {measure(engine, held_out):.4f}")

    gas = engine.gradient_accumulation_steps()
    losses = []
    for index, batch in enumerate(loader):
        step = index // gas + 1
        if step <= done:  # trained before the checkpoint
            continue
        if step > args.steps:
            break
        loss = engine(**{key: x.to(engine.device) for key, x in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        if (index + 1) % gas == 0:
            say(f"step {step:3d}/{args.steps}  loss {torch.stack(losses).mean():.4f}")
            losses = []

    state = {"step": args.steps, "layout": layout, "held_out": measure(engine, held_out)}
    engine.save_checkpoint(str(args.checkpoint), client_state=state)
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
