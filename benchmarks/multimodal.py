"""Check multimodal models of transformers under sequence parallelism, on tiny models.

    python -m benchmarks.multimodal [--write] [family ... | frames]

Compares loss and all gradients (encoder, projector, language model, head) of a tiny model per family, in fp64 on CPU,
unsharded and over 2, 3 and 4 ranks: two rows of several images, one row whose only image is in the first rank's part,
text alone, and the two rows packed into one. ``frames`` counts a long video instead (video.py).
``--write`` writes the table to docs/vision_language.md and the lists of verified families.
"""

import argparse
import functools
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import video
from benchmarks.cells import KeepFp64
from benchmarks.figures import Figure, Part, markdown, report
from benchmarks.multimodal_families import FAMILIES, batch_of, cast, packed, tiny_model
from benchmarks.ranks import LateError, RankError, Ranks
from deepspeed_alst.config.schema import parse
from deepspeed_alst.core.feature import RunContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.mesh import build_control_group
from deepspeed_alst.errors import AlstError
from deepspeed_alst.features import features_of
from deepspeed_alst.multimodal import hf_families
from deepspeed_alst.multimodal.hf_families import PACKS, VERIFIED_MODEL_TYPES
from deepspeed_alst.start import build_session
from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves
from deepspeed_alst.verification.hf_parity_trial import Verdict

ROOT = Path(__file__).resolve().parent.parent
CASES = {"images": (2, 1), "first part": (1,), "text": (0, 0)}
"""Images of each row of a batch."""
_PACKED = "packed"
_DEGREES = (2, 3, 4)
_COLUMNS = (*CASES, _PACKED)
_SECONDS = 300.0
_TOLERANCE = 1e-12
# Models that run in fp32 alone.
_TOLERANCE_FP32 = 2e-5
_NONE = Verdict("")
# Share of all gradients' norm; less is rounding.
_GRAD_NORM_FLOOR = 1e-4


@dataclass(frozen=True)
class Row:
    """Verdicts of one family on the cases that its degrees have reached."""

    name: str
    verdicts: tuple[tuple[Verdict, ...], ...]
    """Of each degree, by case."""

    @property
    def cases(self) -> list[Verdict]:
        """Worst verdict of each case."""
        return [max(each, key=_badness) for each in itertools.zip_longest(*self.verdicts, fillvalue=_NONE)]

    @property
    def outcome(self) -> str:
        """Worst outcome; that packed rows are refused does not count."""
        found = [each for place, each in enumerate(self.cases) if place < len(CASES) or each.outcome != "refused"]
        return max(found, key=_badness).outcome

    @property
    def packs(self) -> bool:
        """True if packed rows are right."""
        return len(self.cases) == len(_COLUMNS) and self.cases[-1].outcome == "right"


def _badness(verdict: Verdict) -> tuple[int, float]:
    order = ("", "right", "not built", "refused", "wrong", "no answer", "crash")
    return order.index(verdict.outcome), verdict.error


@functools.cache
def _control_group() -> Any:
    return build_control_group()


def split(model: torch.nn.Module, patches: PatchSet, sp_size: int = 2, **keys: Any) -> Any:
    """Prepare a model for sequence parallelism as ``deepspeed.initialize`` does, without an engine; its session."""
    ds_config = {"sequence_parallel_size": sp_size, "alst": {"pad_to_multiple_of": sp_size, **keys}}
    ds_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": sp_size}
    spec, config = ModelSpec(model).split_part(), parse(ds_config)
    session = build_session(spec, config, ds_config, _control_group(), patches)
    leaves = ZeRO3Leaves(spec.whole, 0, patches)
    run = RunContext(spec, config, 0, _control_group(), session, None, session.calls, leaves, "cpu")
    for feature in features_of(run, ""):
        feature.prepare_model(run, patches)
    return session


def step(model: torch.nn.Module, batch: dict[str, Any], session: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of a batch, averaged over the ranks of a session."""
    model.zero_grad()
    loss = model(**batch).loss
    if session is None:
        loss.backward()
    else:
        with session.backward(loss) as given:
            given.backward()
    params = model.named_parameters()
    grads = {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in params}
    if session is not None:
        for grad in grads.values():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return float(loss), {name: grad.clone() for name, grad in grads.items()}


def ask(name: str) -> list[Verdict]:
    """Return a family's verdicts; runs on every rank."""
    with KeepFp64():
        verdicts = _verdicts(name, torch.float64)
    # Models with kernels for fp32 or fp16 alone.
    return _verdicts(name, torch.float32) if verdicts[0].outcome == "not built" else verdicts


def _verdicts(name: str, dtype: torch.dtype) -> list[Verdict]:
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        model = tiny_model(name, dtype)
        batches = {case: batch_of(name, model, images) for case, images in CASES.items()}
        truth = {case: step(model, batch) for case, batch in batches.items()}
    except Exception as error:
        return [Verdict("not built", f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")]
    if problem := _uneven_calls(name, model, dtype):
        return [Verdict("wrong", problem)]
    verdicts, why = [], ""
    try:
        row = packed(batches["images"])
        truth, batches = truth | {_PACKED: step(model, row)}, batches | {_PACKED: row}
    except Exception as error:
        why = f"{_PACKED}: unsharded, {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    with PatchSet() as patches:
        patches.set(hf_families, "VERIFIED_MODEL_TYPES", VERIFIED_MODEL_TYPES | {model.config.model_type})
        patches.set(hf_families, "PACKS", PACKS | {model.config.model_type})
        try:
            session = split(model, patches, dist.get_world_size())
        except AlstError as error:
            return [Verdict("refused", str(error).splitlines()[0])]
        for case, batch in batches.items():
            try:
                verdicts.append(judge(truth[case], step(model, batch, session), dtype))
            except AlstError as error:
                verdicts.append(Verdict("refused", f"{case}: {str(error).splitlines()[0]}"))
    if why:
        verdicts.append(Verdict("refused", why))
    elif verdicts[-1].outcome == "wrong" and name not in PACKS:
        verdicts[-1] = Verdict("refused", f"{_PACKED}: {verdicts[-1].why}")
    return verdicts


def _uneven_calls(name: str, model: torch.nn.Module, dtype: torch.dtype) -> str:
    """Return why ranks with different numbers of images could not share an encoder under ZeRO 3; empty if they can."""
    owner = next((each for each in (getattr(model, "model", None), model) if hasattr(each, "get_image_features")), None)
    if owner is None or name in hf_families.REPEATED:
        return ""
    calls = []
    for count in (1, 3):
        calls.append([])
        media = cast(FAMILIES[name].media(model.config, (count,), torch.Generator().manual_seed(0)), dtype)
        with PatchSet() as patches, torch.no_grad():
            for each, module in model.named_modules():
                patches.hook(module, "forward", lambda *_, each=each: calls[-1].append(each))
            owner.get_image_features(**media, return_dict=True)
    return "" if calls[0] == calls[1] else "its encoder calls modules once for each image: list it in REPEATED"


def judge(truth: Any, found: Any, dtype: torch.dtype = torch.float64) -> Verdict:
    """Compare loss and gradients of two steps."""
    (loss, grads), (own_loss, own_grads) = truth, found
    norm = sum(float(grad.norm()) ** 2 for grad in grads.values()) ** 0.5
    errors = {"loss": abs(own_loss - loss) / abs(loss)}
    for name, grad in grads.items():
        errors[name] = float((own_grads[name] - grad).norm()) / max(float(grad.norm()), _GRAD_NORM_FLOOR * norm)
    worst = max(errors, key=lambda name: errors[name])
    outcome = "right" if errors[worst] <= (_TOLERANCE if dtype == torch.float64 else _TOLERANCE_FP32) else "wrong"
    return Verdict(outcome, "" if outcome == "right" else f"{worst} is off by {errors[worst]:.1e}", errors[worst])


def census(names: list[str]) -> Iterator[Row]:
    """Yield the verdicts of these families in sequence."""
    ranks = {degree: Ranks(degree) for degree in _DEGREES}
    for name in names:
        verdicts = list[tuple[Verdict, ...]]()
        for degree in _DEGREES:
            try:
                verdicts.append(tuple(ranks[degree].run(ask, name, seconds=_SECONDS)[0]))
            except RankError as error:
                outcome = "no answer" if isinstance(error, LateError) else "crash"
                verdicts.append((Verdict(outcome, str(error).strip().splitlines()[-1]),))
                ranks[degree].close()
                ranks[degree] = Ranks(degree)
            if len(verdicts[-1]) < len(_COLUMNS):
                break
        yield Row(name, tuple(verdicts))
    for each in ranks.values():
        each.close()


def cells_of(row: Row) -> list[str]:
    """Return a family's table cells: its error, or the outcome, and why it is not right."""
    cells = [f"{each.error:.0e}" if each.outcome == "right" else each.outcome for each in row.cases]
    why = next((each.why for each in row.cases if each.why), "")
    return [*cells, *[""] * (len(_COLUMNS) - len(cells)), textwrap.shorten(why, 200, placeholder=" ...")]


def write(rows: list[Row]) -> None:
    """Write the table to the documentation, and the verified families to the list."""
    page = ROOT / "docs" / "vision_language.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->")
    tail = rest.partition("<!-- end -->")[2]
    table = markdown(["model_type", *_COLUMNS, "why not"], ([row.name, *cells_of(row)] for row in rows))
    page.write_text(f"{head}<!-- table -->\n\n{table}\n<!-- end -->{tail}", encoding="utf-8")
    listed = ROOT / "deepspeed_alst" / "multimodal" / "hf_families.py"
    text = listed.read_text("utf-8")
    right = VERIFIED_MODEL_TYPES | {row.name for row in rows if row.outcome == "right"}
    packs = PACKS | {row.name for row in rows if row.packs}
    for key, found in (("_FAMILIES", right), ("_PACKS", packs)):
        names = textwrap.fill(" ".join(sorted(found)), 120)
        text = re.sub(rf'({key} = """\n).*?("""\n)', rf"\g<1>{names}\n\g<2>", text, flags=re.S)
    listed.write_text(text, encoding="utf-8")


def figures(names: list[str], writes: bool) -> Iterator[Figure]:
    """Yield the verdicts of the families."""
    rows = []
    for row in census(names):
        rows.append(row)
        met = row.outcome not in ("wrong", "crash", "no answer") and (
            row.name not in VERIFIED_MODEL_TYPES or row.outcome == "right"
        )
        yield Figure(row.name, tuple(cells_of(row)), met=met, brief=False)
    if writes:
        write(rows)


def main() -> int:
    """Print the table; return 1 if a family is wrong, crashes, or is no longer right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table and the list of what is right")
    parser.add_argument("families", nargs="*", default=[*FAMILIES])
    arguments = parser.parse_args()
    part = Part(lambda: figures(arguments.families, arguments.write), (*_COLUMNS, "why not"))
    parts = {"frames": video.PART} if arguments.families == ["frames"] else {"multimodal": part}
    return report(__doc__, parts, ())


if __name__ == "__main__":
    sys.exit(main())
