"""Train a causal language model on long documents: a plain DeepSpeed loop, one process per GPU.

    deepspeed --num_gpus 2 examples/train.py --deepspeed ds_configs/sp2.json

By default, a tiny byte-level Llama, built from a config, trains on the sources of Python's standard library. Each step
prints its loss (nats per token), gradient norm, tokens/s and peak memory.
"""

import argparse
import json
import os
import sysconfig
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", required=True, metavar="JSON", help="the ds_config")
    parser.add_argument("--model", help="a hub name or a local folder; default: a small byte-level Llama")
    parser.add_argument(
        "--data", type=Path, help="a .jsonl (key 'text') or .txt file; default: Python's standard library"
    )
    parser.add_argument("--seq-len", type=int, default=16384, help="longest sequence, in tokens")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, help="folder to save to at the end, and to resume from if it has one"
    )
    parser.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="also save every so many steps")
    parser.add_argument("--log-file", type=Path, help="write one JSON line a step to this file")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser.parse_args()


class Documents(torch.utils.data.Dataset):
    """Documents as token ids, cut into windows of at most ``seq_len`` tokens."""

    def __init__(self, texts, tokenize, seq_len: int) -> None:
        self.windows = []
        for text in texts:
            ids = tokenize(text)
            cuts = [ids[first : first + seq_len] for first in range(0, len(ids), seq_len)]
            # Short windows do not train long context.
            self.windows += [cut for cut in cuts if len(cut) >= seq_len // 2]
        if not self.windows:
            raise SystemExit(f"no document has {seq_len // 2} tokens or more; choose a smaller --seq-len")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.as_tensor(self.windows[index], dtype=torch.long)
        return {"input_ids": ids, "labels": ids.clone()}


def read_texts(path: Path | None) -> list[str]:
    """Read the documents: "text" of each .jsonl line, a .txt as one, or the standard library's sources."""
    if path is None:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return [source.read_text(encoding="utf-8") for source in sources]
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
    return [content]


def build(args: argparse.Namespace):
    """Return the model and a function that tokenizes text."""
    if args.model is None:
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1 << 20,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config), lambda text: list(text.encode("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    return model, lambda text: tokenizer(text)["input_ids"]


def main() -> None:
    """Train the model."""
    args = parse_args()
    torch.manual_seed(args.seed)
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # The ranks of a host share its cores; excess threads waste time in spin waits.
        ranks_here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, os.cpu_count() // ranks_here))
    model, tokenize = build(args)
    model.activation_checkpointing_enable()
    data = Documents(read_texts(args.data), tokenize, args.seq_len)
    engine, _, loader, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=data, config=args.deepspeed
    )

    # Counted in samples, which are independent of the SP degree and the number of ranks.
    samples_per_batch = engine.train_batch_size() // engine.gradient_accumulation_steps()
    step, epoch, consumed = 0, 0, 0
    if args.checkpoint and (args.checkpoint / "latest").exists():
        _, state = engine.load_checkpoint(str(args.checkpoint))
        step, epoch, consumed = state["step"], state["epoch"], state["consumed"]

    def save() -> None:
        engine.save_checkpoint(str(args.checkpoint), client_state={"step": step, "epoch": epoch, "consumed": consumed})

    # One bar for the job, on a terminal.
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=True if dist.get_rank() else None)
    losses, tokens, started = [], 0, time.perf_counter()
    while step < args.steps:
        loader.data_sampler.set_epoch(epoch)
        for index, batch in enumerate(loader):
            if (index + 1) * samples_per_batch <= consumed:  # trained before the checkpoint
                continue
            batch = {key: value.to(engine.device) for key, value in batch.items()}
            loss = engine(**batch).loss
            engine.backward(loss)
            losses.append(loss.detach())
            tokens += batch["input_ids"].numel() * dist.get_world_size()
            last = engine.is_gradient_accumulation_boundary()
            engine.step()
            consumed = (index + 1) * samples_per_batch
            if last:
                step += 1
                report(args, step, bar, engine, torch.stack(losses).mean(), tokens, time.perf_counter() - started)
                losses, tokens, started = [], 0, time.perf_counter()
                if args.checkpoint and (step == args.steps or (args.save_every and step % args.save_every == 0)):
                    save()
            if step == args.steps:
                break
        else:
            epoch, consumed = epoch + 1, 0
    bar.close()
    dist.destroy_process_group()


def report(args: argparse.Namespace, step: int, bar, engine, loss: torch.Tensor, tokens: int, seconds: float) -> None:
    """Print a line above the progress bar on rank 0; the loss is the mean over all ranks."""
    dist.all_reduce(loss)
    norm = engine.get_global_grad_norm()
    line = {
        "step": step,
        "loss": loss.item() / dist.get_world_size(),
        "grad_norm": None if norm is None else float(norm),
        "tokens_per_s": tokens / seconds,
        "peak_gib": get_accelerator().max_memory_allocated() / 2**30,
    }
    if dist.get_rank() == 0:
        shown = "-" if norm is None else f"{line['grad_norm']:.3f}"
        with bar.external_write_mode():
            print(
                f"step {step:3d}/{args.steps}  loss {line['loss']:.4f}  grad norm {shown}  "
                f"{line['tokens_per_s']:,.0f} tokens/s  peak {line['peak_gib']:.2f} GiB",
                flush=True,
            )
        bar.set_postfix(loss=line["loss"], refresh=False)
        bar.update()
        if args.log_file:
            with args.log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
