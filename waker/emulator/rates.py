"""How often an action may be asked for: token buckets, with the time as an argument."""

__all__ = ["Rates"]


class Rates:
    """One bucket for each key: *burst* tokens at first, and *per_s* more each second up to that."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}

    def take(self, action: str, who: str, now: float, *, per_s: float, burst: float) -> bool:
        """Take one token for *action* on *who*; False if there is none."""
        tokens, at = self._buckets.get((action, who), (burst, now))
        tokens = min(burst, tokens + (now - at) * per_s)
        granted = tokens >= 1
        self._buckets[action, who] = (tokens - granted, now)
        return granted
