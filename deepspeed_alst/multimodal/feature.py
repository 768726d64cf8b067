"""Multimodal models under ``sequence_parallel_size``: a merge of whole samples, the language model in shards.

Every rank of a sequence is given the whole sample. The model's own code merges embeddings that are not made yet
(deferred.py) and calls its language model, where each rank makes those of its shard (decoder_calls.py). Its output
stands for that of the whole sequence (whole_sequence/sequence_tensor.py), of which the head and the loss run on this
rank's rows (head.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.attention.private_config import own_config
from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import gather_objects
from deepspeed_alst.errors import DataError
from deepspeed_alst.multimodal.decoder_calls import split_decoder_calls
from deepspeed_alst.multimodal.deferred import defer_embeddings
from deepspeed_alst.multimodal.encoder_split import split_encoder
from deepspeed_alst.multimodal.head import split_fused_head, split_head
from deepspeed_alst.multimodal.hf_families import FRAME_BY_FRAME, ONE_BY_ONE, PADDED, REPEATED
from deepspeed_alst.multimodal.hf_image_masks import mask_of_batch
from deepspeed_alst.sequence_parallel.feature import without_split


class Multimodal(Feature):
    """Split of a multimodal model's language model, head and loss."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the calls of the language model, of the head and of the loss."""
        session, whole = self._session, ModelSpec(run.spec.whole)
        self._name = whole.name
        _share_config(whole, run.spec.config, patches)
        session.calls.mask_of_batch = mask_of_batch
        defer_embeddings(whole, session.calls, patches)
        split_decoder_calls(run.spec, session, patches)
        split_head(whole, session, patches)
        split_fused_head(patches)
        kind = self._kind = whole.config.model_type
        kinds = kind in FRAME_BY_FRAME, kind in PADDED
        self._splits = kind not in REPEATED and split_encoder(whole, session, patches, *kinds)
        if hasattr(whole.model, "generate"):
            patches.wrap(whole.model, "generate", without_split(run.spec.config, session.calls))

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Make batches without images safe under ZeRO.

        Under ZeRO 3 DeepSpeed 0.19.8 keeps the gradients of an encoder that the next step leaves out, and steps with
        them again or adds them to the next ones. And ranks wait for one that gathers an encoder's weights, and under
        ZeRO 1 and 2 for one that reduces its gradients.
        """
        self._media: list[tuple[str, int]] | None = None
        split = {id(param) for each in (run.spec.outer, run.spec.with_head.head) for param in each.parameters()}
        self._trains = any(param.requires_grad and id(param) not in split for param in run.spec.whole.parameters())
        self._stage, optimizer = run.stage, engine.optimizer
        offload = engine.zero_offload_optimizer()
        is_offloaded = offload is not None and offload.device != "none"
        self._keeps_gradients = run.stage > 1 and self._trains and is_offloaded
        if run.stage == 3 or self._keeps_gradients or (run.stage and self._session.groups.dp_size > 1):
            patches.hook(run.spec.whole, "forward_pre", self._check_media, prepend=True, with_kwargs=True)
        if run.stage == 3 and hasattr(optimizer, "grad_partitions_flat_buffer"):
            patches.wrap(optimizer, "step", lambda step: functools.partial(_step_and_forget, step, optimizer))

    def _check_media(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise on all ranks if only some ranks, or some micro-steps with an offloaded optimizer, have images."""
        waits = self._stage == 3 or (self._trains and torch.is_grad_enabled())
        if self._session.calls.whole or not waits:
            return
        tensors = {key: x for key, x in kwargs.items() if isinstance(x, torch.Tensor)}
        # An encoder that calls its modules once for each image gathers their weights as often.
        counted = self._stage == 3 and self._kind in ONE_BY_ONE
        media = [(key, 0) for key, x in sorted(tensors.items()) if x.is_floating_point()]
        media += [(key, len(x)) for key, x in sorted(tensors.items()) if counted and "grid" in key]
        everyone = gather_objects(media, self._session.groups.control_group)
        if any(each != everyone[0] for each in everyone):
            raise DataError(
                f"under ZeRO {self._stage} all ranks need {'as many ' if counted else ''}images in the same micro-steps"
                f", as they gather the encoder's weights or reduce its gradients together; they have {everyone}. Put "
                f"an image into each batch, or use ZeRO {0 if self._trains else 2}"
            )
        if not self._keeps_gradients or not torch.is_grad_enabled():
            return
        self._media = media if self._media is None else self._media
        if [key for key, _ in media] != [key for key, _ in self._media]:
            raise DataError(
                f"under ZeRO {self._stage} with zero_optimization.offload_optimizer DeepSpeed steps with old gradients "
                "of an encoder that a micro-step leaves out, also at sequence_parallel_size 1: put an image into each "
                "batch or into none, freeze the encoder, or leave offload_optimizer out"
            )

    def report(self) -> list[tuple[str, str]]:
        """Return the row of the parts that see whole samples."""
        encoders = "split over the ranks of a sequence" if self._splits else "encoded on each rank"
        return [("multimodal", f"{self._name}: images {encoders}; cut at the language model")]


def _share_config(whole: ModelSpec, text_config: Any, patches: PatchSet) -> None:
    """Give a model the config of its patched language model, by which it makes masks."""
    config, before = whole.config, whole.text_config
    own = own_config(whole.outer, config, patches)
    for name in [name for name, value in vars(config).items() if value is before]:
        patches.set(own, name, text_config)


def _step_and_forget(step: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    found = step(*args, **kwargs)
    partitions = [each.grad for each in optimizer.fp32_partitioned_groups_flat if each.grad is not None]
    if partitions:  # offloaded
        torch._foreach_zero_(partitions)
    optimizer.grad_partitions_flat_buffer.zero_()
    if hasattr(optimizer, "norm_for_param_grads"):
        optimizer.norm_for_param_grads.clear()
    return found
