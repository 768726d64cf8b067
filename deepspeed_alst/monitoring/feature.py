"""DeepSpeed's ``steps_per_print`` and monitors: a line on rank 0 and events of each step (docs/metrics.md)."""

import math
from typing import Any

from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import gather_objects


class StepMetrics(Feature):
    """A line and monitor events, if the ds_config asks for them."""

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Build the engine's metrics. Collective: rank 0's ds_config decides, because rank 0 prints and writes."""
        steps = engine.steps_per_print()
        # accelerate uses infinity for never.
        prints = steps is not None and math.isfinite(steps)
        if every := gather_objects(int(steps) if prints else int(engine.monitor.enabled), run.control_group)[0]:
            from deepspeed_alst.monitoring.metrics import Metrics

            engine.alst_features.metrics = Metrics(engine, every, prints)
