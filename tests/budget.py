"""How long the tests of each area may take on 2 cores; ``make test`` fails where an area takes longer.

All take under 20 minutes on a quiet machine; an area may take half again as long as it does there, for noise. What does
not fit is marked slow, for make test-full.
"""

from collections import defaultdict

SECONDS = {
    "parity": 270,
    "config and loader": 100,
    "models": 210,
    "the programs people have": 480,
    "tiles and kernels": 400,
    "offload": 100,
    "the rest": 240,
}

AREAS = {
    "test_parity": "parity",
    "test_features": "parity",
    "test_bench_reduction": "parity",
    "test_reduction": "parity",
    "test_reduction_engine": "parity",
    "test_slices": "parity",
    "test_two_engines": "parity",
    "test_compatibility": "config and loader",
    "test_config": "config and loader",
    "test_heads": "config and loader",
    "test_input_config": "config and loader",
    "test_input_plans": "config and loader",
    "test_input_loader": "config and loader",
    "test_input_loss": "the rest",
    "test_input_safety": "the rest",
    "test_loader": "config and loader",
    "test_plugin": "config and loader",
    "test_recipes": "config and loader",
    "test_report": "config and loader",
    "test_shard": "config and loader",
    "test_compile": "the programs people have",
    "test_verify": "the programs people have",
    "test_plan": "config and loader",
    "test_cores": "the programs people have",
    "test_checkpoints": "the programs people have",
    "test_faults": "the programs people have",
    "test_recipes_upstream": "the programs people have",
    "test_tiling_compat": "the programs people have",
    "test_disk_tier": "offload",
    "test_activation_store": "offload",
    "test_host_pool": "offload",
    "test_offload_engine": "offload",
    "test_offload_plan": "offload",
    "test_dropout": "models",
    "test_families": "models",
    "test_census": "models",
    "test_model_check": "models",
    "test_masks": "models",
    "test_whole_sequence": "models",
    "test_mixtures": "models",
    "test_linear": "models",
    "test_fused_norms": "tiles and kernels",
    "test_kernels": "tiles and kernels",
    "test_gated": "tiles and kernels",
    "test_gated_mlp": "tiles and kernels",
    "test_kernels_compile": "tiles and kernels",
    "test_liger": "tiles and kernels",
    "test_ledger": "tiles and kernels",
    "test_norm_kernels": "tiles and kernels",
    "test_op_build": "tiles and kernels",
    "test_pack_heads": "tiles and kernels",
    "test_sum_pieces": "tiles and kernels",
    "test_sum_pieces_cuda": "tiles and kernels",
    "test_tiled_loss": "tiles and kernels",
    "test_tiled_mlp": "tiles and kernels",
    "test_tiles_engine": "tiles and kernels",
    "test_tiles_unusual": "tiles and kernels",
    "test_bench_tiles": "tiles and kernels",
    "test_metrics": "the programs people have",
    "test_trainer": "the programs people have",
    "test_trainer_checkpoints": "the programs people have",
    "test_trl": "the programs people have",
    "test_kept_attention": "offload",
    "test_frozen": "the programs people have",
    "test_peft": "the programs people have",
}


class Budget:
    """A pytest plugin that adds up the seconds of each area."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        module = report.nodeid.split("::")[0].rsplit("/", 1)[-1].removesuffix(".py")
        self.seconds[AREAS.get(module, "the rest")] += report.duration

    def over(self) -> list[str]:
        return [
            f"{area}: {spent:.0f} s of tests, more than its {SECONDS[area]} s"
            for area, spent in self.seconds.items()
            if spent > SECONDS[area]
        ]

    def pytest_terminal_summary(self, terminalreporter):
        for area, spent in sorted(self.seconds.items()):
            terminalreporter.write_line(f"{area}: {spent:.0f} s of {SECONDS[area]}")
        for line in self.over():
            terminalreporter.write_line(f"OVER BUDGET {line}", red=True)

    def pytest_sessionfinish(self, session):
        if self.over() and not session.exitstatus:
            session.exitstatus = 1
