"""What cannot run on CPU, stood in for: modules with the real ones' names and signatures, which transformers imports.

They refuse what the real ones refuse (arguments, shapes, strides, dtypes of the lengths) and compute the same with
plain PyTorch, in the dtype that they are given.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

HUB_KERNEL = "kernels-community/flash-attn2"


@contextmanager
def installed() -> Iterator[list[dict[str, Any]]]:
    """Have transformers find the stand-ins by its own lazy import; yields what each of their calls was given."""
    from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
    from transformers.integrations import hub_kernels

    from tests.stand_ins import attend, flash

    before = vars(modeling_flash_attention_utils)["_loaded_implementation"]
    attend.CALLS.clear()
    made = flash.modules()
    with (
        mock.patch.object(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True),
        mock.patch.object(modeling_flash_attention_utils, "_loaded_implementation", None),
        mock.patch.object(hub_kernels, "is_kernels_available", lambda: True),
        mock.patch.object(hub_kernels, "get_kernel", lambda repo_id, **_: {HUB_KERNEL: made["flash_attn"]}[repo_id]),
    ):
        sys.modules.update(made)
        try:
            yield attend.CALLS
        finally:
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(HUB_KERNEL, None)
            for name in made:
                sys.modules.pop(name)
    modeling_flash_attention_utils._loaded_implementation = before
