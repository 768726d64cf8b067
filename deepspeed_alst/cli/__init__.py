"""The command line: ``ds_alst <command>``, or ``python -m deepspeed_alst <command>``."""
