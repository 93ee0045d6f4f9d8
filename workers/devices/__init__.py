"""What memory, utilisation and power are read from: NVML, the host, or the simulator's pretended cards."""

from __future__ import annotations

from workers.devices.base import Device, LostDevice
from workers.launch.workspace import Workspace


def open_device(kind: str, visible: list[str], workspace: Workspace) -> Device:
    """Return the device of one session: `cuda`, `cpu` or `sim` on the cards that `visible` names.

    Cards that NVML does not give make a `LostDevice`: a session on them says so, and can hold them.
    """
    if kind == "cuda":
        from pynvml import NVMLError

        from workers.devices.nvml import NoSuchCard, NvmlDevice

        try:
            return NvmlDevice(visible)
        except (NoSuchCard, NVMLError) as error:
            return LostDevice(f"NVML does not give the session its cards ({', '.join(visible)}): {error}")
    if kind == "sim":
        from workers.devices.sim import SimDevice

        return SimDevice(visible, workspace.sim_state)
    from workers.devices.host import HostDevice

    return HostDevice()
