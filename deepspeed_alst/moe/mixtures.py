"""Mixtures of experts: load-balancing loss over the whole sequence, and experts that not every rank calls.

The loss is E times the sum over the experts of their share of tokens times their mean probability (arXiv:2101.03961).

Legend: B batch, s tokens of this rank's shard, T = B*s, L layers, E experts, k experts per token.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import NamesFor, PatchSet, copy_function, importing, subclass
from deepspeed_alst.core.selfcheck import is_equivalent, random_tensors, result_or_none
from deepspeed_alst.data.sharding import REAL_TOKENS
from deepspeed_alst.distributed.sequence_loss import sum_over_shards
from deepspeed_alst.errors import UnsupportedModelError

_FUNCTION = "load_balancing_loss_func"
_SWITCH = "output_router_logits"


def unknown_router_loss(spec: ModelSpec) -> str | None:
    """Return why a model's router loss cannot be made over the whole sequence; None if it can."""
    if not spec.router_classes:
        return None
    callers: list[FunctionType] = []

    def note(function: FunctionType) -> dict[str, Any]:
        if _FUNCTION in function.__code__.co_names and _FUNCTION in function.__globals__:
            callers.append(function)
        return {}

    for forward in (spec.model.forward, *_class_forwards(spec.model).values()):
        copy_function(forward, note)
    unknown = next((each.__module__ for each in callers if not _is_known(each.__globals__[_FUNCTION])), None)
    return unknown and (
        f"{_SWITCH}=True: {unknown}.{_FUNCTION} is not the load-balancing loss that is known, and would be made of a "
        "shard; set it to False"
    )


def router_problem(spec: ModelSpec, kwargs: dict[str, Any], calls: ForwardContext) -> str | None:
    """Return why a forward with these arguments cannot get a whole-sequence router loss; None if it can."""
    asked = kwargs.get(_SWITCH)
    if asked is None:
        asked = getattr(spec.text_config, _SWITCH, False)
    if not asked or not spec.router_classes:
        return None
    if not calls.makes_whole_loss:
        return (
            f"it asks for {_SWITCH}, whose loss is not a sum over shards, which this program aggregates itself; set it "
            "to False, or leave mpu and DeepSpeed's ALST classes out"
        )
    if calls.real_tokens is None:
        return (
            f"it asks for {_SWITCH}, but does not say in {REAL_TOKENS} which tokens are padding; give the model every "
            f"key of the sharded loader's batch, or set {_SWITCH} to False"
        )
    problem = unknown_router_loss(spec)
    return problem and f"it asks for {problem}"


def whole_router_loss(spec: ModelSpec, group: Any, calls: ForwardContext, patches: PatchSet) -> None:
    """Patch a model with routers to compute its load-balancing loss over the whole sequence, sharded over a group.

    Its forwards look the function up by a global name that other models share, so this model runs copies of them with
    another function under that name.
    """
    base = spec.model

    def whole(before: Callable[..., Any]) -> Callable[..., Any]:
        if not _is_known(before):
            return before

        @torch.compiler.disable
        @functools.wraps(before)
        def of_whole_sequence(
            gate_logits: Any, num_experts: int | None = None, top_k: int = 2, attention_mask: Any = None
        ) -> Any:
            if calls.whole or not calls.inside or not isinstance(gate_logits, tuple):
                return before(gate_logits, num_experts, top_k, attention_mask)
            assert calls.real_tokens is not None and num_experts is not None  # checked by the batch guard
            calls.router_loss += 1
            _check_recorded(spec, gate_logits, calls.real_tokens.numel())
            return load_balancing_loss(gate_logits, num_experts, top_k, calls.real_tokens.flatten(), group)

        return of_whole_sequence

    def names_for(function: FunctionType) -> dict[str, Any]:
        if _FUNCTION not in function.__code__.co_names:
            return {}
        if _FUNCTION in function.__globals__:
            return {_FUNCTION: whole(function.__globals__[_FUNCTION])}
        return importing(_FUNCTION, whole)  # TRL's fused head imports it in its body

    _replace_forwards(base, names_for, patches)

    @torch.compiler.disable
    def end(module: torch.nn.Module, args: Any, output: Any) -> None:
        if getattr(output, "aux_loss", None) is not None and not calls.router_loss and not calls.whole:
            raise UnsupportedModelError(
                f"{type(base).__name__} made its router's loss without {_FUNCTION}: it is the loss of a shard. Undo "
                f"whatever replaced its forward (Liger, a subclass), or set {_SWITCH} to False."
            )

    # Every call passes the outermost module.
    patches.hook(spec.outer, "forward", end)


def _replace_forwards(base: torch.nn.Module, names_for: NamesFor, patches: PatchSet) -> None:
    """Replace one model's forward, and those that ``super().forward`` reaches, by copies."""
    behind = {kind: copy_function(forward, names_for) for kind, forward in _class_forwards(base).items()}
    changed = [(kind, copy) for kind, copy in list(behind.items())[1:] if copy is not vars(kind)["forward"]]
    if changed:  # each precedes its class in the MRO
        patches.subclass(base, {}, *(subclass(kind, {"forward": copy}) for kind, copy in changed))
    copy = copy_function(base.forward, names_for)
    if copy != base.forward:
        patches.set(base, "forward", copy)


def _class_forwards(base: torch.nn.Module) -> dict[type, Any]:
    return {kind: vars(kind)["forward"] for kind in type(base).__mro__ if "forward" in vars(kind)}


def load_balancing_loss(
    gate_logits: tuple[torch.Tensor, ...], num_experts: int, top_k: int, real_T: torch.Tensor, group: Any
) -> torch.Tensor:
    """Return the loss of the sequence over a group's ranks, ``L x [T, E], [T] -> []``, on all of them.

    Collective over the group: one all-reduce of 2 E + 1 numbers, none in the backward, no host sync. ``real_T`` is
    False for padding.
    """
    return _loss_of(sum_over_shards(_totals(gate_logits, num_experts, top_k, real_T), group))


def _totals(gate_logits: tuple[torch.Tensor, ...], num_experts: int, top_k: int, real_T: torch.Tensor) -> torch.Tensor:
    """Sum over all layers' tokens, ``[2 E + 1]`` in fp64: each expert's probabilities, its tokens, all tokens."""
    real_T, device = real_T.to(gate_logits[0].device), gate_logits[0].device
    assigned_Tk = real_T.long().repeat_interleave(top_k)
    # int64 and fp64: layers * tokens * k exceeds 2**24, where fp32 stops counting.
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
    sums_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
    for logits_TE in gate_logits:
        probabilities_TE = torch.nn.functional.softmax(logits_TE.to(device), dim=-1)
        chosen_Tk = probabilities_TE.detach().topk(top_k, dim=-1).indices
        counts_E.scatter_add_(0, chosen_Tk.flatten(), assigned_Tk)
        sums_E = sums_E + (probabilities_TE * real_T[:, None]).sum(dim=0, dtype=torch.float64)
    num_rows = len(gate_logits) * real_T.sum().double()
    return torch.cat([sums_E, counts_E.double(), num_rows[None]])


def _loss_of(totals: torch.Tensor) -> torch.Tensor:
    num_experts = len(totals) // 2
    sums_E, counts_E, num_rows = totals.split([num_experts, num_experts, 1])
    num_rows = num_rows.clamp(min=1.0)
    return (num_experts * (counts_E / num_rows * (sums_E / num_rows)).sum()).float()


@functools.cache
def _is_known(function: Callable[..., Any]) -> bool:
    """Return True if a loss equals this module's in value and gradient on an example, masked and unmasked."""
    return bool(result_or_none(_agrees, function))


def _agrees(function: Callable[..., Any]) -> bool:
    def ours(logits: Any, num_experts: int, top_k: int, mask: torch.Tensor | None) -> torch.Tensor:
        counted = torch.ones(batch * length, dtype=torch.bool) if mask is None else mask.flatten().bool()
        return _loss_of(_totals(logits, num_experts, top_k, counted))

    draw, (layers, batch, length, experts, top_k) = random_tensors(), (3, 2, 5, 7, 3)
    mask = torch.ones(batch, length, dtype=torch.long, device="cpu")
    mask[1, 3:] = 0
    logits = tuple(draw(batch * length, experts).requires_grad_() for _ in range(layers))
    return all(is_equivalent(function, ours, (logits, experts, top_k, each)) for each in (None, mask))


def _check_recorded(spec: ModelSpec, gate_logits: tuple[torch.Tensor, ...], num_tokens: int) -> None:
    """Raise if router logits were recorded without a gradient, or are not those of all tokens."""
    rows = {len(logits) for logits in gate_logits}
    if rows != {num_tokens}:
        raise UnsupportedModelError(
            f"{spec.name} recorded router logits of {sorted(rows)} tokens, where its shard has {num_tokens}. Set "
            f"{_SWITCH} to False, or leave alst.tiled_mlp_compute out."
        )
    if not torch.is_grad_enabled() or gate_logits[-1].requires_grad:
        return
    layers = spec.checkpointed_layers
    trains = any(param.requires_grad for layer in layers for param in layer.parameters())
    if trains and any(layer.gradient_checkpointing and layer.training for layer in layers):
        raise UnsupportedModelError(
            f"{spec.name}: a reentrant checkpoint records router logits without a gradient, so that {_SWITCH}=True "
            "would train nothing. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


def call_together(spec: ModelSpec, stage: int, leaf: Callable[[Any], None], patches: PatchSet) -> None:
    """Make every rank touch every expert of a block with a module for each, whose forward calls those with tokens.

    Under ZeRO-3 a rank that does not call an expert would not join the all-gathers of its weights, so each block is
    made a ``leaf`` module (tiling/zero3_leaf.py). On other stages the rank would have no gradient for the expert, or at
    another time, and DeepSpeed 0.19.8 then adds up gradients of different weights.
    """
    for block, experts in spec.separate_experts():
        if stage == 3:
            leaf(block)
        else:
            patches.hook(block, "forward_pre", _gradient_for_each(experts))


class _ZeroGradients(torch.autograd.Function):
    """Identity of a block's input that gives the weights of all its experts a zero gradient.

    Its backward runs after those of all ops on the input, so every weight's gradient is complete then on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.params = params
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # An expanded scalar takes memory only for weights without another gradient.
        return grad, *(param.new_zeros(()).expand_as(param) for param in ctx.params)


def _gradient_for_each(experts: torch.nn.Module) -> Callable[..., Any]:
    @torch.compiler.disable
    def hook(block: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        params = [param for param in experts.parameters() if param.requires_grad]
        if not params or not torch.is_grad_enabled():
            return None
        if not args or not isinstance(args[0], torch.Tensor):
            raise UnsupportedModelError(
                f"{type(block).__name__} has a module for each expert, and its first argument is not its tokens: "
                "experts without tokens could not be given a gradient. Use ZeRO 3."
            )
        return (_ZeroGradients.apply(args[0], *params), *args[1:])

    return hook
