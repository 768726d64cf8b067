"""CPUs near a device: host memory that they touch first is allocated on their NUMA node."""

from pathlib import Path
from typing import Any


def cpus_near(address: str, sysfs: Path = Path("/sys")) -> frozenset[int]:
    """Return the CPUs of a PCI device's NUMA node; empty if there is one node only or it is unknown.

    Args:
        address: PCI address, such as ``0000:1b:00.0``.
        sysfs: root of the kernel's sysfs.
    """
    nodes = sysfs / "devices/system/node"
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
        num_nodes = sum(1 for each in nodes.iterdir() if each.name.startswith("node"))
        if node < 0 or num_nodes < 2:
            return frozenset()
        return frozenset(_parse((nodes / f"node{node}" / "cpulist").read_text()))
    except (OSError, ValueError):
        return frozenset()


def pci_address(properties: Any) -> str:
    """Return the PCI address from the device properties of ``torch.cuda.get_device_properties``."""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def _parse(ranges: str) -> list[int]:
    """Parse a CPU list: ``0-3,8`` is 0, 1, 2, 3, 8."""
    found = []
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
