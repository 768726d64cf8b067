"""Models of images and text train under sequence parallelism as without it."""

import contextlib

import deepspeed
import pytest
import torch
import torch.distributed as dist

import deepspeed_alst
from benchmarks.cells import Cell, KeepFp64, ds_config, full_weight
from benchmarks.multimodal import ask, judge, split, step
from benchmarks.multimodal_families import batch_of, tiny_model
from benchmarks.ranks import RankError
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import AlstError, DataError, UnsupportedModelError
from deepspeed_alst.multimodal.encoder_split import Images

NAMES = ("pixel_values", "image_grid_thw")
RATE, GAS, WORLD = 0.02, 2, 2
STEPS = (((2, 1), (1,)), ((1, 2), (0, 1)))
"""Images of each row, of the batches of each step."""


@pytest.mark.parametrize("name", [pytest.param("llava", marks=pytest.mark.slow), "qwen3_vl", "gemma3"])
def test_loss_and_all_gradients_are_those_of_sp1(name, ranks2):
    verdicts = ranks2.run(ask, name)[0]
    packs = "refused" if name == "gemma3" else "right"
    assert [each.outcome for each in verdicts] == ["right"] * 3 + [packs], verdicts
    assert max(each.error for each in verdicts) < 1e-12


def batches_of(name: str, model: torch.nn.Module, rank: int) -> list[dict]:
    found = []
    for rows in STEPS:
        for images in rows:
            batch = batch_of(name, model, images)
            batch["input_ids"][:, 3] += rank  # a text token: other samples on the other rank
            found.append(batch)
    return found


def train(name: str, stage: int, tiles: bool) -> dict:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    model = tiny_model(name, torch.float32)
    own = batches_of(name, model, dist.get_rank())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE),
        config=ds_config(Cell(stage=stage, gas=GAS, tiles=tiles), 2),
    )
    losses = []
    for batch in deepspeed_alst.shard_dataloader(own, engine):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    weights = {key: full_weight(param) for key, param in engine.module.named_parameters()}
    engine.eval()
    with torch.no_grad():
        output = engine(**own[dist.get_rank()])  # another batch on each rank
        logits = output.logits
    found = {"losses": losses, "weights": weights, "evaluated": float(output.loss), "logits": logits.float()}
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("name", "stage", "tiles"),
    [
        ("llava", 3, True),
        pytest.param("qwen2_5_vl", 2, False, marks=pytest.mark.slow),
        *(
            pytest.param(name, stage, tiles, marks=pytest.mark.slow)
            for name in ("llava", "qwen3_vl", "gemma3")
            for stage, tiles in ((0, True), (1, False), (2, True), (3, False))
        ),
    ],
)
def test_steps_of_an_engine_are_those_of_sp1(name, stage, tiles, ranks2):
    found = ranks2.run(train, name, stage, tiles)
    model = tiny_model(name, torch.float32)
    own = [batches_of(name, model, rank) for rank in range(WORLD)]
    optimizer, losses = torch.optim.SGD(model.parameters(), RATE), []
    for place in range(len(STEPS)):
        for micro in range(GAS):
            for rank in range(WORLD):
                loss = model(**own[rank][place * GAS + micro]).loss
                losses.append(float(loss))
                (loss / (GAS * WORLD)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(losses, rel=1e-5)
    before = dict(tiny_model(name, torch.float32).named_parameters())
    for key, param in model.named_parameters():
        change = (param - before[key]).norm()
        assert (found[0]["weights"][key] - param).norm() <= 1e-3 * change + 1e-6 * param.norm() + 1e-6, key
    model.eval()
    for rank in range(WORLD):
        output = model(**own[rank][rank])
        assert found[rank]["evaluated"] == pytest.approx(float(output.loss), rel=1e-5)
        mask = own[rank][rank]["attention_mask"].bool()
        assert torch.allclose(found[rank]["logits"][mask], output.logits[mask], rtol=1e-3, atol=1e-4)


def padded_on_the_left(batch: dict, unlabelled: bool = True) -> dict:
    """Move each row's padding to the left, without a label on its first token."""
    if unlabelled:
        batch["labels"][:, 0] = -100
    rows = {}
    for key, x in batch.items():
        if x.shape == batch["attention_mask"].shape:
            lengths = batch["attention_mask"].sum(1).tolist()
            rows[key] = torch.stack([row.roll(len(row) - n) for row, n in zip(x, lengths, strict=True)])
    return batch | rows


def adapted(model):
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)
    return model.double()


def frozen(model):
    """All but the projector and the language model's last layer."""
    for name, param in model.named_parameters():
        param.requires_grad_("projector" in name or "language_model.layers.3" in name)
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model


VARIANTS = {
    "left padding": ("qwen2_5_vl", None, {}),
    "LoRA": ("llava", adapted, {}),
    "LoRA, mrope": ("qwen2_vl", adapted, {}),
    "frozen": ("llava", frozen, {}),
    "checkpointing": ("qwen3_vl", checkpointed, {}),
    "tiles": ("gemma3", None, {"tiled_mlp_compute": {"tile_tokens": 7}, "tiled_logits_loss": {"tile_tokens": 5}}),
    "no tiles": ("llava", None, {"tiled_logits_loss": False}),
    "memory-lean": ("qwen2_vl", checkpointed, {"memory_lean_layer": {"chunk_tokens": 10, "key_block": 7}}),
}


def vary(name: str) -> float:
    family, change, keys = VARIANTS[name]
    in_fp32 = change is checkpointed  # the mode does not reach the recomputation
    with contextlib.nullcontext() if in_fp32 else KeepFp64(), PatchSet() as patches:
        model = tiny_model(family, torch.float32 if in_fp32 else torch.float64)
        batch = batch_of(family, model, (2, 1))
        model = model if change is None else change(model)
        batch = padded_on_the_left(batch) if name == "left padding" else batch
        truth = step(model, batch)
        return judge(truth, step(model, batch, split(model, patches, **keys))).error


@pytest.mark.parametrize(
    "name",
    [each if each == "left padding" else pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS],
)
def test_variants_are_right(name, ranks2):
    assert ranks2.run(vary, name)[0] < (1e-5 if VARIANTS[name][1] is checkpointed else 1e-11)


def refused(name: str) -> tuple[str, str]:
    from transformers import FuyuConfig, FuyuForCausalLM

    from deepspeed_alst.verification.hf_tiny_models import shrink

    with PatchSet() as patches:
        try:
            if name == "unlisted":
                split(FuyuForCausalLM(shrink(FuyuConfig())), patches)
            family = "gemma3" if "images" in name else name if name in ("llava", "qwen2_5_vl") else "qwen3_vl_moe"
            model = tiny_model(family, torch.float32)
            if name == "router loss":
                model.config.text_config.output_router_logits = True
            session = split(model, patches)
            batch = batch_of(family, model, (2, 1))
            if name == family:
                del batch["attention_mask"]
                batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None] % 17
            if name == "other images":
                batch["pixel_values"] += dist.get_rank()
            step(model, padded_on_the_left(batch, "labels" not in name) if "left" in name else batch, session)
        except AlstError as error:
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("unlisted", UnsupportedModelError, "PersimmonForCausalLM"),
        ("images, left", UnsupportedModelError, "pad on the right"),
        ("images, left, labels", DataError, "label on the first token"),
        ("other images", DataError, "different images"),
        ("llava", UnsupportedModelError, "apart only without a cache"),
        ("qwen2_5_vl", UnsupportedModelError, "packed rows of model_type"),
        ("router loss", UnsupportedModelError, "output_router_logits"),
    ],
)
def test_what_is_not_verified_is_refused(name, kind, words, ranks2):
    for found, message in ranks2.run(refused, name):
        assert found == kind.__name__ and words in message


def test_images_are_balanced_by_patches_and_frames():
    grid = torch.tensor([[4, 2, 2], [1, 4, 2], [1, 2, 2]])
    given = {"pixel_values": torch.zeros(28, 3), "image_grid_thw": grid}
    images = Images.of(given, True, *NAMES)
    shares = images.shares(2)
    assert [sum(images.patches[each] for each in share) for share in shares] == [16, 12]
    assert sorted(shares[0] + shares[1]) == list(range(6))
    assert images.arguments(given, [0, 5])["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 2]]
    assert Images.of(given, False, *NAMES).shares(2) == [[0], [1, 2]]
    assert Images.of(given | {"pixel_values": torch.zeros(27, 3)}, True, *NAMES) is None


def over_four(name: str) -> float:
    with KeepFp64(), PatchSet() as patches:
        model = tiny_model(name)
        batch = batch_of(name, model, (2, 1))  # a rank without an image
        truth = step(model, batch)
        return judge(truth, step(model, batch, split(model, patches, sp_size=4))).error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "idefics3"])
def test_a_rank_without_an_image_takes_part(name, ranks4):
    assert ranks4.run(over_four, name)[0] < 1e-11


def of_video(name: str) -> tuple[float, list[int]]:
    """A video of six frames instead of images; returns the frames that each rank encodes too."""
    with KeepFp64(), PatchSet() as patches:
        model = tiny_model(name)
        config, vision = model.config, model.config.vision_config
        grid, make = torch.tensor([[6, 4, 2]]), torch.Generator().manual_seed(0)
        features = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(48, features, generator=make, dtype=torch.float64)
        ids = torch.randint(10, 100, (1, 31), generator=make)
        frames = [5 + 3 * frame for frame in range(6)] if "3" in name else [5 + 2 * frame for frame in range(6)]
        for place in frames:  # two tokens each; with a timestamp before each from Qwen3-VL on
            ids[0, place : place + 2] = config.video_token_id
        is_video = ids == config.video_token_id
        batch = {"input_ids": ids, "labels": ids.masked_fill(is_video, -100), "mm_token_type_ids": is_video.long() * 2}
        batch |= {"pixel_values_videos": pixels, "video_grid_thw": grid}
        truth = step(model, batch)
        session = split(model, patches)
        encoded = list[int]()
        patches.hook(model.model.visual, "forward_pre", lambda _, args: encoded.append(len(args[0])))
        return judge(truth, step(model, batch, session)).error, encoded


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_frames_of_a_video_are_split(name, ranks2):
    for error, encoded in ranks2.run(of_video, name):
        assert error < 1e-11
        assert encoded == [24]


def with_images_on_one_replica(stage: int) -> str:
    model = tiny_model("llava", torch.float32)
    batch = batch_of("llava", model, (2, 1) if dist.get_rank() < 2 else (0, 0))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config(Cell(stage=stage, world_size=4), 2)
    )
    try:
        engine(**batch)
    except DataError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_images_on_one_replica_alone_are_refused(stage, ranks4):
    assert all("all ranks need images" in each for each in ranks4.run(with_images_on_one_replica, stage))


def test_arguments_that_are_not_of_images_leave_them_together():
    pixels = {"pixel_values": torch.zeros(3, 5, 4), "image_sizes": torch.ones(3, 2)}
    assert Images.of(pixels, False, *NAMES) is not None
    # One entry for each row of the batch, which may have as many rows as images.
    assert Images.of(pixels | {"batch_num_images": torch.tensor([2, 1, 0])}, False, *NAMES) is None
    grids = {"pixel_values": torch.zeros(8, 4), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]])}
    assert Images.of(grids, False, *NAMES) is not None
    assert Images.of(grids | {"image_cu_seqlens": torch.tensor([0, 4, 8])}, False, *NAMES) is None


def alternate(stage: int) -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    model = tiny_model("llava", torch.float32)
    config = ds_config(Cell(stage=stage, gas=GAS), 2) | {"zero_force_ds_cpu_optimizer": False}
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    own = [batch_of("llava", model, images) for images in ((1,), (0,))]
    try:
        for batch in deepspeed_alst.shard_dataloader(own, engine):
            engine.backward(engine(**batch).loss)
            engine.step()
    finally:
        engine.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_refuses_micro_steps_without_images(stage, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(alternate, stage)
    for each in caught.value.errors:
        assert isinstance(each, DataError) and "offload_optimizer" in str(each)
