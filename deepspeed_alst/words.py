"""How this package says numbers to people."""


def in_words(num_bytes: float, digits: int = 2, step: int = 1024) -> str:
    """Bytes in the largest unit that leaves a number of one or more.

    Args:
        num_bytes: how many.
        digits: behind the point.
        step: 1024 for memory (KiB, MiB, GiB), 1000 for what is sent (kB, MB, GB).
    """
    units = ("bytes", "kB", "MB", "GB") if step == 1000 else ("bytes", "KiB", "MiB", "GiB")
    power = next((power for power in (3, 2, 1) if num_bytes >= step**power), 0)
    return f"{num_bytes / step**power:,.{digits}f} {units[power]}"
