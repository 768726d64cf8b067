"""Processors of tiny multimodal models, and rows of images and letters for TRL's trainers."""

import string
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)

from benchmarks.multimodal_families import tiny_model

SIZE = 16
"""Height of an image, in pixels."""
_NAMES = {
    "llava": {"image_token": "<image>"},
    "qwen2_5_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "gemma3": {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
}
_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE {% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


class QwenProcessor(Qwen2_5_VLProcessor):
    """Qwen's without videos, whose processor needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor(name: str):
    """One token a letter; images of 4 tokens or more; no hub is asked."""
    config, names = tiny_model(name, torch.float32).config, _NAMES[name]
    letters = ["<pad>", "<eos>", "<unk>", *string.ascii_lowercase, " "]
    ids = {letter: place for place, letter in enumerate(letters)}
    for key, token in names.items():
        ids[token] = getattr(config, f"{key}_id", None) or getattr(config, f"{key}_index")
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )
    size, template = (
        {"height": SIZE, "width": SIZE},
        _TEMPLATE.replace("IMAGE", names.get("boi_token", names["image_token"])),
    )
    tokenizer.chat_template = template
    if name == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
        return LlavaProcessor(images, tokenizer, 8, "default", template, num_additional_image_tokens=1)
    if name == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessor(size=size), tokenizer, template, image_seq_length=4)
    images = Qwen2VLImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    return QwenProcessor(images, tokenizer, template)


def rows(name: str, count: int, trainer: str = "SFT") -> list[dict]:
    """Rows of one or two images each, and letters, for a trainer of TRL."""
    make = torch.Generator().manual_seed(5)

    def said(role: str, least: int, most: int) -> dict:
        length = int(torch.randint(least, most, (), generator=make))
        letters = torch.randint(0, 26, (length,), generator=make).tolist()
        return {"role": role, "content": "".join(string.ascii_lowercase[n] for n in letters)}

    def talk(trainer: str) -> dict:
        question = said("user", 3, 9)
        if trainer == "SFT":
            return {"messages": [question, said("assistant", 5, 30)]}
        answers = {"DPO": ("chosen", "rejected"), "prompts": ("completion",)}.get(trainer, ())
        return {"prompt": [question], **{key: [said("assistant", 5, 30)] for key in answers}}

    found = []
    for place in range(count):
        widths = [SIZE] if name == "llava" else [SIZE, 2 * SIZE][: 1 + place % 2]
        pixels = [torch.randint(0, 256, (SIZE, width, 3), generator=make, dtype=torch.uint8) for width in widths]
        found.append({"images": [Image.fromarray(each.numpy()) for each in pixels], **talk(trainer)})
    return found


def save_model(folder: str, name: str) -> type:
    """Write a tiny model into a folder, as ``save_pretrained``, which would write on rank 0 alone."""
    model = tiny_model(name, torch.float32)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    return type(model)


def save_all(folder: Path, name: str, trainer: str) -> None:
    """Write model and processor to ``model``, and splits of rows to ``data``."""
    from datasets import Dataset

    (folder / "model").mkdir()
    save_model(str(folder / "model"), name)
    processor(name).save_pretrained(folder / "model")
    for split, count in (("train", 32), ("test", 4)):
        Dataset.from_list(rows(name, count, trainer)).to_parquet(folder / "data" / f"{split}.parquet")
