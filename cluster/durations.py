"""Lengths of time as people write them: 90s, 30m, 4h, 2d, 1h30m."""

import re

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_WHOLE = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(text: str) -> float:
    """Seconds. Raises ValueError for anything else than a positive length in d, h, m and s, in this order."""
    found = _WHOLE.fullmatch(text.strip())
    seconds = sum(int(number or 0) * unit for number, unit in zip(found.groups(), _UNITS.values(), strict=True)) if found else 0.0
    if seconds <= 0:
        raise ValueError(f"{text!r} is no length of time such as 90s, 30m, 4h or 1h30m")
    return seconds


def short_duration(seconds: float) -> str:
    """About so long, in one unit: `40 s`, `5 min`, `2.5 h`."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
