"""Entry point of ``python -m deepspeed_alst``: the same as ``ds_alst``, for a checkout that is not installed."""

import sys

from deepspeed_alst.cli.main import main

sys.exit(main())
