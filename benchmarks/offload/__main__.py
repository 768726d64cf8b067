"""Activation offload: bytes on device, host and disk, attention forwards, and step times.

    python -m benchmarks.offload [part ...]

Parts are waiting, tiers, attention and packing; default: all. The exit status is non-zero if a target is missed.
"""

import sys

from benchmarks.figures import Part, report
from benchmarks.offload import attention, packing, tiers, waiting

PARTS = {
    module.__name__.rsplit(".", 1)[-1]: Part(module.rows, caption=module.__doc__.split("\n\n", 1)[-1])
    for module in (waiting, tiers, attention, packing)
}

if __name__ == "__main__":
    sys.exit(report(__doc__, PARTS))
