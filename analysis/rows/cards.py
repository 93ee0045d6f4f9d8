"""What a card is called on a page: the same name wherever it stands, by its UUID as `nvidia-smi -L` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

KINDS = ("GPU", "MIG")
UUID_LENGTH = 8


def short_names(device_ids: Iterable[str]) -> dict[str, str]:
    """Return a name for each card: `GPU 1160ada8`, the first eight digits of its UUID.

    An id that is no UUID (`host`, `SIM-3`) stays as it is, and one that begins as another's does.

    Example:
        >>> short_names(["GPU-1160ada8-5c4f-11ee", "host"])
        {'GPU-1160ada8-5c4f-11ee': 'GPU 1160ada8', 'host': 'host'}
    """
    short = {device_id: _short(device_id) for device_id in device_ids}
    bearers = Counter(short.values())
    return {device_id: name if bearers[name] == 1 else device_id for device_id, name in short.items()}


def _short(device_id: str) -> str:
    kind, _, uuid = device_id.partition("-")
    return f"{kind} {uuid[:UUID_LENGTH]}" if kind in KINDS else device_id
