"""Cards as NVML shows them, on a pretended NVML: names, slices, what is not offered, and what a process may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cluster.nodes import _node_of_cards
from orchestrator.fleet import NoRoom, local_fleet
from orchestrator.plan import make_plan
from tests.configs import experiment, resolved
from workers import node_report, processes
from workers.devices import open_device
from workers.devices.base import CardLost
from workers.devices.nvml import NoSuchCard, NvmlDevice, kinds_of_cards, throttle_reasons, visible_cards
from workers.launch.workspace import Workspace

GIB = 2**30
PID = os.getpid()
FIRST, SECOND, THIRD = "GPU-8932f937-d72c-4106", "GPU-8932aaaa-0000-4107", "GPU-1f00ba42-0000-4108"
SLICE = "MIG-5a6b7c8d-1111-2222"


@dataclass
class Chip:
    """What one handle stands for: a card, or a slice of one."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 80 * GIB
    used: int = 2 * GIB
    reserved: int = GIB
    refused: tuple[str, ...] = ()
    """Functions that NVML does not offer for it."""
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    slices: list[tuple[int, int, Chip]] = field(default_factory=list)
    """A card that is split (MIG): its slices by GPU instance and compute instance."""


class PretendedNvml:
    """As much of `pynvml` as is used. Every question outside init and shutdown is an error, as it is in NVML."""

    class NVMLError(Exception):
        def __init__(self, said: object, value: int = 0) -> None:
            super().__init__(said)
            self.value = value

    nvmlMemory_v2 = 0x02000028  # noqa: N815
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25

    def __init__(self, cards: list[Chip], driver: bool, memory_v2: bool) -> None:
        self._cards, self._driver, self._memory_v2 = cards, driver, memory_v2
        self._slices = [found for card in cards for _, _, found in card.slices]
        self.opened = 0
        self.lost: Chip | None = None
        """Its memory is not to be read by version 2 for now."""

    def nvmlInit(self) -> None:  # noqa: N802
        if not self._driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._ask()
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self._ask()
        return "570.86.15"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._ask()
        return len(self._cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Chip:  # noqa: N802
        self._ask()
        if index >= len(self._cards):
            raise self.NVMLError("Invalid Argument")
        return self._cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Chip:  # noqa: N802
        self._ask()
        for chip in self._cards + self._slices:
            if chip.uuid == uuid:
                return chip
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetUUID(self, chip: Chip) -> str:  # noqa: N802
        self._ask(chip, "UUID")
        return chip.uuid

    def nvmlDeviceGetName(self, chip: Chip) -> bytes:  # noqa: N802
        self._ask(chip, "Name")
        return chip.name.encode()  # older bindings answer in bytes

    def nvmlDeviceGetMemoryInfo(self, chip: Chip, version: int | None = None) -> SimpleNamespace:  # noqa: N802
        self._ask(chip, "MemoryInfo")
        if version is None:
            return SimpleNamespace(total=chip.total, used=chip.used + chip.reserved)
        if not self._memory_v2:
            raise self.NVMLError("Function Not Found", self.NVML_ERROR_FUNCTION_NOT_FOUND)
        if chip is self.lost:
            raise self.NVMLError("GPU is lost", self.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(total=chip.total, used=chip.used, reserved=chip.reserved)

    def nvmlDeviceGetUtilizationRates(self, chip: Chip) -> SimpleNamespace:  # noqa: N802
        self._ask(chip, "UtilizationRates")
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetPowerUsage(self, chip: Chip) -> int:  # noqa: N802
        self._ask(chip, "PowerUsage")
        return 512_500

    def nvmlDeviceGetClockInfo(self, chip: Chip, kind: int) -> int:  # noqa: N802
        self._ask(chip, "ClockInfo")
        return {self.NVML_CLOCK_SM: 1980}[kind]

    def nvmlDeviceGetTemperature(self, chip: Chip, sensor: int) -> int:  # noqa: N802
        self._ask(chip, "Temperature")
        return {self.NVML_TEMPERATURE_GPU: 61}[sensor]

    def nvmlDeviceGetTotalEnergyConsumption(self, chip: Chip) -> int:  # noqa: N802
        self._ask(chip, "TotalEnergyConsumption")
        return 4_406_427

    def nvmlDeviceGetCurrentClocksEventReasons(self, chip: Chip) -> int:  # noqa: N802
        self._ask(chip, "CurrentClocksEventReasons")
        return 0x1 | 0x4 | 0x40

    def nvmlDeviceGetEnforcedPowerLimit(self, chip: Chip) -> int:  # noqa: N802
        self._ask(chip, "EnforcedPowerLimit")
        return 700_000

    def nvmlDeviceGetMigMode(self, chip: Chip) -> list[int]:  # noqa: N802
        self._ask(chip, "MigMode")
        return [int(bool(chip.slices))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, chip: Chip) -> int:  # noqa: N802
        self._ask(chip, "MaxMigDeviceCount")
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, chip: Chip, index: int) -> Chip:  # noqa: N802
        self._ask(chip)
        if index >= len(chip.slices):
            raise self.NVMLError("Not Found")
        return chip.slices[index][2]

    def nvmlDeviceGetGpuInstanceId(self, chip: Chip) -> int:  # noqa: N802
        return next(gi for card in self._cards for gi, _, found in card.slices if found is chip)

    def nvmlDeviceGetComputeInstanceId(self, chip: Chip) -> int:  # noqa: N802
        return next(ci for card in self._cards for _, ci, found in card.slices if found is chip)

    def nvmlDeviceGetComputeRunningProcesses(self, chip: Chip) -> list[SimpleNamespace]:  # noqa: N802
        self._ask(chip, "ComputeRunningProcesses")
        return [SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in chip.processes]

    def _ask(self, chip: Chip | None = None, function: str = "") -> None:
        if not self.opened:
            raise self.NVMLError("Uninitialized")
        if chip is not None and function in chip.refused:
            raise self.NVMLError("Not Supported", self.NVML_ERROR_NOT_SUPPORTED)


Made = Callable[..., PretendedNvml]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Return what puts a node with these cards in the place of this host's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*cards: Chip, driver: bool = True, memory_v2: bool = True) -> Any:
        pretended = PretendedNvml(list(cards), driver, memory_v2)
        monkeypatch.setitem(sys.modules, "pynvml", pretended)
        return pretended

    return put


@pytest.fixture
def three(nvml: Made) -> PretendedNvml:
    return nvml(Chip(FIRST), Chip(SECOND), Chip(THIRD, "NVIDIA A100", 40 * GIB, 3 * GIB))


def test_cards_that_nvml_does_not_give_make_a_device_that_says_so(nvml: Made, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    pretended = nvml(Chip(FIRST), Chip(SECOND, refused=("UUID",)))
    assert [card.id for card in open_device("cuda", ["0"], workspace).cards] == [FIRST]
    for names in (["7"], ["0", "1"]):  # not there any more; there, but off the bus
        device = open_device("cuda", names, workspace)
        assert (device.cards, device.sample(None), device.processes(None)) == ([], [], [])
        with pytest.raises(CardLost, match=rf"^NVML does not give the session its cards \({', '.join(names)}\): "):
            device.memory_by_card(None)
        device.close()
    assert pretended.opened == 1  # what could not be opened has let go of NVML
    nvml(driver=False)
    with pytest.raises(CardLost, match="NVML Shared Library Not Found"):
        open_device("cuda", ["0"], workspace).memory_by_card(None)


NOT_OF_A_SLICE = (
    "UtilizationRates", "PowerUsage", "ClockInfo", "Temperature", "TotalEnergyConsumption",
    "CurrentClocksEventReasons", "EnforcedPowerLimit", "MigMode",
)  # fmt: skip


def mig_slice(uuid: str = SLICE) -> Chip:
    return Chip(uuid, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", total=10 * GIB, used=GIB // 2, refused=NOT_OF_A_SLICE)


def split() -> Chip:
    return Chip(FIRST, slices=[(7, 0, mig_slice()), (9, 0, mig_slice("MIG-other"))])


def test_the_pretended_functions_are_those_of_the_real_binding() -> None:
    import pynvml

    missing = [name for name in vars(PretendedNvml) if not name.startswith("_") and not hasattr(pynvml, name)]
    assert missing == []


# --- which cards ---


@pytest.mark.parametrize(
    ("visible", "cards"),
    [
        (["0", "1", "2"], [FIRST, SECOND, THIRD]),
        (["2", "0"], [THIRD, FIRST]),
        (["1"], [SECOND]),
        ([SECOND, FIRST], [SECOND, FIRST]),
        (["GPU-8932f937"], [FIRST]),
        (["GPU-1", "GPU-8932a"], [THIRD, SECOND]),
        (["GPU-1f", "0", SECOND], [THIRD, FIRST, SECOND]),
        ([], []),
    ],
)
def test_cards_are_those_that_are_named_in_that_order(
    three: PretendedNvml, visible: list[str], cards: list[str]
) -> None:
    device = NvmlDevice(visible)
    assert [card.id for card in device.cards] == cards
    assert [row.device_id for row in device.sample(None)] == cards
    device.close()
    assert three.opened == 0


def test_a_card_has_its_own_name_and_all_of_its_memory(three: PretendedNvml) -> None:
    device = NvmlDevice(["2"])
    assert [(card.name, card.memory_bytes) for card in device.cards] == [("NVIDIA A100", 40 * GIB)]
    assert device.driver_version == "570.86.15"


@pytest.mark.parametrize("name", ["3", "-2", "GPU-deadbeef", "MIG-5a6b", "nonsense"])
def test_a_card_that_is_not_there_is_named_in_the_message(three: PretendedNvml, name: str) -> None:
    with pytest.raises(NoSuchCard, match=rf"CUDA_VISIBLE_DEVICES names '{name}', but this node has no such GPU \("):
        NvmlDevice(["0", name])
    assert three.opened == 0, "NVML is let go of where a device cannot be made"


def test_the_beginning_of_two_uuids_names_no_card(three: PretendedNvml) -> None:
    with pytest.raises(NoSuchCard, match="names 'GPU-8932', but the UUIDs of 2 GPUs begin so"):
        NvmlDevice(["GPU-8932"])


@pytest.mark.parametrize(
    ("visible", "twice"),
    [
        (["0", "0"], "GPU-8932f937-d72c-4106 twice, as '0' and as '0'"),
        (["1", "0", FIRST], f"{FIRST} twice, as '0' and as '{FIRST}'"),
        (["GPU-8932f", "2", "0"], f"{FIRST} twice, as 'GPU-8932f' and as '0'"),
    ],
)
def test_one_card_named_twice_is_not_two(
    three: PretendedNvml, monkeypatch: pytest.MonkeyPatch, visible: list[str], twice: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(visible))
    for make in (visible_cards, lambda: NvmlDevice(visible)):
        with pytest.raises(NoSuchCard, match=f"CUDA_VISIBLE_DEVICES names {twice}"):
            make()
    assert three.opened == 0


# --- what is read ---


def test_memory_is_that_of_each_card_that_is_named(three: PretendedNvml) -> None:
    assert NvmlDevice(["0", "2"]).memory_by_card(None) == [2 * GIB, 3 * GIB]
    assert NvmlDevice(["1"]).memory_by_card(None) == [2 * GIB]


def test_the_drivers_reserve_is_counted_only_where_nvml_cannot_leave_it_out(nvml: Made) -> None:
    nvml(Chip(FIRST), memory_v2=False)
    device = NvmlDevice(["0"])
    assert device.memory_by_card(None) == [device.sample(None)[0].memory_used_bytes] == [3 * GIB]


def test_a_read_that_fails_is_no_reading_by_the_version_that_counts_the_reserve(nvml: Made) -> None:
    first, second = Chip(FIRST), Chip(SECOND)
    pretended = nvml(first, second)
    device = NvmlDevice(["0", "1"])
    pretended.lost = second
    with pytest.raises(CardLost, match=f"NVML does not read {SECOND} any more: GPU is lost"):
        device.memory_by_card(None)
    assert [row.memory_used_bytes for row in device.sample(None)] == [2 * GIB, None]
    pretended.lost = None
    assert device.memory_by_card(None) == [2 * GIB, 2 * GIB]


def test_a_card_that_cannot_be_read_as_a_device_is_made_is_not_read_by_the_other_version(nvml: Made) -> None:
    card = Chip(FIRST)
    pretended = nvml(card)
    pretended.lost = card
    with pytest.raises(PretendedNvml.NVMLError, match="GPU is lost"):
        NvmlDevice(["0"])
    assert pretended.opened == 0


def test_a_binding_without_the_second_memory_call_is_read_by_the_first(
    nvml: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml(Chip(FIRST))
    monkeypatch.delattr(PretendedNvml, "nvmlMemory_v2")
    assert NvmlDevice(["0"]).memory_by_card(None) == [3 * GIB]


def test_a_sample_has_watts_percent_megahertz_degrees_and_joules(three: PretendedNvml) -> None:
    (row,) = NvmlDevice(["0"]).sample(None)
    assert (row.t_s, row.device_id, row.memory_used_bytes) == (0.0, FIRST, 2 * GIB)
    assert (row.utilization_pct, row.power_w, row.sm_clock_mhz, row.temperature_c) == (97.0, 512.5, 1980, 61)
    assert (row.energy_j, row.clock_event_reasons) == (4406.427, 0x45)
    assert NvmlDevice(["0"]).cards[0].power_limit_w == 700.0


@pytest.mark.parametrize(
    ("function", "column"),
    [
        ("UtilizationRates", "utilization_pct"),
        ("PowerUsage", "power_w"),
        ("ClockInfo", "sm_clock_mhz"),
        ("Temperature", "temperature_c"),
        ("TotalEnergyConsumption", "energy_j"),
        ("CurrentClocksEventReasons", "clock_event_reasons"),
    ],
)
def test_what_one_card_does_not_offer_is_none_and_the_rest_is_there(nvml: Made, function: str, column: str) -> None:
    nvml(Chip(FIRST, refused=(function,)), Chip(SECOND))
    without, whole = NvmlDevice(["0", "1"]).sample(None)
    assert getattr(without, column) is None
    assert [getattr(without, column.name) for column in fields(without)].count(None) == 1
    assert getattr(whole, column) is not None


def test_a_card_that_is_lost_while_it_is_watched_leaves_a_sample_without_figures(nvml: Made) -> None:
    card = Chip(FIRST)
    nvml(card, Chip(SECOND))
    device = NvmlDevice(["0", "1"])
    card.refused = ("MemoryInfo", "UtilizationRates", "PowerUsage", "ClockInfo", "Temperature")
    lost, other = device.sample(None)
    assert (lost.memory_used_bytes, lost.utilization_pct, lost.power_w) == (None, None, None)
    assert other.memory_used_bytes == 2 * GIB


def test_a_mig_slice_has_its_own_memory_and_none_of_the_cards_power(nvml: Made) -> None:
    nvml(split())
    device = NvmlDevice([SLICE])
    (card,), (row,) = device.cards, device.sample(None)
    assert (card.id, card.name, card.memory_bytes) == (SLICE, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * GIB)
    assert [row.memory_used_bytes] == device.memory_by_card(None) == [GIB // 2]
    assert (row.utilization_pct, row.power_w, row.sm_clock_mhz, row.temperature_c) == (None, None, None, None)


# --- whose processes ---


def test_ours_are_the_processes_in_the_servers_tree(nvml: Made) -> None:
    nvml(Chip(FIRST, processes=[(PID, GIB), (999_999_999, 3 * GIB)]), Chip(SECOND, processes=[(999_999_998, None)]))
    device = NvmlDevice(["0", "1"])
    seen = [(found.device_id, found.pid, found.memory_bytes, found.ours) for found in device.processes(PID)]
    assert seen == [
        (FIRST, PID, GIB, True),
        (FIRST, 999_999_999, 3 * GIB, False),
        (SECOND, 999_999_998, None, False),
    ]
    assert not any(found.ours for found in device.processes(None))


def test_a_process_that_is_forked_between_two_readings_is_ours(nvml: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the server forked a worker while NVML was being asked: a tree that was read before would not have it."""
    chip = Chip(FIRST, processes=[(PID, GIB)])
    pretended = nvml(chip)
    tree, child = [PID], 999_999_999

    def asked(handle: Chip) -> list[SimpleNamespace]:
        tree.append(child)
        chip.processes.append((child, GIB))
        return [SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in handle.processes]

    monkeypatch.setattr(pretended, "nvmlDeviceGetComputeRunningProcesses", asked)
    monkeypatch.setattr(processes, "tree", lambda _: list(tree))
    assert [(found.pid, found.ours) for found in NvmlDevice(["0"]).processes(PID)] == [(PID, True), (child, True)]


def test_a_card_that_does_not_tell_its_processes_has_none(nvml: Made) -> None:
    nvml(Chip(FIRST, refused=("ComputeRunningProcesses",)), Chip(SECOND, processes=[(999_999_999, GIB)]))
    device = NvmlDevice(["0", "1"])
    assert [found.device_id for found in device.processes(None)] == [SECOND]


# --- what a node says before a run ---


def test_a_node_names_its_cards_and_who_else_is_on_those_that_count(
    nvml: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_report, "CLEAN_LIMIT_S", 0.0)
    nvml(Chip(FIRST), Chip(SECOND, processes=[(999_999_999, GIB)]))
    every, first, none = (node_report.look((), most) for most in (None, 1, 0))
    assert every.gpu_names == ("NVIDIA H100 80GB HBM3",) * 2
    assert every.foreign_processes == (f"pid 999999999 on {SECOND}: 1024 MiB",)
    assert (len(first.gpu_names), first.foreign_processes) == (1, ())
    assert (none.gpu_names, none.foreign_processes) == ((), ())


def test_a_process_that_is_just_ending_is_waited_for(nvml: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip(FIRST, processes=[(999_999_999, GIB)])
    nvml(chip)
    monkeypatch.setattr(node_report.time, "sleep", lambda _: chip.processes.clear())
    assert node_report.look().foreign_processes == ()


# --- what this process may use ---


@pytest.mark.parametrize(
    ("value", "cards"),
    [
        (None, [FIRST, SECOND, THIRD]),
        ("1,0", [SECOND, FIRST]),
        (" 2 , GPU-8932f ", [THIRD, FIRST]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [FIRST]),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_decides_what_this_process_may_use(
    three: PretendedNvml, monkeypatch: pytest.MonkeyPatch, value: str | None, cards: list[str]
) -> None:
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert [card.id for card in visible_cards()] == cards
    assert three.opened == 0


def test_a_node_knows_of_cards_of_another_kind_that_this_run_may_not_use(
    three: PretendedNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("NVIDIA A100", "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(node_report, "CLEAN_LIMIT_S", 0.0)
    asked = experiment("kv")
    (here,) = local_fleet(asked.cluster, asked.engine).nodes
    there = _node_of_cards({"NodeID": "n", "Resources": {"GPU": 2}}, node_report.look())
    assert (here.gpu_name, here.all_kinds) == (there.gpu_name, there.all_kinds) == (kinds[1], kinds)
    assert three.opened == 0


def test_a_lost_card_is_of_no_kind_and_a_host_without_a_driver_has_none(nvml: Made) -> None:
    made = nvml(Chip(FIRST, "NVIDIA A100", refused=("Name",)), Chip(SECOND))
    assert kinds_of_cards() == ("NVIDIA H100 80GB HBM3",)
    assert made.opened == 0
    nvml(driver=False)
    assert kinds_of_cards() == ()


def test_an_unknown_card_in_cuda_visible_devices_is_an_error_in_words(
    three: PretendedNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    with pytest.raises(NoSuchCard, match="names '7', but this node has no such GPU"):
        visible_cards()
    assert three.opened == 0


def test_a_card_that_nobody_has_named_and_nvml_does_not_read_is_said_with_what_leaves_it_out(nvml: Made) -> None:
    made = nvml(Chip(FIRST), Chip(SECOND, refused=("MemoryInfo",)), Chip(THIRD))
    with pytest.raises(NoSuchCard) as refused:
        visible_cards()
    words = "NVML does not read card 1 (Not Supported): leave it out with CUDA_VISIBLE_DEVICES=0,2"
    assert str(refused.value) == words
    asked = experiment("kv")
    with pytest.raises(NoRoom) as no_room:
        local_fleet(asked.cluster, asked.engine)
    assert str(no_room.value) == f"{words}; engine.device=cpu needs none"
    assert made.opened == 0
    nvml(Chip(FIRST, refused=("MemoryInfo",)))
    with pytest.raises(NoSuchCard, match=r"does not read card 0 \(Not Supported\)$"):
        visible_cards()


@pytest.mark.parametrize("value", [None, "", "-1", "-1,0", "NoDevFiles"])
def test_a_host_without_a_driver_has_no_cards(nvml: Made, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    nvml(driver=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_cards() == []


@pytest.mark.parametrize("value", ["0", "7", FIRST])
def test_a_card_that_is_named_where_there_is_no_driver_is_an_error_in_words(
    nvml: Made, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    nvml(driver=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(NoSuchCard, match=f"names '{value}', but this node has no NVML .NVML Shared Library Not Found"):
        visible_cards()


def test_a_split_card_is_its_first_slice_until_its_slices_are_named(
    nvml: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml(split(), Chip(SECOND))
    assert [card.id for card in visible_cards()] == [SLICE, SECOND]
    for name in ("0", FIRST, "GPU-8932f"):
        assert [card.id for card in NvmlDevice([name]).cards] == [SLICE]
    with pytest.raises(NoSuchCard, match=f"names {SLICE} twice, as '0' and as '{SLICE}'"):
        NvmlDevice(["0", SLICE])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-other,{SLICE}")
    assert [(card.id, card.memory_bytes) for card in visible_cards()] == [("MIG-other", 10 * GIB), (SLICE, 10 * GIB)]


def test_a_slice_is_found_by_its_card_and_instances_too(nvml: Made) -> None:
    nvml(split())
    assert [card.id for card in NvmlDevice([f"MIG-{FIRST}/9/0"]).cards] == ["MIG-other"]
    with pytest.raises(NoSuchCard, match="no such GPU"):
        NvmlDevice([f"MIG-{FIRST}/8/0"])


def test_a_server_has_one_slice_of_a_card_and_no_more(nvml: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(split())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-other,{SLICE}")
    alone, spread = experiment("kv"), experiment("kv", server__tensor_parallel_size=2)
    fleet = local_fleet(spread.cluster, spread.engine)
    assert make_plan(resolved(alone), fleet).sessions
    with pytest.raises(NoRoom, match=r"server\.tensor_parallel_size=2, but the GPUs are slices of cards \(MIG\)"):
        make_plan(resolved(spread), fleet)
    there = _node_of_cards({"NodeID": "n", "Resources": {"GPU": 2}}, node_report.look())
    assert there.slices
    nvml(Chip(FIRST), Chip(SECOND))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert make_plan(resolved(spread), local_fleet(spread.cluster, spread.engine)).sessions


def test_what_holds_a_clock_down_is_said_in_words() -> None:
    assert throttle_reasons(0x1 | 0x2) == []
    assert throttle_reasons(0x1 | 0x4 | 0x40) == ["power cap", "heat, by hardware"]
