"""The account of a server's memory: what its workers' allocators hold, against what its cards say. Blocking calls.

Used by `workers.session` and `workers.measuring`. The parts of the allocator, and what is outside it, come from
`engines/inside/vllm_memory.py` in the workers. What is outside is read from the cards, too, when at the server's end
its workers give back all that they hold.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from contract.rows import MemoryAccount
from workers import probe
from workers.devices.base import Device
from workers.load.endpoint import Endpoint

RPC_LIMIT_S = 45.0
EMPTIED_BYTES = 16 * 2**20
"""The card shows what is outside the allocator only once that holds no more than this; its figure is taken off."""


class ServerAccount:
    """One server's account. `rows` grow as its life goes on; a step whose answer does not come adds nothing."""

    def __init__(self, device: Device, endpoint: Endpoint, baseline: list[int], contexts: list[int | None]) -> None:
        self.rows: list[MemoryAccount] = []
        self._device, self._endpoint = device, endpoint
        self._baseline, self._contexts = baseline, contexts
        self._highest = list(baseline)

    @property
    def of_cards(self) -> bool:
        """Whether the workers have answered for memory of cards, so that they can be asked again."""
        return any(row.used_bytes is not None for row in self.rows)

    def at(self, moment: str, used: list[int]) -> None:
        """Enter the allocators' parts beside `used`, the cards' memory at that moment (`ready` or `loaded`)."""
        self._saw(used)
        self._enter(moment, used)

    def saw(self, peak: dict[str, int]) -> None:
        """Remember what each card held at the highest moment of a point, if it is the highest so far."""
        self._saw([peak.get(card.id, 0) for card in self._device.cards])

    def settle(self, pid: int) -> None:
        """Enter the peak, then let the workers give everything back and enter what the cards still hold.

        The server must not be asked anything afterwards.
        """
        self._saw(self._device.memory_by_card(pid))
        self._enter("peak", self._highest)
        held = {at: answer.get("reserved") for at, answer in self._asked("give_back_memory").items()}
        used = self._device.memory_by_card(pid)
        places = [card.id for card in self._device.cards]
        for row in self.rows:
            at = places.index(row.device_id)
            left = held.get(at)
            if left is not None and left <= EMPTIED_BYTES:
                row.outside_bytes = used[at] - left - self._baseline[at]

    def _saw(self, used: list[int]) -> None:
        self._highest = max(self._highest, used, key=sum)

    def _enter(self, moment: str, used: list[int]) -> None:
        answers = self._asked("account_memory")
        if answers:  # a point that is measured again has its moment again
            self.rows[:] = [row for row in self.rows if row.moment != moment]
        for at, parts in answers.items():
            on_card = "reserved" in parts
            self.rows.append(
                MemoryAccount(
                    moment,
                    self._device.cards[at].id,
                    used_bytes=used[at] - self._baseline[at] if on_card else None,
                    weights_bytes=parts.get("weights"),
                    kv_bytes=parts.get("kv"),
                    graph_pool_bytes=parts.get("graphs"),
                    buffer_bytes=parts.get("buffers"),
                    cached_bytes=parts.get("cached"),
                    context_bytes=self._contexts[at] if on_card else None,
                    outside_now_bytes=parts.get("outside"),
                    outside_at_init_bytes=parts.get("outside_at_init"),
                )
            )

    def _asked(self, method: str) -> dict[int, dict[str, Any]]:
        """Call a method in every worker; return the answers by the place of its card."""
        with contextlib.suppress(probe.NoAnswer, ValueError, KeyError, TypeError, AttributeError):
            status, text = probe.post(self._endpoint, "/collective_rpc", {"method": method}, RPC_LIMIT_S)
            if status == 200:
                return self._placed(json.loads(text)["results"])
        return {}

    def _placed(self, answers: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """vLLM's ranks use the visible cards in order; where a worker names its card, that counts."""
        places = {card.id.removeprefix("GPU-"): at for at, card in enumerate(self._device.cards)}
        return {places.get(str(answer.get("uuid")), rank): answer for rank, answer in enumerate(answers[: len(places)])}
