"""Sizes and time spans in the units in which people read them."""

__all__ = ["human_bytes", "human_seconds"]


def human_bytes(count: int) -> str:
    """Return a number of bytes for reading.

    Example:
        >>> human_bytes(999), human_bytes(153_600_000)
        ('999 B', '153.6 MB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Return a time span for reading.

    Example:
        >>> human_seconds(0.42), human_seconds(75), human_seconds(7_260)
        ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
