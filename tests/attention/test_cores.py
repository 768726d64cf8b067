"""Attention cores beside sdpa: each gives the loss and every gradient of the run without sequence parallelism, in fp64.

Three kinds of evidence, said in each test: *run here* (sdpa; flex_attention's forward), *stand-in* (flash attention,
whose kernels need a GPU: transformers' own code runs up to the call of the kernel, which tests/stand_ins computes), and
*refused here* (what PyTorch has on no CPU). Truths are SP 1 with the same core, and, for windows and packed documents,
sdpa at SP 1 with transformers' own masks, or a document at a time.
"""

import copy
import itertools
import math
import pickle
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.utils.generic import is_flash_attention_requested

from benchmarks.cells import Cell, KeepFp64, build_model, ds_config, full_weight
from benchmarks.families import FAMILIES, LINEAR_FAMILIES, family_config
from benchmarks.ranks import RankError
from deepspeed_alst.attention.hf_attention import find_backend
from deepspeed_alst.attention.private_config import PrivateName
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import ShardingConfig, shard_batch
from deepspeed_alst.distributed.mesh import build_control_group, build_groups
from deepspeed_alst.errors import DataError, UnsupportedModelError
from deepspeed_alst.sequence_parallel.batch_check import check_batches
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.verification.hf_support_checks import check_model
from tests import stand_ins
from tests.models import family_batch

EXACT = 1e-12
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4", stand_ins.HUB_KERNEL)
# Families whose layers drop what flash attention would need to know of packed documents; a mask reaches them.
NO_DOCUMENTS = ("stablelm", "nemotron")
# Families with a scan that transformers does not tell of documents, or that drop what they are told.
LEAKING = ("mamba2", "kimi_linear", "jamba", "mamba", "falcon_mamba", "zamba")
# A boundary of shards at SP 2 and 4 (16 and 8 tokens) inside a document, at its start, and behind its only token.
DOCUMENTS = (7, 1, 8, 13)

Step = tuple[float, dict[str, torch.Tensor]]


def model_with(core: str, config: Any) -> torch.nn.Module:
    """A model in fp64 that transformers would have loaded with this core on a GPU."""
    # Eager experts: the grouped matrix product of the default has no fp64.
    config._experts_implementation = "eager"
    # Where it cannot be loaded with this core for want of a GPU, one that goes with every model.
    model = build_model(config, core=core if core == "sdpa" else "eager").double()
    if core == stand_ins.HUB_KERNEL:
        lazy_import_flash_attention(core)  # as loading the model does: registers it
    model.config._attn_implementation = core
    return model


def step(model: torch.nn.Module, batch: dict[str, Any]) -> Step:
    """Loss and gradients."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole_step(core: str, config: Any, batch: dict[str, Any]) -> Step:
    """One step without sequence parallelism."""
    with KeepFp64():
        return step(model_with(core, config), batch)


def split_step(core: str, config: Any, batch: dict[str, Any], sp_size: int, multiple: int) -> Step:
    """One step over ``sp_size`` ranks, with gradients averaged as DeepSpeed does it."""
    with PatchSet() as undo, KeepFp64():
        groups = build_groups(sp_size, build_control_group())
        undo.callback(groups.destroy)
        model = model_with(core, config)
        sharded = shard_batch(batch, sp_size, ShardingConfig(multiple, packing=True))
        calls = ForwardContext()
        patch_model(ModelSpec(model), groups.sp_group, undo, calls)
        check_batches(ModelSpec(model), groups, calls, undo)
        loss, grads = step(model, {**sharded.shards[groups.sp_rank], **sharded.common})
        for grad in grads.values():
            dist.all_reduce(grad, group=groups.sp_group)
            grad /= sp_size
        return loss, grads


def document_by_document(config: Any, batch: dict[str, Any], lengths: tuple[int, ...]) -> Step:
    """The truth for packed documents: each alone through sdpa, their losses weighted by their labels."""
    with KeepFp64():
        model = model_with("sdpa", config)
        cuts = list(itertools.pairwise([0, *itertools.accumulate(lengths)]))
        counts = [int((batch["labels"][:, start + 1 : end] != -100).sum()) for start, end in cuts]
        total = torch.zeros((), dtype=torch.float64)
        for (start, end), count in zip(cuts, counts, strict=True):
            if count:
                one = {key: batch[key][:, start:end] for key in ("input_ids", "labels")}
                total = total + model(**one, use_cache=False).loss * count / sum(counts)
        total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(got: Step, true: Step) -> float:
    """The largest relative error of the loss and of all gradients."""
    errors = [abs(got[0] - true[0]) / true[0]]
    assert got[1].keys() == true[1].keys()
    errors += [float((got[1][name] - t).norm() / t.norm()) for name, t in true[1].items() if t.norm()]
    return max(errors)


def packed_batch(lengths: tuple[int, ...] = DOCUMENTS, seed: int = 3) -> dict[str, torch.Tensor]:
    """Documents one after the other, with position ids that start again."""
    batch = family_batch(sum(lengths), 1, seed)
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    batch["labels"][batch["position_ids"] == 0] = -100
    return batch


def collated(collator: Any, lengths: tuple[int, ...] = DOCUMENTS) -> dict[str, Any]:
    """The same documents as a packing collator of a library gives them."""
    batch = packed_batch(lengths)
    ids, labels = (batch[key][0].split(lengths) for key in ("input_ids", "labels"))
    pairs = zip(ids, labels, strict=True)
    return dict(collator([{"input_ids": one.tolist(), "labels": label.tolist()} for one, label in pairs]))


# --- loss and gradients of whole sequences


def errors_of_heads(core: str, sp_size: int) -> list[float]:
    batch = family_batch(37, 2)
    errors = []
    with stand_ins.installed():
        for kv_heads in (1, 2, 4, 8):
            config = family_config("llama", num_attention_heads=8, num_key_value_heads=kv_heads)
            errors.append(worst(split_step(core, config, batch, sp_size, 8), whole_step(core, config, batch)))
    return errors


@pytest.mark.parametrize(
    ("core", "sp_size"),
    [
        pytest.param(core, sp_size, marks=[pytest.mark.slow] * (sp_size == 4 and core in FLASH[1:]))
        for core in ("sdpa", *FLASH)
        for sp_size in (2, 4)
    ],
)
def test_a_core_is_exact_for_kv_heads_split_and_replicated(core, sp_size, ranks4):
    """sdpa: run here. Flash attention: stand-in."""
    assert max(ranks4.run(errors_of_heads, core, sp_size)[0]) < EXACT


def calls_of(core: str) -> list[dict[str, Any]]:
    with stand_ins.installed() as calls:
        split_step(core, family_config("llama"), family_batch(37, 2), 2, 8)
        return list(calls)


@pytest.mark.parametrize(("core", "kind"), zip(FLASH, ("2", "3", "4", "2"), strict=True))
def test_flash_attention_is_called_under_its_own_name_with_the_whole_sequence(core, kind, ranks2):
    """Stand-in: two layers, two calls, and none of the kernel that another name stands for."""
    for calls in ranks2.run(calls_of, core):
        assert [(call["kind"], call["length"]) for call in calls] == [(kind, 40)] * 2


# --- windows


def errors_of_windows(model_type: str, changed: dict[str, Any], sp_size: int) -> tuple[float, float, set[int]]:
    config, batch = family_config(model_type, **changed), family_batch(37, 2)
    with stand_ins.installed() as calls:
        check_model(ModelSpec(model_with("flash_attention_2", copy.deepcopy(config))))
        split = split_step("flash_attention_2", copy.deepcopy(config), batch, sp_size, math.lcm(8, sp_size))
        lefts = {call["left"] for call in calls}
        same_core = whole_step("flash_attention_2", copy.deepcopy(config), batch)
    return worst(split, same_core), worst(split, whole_step("sdpa", copy.deepcopy(config), batch)), lefts


@pytest.mark.parametrize("sp_size", [2, 4])
@pytest.mark.parametrize(
    ("model_type", "changed", "lefts"),
    [
        ("mistral", {"sliding_window": 11}, {10}),
        # Longer than a shard and shorter than the sequence: of the shard's length it would be no window at all.
        ("mistral", {"sliding_window": 30}, {29}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}, {-1, 10}),
        ("mixtral", {"sliding_window": 11}, {10}),
        ("phi3", {"sliding_window": 11}, {10}),
        ("starcoder2", {"sliding_window": 11}, {10}),
    ],
)
def test_windows_under_flash_attention_are_those_of_the_whole_sequence(model_type, changed, lefts, sp_size, ranks4):
    """Stand-in, against itself at SP 1 and against sdpa at SP 1 with transformers' mask, which is run here."""
    same_core, sdpa, seen = ranks4.run(errors_of_windows, model_type, changed, sp_size)[0]
    assert seen == lefts
    assert same_core < EXACT and sdpa < EXACT


# --- packed documents


def errors_of_packing(core: str, how: str, sp_size: int, multiple: int, changed: dict[str, Any]) -> Any:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    config = family_config("mistral", **changed)
    batch = {
        "position_ids": packed_batch,
        "flattening": lambda: collated(DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)),
        "bounds only": lambda: collated(
            DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
        ),
        "trl": lambda: collated(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)),
    }[how]()
    with stand_ins.installed() as calls:
        split = split_step(core, config, batch, sp_size, multiple)
        seen = [(call["kind"], call["bounds"], type(call["longest"])) for call in calls]
        same_core = whole_step(core, config, batch)
    truth = document_by_document(config, packed_batch(), DOCUMENTS)
    return worst(split, same_core), worst(split, truth), seen


@pytest.mark.parametrize("changed", [{}, {"sliding_window": 5}], ids=["full", "window"])
@pytest.mark.parametrize("how", ["position_ids", "flattening", "bounds only", "trl"])
@pytest.mark.parametrize(
    ("core", "sp_size", "multiple"), [("flash_attention_2", 2, 32), ("flash_attention_3", 4, 4), ("sdpa", 4, 32)]
)
def test_packed_documents_do_not_see_one_another(core, sp_size, multiple, how, changed, ranks4):
    """Stand-in (sdpa: run here), against itself at SP 1 and against each document alone through sdpa."""
    same_core, truth, seen = ranks4.run(errors_of_packing, core, how, sp_size, multiple, changed)[0]
    assert truth < EXACT
    # Without position_ids transformers at SP 1 counts them through, which is the same to rounding only; and under sdpa
    # it then knows of no documents.
    if how != "bounds only":
        assert same_core < EXACT
    padded = -(-sum(DOCUMENTS) // multiple) * multiple
    bounds = [0, *itertools.accumulate(DOCUMENTS)] + [padded] * (padded > sum(DOCUMENTS))
    assert seen == ([] if core == "sdpa" else [(f"{core[-1]} varlen", bounds, int)] * 2), "padding is a document"


def errors_of_a_packed_family(model_type: str, cores: tuple[str, ...]) -> list[float]:
    config, batch = family_config(model_type), packed_batch()
    batch["seq_idx"] = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS)).int()[None]
    with stand_ins.installed():
        split = [split_step(core, config, batch, 2, 8) for core in cores]
    truth = document_by_document(config, batch, DOCUMENTS)
    # A document alone may leave an expert without a token, and its gradient None; together they do not.
    return [worst(each, truth) for each in split]


@pytest.mark.parametrize("model_type", [each for each in FAMILIES + LINEAR_FAMILIES if each not in LEAKING])
def test_the_verified_families_hand_the_documents_on(model_type, ranks2):
    """sdpa: run here. Flash attention: stand-in. Against each document alone through sdpa."""
    if model_type == "lfm3" and Version(transformers.__version__) < Version("5.24"):
        # Its convolution is a plain function there, which nothing says to look along the sequence.
        with pytest.raises(UnsupportedModelError, match="layer_types has conv"):
            check_model(ModelSpec(build_model(family_config(model_type))))
        return
    cores = ("sdpa",) if model_type in NO_DOCUMENTS else ("sdpa", "flash_attention_2")
    assert max(ranks2.run(errors_of_a_packed_family, model_type, cores)[0]) < EXACT


@pytest.mark.parametrize("model_type", NO_DOCUMENTS + LEAKING)
def test_a_family_that_does_not_is_refused(model_type, ranks2):
    """Stand-in. transformers gives their layers no positions either, so packing leaks at SP 1 as well."""
    with pytest.raises(RankError) as caught:
        ranks2.run(errors_of_a_packed_family, model_type, ("flash_attention_2",))
    sentence = "does not tell all of its layers where packed documents end"
    sentence += "|packed documents would see one another in .*Delta|.*Mixer"
    for error in caught.value.errors:
        assert isinstance(error, UnsupportedModelError) and re.search(sentence, str(error))


# --- other arguments


def errors_of_arguments(model_type: str, core: str, sp_size: int, changed: dict[str, Any]) -> tuple[float, list[Any]]:
    config = family_config(model_type, **{"num_attention_heads": 8, "num_key_value_heads": 2, **changed})
    with stand_ins.installed() as calls:
        split = split_step(core, config, family_batch(37, 2), sp_size, math.lcm(8, sp_size))
        seen = [(call["left"], call["softcap"]) for call in calls]
        return worst(split, whole_step(core, config, family_batch(37, 2))), seen


@pytest.mark.parametrize("sp_size", [2, 4])
def test_softcap_reaches_flash_attention(sp_size, ranks4):
    """Stand-in. gemma2 is no verified family: it is here for its arguments."""
    changed = {"sliding_window": 11, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    error, seen = ranks4.run(errors_of_arguments, "gemma2", "flash_attention_2", sp_size, changed)[0]
    assert error < EXACT and seen == [(10, 0.5), (-1, 0.5)]


@pytest.mark.parametrize("sp_size", [2, 4])
def test_sinks_are_those_of_this_ranks_heads(sp_size, ranks4):
    """Stand-in of flash attention 4, which has them; their gradient is compared like any other."""
    changed = {"sliding_window": 11, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}
    error, seen = ranks4.run(errors_of_arguments, "gpt_oss", "flash_attention_4", sp_size, changed)[0]
    assert error < EXACT and [left for left, _ in seen] == [10, None]


# --- the name


def facts_of_the_name(core: str) -> dict[str, Any]:
    """What a patched model's name is to those who read it, and to those who look it up."""
    with stand_ins.installed(), PatchSet() as undo:
        config = family_config("llama")
        model, other = model_with(core, config), model_with(core, config)
        own = AttentionInterface._global_mapping[core]
        mapped = [dict(each._global_mapping) for each in (AttentionInterface, AttentionMaskInterface)]
        saved = model.config.to_json_string()
        patch_model(ModelSpec(model), None, undo)
        name = model.config._attn_implementation
        facts = {
            "read": name == core and name in ("eager", core) and core in [name] and name.startswith(core),
            "private": isinstance(name, PrivateName),
            "flash": is_flash_attention_requested(model.config),
            "version": [v for v in (2, 3, 4) if is_flash_attention_requested(model.config, version=v)],
            "entry is its own": AttentionInterface._global_mapping[name] is not own
            and name in AttentionMaskInterface(),
            "others keep theirs": AttentionInterface._global_mapping[other.config._attn_implementation] is own,
            "set again": None,
            "saved": model.config.to_json_string() == saved,
            "copies": [
                type(each._attn_implementation) is str and each._attn_implementation == core
                for each in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config)))
            ],
        }
        model.set_attn_implementation(core)  # it has it
        facts["set again"] = model.config._attn_implementation is name
        with pytest.raises(UnsupportedModelError, match="an engine with sequence parallelism owns it already"):
            check_model(ModelSpec(model))
        undo.close()
        left = [dict(each._global_mapping) for each in (AttentionInterface, AttentionMaskInterface)]
        facts["nothing is left"] = left == mapped and type(model.config._attn_implementation) is str
        return facts


@pytest.mark.parametrize(
    ("core", "version"), [("sdpa", []), ("flash_attention_2", [2]), ("flash_attention_3", [3]), (FLASH[3], [2])]
)
def test_the_name_is_read_as_the_core_and_looked_up_as_the_models_own(core, version, ranks2):
    """Run here; of flash attention nothing is computed."""
    facts = ranks2.run(facts_of_the_name, core)[0]
    assert facts.pop("version") == version and facts.pop("flash") == bool(version)
    assert facts.pop("copies") == [True, True]
    assert {key for key, value in facts.items() if not value} == set()


def reference_beside(core: str) -> list[Step]:
    """A whole reference model before, during and after another one's sequence parallelism, both of one config."""
    config, batch = family_config("llama"), family_batch(24, 1)
    steps = [] if core == "sdpa" else None
    with stand_ins.installed(), KeepFp64():
        reference = model_with(core, config)

        def look() -> Step:
            reference.zero_grad(set_to_none=False)
            loss, grads = step(reference, batch)
            return loss, {name: grad.clone() for name, grad in grads.items()}

        steps = [look()]
        with PatchSet() as undo:
            model = model_with(core, config)
            patch_model(ModelSpec(model), None, undo)
            split = shard_batch(batch, 2, ShardingConfig(2)).shards[dist.get_rank()]
            step(model, split)
            steps.append(look())
            step(model, split)
        steps.append(look())
    return steps


@pytest.mark.parametrize("core", ["sdpa", *FLASH])
def test_a_reference_model_in_the_process_stays_as_it_is(core, ranks2):
    """sdpa: run here. Flash attention: stand-in."""
    for before, during, after in ranks2.run(reference_beside, core):
        for loss, grads in (during, after):
            assert loss == before[0] and all(torch.equal(grads[name], grad) for name, grad in before[1].items())


def two_cores() -> float:
    """Two models of two flash cores, one of them of the hub, forward by turns and backward in the other order."""
    names, batch = (FLASH[0], FLASH[3]), family_batch(24, 1)
    with stand_ins.installed(), PatchSet() as undo:
        # In fp32: recomputation runs in autograd's own thread, where KeepFp64 is not.
        models = [model_with(core, family_config("llama")).float() for core in names]
        for model in models:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            patch_model(ModelSpec(model), None, undo)
        split = shard_batch(batch, 2, ShardingConfig(2)).shards[dist.get_rank()]
        losses = [model(**split, use_cache=False).loss for model in models]
        for loss in losses:
            loss.backward()
        errors = []
        for model, loss, core in zip(models, losses, names, strict=True):
            grads = {name: p.grad for name, p in model.named_parameters()}
            for grad in grads.values():
                dist.all_reduce(grad)
                grad /= 2
            errors.append(worst((loss.item(), grads), whole_step(core, family_config("llama"), batch)))
    return max(errors)


def test_two_flash_cores_by_turns_do_not_take_one_anothers_place(ranks2):
    """Stand-in. transformers loads a kernel anew when another name was used last, and registers it under that name."""
    assert ranks2.run(two_cores)[0] < 1e-5


def another_model_of_its_config() -> tuple[str, float]:
    """What a second model says that is built from a patched model's config, and the loss of one from a copy."""
    batch = family_batch(24, 1)
    with PatchSet() as undo:
        model = model_with("sdpa", family_config("llama"))
        alone = model_with("sdpa", family_config("llama"))(**batch).loss
        patch_model(ModelSpec(model), None, undo)
        copied = type(model)(copy.deepcopy(model.config)).double()
        copied.load_state_dict(model.state_dict())
        with pytest.raises(UnsupportedModelError) as caught:
            type(model)(model.config).double()(**batch)
        return str(caught.value), abs(copied(**batch).loss - alone).item()


def test_a_model_built_from_a_patched_models_config_is_refused_and_one_from_its_copy_is_whole(ranks2):
    """Run here."""
    for sentence, difference in ranks2.run(another_model_of_its_config):
        assert "LlamaAttention is part of another model" in sentence and "copy.deepcopy(model.config)" in sentence
        assert difference == 0


# --- flex attention


def flex_forward(changed: dict[str, Any]) -> float:
    """The error of flex attention's loss at SP 2 against sdpa's at SP 1, both in fp32."""
    from torch._inductor import config as inductor

    inductor.compile_threads = 1  # a pool of compilers for each rank is more than the cores bear
    # Not shorter: PyTorch 2.13's compiled kernel of the CPU is wrong by itself for causal masks of 40 tokens (NaN).
    config, batch = family_config("llama", **changed), family_batch(125, 2)
    whole, split = (model_with(core, config).float().eval() for core in ("sdpa", "flex_attention"))
    with PatchSet() as undo, torch.no_grad():
        true = whole(**batch).loss
        patch_model(ModelSpec(split), None, undo)
        # Twice: the second finds the mask of this length, whatever it is given beside it.
        for _ in range(2):
            got = split(**shard_batch(batch, 2, ShardingConfig(8)).shards[dist.get_rank()], use_cache=False).loss
    return abs(got - true).item() / true.item()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flex_attention_is_causal_over_the_whole_sequence(ranks2):
    """Run here, forward and compiled: its backward is not on CPU."""
    changed = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 1}
    assert ranks2.run(flex_forward, changed)[0] < 1e-6


def train_flex() -> None:
    with PatchSet() as undo:
        model = model_with("flex_attention", family_config("llama"))
        check_model(ModelSpec(model))
        patch_model(ModelSpec(model), None, undo)
        model(**shard_batch(family_batch(16, 1), 2, ShardingConfig(2)).shards[dist.get_rank()])


def test_flex_attention_does_not_train_on_cpu_and_says_so(ranks2):
    """Refused here; on a GPU it is compiled, forward and backward, by transformers' own function."""
    with pytest.raises(RankError) as caught:
        ranks2.run(train_flex)
    for error in caught.value.errors:
        assert isinstance(error, UnsupportedModelError)
        assert "'flex_attention' cannot train on CPU" in str(error) and "'sdpa'" in str(error)


# --- in DeepSpeed


def trained(core: str, stage: int, sp_size: int) -> list[torch.Tensor]:
    """The weights after two steps on packed documents, two batches a rank, through ``deepspeed.initialize``."""
    import deepspeed

    import deepspeed_alst

    with stand_ins.installed():
        model = model_with(core, family_config("qwen3")).float()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        config = ds_config(Cell(stage=stage), sp_size)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        lengths = [(9, 5, 20), (3, 30), (17, 17, 1), (40,)]
        mine = [collated(collator, lengths[2 * batch + dist.get_rank()]) for batch in range(2)]
        for batch in deepspeed_alst.shard_dataloader(mine, engine):
            engine.backward(engine(**batch).loss)
            engine.step()
        weights = [full_weight(param) for param in engine.module.parameters()]
        engine.destroy()
        return weights


@pytest.mark.parametrize(
    ("core", "stage"),
    [
        *(pytest.param("flash_attention_2", 2, marks=pytest.mark.slow), ("flash_attention_2", 3)),
        *((stand_ins.HUB_KERNEL, 2), pytest.param(stand_ins.HUB_KERNEL, 3, marks=pytest.mark.slow)),
    ],
)
def test_a_step_on_packed_documents_is_that_of_the_run_without_sequence_parallelism(core, stage, ranks2):
    """Stand-in, through DeepSpeed with checkpointed layers: every weight after two steps, in fp32."""
    split, whole = (ranks2.run(trained, core, stage, sp_size)[0] for sp_size in (2, 1))
    assert max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(split, whole, strict=True)) < 1e-6


# --- what is refused


@pytest.mark.parametrize("core", FLASH)
def test_chunks_are_refused_under_flash_attention_with_the_core_that_has_them(core):
    with stand_ins.installed():
        model = model_with(core, family_config("llama4_text", layer_types=["chunked_attention", "full_attention"]))
        with pytest.raises(UnsupportedModelError, match=rf"chunked_attention: not with .*'{core}'.*; sdpa can do it"):
            check_model(ModelSpec(model))


@pytest.mark.parametrize("core", ["eager", "paged|eager"])
def test_other_cores_are_refused_with_those_that_are_available(core):
    model = build_model(family_config("llama"))
    model.config._attn_implementation = core
    with pytest.raises(UnsupportedModelError) as caught:
        check_model(ModelSpec(model))
    assert f"attn_implementation='{core}' is not available" in str(caught.value)
    assert all(name in str(caught.value) for name in ("'sdpa'", "'flash_attention_2'", "'flex_attention'"))


def test_a_function_that_somebody_registered_under_a_cores_name_is_not_the_core():
    own = AttentionInterface._global_mapping["flash_attention_3"]
    try:
        AttentionInterface.register("flash_attention_3", lambda *args, **kwargs: None)
        assert find_backend("flash_attention_3") is None
    finally:
        AttentionInterface.register("flash_attention_3", own)
    assert find_backend("flash_attention_3") is not None


def test_packed_documents_are_refused_where_the_model_does_not_keep_them_apart():
    for batch in (packed_batch(), collated(DataCollatorWithFlattening(return_flash_attn_kwargs=True))):
        with pytest.raises(DataError, match=r"restart at token 7 of row 0.*does not support packed samples"):
            shard_batch(batch, 2, ShardingConfig(2))


def test_a_single_document_of_a_packing_collator_is_a_document():
    plain = {key: x for key, x in family_batch(8, 1).items()}
    got = shard_batch({**plain, "cu_seq_lens_q": torch.tensor([0, 8]), "max_length_q": 8}, 2, ShardingConfig(2))
    expected = shard_batch(plain, 2, ShardingConfig(2))
    assert got.common == {}
    assert all(torch.equal(x, expected.shards[1][key]) for key, x in got.shards[1].items())


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"cu_seq_lens_q": torch.tensor([0, 2, 6])},
            "end at 2, 6 by cu_seq_lens_q, and at 3, 6 by position_ids",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, "cu_seq_lens_q goes from 0 to 5"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 3, 6])}, "it must rise"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6]), "cu_seq_lens_k": torch.tensor([0, 6])}, "differ"),
        ({"cu_seq_lens_k": [0, 3, 6]}, "cu_seq_lens_k must be a 1-D integer tensor"),
    ],
)
def test_documents_that_do_not_fit_are_refused(changed, sentence):
    batch = {"input_ids": torch.arange(6)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with pytest.raises(DataError, match=sentence):
        shard_batch({**batch, **changed}, 2, ShardingConfig(2, packing=True))


def test_packed_documents_in_several_rows_are_refused():
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "position_ids": torch.tensor([0, 1, 2, 0, 1, 2])}
    with pytest.raises(DataError, match="a batch of 2 rows"):
        shard_batch(batch, 2, ShardingConfig(2, packing=True))


def guarded(change: str) -> None:
    """A packed batch of a loader that is not ours."""
    with stand_ins.installed(), PatchSet() as undo:
        groups = build_groups(2, build_control_group())
        undo.callback(groups.destroy)
        model = model_with("flash_attention_2", family_config("llama"))
        calls = ForwardContext()
        patch_model(ModelSpec(model), groups.sp_group, undo, calls)
        check_batches(ModelSpec(model), groups, calls, undo)
        sharded = shard_batch(packed_batch((20, 12)), 2, ShardingConfig(2, packing=True))
        batch = {**sharded.shards[groups.sp_rank], **sharded.common}
        if change == "no bounds":
            del batch["cu_seq_lens_q"], batch["cu_seq_lens_k"]
        elif change == "a shard's bounds":
            batch["cu_seq_lens_q"] = torch.tensor([0, 16])
        elif change == "one rank's bounds":
            batch["cu_seq_lens_q"] = torch.tensor([0, 20, 32] if groups.sp_rank else [0, 19, 32])
        elif change == "the other's shard":
            batch |= sharded.shards[1 - groups.sp_rank]
        model(**batch)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("no bounds", "position_ids restart, but it has no cu_seq_lens_q"),
        ("a shard's bounds", "not those of the whole sequence"),
        ("one rank's bounds", "packed documents that differ"),
        ("the other's shard", "position_ids that start at"),
    ],
)
def test_a_packed_batch_of_another_loader_is_refused_on_all_ranks(change, sentence, ranks2):
    """Stand-in; the first of these restarts in the last shard only, where the start of the shard does not tell."""
    with pytest.raises(RankError) as caught:
        ranks2.run(guarded, change)
    assert all(isinstance(error, DataError) and sentence in str(error) for error in caught.value.errors)
