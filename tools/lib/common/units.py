"""Durations and sizes as people read them."""


def human_bytes(num: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num < 1000:
            return f"{num:.3g} {unit}" if unit != "bytes" else f"{num:.0f} bytes"
        num /= 1000
    return f"{num:,.3g} TB"


def human_seconds(seconds: float) -> str:
    """4000 -> '1 h 07 min'."""
    if 0 < seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
