"""What cannot run on CPU, stood in for: modules with the real ones' names and signatures, which transformers imports.

``flash_attn`` (2.8.3), ``flash_attn_interface`` (3), ``flash_attn.cute`` (4) and a kernel as the hub's loader returns
it. They refuse what the real ones refuse (arguments, shapes, strides, dtypes of the lengths) and compute the same with
plain PyTorch, in the dtype that they are given.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

HUB_KERNEL = "kernels-community/flash-attn2"
_MODULES = ("flash_attn", "flash_attn.bert_padding", "flash_attn.cute", "flash_attn_interface")


@contextmanager
def installed() -> Iterator[list[dict[str, Any]]]:
    """Have transformers find the stand-ins by its own lazy import; yields what each of their calls was given."""
    from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
    from transformers.integrations import hub_kernels

    from tests.stand_ins import attend

    before = vars(modeling_flash_attention_utils)["_loaded_implementation"]
    attend.CALLS.clear()
    with (
        mock.patch.object(sys, "path", [str(Path(__file__).parent), *sys.path]),
        mock.patch.object(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True),
        mock.patch.object(modeling_flash_attention_utils, "_loaded_implementation", None),
        mock.patch.object(hub_kernels, "is_kernels_available", lambda: True),
        mock.patch.object(hub_kernels, "get_kernel", _kernel),
    ):
        try:
            yield attend.CALLS
        finally:
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(HUB_KERNEL, None)
            for name in _MODULES:
                sys.modules.pop(name, None)
    modeling_flash_attention_utils._loaded_implementation = before


def _kernel(repo_id: str, **kwargs: Any) -> ModuleType:
    """What the hub's loader returns for the repository of flash attention 2."""
    import flash_attn

    assert repo_id == HUB_KERNEL, repo_id
    kernel = ModuleType("flash_attn2_of_the_hub")
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(kernel, name, getattr(flash_attn, name))
    return kernel
