"""Classifiers, decoders without a head, and modules around a model: ranks split the calls of a part.

The rest of the model runs on whole batches on every rank. What it gets of that part stands for the whole sequence
(sequence_tensor.py); its modules run on the rows of the shard, in a call of their own: ZeRO 3 gathers their weights.
"""

import contextlib
import inspect
from typing import Any

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.model_draws import begin
from deepspeed_alst.whole_sequence.batches import forward_whole_batch, is_whole_batch
from deepspeed_alst.whole_sequence.sequence_tensor import SequenceTensor

_TOKENWISE = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Dropout, torch.nn.Identity)


def split_calls(spec: ModelSpec, session: Any, patches: PatchSet) -> None:
    """Split the calls of a part of a model, and run the modules around it on the rows of the shard.

    Raises:
        UnsupportedModelError: a module around it has weights, and is not known to treat tokens one by one.
    """
    decoder, inside = spec.outer, set(spec.outer.modules())
    signature = inspect.signature(decoder.forward)
    if "input_ids" not in signature.parameters:  # a wrapper's, which passes its arguments on
        signature = inspect.signature(spec.model.forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        output = decoder._call_impl(*args, **kwargs)
        session.watch_loss(output)
        return output

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args).arguments | kwargs
        if session.calls.whole or not is_whole_batch(given):
            return run(*args, **kwargs)
        return forward_whole_batch(session, run, {name: x for name, x in given.items() if x is not None})

    patches.set(decoder, "_compiled_call_impl", call)  # what a module's __call__ runs, hooks included
    for name, module in spec.whole.named_modules():
        if module in inside or any(True for _ in module.children()):
            continue
        if isinstance(module, _TOKENWISE) or type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
            _run_on_rows(module, session, patches)
        elif any(True for _ in module.parameters()):
            raise UnsupportedModelError(
                f"{type(spec.whole).__name__}: {name} is a {type(module).__name__} outside of the decoder, not known "
                "to treat tokens one by one. Use a Linear, a Dropout or a norm, or set sequence_parallel_size to 1."
            )


def _run_on_rows(module: torch.nn.Module, session: Any, patches: PatchSet) -> None:
    """Make calls of a module with a tensor of the whole sequence run on this rank's rows, ``[B, s, features]``."""
    cls = type(module)

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], SequenceTensor):
            return cls.__call__(self, *args, **kwargs)
        x, tokens = args[0], args[0].places.tokens
        draws = contextlib.nullcontext()
        if self.training and isinstance(self, torch.nn.Dropout):
            draws = begin(
                session.calls.draws, tokens.batch, tokens.shard, session.groups.sp_rank, session.calls.checking
            )
        with draws:
            rows = x.computed_rows()
            found = cls.__call__(self, rows.view(tokens.batch, tokens.shard, *rows.shape[1:]))
        return x.like(found.flatten(0, 1))

    patches.subclass(module, {"__call__": torch.compiler.disable(call)})
