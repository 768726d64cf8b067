"""Multimodal families that the census found right under sequence parallelism."""

from collections.abc import Iterator

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from deepspeed_alst.core.hf_model_spec import ModelSpec

_FAMILIES = """
aria aya_vision cohere2_vision deepseek_vl exaone4_5 gemma3 gemma4 glm46v glm4v glm4v_moe glm_ocr got_ocr2 idefics2
idefics3 internvl janus kimi_k25 lighton_ocr llava llava_next llava_next_video llava_onevision mistral3 ovis2
paddleocr_vl paligemma qianfan_ocr qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm
video_llama_3 video_llava vipllava voxtral
"""
VERIFIED_MODEL_TYPES = frozenset(_FAMILIES.split())
"""``model_type`` of the families that ``python -m benchmarks.multimodal`` found right; the list only grows."""
_PACKS = """
aria aya_vision cohere2_vision deepseek_vl exaone4_5 got_ocr2 idefics2 idefics3 internvl janus kimi_k25 lighton_ocr
llava llava_next llava_next_video llava_onevision mistral3 ovis2 qianfan_ocr qwen2_audio qwen3_vl qwen3_vl_moe smolvlm
video_llama_3 video_llava vipllava voxtral
"""
PACKS = frozenset(_PACKS.split())
"""Families of which it found rows of packed documents right."""
FRAME_BY_FRAME = frozenset(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"))
"""Families whose encoder treats the frames of a video one by one."""
ONE_BY_ONE = frozenset(("paddleocr_vl",))
"""Families whose encoder calls its modules once for each image."""
PADDED = frozenset(("idefics2", "idefics3", "smolvlm"))
"""Families whose rows are padded with images of zeros, which their encoder drops."""
REPEATED = frozenset(("ovis2",)) | ONE_BY_ONE
"""Families that encode all images on each rank; Ovis 2 has other features with an image's."""


def family_problems(spec: ModelSpec) -> Iterator[str]:
    """Yield the problem of a multimodal model that the census has not found right."""
    outer = ModelSpec(spec.whole)
    if getattr(spec.text_config, "output_router_logits", False):
        yield "output_router_logits=True: the router's loss of a multimodal model is not verified; set it to False"
    if (kind := outer.config.model_type) in VERIFIED_MODEL_TYPES:
        return
    alone = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(spec.config), None)
    alone = alone[0] if isinstance(alone, tuple) else alone
    way_out = f", or train its language model alone, {alone.__name__} of config.get_text_config()" if alone else ""
    yield (
        f"{outer.name} (model_type='{kind}') is not one of the {len(VERIFIED_MODEL_TYPES)} multimodal families "
        f"verified under sequence parallelism (docs/vision_language.md); set sequence_parallel_size to 1{way_out}"
    )
