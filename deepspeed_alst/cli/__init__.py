"""Command line of the package: ``ds_alst <command>``, or ``python -m deepspeed_alst <command>``."""
