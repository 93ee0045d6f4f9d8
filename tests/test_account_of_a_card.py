"""From what NVML and cudaMemGetInfo say of a card to the account on the page: what nobody tells is in the residual.

The card is made up and knows what is on it; the extension of vLLM's workers, the session's account and the analysis are
the real ones.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.memory.kv_account import Account, Accounts
from analysis.memory.kv_fit import kv_results
from contract.rows import MemoryAccount
from tests import synthetic_run as synthetic
from workers import engines, probe
from workers.account import ServerAccount
from workers.devices.base import Card
from workers.load.endpoint import Endpoint

MIB, GIB = 2**20, 2**30
TOTAL = 80 * GIB
CONTEXT, LIBRARIES = 527 * MIB, 158 * MIB
WEIGHTS, KV, CACHE = 0x1000_0000, 0x9000_0000, 0x7000_0000


@dataclass
class PretendedCard:
    """What is on a card, by who has it. `outside` is the server's, beside torch's allocator."""

    others: int = 0
    outside: int = 0
    torch: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """Size and liveness of torch's blocks, by address."""

    cards = (Card("GPU-aa", "H100", TOTAL),)

    @property
    def held(self) -> int:
        return sum(size for size, _ in self.torch.values())

    @property
    def used(self) -> int:
        return self.others + self.outside + self.held

    def memory_by_card(self, pid: int | None) -> list[int]:
        return [self.used]


class Tensor:
    """Of one storage at an address."""

    def __init__(self, address: int, size: int) -> None:
        self._storage = SimpleNamespace(data_ptr=lambda: address, nbytes=lambda: size)

    def untyped_storage(self) -> SimpleNamespace:
        return self._storage


def extension_on(card: PretendedCard) -> ModuleType:
    """Import the extension beside a torch whose card this is."""

    def snapshot() -> list[dict[str, Any]]:
        return [
            {
                "device": 0,
                "address": address,
                "blocks": [{"size": size, "state": "active_allocated" if live else "inactive"}],
            }
            for address, (size, live) in card.torch.items()
        ]

    cuda = SimpleNamespace(
        synchronize=lambda: None,
        memory_snapshot=snapshot,
        memory_reserved=lambda device: card.held,
        mem_get_info=lambda device: (TOTAL - card.used, TOTAL),
        get_device_properties=lambda device: SimpleNamespace(uuid="aa"),
    )
    spec = importlib.util.spec_from_file_location("vllm_memory", f"{engines.__path__[0]}/inside/vllm_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, torch=SimpleNamespace(cuda=cuda, Tensor=Tensor)):
        spec.loader.exec_module(module)
    return module


def worker_on(card: PretendedCard) -> Any:
    """Return vLLM's worker, with our methods, as it is when it has just looked at the card."""
    worker = extension_on(card).MemoryAccount()
    parameters = SimpleNamespace(parameters=lambda: iter([Tensor(WEIGHTS, 7 * GIB)]), buffers=lambda: iter([]))
    layers = {"layer": SimpleNamespace(kv_cache=[Tensor(KV, 9 * GIB)])}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    worker.device = SimpleNamespace(type="cuda", index=0)
    worker.model_runner = SimpleNamespace(get_model=lambda: parameters, vllm_config=config)
    worker.init_snapshot = SimpleNamespace(non_torch_memory=card.used - card.held)
    return worker


@dataclass(frozen=True)
class Life:
    """What comes to a card, and when; bytes."""

    there_before: int = 0
    """Of others, before the server."""
    others_at_start: int = 0
    """Of others, between the reading before the server and the engine's first look."""
    early: int = 0
    """Of the server, by its first look, beyond a bare context."""
    kernels: int = LIBRARIES
    """Of the server outside torch, since."""
    others_before_ready: int = 0
    others_before_loaded: int = 0
    libraries_told: int | None = LIBRARIES

    def accounts(self) -> dict[str, Account]:
        """Live it, and return what the analysis makes of it when ready, loaded and at peak."""
        card = PretendedCard(others=self.there_before)
        baseline = [card.used]
        card.others += self.others_at_start
        card.outside = CONTEXT + self.early
        worker = worker_on(card)

        def called(endpoint: Endpoint, path: str, body: dict[str, Any], timeout_s: float) -> tuple[int, str]:
            if body["method"] == "give_back_memory":
                card.torch.clear()
                return 200, json.dumps({"results": [{"reserved": 0}]})
            return 200, json.dumps({"results": [worker.account_memory()]})

        card.torch = {WEIGHTS: (7 * GIB, True), KV: (9 * GIB, True), CACHE: (210 * MIB, False)}
        card.outside += self.kernels
        card.others += self.others_before_ready
        account = ServerAccount(card, Endpoint("http://l", "m", uds="/s"), baseline, [CONTEXT])  # type: ignore[arg-type]
        with patch.object(probe, "post", called):
            account.at("ready", card.memory_by_card(1))
            card.others += self.others_before_loaded
            card.torch[CACHE] = (274 * MIB, False)
            account.at("loaded", card.memory_by_card(1))
            account.settle(1)
        return accounts_of(account.rows, self.libraries_told)


def accounts_of(rows: list[MemoryAccount], libraries: int | None) -> dict[str, Account]:
    row = replace(synthetic.committed_row(synthetic.GPU, 512), device_ids=["GPU-aa"])
    tables = synthetic.tables_of([row])
    session = replace(tables.sessions[0], account=rows, library_bytes=libraries)
    (result,) = kv_results(tables.points)
    (reading,) = result.readings
    found = {moment: Accounts([session]).at(reading, moment) for moment in ("ready", "loaded", "peak")}
    return {moment: account for moment, account in found.items() if account is not None}


def test_a_stranger_that_comes_after_the_first_look_is_in_the_residual() -> None:
    accounts = Life(kernels=230 * MIB, others_before_loaded=5 * GIB).accounts()
    assert accounts["ready"].residual == 72 * MIB
    assert accounts["ready"].share < 0.01
    assert accounts["loaded"].residual == accounts["peak"].residual == 72 * MIB + 5 * GIB
    assert accounts["loaded"].share > 0.2
    assert accounts["loaded"].since == 72 * MIB + 5 * GIB


@pytest.mark.parametrize("others", [0, GIB])
def test_what_comes_before_the_first_look_is_in_the_residual_and_in_what_the_first_look_checks(others: int) -> None:
    ready = Life(early=3 * MIB, kernels=230 * MIB, others_at_start=others).accounts()["ready"]
    assert ready.residual == 75 * MIB + others
    assert (ready.since, ready.neither) == (72 * MIB, 3 * MIB + others)


def test_a_split_of_torchs_allocator_that_loses_a_part_shows_in_the_residual() -> None:
    rows = [MemoryAccount("ready", "GPU-aa", 17 * GIB, weights_bytes=7 * GIB, kv_bytes=8 * GIB, context_bytes=CONTEXT)]
    assert accounts_of(rows, None)["ready"].residual == 2 * GIB - CONTEXT


sizes = st.integers(0, 4 * GIB)
lives = st.builds(
    Life,
    there_before=sizes,
    others_at_start=sizes,
    early=sizes,
    kernels=sizes,
    others_before_ready=sizes,
    others_before_loaded=sizes,
    libraries_told=st.none() | sizes,
)


@given(lives)
def test_whatever_comes_the_residual_is_what_nobody_tells_and_its_readings_add_up_to_it(life: Life) -> None:
    accounts = life.accounts()
    untold = life.others_at_start + life.early + life.kernels + life.others_before_ready - (life.libraries_told or 0)
    later = {"ready": 0, "loaded": life.others_before_loaded, "peak": life.others_before_loaded}
    assert accounts.keys() == later.keys()
    for moment, account in accounts.items():
        parts = {
            part: account.parts[part] for part in ("weights", "kv", "context", "libraries") if part in account.parts
        }
        told = {} if life.libraries_told is None else {"libraries": life.libraries_told}
        assert parts == {"weights": 7 * GIB, "kv": 9 * GIB, "context": CONTEXT, **told}
        assert account.residual == untold + later[moment]
        assert account.neither == life.others_at_start + life.early
        assert (account.with_graphs or 0) + (account.since or 0) + (account.neither or 0) == account.residual
        assert account.end_difference == life.others_before_loaded - later[moment]
