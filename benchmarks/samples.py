"""Sample outputs and tables of README.md and other pages, which ``make docs-data`` writes between the marks of cog.

    python -m benchmarks.samples [--check]

A page says ``[[[cog put("NAME") ]]]`` in a comment before the text and ``[[[end]]]`` after it. Samples named in
``SLOW`` start ranks or measure. ``--check`` compares the others and changes nothing; exit status 5: one is out of date.
"""

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.figures import markdown

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "ds_configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_QUICK = "ALST_SAMPLES_QUICK"
_LLAMA = "benchmarks/models/llama-3.1-8b.json"
_PLANNED = r"[\d,]+ tokens,|\s+GiB|layer|backward|attention (kernel|outputs)|total|The longest"


def block(content: str, language: str = "text", width: int = 125) -> str:
    """Return a fenced block; lines of prose are wrapped, those of tables and commands are not."""
    lines = content.strip("\n").splitlines()
    if language == "text":
        lines = [part for line in lines for part in ([line] if line[:1] in "│┃" else textwrap.wrap(line, width))]
    return f"```{language}\n" + "\n".join(line.rstrip() for line in lines) + "\n```\n"


def output_of(*words: str, status: int = 0, cwd: Path | str = ROOT, errors: bool = False) -> str:
    """Return what a command prints, with ``errors`` to stderr too.

    Raises:
        RuntimeError: it ended with another exit status.
    """
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "130"})
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr * errors


def script(name: str) -> str:
    """Return the path of a command of this environment."""
    return str(Path(sys.executable).parent / name)


def train(ds_config: dict[str, Any], *words: str, program: str = "examples/train.py") -> str:
    """Return what a program prints on 2 ranks with a ds_config."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(ds_config), encoding="utf-8")
        return output_of(script("deepspeed"), "--num_gpus", "2", program, *words, "--deepspeed", str(path), errors=True)


def recipe(name: str) -> dict[str, Any]:
    """Return a ds_config of ds_configs/."""
    return json.loads((ROOT / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))


def error_of(run: Callable[[], Any]) -> str:
    """Return the message of the error that a call of this package raises."""
    from deepspeed_alst.errors import AlstError

    try:
        run()
    except AlstError as error:
        return str(error)
    raise RuntimeError("no error")


# --- errors and warnings


def config_errors(ds_config: dict[str, Any], num_gpus: int = 8) -> str:
    """Return the errors of a ds_config as ``ds_alst report`` finds them."""
    from deepspeed_alst.cli.report import problems

    return block("\n".join(problems(ds_config, num_gpus)))


def heads_error() -> str:
    """Return the error of SP 64 with a gated delta net's 32 heads on 64 ranks."""
    from deepspeed_alst.config.compatibility import check_world
    from deepspeed_alst.config.schema import parse

    return block(error_of(lambda: check_world(parse({"sequence_parallel_size": 64}), 64, [(32, 16, "scan")])))


def tile_error() -> str:
    """Return the error of a budget without room for a tile."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deepspeed_alst.config.schema import TiledMLPConfig
    from deepspeed_alst.core.hf_model_spec import ModelSpec
    from deepspeed_alst.core.patching import PatchSet
    from deepspeed_alst.tiling.tiled_mlp import tile_mlps

    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).train()
    with PatchSet() as undo:
        tile_mlps(ModelSpec(model), TiledMLPConfig(tile_bytes=1024), lambda module: None, undo)
        ids = torch.zeros(1, 4096, dtype=torch.long)
        return block(error_of(lambda: model(input_ids=ids, use_cache=False)))


def version_warning() -> str:
    """Return the warning about a newer torch than the newest that is tested."""
    from deepspeed_alst import environment

    newer = {"torch": "2.15.0"}
    older = mock.patch.object(environment, "version", lambda name: newer.get(name, "0"))
    with older, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        environment.check_deepspeed()
    return block(str(caught[0].message))


def bucket_plan() -> str:
    """Return the longest sequences of two bucket sizes."""
    from benchmarks.pictures import longest_of

    rows = []
    for text, size in (("5e8", 5e8), ("1.25e8 (the file's)", 1.25e8)):
        plan, sp_size = longest_of("llama-8b-h100x8", 8, {"reduce_bucket_size": size})
        bucket = f"{plan.device['gradient buckets, slices'] / 2**30:.1f} GiB"
        rows.append((text, bucket, f"{plan.tokens * sp_size:,} tokens"))
    return markdown(("`reduce_bucket_size`", "gradient bucket and slices", "longest sequence"), rows)


def checks() -> str:
    """Return the main lines of ``ds_alst`` report, plan and verify."""
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "bad.json"
        wrong.write_text(json.dumps({"sequence_parallel_size": 8, "alst": {"tiled_mlp": True}}), encoding="utf-8")
        runs = (
            ("report --ds_config bad.json --num_gpus 8", r"problem|.*bad\.json", 1, (), folder),
            (f"plan --ds_config ds_configs/llama-8b-h100x8.json --model {_LLAMA} --num_gpus 8", _PLANNED, 0, (), ROOT),
            (
                f"verify --ds_config ds_configs/cpu-sp2-all.json --model {_LLAMA}",
                r"┃|│ (loss|gradients)",
                0,
                ("--output", folder),
                ROOT,
            ),
        )
        lines = []
        for words, wanted, status, more, cwd in runs:
            said = output_of(script("ds_alst"), *words.split(), *more, status=status, cwd=cwd)
            lines += [f"$ ds_alst {words}", *(line for line in said.splitlines() if re.match(wanted, line))]
    return block("\n".join(lines), "console")


def few_keys() -> str:
    """Return the plan of 500,000 tokens without a ds_config, and the cheapest keys for them."""
    words = f"plan --model {_LLAMA} --num_gpus 8 --seq_len 500000 --cheapest"
    said = output_of(script("ds_alst"), *words.split())
    wanted = rf"{_PLANNED}|weights|gradients|optimizer|available|Cheapest|Step time"
    return block("\n".join([f"$ ds_alst {words}", *(x for x in said.splitlines() if re.match(wanted, x))]), "console")


# --- runs


def demo() -> str:
    """Return what ``make demo`` prints of its first and last steps."""
    lines = [line for line in train(recipe("sp2")).splitlines() if line.startswith("step ")]
    return block("\n".join([*lines[:3], "...", lines[-1]]), "console")


@functools.cache
def _activation_report() -> tuple[str, ...]:
    said = train(recipe("cpu-sp2-all"), "--seq-len", "2048", "--steps", "1")
    return tuple(line for line in said.splitlines() if line.startswith("│"))


def activation_report(*names: str) -> str:
    """Return rows of the activation report of ds_configs/cpu-sp2-all.json."""
    return _rows(_activation_report(), names)


def reduction_report() -> str:
    """Return the reduction's rows for the page's own program and first ds_config."""
    page = (ROOT / "docs" / "reduction.md").read_text(encoding="utf-8")
    ds_config = json.loads(re.findall(r"^```json\n(.*?)^```", page, re.S | re.M)[1])
    more = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(re.findall(r"^```python[^\n]*\n(.*?)^```", page, re.S | re.M)[0], encoding="utf-8")
        said = train(ds_config | more, program=str(program))
    lines = tuple(line for line in said.splitlines() if line.startswith("│"))
    return _rows(lines, ("reduction", "on the wire", "largest extra buffers", "gradient buckets"))


def _rows(lines: tuple[str, ...], names: tuple[str, ...]) -> str:
    """Return the named rows of a table, without the width that only its other rows need."""
    cells = {line.strip("│ ").partition("│")[0].strip(): line.strip("│ ").partition("│")[2].strip() for line in lines}
    left, right = max(map(len, names)), max(len(cells[name]) for name in names)
    return block("\n".join(f"│ {name:{left}} │ {cells[name]:{right}} │" for name in names))


def metrics_line() -> str:
    """Return the line of one optimizer step."""
    said = train({**recipe("sp2"), "steps_per_print": 2}, "--seq-len", "2048", "--steps", "2")
    return block(next(line for line in said.splitlines() if line.startswith("alst: step")), "text", 10**4)


# --- figures of docs/benchmarks.md


@functools.cache
def saved() -> dict[str, list[str]]:
    """Return the cells of each row of docs/benchmarks.md by "section, table, row"."""
    rows, section, table = {}, "", ""
    for line in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("**"):
            table = line.strip("*")
        elif line.startswith("| "):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[f"{section}, {table}, {name}"] = cells
    return rows


def _census() -> tuple[int, int]:
    """Return the numbers of right models and of all in docs/census.md."""
    found = re.search(r"(\d+) models: (\d+) right", (ROOT / "docs" / "census.md").read_text(encoding="utf-8"))
    return int(found[2]), int(found[1])


_TILES, _GLOO = "`make bench-tiles`", "CPU, gloo"
_FAKE, _RUN, _KERNELS = (_TILES, "fake tensors"), (_TILES, "run on CPU"), "`make bench-kernels`"
_HEAD = ("figure", "this package", "DeepSpeed 0.19.8", "command", "evidence")


def _tiles(row: str) -> list[str]:
    return saved()[f"tiles, {row}"][:2]


def _memory(row: str) -> list[str]:
    return saved()[f"kernels, memory, {row}"]


def results() -> str:
    """Return README's table of results."""
    loops = [cells for name, cells in saved().items() if name.startswith("parity, parity, loop")]
    met, cases = (sum(int(re.findall(r"\d+", cells[-1])[at]) for cells in loops) for at in (0, 1))
    wrong, ran = (sum(int(re.findall(r"\d+", cells[4])[at]) for cells in loops) for at in (0, 1))
    right, models = _census()
    layer = "wire, collectives / bytes of one decoder layer, SP 8, 8 KV heads"
    wire = [saved()[f"{layer}, {part}"] for part in ("forward", "recompute", "backward")]
    calls = [", ".join(cells[at].split()[0] for cells in wire) for at in (0, 1)]
    shape = "memory, KiB of device memory per token, Llama-3.1-8B, SP 8"
    systems = ("memory-lean layers", "ordinary path, Liger", "DeepSpeed's ALST, Liger", "DeepSpeed's ALST")
    lean, ordinary, liger, plain = (saved()[f"{shape}: {system}"][2] for system in systems)
    flops = [f"{float(each):.2f}" for each in _tiles("shapes, Llama-3.1-8B, SP 8: FLOPs of the model")]
    memory = saved()["reduction, memory, 4 ranks, ZeRO 3, accumulated in bf16, bucket 488,281"]
    sums = [f"{float(memory[at].replace(',', '')):,.0f} MiB" for at in (2, 0)]
    off = f"{wrong} of {ran} off by more than 25 %"
    parity = "configurations whose error against fp64 is at most twice SP 1's, ZeRO 0 to 3, SGD"
    census = f"causal LMs of transformers 5.24 at SP 2, 3, 4, of {models}"
    of_step = "matrix FLOPs of a step, tiled and checkpointed, relative to a plain step, Llama-3.1-8B"
    of_token = "device memory per token of the shard with tiles and offload, Llama-3.1-8B, SP 8"
    ours = f"{ordinary} KiB with Liger; {lean} with `memory_lean_layer`"
    of_sums, size = "memory of fp32 gradient sums, bucket of 5e8, ZeRO 3, 4 ranks", "CPU, at 1/1024 of the size"
    rows = [
        (parity, f"{met} of {cases}", off, _GLOO, "`make parity`"),
        (census, f"{right} match SP 1, none differs, others are refused", "not run", _GLOO, "`make census`"),
        ("collectives per layer: forward, recomputation, backward", *calls, _GLOO, "`make bench-wire`"),
        (of_token, ours, f"{liger} KiB with Liger, {plain} without", "fake tensors", "`make bench-memory`"),
        (of_step, *flops, "fake tensors", _TILES),
        (of_sums, *sums, size, "`make bench-reduction`"),
    ]
    return markdown(("figure", "this package", "DeepSpeed 0.19.8's own ALST", "measured on", "command"), rows)


def tiled_mlp() -> str:
    """Return the measured figures of docs/tiled_mlp.md."""
    shape = "shapes, Llama-3.1-8B, SP 8"
    gathers = zip(*(_tiles(f"gathers, {count} tiles: all-gathers a step") for count in (1, 4, 64)), strict=True)
    errors = zip(*(_tiles(f"gradients, {count} tiles: error of weight gradients") for count in (1, 128)), strict=True)
    peaks = zip(*(_memory(f"MLP, tiles of {count} tokens") for count in ("2,560", "5,504")), strict=True)
    by_autograd, closed, *_ = map(" and ".join, peaks)
    of_step = "matrix FLOPs of a step relative to a plain one, Llama-3.1-8B, checkpointed"
    of_mlp = "peak of an MLP's backward, 32,768 tokens, Llama-3.1-8B, in tiles of 2,560 and of 5,504 tokens"
    step, plain = "seconds, 2K tokens, hidden 1024, relative to an untiled step", "2K tokens, hidden 1024, of untiled's"
    rows = [
        (of_step, *_tiles(f"{shape}: FLOPs of the model"), *_FAKE),
        ("forwards of an MLP's first and last matrix", *_tiles(f"{shape}: forwards of first, last matrix"), *_FAKE),
        ("all-gathers of a ZeRO-3 step in 1, 4, 64 tiles", *map(", ".join, gathers), *_RUN),
        ("error of bf16 weight gradients in 1 and 128 tiles", *map(", ".join, errors), *_RUN),
        (of_mlp, f"{closed}; by autograd {by_autograd}", "", _KERNELS, "fake tensors"),
        (step, *_tiles(f"time, seconds of a step, {plain}"), *_RUN),
    ]
    return markdown(_HEAD, rows)


def tiled_loss() -> str:
    """Return the measured figures of docs/tiled_loss.md."""

    def peaks(row: str) -> list[str]:
        return [f"{int(each):,} MiB" for each in _tiles(f"loss, {row}")]

    bf16 = "cross_entropy t 3, V 128256, dtype bfloat16", "DeepSpeed's chunked cross-entropy [3, 128256] bfloat16"
    moved = [f"{float(saved()[f'kernels, numbers, {row}'][2]):.1f}" for row in bf16]
    by_torch, by_kernel, *_ = _memory("loss, tiles of 1 GiB: 2,092 tokens, torch's have 523")
    real, size = "the same with data, at 1/16 of the size (whole: 388 MiB)", "for real, 1/16, 100% trained"
    head = "peak of Llama-3.1-8B's head and loss, 32,768 tokens (whole: 49,632 MiB)"
    flops = "loss, Llama-3.1-8B's head, 30% trained: FLOPs of the whole's"
    whole = _memory("loss, DeepSpeed's chunked on whole logits, computed")[1]
    chunked = f"its kernel takes whole logits: {whole}"
    tiles = "peak in tiles of 1 GiB: 2,092 tokens with the kernel; 523 with torch"
    rows = [
        (head, *peaks("Llama-3.1-8B's head, 100% trained: peak MiB (whole 49632)"), *_FAKE),
        ("FLOPs of the head where 30 % of the tokens are trained", *_tiles(flops), *_FAKE),
        (real, *peaks(f"{size}: peak MiB (whole 388)"), *_RUN),
        (tiles, f"{by_kernel}; {by_torch}", chunked, _KERNELS, "fake tensors; DeepSpeed: computed"),
        ("bytes moved per bf16 logit by the kernel", *moved, _KERNELS, "interpreted"),
    ]
    return markdown(_HEAD, rows)


def memory_lean() -> str:
    """Return the measured figures of docs/memory_lean.md."""
    start, lean = "memory, KiB of device memory per token, ", ": memory-lean layers"
    cases = [name.removesuffix(lean) for name in saved() if name.startswith(start) and name.endswith(lean)]
    rows = []
    for case in cases:
        _, _, step, fixed, host, flops, *_ = saved()[case + lean]
        # DeepSpeed's degrees divide the heads.
        rest = (saved().get(case + system) for system in (": ordinary path, Liger", ": DeepSpeed's ALST, Liger"))
        rows.append((case.removeprefix(start), step, *(each[2] if each else "" for each in rest), fixed, host, flops))
    others = "ordinary path", "DeepSpeed 0.19.8's ALST"
    return markdown(("model", "memory-lean", *others, "constant, GiB", "host, a layer", "matrix FLOPs"), rows)


def trainers() -> str:
    """Return TRL's trainers, the losses that their configs name, and whether the package takes them."""
    import trl
    from trl.experimental import gkd

    from deepspeed_alst.integrations.trl_losses import refusals

    rows = []
    names = sorted(name for name in trl._import_structure["trainer"] if name.endswith("Trainer"))
    for name, home in [*((name, trl) for name in names), ("GKDTrainer", gkd)]:
        config = getattr(home, name.replace("Trainer", "Config"))
        about = config.__dataclass_fields__["loss_type"].metadata if "loss_type" in config.__annotations__ else {}
        named = re.search(r"values are:? (.*?)\. ", about.get("help", ""))
        losses = about.get("choices") or re.findall(r"'(\w+)'", named[1] if named else "")
        trainer = object.__new__(getattr(home, name))
        trainer.args = SimpleNamespace(loss_type=None)
        verdict = "refused" if refusals(trainer) else "right"
        rows.append((f"`{name}`", ", ".join(f"`{each}`" for each in losses) or "its own", verdict))
    return markdown((f"TRL {metadata.version('trl')}", "`loss_type`", "under sequence parallelism"), rows)


QUICK: dict[str, Callable[[], str]] = {
    "bad keys": lambda: config_errors(
        {"sequence_parallel_size": 3, "alst": {"pad_to_multiple": 64, "liger_kernel": "on"}}
    ),
    "SP and ranks": lambda: config_errors({"sequence_parallel_size": 3}),
    "SP and heads": heads_error,
    "tile bytes": tile_error,
    "newer": version_warning,
    "recipes": lambda: importlib.import_module("benchmarks.recipes").table(),
    "crossing": lambda: importlib.import_module("benchmarks.recipes").crossing_table(),
    "results": results,
    "tiled MLP": tiled_mlp,
    "tiled loss": tiled_loss,
    "memory-lean": memory_lean,
    "trainers": trainers,
}
SLOW: dict[str, Callable[[], str]] = {
    "bucket plan": bucket_plan,
    "longest": lambda: importlib.import_module("benchmarks.longest").table(),
    "few keys": few_keys,
    "checks": checks,
    "demo": demo,
    "report": lambda: activation_report("sequence parallelism", "attention", "tiled MLP", "reduction"),
    "tiled MLP report": lambda: activation_report("tiled MLP"),
    "reduction report": reduction_report,
    "metrics line": metrics_line,
}
SAMPLES = QUICK | SLOW


def put(name: str) -> None:
    """Write a sample at the mark that cog is at; with ``--check`` leave a slow one as it is."""
    import cog

    cog.out(cog.previous if _QUICK in os.environ and name in SLOW else SAMPLES[name]())


def main() -> int:
    """Let cog write the samples, or compare them."""
    from cogapp import Cog

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the quick ones, write nothing")
    options = ["-r"]
    if parser.parse_args().check:
        options = ["--check", "--diff"]
        os.environ[_QUICK] = "1"
    prologue = "from benchmarks.samples import put"
    return Cog().main(["cog", *options, "--verbosity=1", "-p", prologue, *map(str, PAGES)])


if __name__ == "__main__":
    sys.exit(main())
