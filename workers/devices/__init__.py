"""What memory, utilisation and power are read from: NVML, the host, or the simulator's pretended cards."""

from __future__ import annotations

from workers.devices.base import Device
from workers.launch.workspace import Workspace


def open_device(kind: str, visible: list[str], workspace: Workspace) -> Device:
    """Return the device of one session: `cuda`, `cpu` or `sim` on the cards that `visible` names."""
    if kind == "cuda":
        from workers.devices.nvml import NvmlDevice

        return NvmlDevice(visible)
    if kind == "sim":
        from workers.devices.sim import SimDevice

        return SimDevice(visible, workspace.sim_state)
    from workers.devices.host import HostDevice

    return HostDevice()
