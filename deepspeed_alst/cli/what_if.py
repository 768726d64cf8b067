"""``ds_alst plan --what_if`` and ``--cheapest``: keys that save memory, one at a time, and the cheapest set of them.

A variant is a ds_config with some keys changed. Those of the same layer share its measurement (``Measuring``).
"""

import copy
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.cli.measure import Layer, Measuring, Model
from deepspeed_alst.cli.memory import GIB, Machine, Plan, longest, plan_of
from deepspeed_alst.cli.report import problems
from deepspeed_alst.cli.step_time import Rates, StepTime, step_time
from deepspeed_alst.config.compatibility import value_at, zero_stage
from deepspeed_alst.config.config_file import TOP_KEYS
from deepspeed_alst.config.schema import AlstConfig, AutoMemoryLeanConfig, LigerConfig, parse

_LOSS, _MLP, _LEAN = "alst.tiled_logits_loss", "alst.tiled_mlp_compute", "alst.memory_lean_layer"
_OFFLOAD, _SAVE = "alst.activation_checkpoint_cpu_offload", "alst.save_attention_output"
_STAGE, _OPTIMIZER, _PARAM = (f"zero_optimization.{key}" for key in ("stage", "offload_optimizer", "offload_param"))
_TO_HOST = {"device": "cpu", "pin_memory": True}
_SWITCHES = {_LOSS: True, _MLP: True, _LEAN: True, _OFFLOAD: True, _OPTIMIZER: _TO_HOST, _PARAM: _TO_HOST}
"""Values that switch a key on."""
_ZEROS = (_OPTIMIZER, _PARAM)
Keys = dict[str, Any]
"""Changed keys of a ds_config by dotted path; None leaves a key out."""


@dataclass(frozen=True)
class Variant:
    """A ds_config with changed keys, and its plan at a given length."""

    keys: Keys
    ds_config: dict[str, Any]
    longest: int
    """Tokens of the longest whole sequence."""
    limit: str
    plan: Plan
    time: StepTime | None

    @property
    def name(self) -> str:
        """The changed keys, by the last part of their paths."""
        return _describe(self.keys) or "as given"


class WhatIf:
    """Variants of one ds_config for one model and machine."""

    def __init__(self, measuring: Measuring, ds_config: Mapping[str, Any], machine: Machine, rates: Rates) -> None:
        self._measuring, self._ds_config, self._machine, self._rates = measuring, ds_config, machine, rates
        self._sp_size = parse(ds_config).sequence_parallel_size
        self._measured = set[tuple[str, ...]]()

    def variant(self, keys: Keys, sequence: int | None = None) -> Variant:
        """Plan the ds_config with these keys for a sequence, or for the longest that fits."""
        ds_config = changed(self._ds_config, keys)
        config = parse(ds_config)
        most, limit = longest(*self._layers_of(config), ds_config, self._machine)
        if (shorter := of_shard(config, most.tokens)) is not config:
            most, limit = longest(*self._layers_of(shorter), ds_config, self._machine)
        tokens = most.tokens if sequence is None else -(-sequence // self._sp_size)
        return Variant(keys, ds_config, most.tokens * self._sp_size, limit, *self._at(ds_config, tokens))

    def _layers_of(self, config: AlstConfig) -> tuple[Model, dict[bool, Layer]]:
        """Return the measurement of a config, and announce it if it is a new one, as it takes seconds."""
        on = tuple(path for path in _SWITCHES if path not in _ZEROS and _has(config, path))
        if on not in self._measured:
            self._measured.add(on)
            words = ", ".join(on) or "no key of the alst block"
            print(f"ds_alst plan: measuring layers on tensors without data, with {words}", file=sys.stderr)
        return self._measuring.of(config)

    def _at(self, ds_config: dict[str, Any], tokens: int) -> tuple[Plan, StepTime | None]:
        model, layers = self._layers_of(of_shard(parse(ds_config), tokens))
        plan = plan_of(model, layers, ds_config, self._machine, tokens)
        layer = layers[plan.num_saved == model.layers.num_layers]  # as plan_of
        return plan, step_time(model, layer, ds_config, self._machine, plan, self._rates)

    def one_at_a_time(self, sequence: int | None) -> Iterator[Variant]:
        """Yield the ds_config as given, then with one key changed, at this length or at the longest of the first."""
        given = self.variant({}, sequence)
        yield given
        for keys in self._valid(single_changes(self._ds_config)):
            yield self.variant(keys, given.plan.tokens * self._sp_size)

    def cheapest(self, sequence: int) -> Variant | None:
        """Return the fastest variant with which a sequence fits, of equally fast ones that with the fewest keys.

        Keys are added to the ds_config, and save_attention_output may change. Layers in chunks, slow to measure and
        never faster, are tried last: with tiles only, and where they can be the cheapest.
        """
        tokens, ranks = -(-sequence // self._sp_size), dict[str, tuple[float, int]]()
        (_, given), best, least = self._at(changed(self._ds_config, {}), tokens), None, (math.inf, 0)
        for keys in sorted(self._valid(added_keys(self._ds_config)), key=lambda keys: _LEAN in keys):
            if _LEAN in keys:
                seconds, count = ranks[_describe({path: value for path, value in keys.items() if path != _LEAN})]
                if least <= (seconds, count + 1):
                    continue
            plan, time = self._at(changed(self._ds_config, keys), tokens)
            # Differences below a thousandth are less than the arithmetic's error.
            rank = ranks[_describe(keys)] = round(relative(time, given), 3), len(keys)
            if rank < least and not plan.over(self._machine):
                best, least = keys, rank
        return None if best is None else self.variant(best, sequence)

    def _valid(self, sets: Iterable[Keys]) -> Iterator[Keys]:
        return (keys for keys in sets if not problems(changed(self._ds_config, keys), self._machine.num_gpus))


def _describe(keys: Keys) -> str:
    values = {path: value["device"] if isinstance(value, dict) else value for path, value in keys.items()}
    words = {path: "off" if value is None else str(value).lower() for path, value in values.items()}
    return ", ".join(f"{path.split('.')[-1]}: {word}" for path, word in words.items())


def relative(time: StepTime | None, given: StepTime | None) -> float:
    """Return a step time relative to that of the ds_config as given; 1 if there is none."""
    return 1.0 if time is None or given is None else time.seconds / given.seconds


def changed(ds_config: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """Return the ds_config with keys set or, if None, left out; ALST's keys at the top level stay there."""
    result = copy.deepcopy(dict(ds_config))
    for path, value in keys.items():
        block, name = path.split(".")
        place = result if name in TOP_KEYS and name in result else result.setdefault(block, {})
        place.pop(name, None)
        if value is not None:
            place[name] = value
    return result


def is_on(ds_config: Mapping[str, Any], path: str) -> bool:
    """Return True if the ds_config has a key of ``_SWITCHES`` on."""
    if path in _ZEROS:
        return value_at(ds_config, f"{path}.device", "none") not in (None, "none")
    return _has(parse(ds_config), path)


def _has(config: AlstConfig, path: str) -> bool:
    return (config.tiled_loss() if path == _LOSS else getattr(config.alst, path.removeprefix("alst."))) is not None


def of_shard(config: AlstConfig, tokens: int) -> AlstConfig:
    """Return the config as it acts on shards of so many tokens: without memory-lean layers where they do not run."""
    alst, lean = config.alst, config.alst.memory_lean_layer
    pays = config.sequence_parallel_size > 1 or alst.activation_checkpoint_cpu_offload is not None
    is_off = isinstance(lean, AutoMemoryLeanConfig) and not pays
    if lean is None or (tokens >= lean.min_tokens and not is_off):
        return config
    # Liger's RoPE is left out there too.
    liger = LigerConfig(rope=False) if alst.liger_kernel == "auto" else alst.liger_kernel
    block = alst.model_copy(update={"memory_lean_layer": None, "liger_kernel": liger})
    return config.model_copy(update={"alst": block})


def single_changes(ds_config: Mapping[str, Any]) -> Iterator[Keys]:
    """Yield each key switched on or off, ``save_attention_output`` with the offload, and the other ZeRO stages."""
    offloads, stage = is_on(ds_config, _OFFLOAD), zero_stage(ds_config)
    saved = parse(ds_config).alst.save_attention_output
    for path, value in _SWITCHES.items():
        on = is_on(ds_config, path)
        if path == _OFFLOAD and not on:
            yield from ({_OFFLOAD: value, _SAVE: saves} for saves in (False, True))
        elif (path != _PARAM or stage == 3) and (path != _OPTIMIZER or stage):
            yield {path: value if not on else None if path in _ZEROS else False}
    yield from ({_SAVE: saves} for saves in (False, True) if offloads and saves is not saved)
    for other in (1, 2, 3):
        if other != stage:
            # Weights are on the host under ZeRO 3 only.
            yield {_STAGE: other} | ({_PARAM: None} if other < 3 and is_on(ds_config, _PARAM) else {})


def added_keys(ds_config: Mapping[str, Any]) -> Iterator[Keys]:
    """Yield the sets of keys that save memory and can be added to the ds_config, the empty one first."""
    switches = [[{}, {path: value}] for path, value in _SWITCHES.items() if not is_on(ds_config, path)]
    stages = [{}, *({_STAGE: stage} for stage in range(zero_stage(ds_config) + 1, 4))]
    saved = parse(ds_config).alst.save_attention_output
    saves = [{}, *({_SAVE: each} for each in (False, True) if each is not saved)]
    for parts in itertools.product(*switches, stages, saves):
        keys: Keys = {path: value for part in parts for path, value in part.items()}
        result = changed(ds_config, keys)
        stage = zero_stage(result)
        adds_lean = _LEAN in keys and not all(is_on(result, path) for path in (_LOSS, _MLP))
        if not adds_lean and not (_OPTIMIZER in keys and not stage) and not (_PARAM in keys and stage < 3):
            yield keys


def row(variant: Variant, given: Variant) -> dict[str, Any]:
    """Return a variant's cells by column."""
    return {
        "keys": variant.name,
        "longest": variant.longest,
        "limited by": variant.limit,
        "bytes of a GPU": sum(variant.plan.device.values()),
        "bytes of a host": sum(variant.plan.host.values()),
        "step time": None if variant.time is None else relative(variant.time, given.time),
    }


def print_table(variants: list[Variant], sp_size: int) -> None:
    """Print the variants, the ds_config as given first, and their bytes and relative step time at its length."""
    given = variants[0]
    print(f"Keys one at a time; bytes and step time at {given.plan.tokens * sp_size:,} tokens")
    width = max(len(each.name) for each in variants) + 2
    print(f"{'':{width}}{'longest':>14}{'limited by':>12}{'GiB per GPU':>13}{'GiB per host':>14}{'step time':>11}")
    for each in variants:
        gpu, host = (sum(sizes.values()) / GIB for sizes in (each.plan.device, each.plan.host))
        time = "" if each.time is None else f"{relative(each.time, given.time):.2f}"
        print(f"{each.name:{width}}{each.longest:14,}{each.limit:>12}{gpu:13,.1f}{host:14,.1f}{time:>11}")
