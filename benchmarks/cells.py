"""One parity cell: a tiny model, a few samples, three SGD steps, with SP 1, with SP P, and in fp64.

All three see the same data in the same steps: with SP 1 every rank is a replica and accumulates ``gas`` samples; with
SP P the ranks of a sequence alternate samples, so they accumulate ``gas * P``.
"""

import copy
import itertools
import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.families import SMALL, family_config, kind_config
from benchmarks.multimodal_families import cast, draw_batch, trained_model
from benchmarks.own_losses import NUM_LABELS, NUM_PROMPTS, OWN_LOSSES
from deepspeed_alst.verification.hf_tiny_models import draw_weights

STEPS = 3
# Of matrices and of norm weights: three steps change each by at least 5 % of its norm, a visible change.
_LEARNING_RATES = (1.45, 3.8)
_LORA_RATE = 0.8
# Relative change of a weight per step in other models; of sqrt(numel) if it starts at zero.
_VISIBLE_STEP = 0.06
# Document starts after, within and at the ends of shards of 24 and 12 tokens.
_DOCUMENT_STARTS = ((0, 11, 24, 36), (0, 23, 30), (0, 13, 25))

_FP16_LOSS_SCALE = 128
_LORA_RANK = 4
_LORA_SEED = 11
# Spread of A and B: large enough for visible gradients, small enough for three large steps to stay stable.
_LORA_SPREAD = {"lora_A": 0.25, "lora_B": 0.15}

FROZEN = {
    "embedding": lambda name: "embed_tokens" in name,
    "layer 0": lambda name: "layers.0." in name or "embed_tokens" in name,
    "all but lm_head": lambda name: "lm_head" not in name,
    "all but norms": lambda name: "norm" not in name,
    "layer 1": lambda name: "layers.1." in name,
}
"""Predicates for names of frozen parameters, by the name of a cell's level."""


@dataclass(frozen=True)
class Cell:
    """Varied settings; the defaults are the plain case."""

    stage: int = 2
    reduce_scatter: bool = True
    gas: int = 1
    dtype: str = "fp32"
    sp_size: int = 2
    world_size: int = 2
    clip: float = 0.0
    contiguous_gradients: bool = True
    overlap_comm: bool = False
    grad_accum: str = ""
    sums: str = ""
    """Dtype of gradient sums; empty for fp32."""
    offload_optimizer: bool = False
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    odd_lengths: bool = False
    unequal_labels: bool = False
    tied: bool = False
    checkpointing: str = ""
    lora: bool = False
    """Train an adapter on a frozen model."""
    tiles: bool = False
    """Tile MLP and loss, a few tokens per tile."""
    loss: str = ""
    """Loss backend of the tiles, "triton" or "liger", run by Triton's interpreter; needs ``tiles``."""
    lean: bool = False
    """Run decoder layers in chunks of a few tokens; needs ``checkpointing``."""
    offload: str = ""
    """Offload target of layer inputs: "host", "disk", or "outputs" for attention outputs too, both on the host."""
    frozen: str = ""
    """Frozen part: a key of ``FROZEN``."""
    model: str = ""
    """Model other than the Llama: a key of ``benchmarks.families.KINDS``."""
    documents: bool = False
    """Pack several documents per sample; position_ids restart."""
    own: str = ""
    """Loss that the program makes: a key of ``benchmarks.own_losses.OWN_LOSSES``; empty for the model's."""
    media: str = ""
    """Family of models of images: a key of ``benchmarks.multimodal_families.FAMILIES``; empty for text alone."""
    seed: int = 7
    """Seed of the samples."""
    extra: tuple[tuple[str, Any], ...] = ()
    """Additional top-level keys of the ds_config."""

    def name(self) -> str:
        """Describe the cell briefly: stage, dtype, ranks, and the settings that differ from the defaults."""
        words = [f"Z{self.stage}", self.dtype, f"SP{self.sp_size}"]
        words += [f"xDP{self.world_size // self.sp_size}"] * (self.world_size > self.sp_size)
        for each in fields(self):
            value = getattr(self, each.name)
            if value != each.default and each.name not in ("stage", "dtype", "sp_size", "world_size"):
                words.append(each.name if value is True else f"{each.name}={value}")
        return " ".join(words)


def learning_rates(cell: Cell) -> tuple[float, float]:
    """Return rates of matrices and norm weights, larger if averaging or clipping shrinks the gradients."""
    # Gradient norm of two samples; random samples average as the root of their number.
    norm, rates = (1.7, (_LORA_RATE, 0.0)) if cell.lora else (2.5, _LEARNING_RATES)
    factor = norm / cell.clip if cell.clip else math.sqrt(cell.world_size * cell.gas / 2)
    return rates[0] * factor, rates[1] * factor


def _rates(cell: Cell, model: torch.nn.Module) -> dict[str, float]:
    """Return the learning rate of each trained parameter."""
    if not (cell.model or cell.own or cell.media):
        rates = learning_rates(cell)
        return {name: rates[param.dim() == 1] for name, param in trained(model).items()}
    _, norm, grads = next(_fp64_steps(cell, plain := _fp64_model(cell)))
    step = _VISIBLE_STEP * (norm / cell.clip if cell.clip else 1.0)
    sizes = {name: float(param.detach().norm()) or math.sqrt(param.numel()) for name, param in trained(plain).items()}
    return {name: step * size / float(grads[name].norm()) for name, size in sizes.items()}


@dataclass
class Result:
    """Results on the host in fp64: loss, norm and gradients of the first step, initial weights and their changes."""

    loss: float
    norm: float | None
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    changes: dict[str, torch.Tensor] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)


def model_config(cell: Cell) -> Any:
    """Build the config of the cell's model or a Llama, whose embedding exceeds the reduction bucket."""
    heads = {} if cell.heads == SMALL["num_attention_heads"] else {"num_attention_heads": cell.heads}
    if cell.model:
        return kind_config(cell.model, **heads)
    if cell.media:
        return trained_model(cell.media).config.get_text_config()
    # With a cache, transformers' sdpa ignores packed documents at SP 1.
    changed = {"intermediate_size": 56, "tie_word_embeddings": cell.tied, "use_cache": not cell.documents}
    return family_config("llama", num_key_value_heads=cell.kv_heads, **heads, **changed)


def build_model(config: Any, seed: int = 0, core: str = "sdpa", auto: Any = AutoModelForCausalLM) -> torch.nn.Module:
    """Build a model with the same weights in every run, spread enough for large gradients."""
    torch.manual_seed(seed)
    # A model without attention rejects attn_implementation.
    attends = auto._model_mapping[type(config)]._supports_sdpa
    model = auto.from_config(config, attn_implementation=core if attends else None)
    draw_weights(model)
    return model


def cell_model(cell: Cell, config: Any) -> torch.nn.Module:
    """Build a cell's model: with the head or the virtual tokens that its loss is of, adapted, or frozen in part."""
    if cell.media:
        model = copy.deepcopy(trained_model(cell.media))
    elif cell.own not in NUM_LABELS:
        model = build_model(config)
    else:
        config.num_labels, config.pad_token_id = NUM_LABELS[cell.own], 0
        model = build_model(config, auto=AutoModelForSequenceClassification)
    if cell.own in NUM_PROMPTS:
        model.prompt = torch.nn.Embedding(NUM_PROMPTS[cell.own], config.hidden_size)
    return vary(model, cell.lora, cell.frozen)


def vary(model: torch.nn.Module, lora: bool = False, frozen: str = "") -> torch.nn.Module:
    """Add an adapter to a model, or freeze a part of it.

    The adapter is LoRA on every linear layer of attention and MLP. Its B is not zero, unlike at the start of a
    training: A's gradients would be zero too, with nothing to compare.
    """
    if frozen:
        for name, param in model.named_parameters():
            param.requires_grad_(not FROZEN[frozen](name))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=_LORA_RANK, lora_alpha=4 * _LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    make = torch.Generator().manual_seed(_LORA_SEED)
    with torch.no_grad():
        for name, param in trained(model).items():
            spread = next(value for part, value in _LORA_SPREAD.items() if part in name)
            param.copy_(torch.randn(param.shape, generator=make) * spread / math.sqrt(param.shape[-1]))
    return model


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters, by names that compilation does not change."""
    return {name.replace("_orig_mod.", ""): param for name, param in model.named_parameters() if param.requires_grad}


def samples(cell: Cell, vocab: int) -> list[list[list[dict[str, torch.Tensor]]]]:
    """Create batches of one sample, all different: ``[step][rank][micro step]``."""
    make = torch.Generator().manual_seed(cell.seed)
    out = []
    for _ in range(STEPS):
        ranks = []
        for rank in range(cell.world_size):
            micros = []
            for micro in range(cell.gas):
                if cell.media:
                    micros.append(draw_batch(cell.media, (1 + (rank + micro) % 2,), make))
                    continue
                # Without odd lengths all samples are equally long; with them all differ and none is divisible.
                length = 43 + 2 * ((3 * rank + micro) % 5) if cell.odd_lengths else 48
                ids = torch.randint(0, vocab, (1, length), generator=make)
                labels = ids.clone()
                if cell.unequal_labels:
                    # A decreasing number of labels in the first half: the last shard of the sequence has none.
                    labels[:, max(3, length // (2 + rank + micro)) :] = -100
                micros.append({"input_ids": ids, "labels": labels})
                if cell.documents:
                    micros[-1]["position_ids"] = _positions(_DOCUMENT_STARTS[(rank + micro) % 3], length)
                    labels[micros[-1]["position_ids"] == 0] = -100
            ranks.append(micros)
        out.append(ranks)
    return out


def _positions(starts: tuple[int, ...], length: int) -> torch.Tensor:
    return torch.cat([torch.arange(end - start) for start, end in itertools.pairwise((*starts, length))])[None]


def ds_config(cell: Cell, sp_size: int) -> dict[str, Any]:
    """Return the cell's ds_config for an SP degree."""
    zero: dict[str, Any] = {
        "stage": cell.stage,
        "reduce_scatter": cell.reduce_scatter,
        "contiguous_gradients": cell.contiguous_gradients,
        "overlap_comm": cell.overlap_comm,
        "reduce_bucket_size": 2000,
        "stage3_param_persistence_threshold": 0,
    }
    if cell.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": cell.gas * sp_size,
        "gradient_clipping": cell.clip,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict(cell.extra),
    }
    if cell.dtype != "fp32":
        config[cell.dtype] = {"enabled": True}
    if cell.dtype == "fp16":
        config["fp16"]["loss_scale"] = _FP16_LOSS_SCALE
    if cell.grad_accum:
        config["data_types"] = {"grad_accum_dtype": cell.grad_accum}
    if cell.sums:
        key = "seq_parallel_communication_data_type" if sp_size > 1 else "communication_data_type"
        config[key] = cell.sums
    if sp_size > 1:
        config |= {"sequence_parallel_size": sp_size, "alst": {"pad_to_multiple_of": sp_size}}
        if cell.tiles:
            loss = {"tile_tokens": 5} | ({"backend": cell.loss} if cell.loss else {})
            config["alst"] |= {"tiled_mlp_compute": {"tile_tokens": 7}, "tiled_logits_loss": loss}
        if cell.lean:
            config["alst"]["memory_lean_layer"] = {"chunk_tokens": 10, "tile_tokens": 4, "key_block": 7}
        config["alst"] |= offload_keys(cell.offload)
    return config


def offload_keys(offload: str) -> dict[str, Any]:
    """Return the alst keys for a cell's ``offload``; both of two layers are offloaded."""
    if not offload:
        return {}
    block: dict[str, Any] = {"keep_last": 0}
    if offload == "disk":
        block |= {"nvme_path": tempfile.gettempdir(), "host_budget": 1}
    return {"activation_checkpoint_cpu_offload": block, "save_attention_output": offload == "outputs"}


def world_mean(losses: list[torch.Tensor]) -> float:
    """Return the mean of all ranks' losses, as many on each."""
    mean = torch.stack(losses).double().mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def train_step(engine: Any, own: list[dict[str, torch.Tensor]]) -> float:
    """Run one optimizer step on this rank's own samples; return the mean loss of all ranks."""
    import deepspeed_alst

    losses = []
    for batch in deepspeed_alst.shard_dataloader(own, engine):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return world_mean(losses)


class Recorder:
    """Recorder of an engine's first optimizer step, and of its weights before and after all steps."""

    def __init__(self, engine: Any, loss_scale: int = 1) -> None:
        self._engine, self._loss_scale = engine, loss_scale
        self._named = trained(engine.module)
        self._before = {name: full_weight(param) for name, param in self._named.items()}
        self._losses: list[torch.Tensor] = []
        self._first: Result | None = None
        self._methods = engine.backward, engine.step
        engine.backward, engine.step = self._backward, self._step

    def _backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> Any:
        # The HF Trainer divides by the accumulation steps itself.
        factor = 1 if scale_wrt_gas else self._engine.gradient_accumulation_steps()
        self._losses.append(loss.detach().double() * factor)
        return self._methods[0](loss, scale_wrt_gas=scale_wrt_gas)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        from deepspeed.utils import safe_get_full_grad

        is_first = self._first is None and self._engine.is_gradient_accumulation_boundary()
        if is_first:
            scale = self._loss_scale
            grads = {name: safe_get_full_grad(param).double() / scale for name, param in self._named.items()}
            self._first = Result(world_mean(self._losses), None, grads)
        out = self._methods[1](*args, **kwargs)
        if is_first and (norm := self._engine.get_global_grad_norm()) is not None:
            self._first.norm = float(norm)
        return out

    def result(self) -> Result:
        """Return the results on rank 0, elsewhere without tensors; needs the engine alive."""
        changes = {name: full_weight(param) - self._before[name] for name, param in self._named.items()}
        if dist.get_rank() != 0:
            return replace(self._first, grads={})
        return replace(self._first, changes=changes, before=self._before)


def run_alst(cell: Cell, **changed: Callable[[Any], Any]) -> Result:
    """Run the cell with this package, configured by its keys only.

    ``changed`` may hold ``on_model``, applied to the model before the engine is built, and ``on_engine``.
    """
    import deepspeed_alst

    def shards(own: Any, engine: Any) -> Any:
        return deepspeed_alst.shard_dataloader(own, engine, whole=bool(cell.own))

    return _run(cell, ds_config(cell, cell.sp_size), shards, sample_loss(cell), **changed)


def run_interpreted(cell: Cell) -> Result:
    """Run the cell with TRITON_INTERPRET=1 set at process start, and assert that a kernel ran."""
    from benchmarks.kernels.interpreter import faithful

    with faithful() as traffic:
        result = run_alst(cell)
    written = torch.tensor(traffic.written)
    torch.distributed.all_reduce(written)  # a rank without labels computes no loss
    assert written, "no Triton kernel ran"
    return result


def run_sp1(cell: Cell, **changed: Callable[[Any], Any]) -> Result:
    """Run the same program with ``sequence_parallel_size`` 1; ``changed`` as for ``run_alst``."""
    return _run(cell, ds_config(cell, 1), lambda own, engine: own, sample_loss(cell), **changed)


def run_upstream(cell: Cell) -> Result:
    """Run the cell with DeepSpeed's own ALST, as documented there."""
    from benchmarks import upstream

    config = ds_config(cell, cell.sp_size)
    del config["alst"]
    with upstream.registered(model_config(cell), cell.sp_size) as mpu:
        return _run(cell, config, upstream.loader, upstream.documented_loss, mpu=mpu)


def sample_loss(cell: Cell) -> Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]:
    """Return the loss of a model, or an engine, on one sample."""
    return OWN_LOSSES[cell.own] if cell.own else lambda model, batch: model(**batch).loss


def _run(
    cell: Cell,
    config: dict[str, Any],
    micro_batches: Callable[[list[dict[str, torch.Tensor]], Any], Iterable[dict[str, torch.Tensor]]],
    loss: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor],
    mpu: Any = None,
    on_model: Callable[[Any], Any] = lambda model: model,
    on_engine: Callable[[Any], Any] = lambda engine: None,
) -> Result:
    import deepspeed

    hf_config = model_config(cell)
    model = cell_model(cell, hf_config)
    if cell.checkpointing:
        reentrant = cell.checkpointing == "reentrant"
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            # A reentrant checkpoint needs an input that requires grad; transformers' Trainer does the same.
            model.enable_input_require_grads()
        model.train()
    model = on_model(model)
    mpu_argument = {} if mpu is None else {"mpu": mpu}
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model, cell), config=config, **mpu_argument)
    on_engine(engine)
    if cell.lean:  # a layer on the ordinary path would prove nothing
        warnings.filterwarnings("error", message="alst.memory_lean_layer")
    # ZeRO's gradients still contain the loss scale before the step; DeepSpeed 0.19.8 omits it at stage 0.
    recorder = Recorder(engine, _FP16_LOSS_SCALE if cell.dtype == "fp16" and cell.stage else 1)
    for ranks in samples(cell, hf_config.vocab_size):
        for batch in micro_batches(ranks[dist.get_rank()], engine):
            engine.backward(loss(engine, batch))
            engine.step()
    result = recorder.result()
    engine.destroy()
    return result


def sgd(model: torch.nn.Module, cell: Cell) -> torch.optim.SGD:
    """Build SGD with a group per learning rate; Adam would hide a wrong gradient scale."""
    by_rate = defaultdict(list)
    rates = _rates(cell, model)
    for name, param in trained(model).items():
        by_rate[rates[name]].append(param)
    return torch.optim.SGD([{"params": params, "lr": rate} for rate, params in by_rate.items()])


def full_weight(param: torch.nn.Parameter) -> torch.Tensor:
    """Return the full fp32 weight from the engine; stage 0 in fp32 has only the parameter itself."""
    from deepspeed.utils import safe_get_full_fp32_param

    weight = safe_get_full_fp32_param(param)
    return (param.detach() if weight is None else weight).double().clone()


class KeepFp64(TorchFunctionMode):
    """Replacement of transformers' fp32 casts (norms, RoPE, routers, loss) by fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        casts = func is torch.Tensor.to or func is torch.Tensor.type
        if casts and torch.float32 in (*args[1:], kwargs.get("dtype")):
            return args[0].double()
        if (
            func in (torch.nn.functional.softmax, torch.Tensor.softmax, torch.zeros)
            and kwargs.get("dtype") is torch.float32
        ):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def run_truth(cell: Cell, loss_of: Callable[..., torch.Tensor] | None = None) -> Result:
    """Run the cell in plain torch, fp64, one process; ``loss_of`` is the loss of a step's unsharded samples.

    By default it is the mean of the samples' losses, as a plain loop accumulates it.
    """
    model = _fp64_model(cell)
    before = {name: param.detach().clone() for name, param in trained(model).items()}
    rates, result = _rates(cell, model), None
    for loss, norm, grads in _fp64_steps(cell, model, loss_of):
        result = result or Result(loss, norm, grads, before=before)
        # DeepSpeed adds 1e-6 to the norm before the comparison.
        factor = max(1.0, (norm + 1e-6) / cell.clip) if cell.clip else 1.0
        with torch.no_grad():
            for name, param in trained(model).items():
                param -= rates[name] * grads[name] / factor
    changes = {name: param.detach() - before[name] for name, param in trained(model).items()}
    return replace(result, changes=changes)


def _fp64_model(cell: Cell) -> torch.nn.Module:
    hf_config = model_config(cell)
    # The default grouped matmul has no fp64 kernel.
    hf_config._experts_implementation = "eager"
    model = cell_model(cell, hf_config)
    rounding = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[cell.dtype]
    # The low-precision run starts from rounded weights.
    return model.to(rounding).double()


def _fp64_steps(
    cell: Cell, model: torch.nn.Module, loss_of: Callable[..., torch.Tensor] | None = None
) -> Iterator[tuple[float, float, dict[str, torch.Tensor]]]:
    """Yield loss, gradient norm and gradients of each step."""
    for ranks in samples(cell, model.config.get_text_config().vocab_size):
        batches = [cast(batch, torch.float64) for micros in ranks for batch in micros]
        with KeepFp64():
            if loss_of is None:
                loss = sum(sample_loss(cell)(model, batch) for batch in batches) / len(batches)
            else:
                loss = loss_of(model, batches)
            model.zero_grad()
            loss.backward()
        grads = {name: param.grad.clone() for name, param in trained(model).items()}
        yield loss.item(), math.sqrt(sum(grad.square().sum().item() for grad in grads.values())), grads
