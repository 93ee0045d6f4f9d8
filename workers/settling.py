"""When a reading of the cards' memory counts: only once it stands still. Blocking.

Used by `workers.session` and `workers.measuring`.
"""

from __future__ import annotations

import time

from workers.devices.base import Device

SETTLED_BYTES = 2**20
SETTLED_READINGS = 3
SETTLE_LIMIT_S = 5.0


def settled_memory(device: Device, pid: int | None) -> list[int]:
    """Read each card's memory until three readings in a row agree within 1 MiB, five seconds at the most.

    Raises `CardLost`.
    """
    readings = [device.memory_by_card(pid)]
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        readings.append(device.memory_by_card(pid))
        last = [sum(reading) for reading in readings[-SETTLED_READINGS:]]
        if len(last) == SETTLED_READINGS and max(last) - min(last) <= SETTLED_BYTES:
            break
    return readings[-1]
