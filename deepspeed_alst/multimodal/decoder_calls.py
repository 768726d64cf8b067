"""Calls of a multimodal model's language model with the embeddings of whole samples, which ranks cut.

Legend: B batch, S whole sequence, s = S/P one shard, N tokens of images in a batch, n those of a shard, M model dim.
"""

import functools
import inspect
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.core.forward_context import CACHES
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.multimodal import hf_families
from deepspeed_alst.multimodal.deferred import MergedEmbeddings, as_made, rows_of
from deepspeed_alst.whole_sequence.batches import forward_whole_batch

_PLACES, _ROWS = "visual_pos_masks", "deepstack_visual_embeds"
_INDEX = "alst_visual_index"
"""Key of each token's row in the features that join later layers, ``[B, S]``."""
_PLACES_OF, _FEATURES = "alst_feature_index", "features of images"
"""Keys of what embeddings that are not made yet consist of beside ids (deferred.py)."""
_MASKS = "alst_masks"
"""Key of masks that the model has made of the whole batch, one or by layer type."""
_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "seq_idx", _PLACES, _ROWS)


def split_decoder_calls(spec: ModelSpec, session: Any, patches: PatchSet) -> None:
    """Shard the language model's inputs, and wrap its outputs as tensors of the whole sequence."""
    decoder, signature = spec.outer, inspect.signature(spec.model.forward)

    def run(merged: MergedEmbeddings | None, **shard: Any) -> Any:
        if merged is not None:
            ids_Bs, index_Bs, features = (shard.pop(each) for each in ("input_ids", _PLACES_OF, _FEATURES))
            shard["inputs_embeds"] = merged.of_tokens(ids_Bs, index_Bs, features)
        masks = shard.pop(_MASKS, None)
        if masks is not None:
            shard["attention_mask"] = masks
        with session.calls.having(has_masks=masks is not None):
            return decoder._call_impl(**_own_rows(shard))

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {**signature.bind_partial(*args).arguments, **kwargs}
        if session.calls.whole or session.calls.checking:
            return decoder._call_impl(**given)
        given = _checked(ModelSpec(spec.whole), tree_map(as_made, given))
        merged = given.get("inputs_embeds")
        if not isinstance(merged, MergedEmbeddings):
            merged = None
        elif "input_ids" in given:
            merged, given["inputs_embeds"] = None, merged.whole()
        else:
            parts = {"input_ids": merged.ids, _PLACES_OF: merged.index, _FEATURES: merged.features}
            given = {key: x for key, x in given.items() if x is not merged} | parts
        return forward_whole_batch(session, functools.partial(run, merged), given)

    patches.set(decoder, "_compiled_call_impl", call)  # what a module's __call__ runs, hooks included


def _checked(whole: ModelSpec, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are set; raise UnsupportedModelError for one that is not known how to cut."""
    name = whole.name
    # A cache without tokens is made for use_cache, which is the config's default, and read by nothing.
    given = {key: x for key, x in given.items() if x is not None and not (key in CACHES and not x.get_seq_length())}
    tokens = given.get("inputs_embeds", given.get("input_ids"))
    if tokens is None:
        raise UnsupportedModelError(f"{name} calls its language model without input_ids or inputs_embeds: use another")
    for key, x in given.items():
        by_token = isinstance(x, torch.Tensor) and x.shape[:2] == tokens.shape[:2]
        if not (key in _KNOWN or by_token or _is_plain(x)):
            raise UnsupportedModelError(
                f"{name} calls its language model with {key} ({type(x).__name__}{list(getattr(x, 'shape', ()))}), of "
                "which a rank's part is not known. Set sequence_parallel_size to 1, or train its language model alone"
            )
    if given.get("output_router_logits"):
        raise UnsupportedModelError(
            f"{name}: output_router_logits=True, whose loss would be made of a shard's tokens. Set it to False"
        )
    masks, positions = given.get("attention_mask"), given.get("position_ids")
    if masks is None and positions is not None and positions.dim() == 2 and (positions.diff() != 1).any():
        _check_packing(whole, given.get("use_cache", whole.text_config.use_cache))
    if isinstance(masks, dict | MaskSpec):  # None stands for a plain causal mask
        if not all(each is None or isinstance(each, MaskSpec) for each in tree_leaves(masks)):
            raise UnsupportedModelError(
                f"{name} makes the masks of its language model itself, without transformers' functions. Set "
                "sequence_parallel_size to 1, or train its language model alone"
            )
        given[_MASKS] = given.pop("attention_mask")
    if _ROWS in given:
        places_BS = given[_PLACES]
        given[_INDEX] = (places_BS.flatten().cumsum(0) - 1).view_as(places_BS)
    return {key: x for key, x in given.items() if key != "use_cache"}


def _check_packing(whole: ModelSpec, uses_cache: bool) -> None:
    """Raise UnsupportedModelError if transformers would not keep packed documents apart, or the census has not run."""
    if whole.config.model_type not in hf_families.PACKS:
        raise UnsupportedModelError(
            f"{whole.name}: position_ids restart, and packed rows of model_type='{whole.config.model_type}' are not "
            "verified (docs/vision_language.md): give one document per row, and leave position_ids out"
        )
    if uses_cache:
        raise UnsupportedModelError(
            f"{whole.name}: position_ids restart, and transformers keeps packed documents apart only without a cache: "
            "set model.config.get_text_config().use_cache to False, or give the model use_cache=False"
        )


def _is_plain(x: Any) -> bool:
    """Return True for a number or a name, the same for all tokens."""
    return isinstance(x, bool | int | float | str) or (isinstance(x, torch.Tensor) and not x.dim())


def _own_rows(shard: dict[str, Any]) -> dict[str, Any]:
    """Cut the features of image tokens that join later layers, ``[N, M] -> [n, M]`` each."""
    index_Bs = shard.pop(_INDEX, None)
    if index_Bs is not None:
        rows_n = index_Bs[shard[_PLACES]]
        shard[_ROWS] = [rows_of(features_NM, rows_n) for features_NM in shard[_ROWS]]
    return shard
