"""Parts of a transformers model: wrappers, decoder, layers, head, routers, experts.

Nothing else in the package looks for them.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils.output_capturing import OutputRecorder

_CHUNKED_LOSS = ("deepspeed.runtime.chunked_cross_entropy", "ChunkedCausalLMLoss")


class ModelSpec:
    """A model that a program passes to ``deepspeed.initialize``, bare or in PEFT's or torch.compile's wrappers.

    Args:
        outer: the caller's. Hooks that must see every call belong on it: a wrapper may call ``forward`` of the model
            inside, which runs no hooks.
    """

    def __init__(self, outer: torch.nn.Module, whole: torch.nn.Module | None = None) -> None:
        self.outer = outer
        self.whole = outer if whole is None else whole
        """The caller's model, of which ``outer`` may be a part (``split_part``)."""
        self.model = outer
        """The model inside nested wrappers: reads and patches of a transformers model use this one."""
        while self.model is not (inner := _inside(self.model)):
            self.model = inner

    @property
    def name(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    @property
    def config(self) -> Any:
        """The model's config as it is now: a patch may have given it a copy of its own."""
        return self.model.config

    @property
    def is_causal_lm(self) -> bool:
        """True for a model of AutoModelForCausalLM, or of a subclass."""
        return _is_any_of(self.model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

    @property
    def is_decoder(self) -> bool:
        """True for a model of AutoModel, without a head."""
        return not self.is_causal_lm and _is_any_of(self.model, MODEL_MAPPING_NAMES)

    @property
    def is_multimodal(self) -> bool:
        """True for the language model of a model of images, video or audio and text, which is ``whole``."""
        outer = ModelSpec(self.whole)
        return self.whole is not self.outer and outer._calls_language_model()

    def _calls_language_model(self) -> bool:
        is_known = isinstance(self.model, PreTrainedModel)
        is_known = is_known and _is_any_of(self.model, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
        return is_known and self.text_config is not self.config

    @property
    def with_head(self) -> "ModelSpec":
        """The spec whose model has the head of this one's hidden states."""
        return ModelSpec(self.whole) if self.is_multimodal else self

    def split_part(self) -> "ModelSpec":
        """Return the spec of the part whose calls ranks split; what is around it sees whole sequences.

        That is the decoder of a classifier, the language model of a multimodal model, the model behind PEFT's virtual
        tokens or in a module of the program's own, else the model itself.
        """
        classifiers = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)
        if is_peft(self.outer) and getattr(self.outer.active_peft_config, "is_prompt_learning", False):
            parts = [ModelSpec(self.model).split_part().outer]
        elif self._calls_language_model():
            parts = [self.model.get_decoder()]
        elif isinstance(self.model, PreTrainedModel):
            is_classifier = not self.is_causal_lm and any(_is_any_of(self.model, each) for each in classifiers)
            parts = [self.decoder] if is_classifier else []
        else:
            children = self.model.children() if isinstance(self.model, torch.nn.Module) else ()
            specs = [spec for each in children if isinstance((spec := ModelSpec(each)).model, PreTrainedModel)]
            parts = [spec.split_part().outer for spec in specs]
        return ModelSpec(parts[0], self.outer) if len(parts) == 1 else self

    @property
    def text_config(self) -> Any:
        """Config of the language model."""
        return self.config.get_text_config()

    @property
    def decoder(self) -> torch.nn.Module:
        """The model without its head, of a multimodal model its language model."""
        if self._calls_language_model():
            return self.model.get_decoder()
        base = getattr(self.model, "base_model", self.model)
        # The prefix of Llama4ForCausalLM names no module of it.
        inner = [each for each in base.children() if isinstance(each, PreTrainedModel)] if base is self.model else []
        return inner[0] if len(inner) == 1 else base

    @property
    def head(self) -> torch.nn.Module | None:
        """Output embeddings; None if there are none."""
        return self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None

    @property
    def embeddings(self) -> torch.nn.Module | None:
        """Input embeddings; None if there are none."""
        return self.model.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None

    @property
    def norms(self) -> list[torch.nn.Module]:
        """The decoder's own modules that have vectors as their only weights: norms before or after the layers."""
        children = [child for child in self.decoder.children() if list(child.parameters())]
        return [child for child in children if all(param.dim() == 1 for param in child.parameters())]

    @property
    def layers(self) -> dict[str, torch.nn.Module]:
        """Elements of the decoder's own ModuleLists, by name in ``model``."""
        prefix = next(name for name, module in self.model.named_modules() if module is self.decoder)
        return {
            f"{prefix}.{name}.{index}".lstrip("."): layer
            for name, child in self.decoder.named_children()
            if isinstance(child, torch.nn.ModuleList)
            for index, layer in enumerate(child)
        }

    @property
    def module_lists(self) -> list[torch.nn.ModuleList]:
        """All ModuleLists of the model, nested ones included."""
        return [module for module in self.model.modules() if isinstance(module, torch.nn.ModuleList)]

    def counterpart(self, name: str) -> torch.nn.Module | None:
        """Return the module that a larger model of the same kind has under a name; indices wrap around.

        None if there is none.
        """
        module: Any = self.model
        for part in name.split(".") if name else ():
            if isinstance(module, torch.nn.ModuleList) and part.isdigit() and len(module):
                module = module[int(part) % len(module)]
            else:
                module = getattr(module, part, None)
        return module if isinstance(module, torch.nn.Module) else None

    @property
    def checkpointed_layers(self) -> list[torch.nn.Module]:
        """Layers that transformers can checkpoint one by one, in model order."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @cached_property
    def router_classes(self) -> tuple[type, ...]:
        """Module classes whose router logits the model can return; may be empty."""
        models = [module for module in self.model.modules() if isinstance(module, PreTrainedModel)]
        specs = [(each._can_record_outputs or {}).get("router_logits") for each in models]
        flat = [each for spec in specs for each in (spec if isinstance(spec, list) else [spec])]
        classes = [each.target_class if isinstance(each, OutputRecorder) else each for each in flat]
        return tuple(dict.fromkeys(each for each in classes if isinstance(each, type)))

    @property
    def expert_counts(self) -> set[int]:
        """Possible numbers of experts in a block, from the config."""
        config = vars(self.text_config) if isinstance(self.model, PreTrainedModel) else {}
        sizes = [value for name, value in config.items() if name.endswith("experts") and "shared" not in name]
        return {size for size in sizes if isinstance(size, int) and size > 1}

    def separate_experts(self) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
        """Yield the blocks of layers that hold a list of as many modules as the config has experts, and the list."""
        counts = self.expert_counts
        # Nested lists yield their blocks twice.
        for block in dict.fromkeys(block for each in self.module_lists for layer in each for block in layer.modules()):
            for child in block.children():
                if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict) and len(child) in counts:
                    yield block, child


def _is_any_of(model: torch.nn.Module, names: Mapping[str, Any]) -> bool:
    known = {each for value in names.values() for each in ([value] if isinstance(value, str) else value)}
    return any(cls.__name__ in known for cls in type(model).__mro__)


def stacked_expert_count(module: torch.nn.Module) -> str | None:
    """Return the attribute in which a module of stacked experts keeps their number; None if it reads the weights."""
    return next((name for name in ("num_experts", "num_local_experts") if hasattr(module, name)), None)


def is_peft(model: torch.nn.Module) -> bool:
    """Return True if a model is PEFT's wrapper, without importing PEFT, which takes seconds."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def _inside(model: torch.nn.Module) -> torch.nn.Module:
    if isinstance(model, torch._dynamo.OptimizedModule):
        return model._orig_mod
    return model.get_base_model() if is_peft(model) else model


def is_causal_lm_loss(function: Any) -> bool:
    """Return True if a loss is transformers' causal LM loss, or the one of ``install_chunked_causal_lm_loss``."""
    return function is ForCausalLMLoss or (type(function).__module__, type(function).__name__) == _CHUNKED_LOSS
