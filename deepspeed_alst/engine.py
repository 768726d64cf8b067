"""Methods that the package's features add to DeepSpeed's engine."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import name_missing_ranks
from deepspeed_alst.distributed.mesh import installed
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.grad_reduction.checks import AverageCheck
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.verification.verify_model import ModelCheck

if TYPE_CHECKING:
    from deepspeed_alst.integrations.hf_upstream import UpstreamProgram
    from deepspeed_alst.monitoring.metrics import Metrics


@dataclass
class EngineFeatures:
    """The features of one engine; None where one is off."""

    patches: PatchSet
    """Undone when the engine is destroyed."""
    control_group: Any
    """All ranks over gloo."""
    session: Session | None = None
    """Sequence parallelism."""
    metrics: "Metrics | None" = None
    gradient_check: AverageCheck | None = None
    model_check: ModelCheck | None = None
    upstream: "UpstreamProgram | None" = None
    """Set if the program was written for DeepSpeed's own ALST."""

    @contextlib.contextmanager
    def collectives(self) -> Iterator[None]:
        """Run a method of DeepSpeed with this engine's mpu; an error names the ranks missing in a collective."""
        if self.session is None:
            yield
            return
        with name_missing_ranks(self.session.groups.roll_group), installed(self.session.mpu):
            yield


class AlstEngine:
    """Mixin ahead of the engine's class, installed by ``PatchSet.mixin``."""

    alst_features: EngineFeatures

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Check the model before the first forward, then split a whole batch or run a shard."""
        features = self.alst_features
        if features.model_check is not None:
            with features.collectives():
                features.model_check.run_once()
        session = features.session
        takes_whole = session is not None and session.takes_whole and not session.splits_decoder
        if takes_whole and not session.calls.whole and not args:
            from deepspeed_alst.whole_sequence.batches import forward_whole_batch, is_whole_batch

            if is_whole_batch(kwargs):
                return forward_whole_batch(session, self._forward_shard, kwargs)
        return self._forward_shard(*args, **kwargs)

    def _forward_shard(self, *args: Any, **kwargs: Any) -> Any:
        features = self.alst_features
        counting = features.metrics.forward(args, kwargs) if features.metrics else contextlib.nullcontext()
        with counting, features.collectives():
            output = super().forward(*args, **kwargs)
        if features.session is not None and not features.session.splits_decoder:
            features.session.watch_loss(output)
        if features.upstream is not None:
            features.upstream.add_loss(output, kwargs)
        return output

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the first averaged gradients, and refuse a loss that is not the whole sequence's."""
        features = self.alst_features
        with contextlib.ExitStack() as around:
            if features.gradient_check is not None:
                around.enter_context(features.gradient_check.backward())
            if features.upstream is not None:
                around.enter_context(features.upstream.aggregation.backward(loss))
            with features.collectives():
                if features.session is not None:
                    loss = around.enter_context(features.session.backward(loss))
                scaled = super().backward(loss, *args, **kwargs)
            if features.metrics is not None:
                features.metrics.add_loss(scaled)
        return scaled

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Drop a step with a NaN or Inf loss or gradient on all ranks, and report a completed one."""
        features = self.alst_features
        with contextlib.ExitStack() as around:
            if features.metrics is not None:
                around.enter_context(features.metrics.step())
            around.enter_context(features.collectives())
            if features.session is not None:
                around.enter_context(features.session.losses.step(self))
            return super().step(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Save a checkpoint for any world size; a failure on one rank is an error on all."""
        from deepspeed_alst.checkpoint.save import save_on_all_ranks

        return self._with_checkpoint(super().save_checkpoint, save_on_all_ranks, args, kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of any world size."""
        from deepspeed_alst.checkpoint.load import load_on_any_world_size

        return self._with_checkpoint(super().load_checkpoint, load_on_any_world_size, args, kwargs)

    def _with_checkpoint(self, method: Callable[..., Any], ours: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        from deepspeed_alst.checkpoint.load import takes_any_world_size

        with self.alst_features.collectives():
            if not takes_any_world_size(self):
                return method(*args, **kwargs)
            call = inspect.signature(method).bind(*args, **kwargs)
            call.apply_defaults()
            return ours(self, method, call, self.alst_features.control_group)

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """Save the weights alone."""
        with self.alst_features.collectives():
            return super().save_16bit_model(*args, **kwargs)

    def deepspeed_io(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Build a loader, of shards under sequence parallelism."""
        session = self.alst_features.session
        if session is None:
            return super().deepspeed_io(dataset, *args, **kwargs)
        return session.sharded_io(super().deepspeed_io, dataset, *args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a compiled backward under sequence parallelism."""
        asked = kwargs.get("compiled_autograd_enabled") or (len(args) > 3 and args[3])
        if asked and self.alst_features.session is not None:
            raise UnsupportedModelError(
                "engine.compile(compiled_autograd_enabled=True): not verified under sequence parallelism; leave the "
                "argument out"
            )
        return super().compile(*args, **kwargs)

    def destroy(self) -> None:
        """Destroy the engine, and undo every patch."""
        features = self.alst_features
        try:
            with features.collectives():
                super().destroy()
        finally:
            features.patches.close()


def extend(engine: Any, patches: PatchSet, control_group: Any, session: Session | None) -> None:
    """Add the methods of AlstEngine to an engine, until its patches are undone."""
    patches.set(engine, "alst_features", EngineFeatures(patches, control_group, session))
    patches.mixin(engine, AlstEngine)
