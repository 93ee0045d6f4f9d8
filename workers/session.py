"""One session: a server and the points measured on it. Verbs: start, measure(point), settle, stop.

Made by the driver's actor on the node that holds the cards, which lends it a way to run load. `stop` may be called from
another thread at any time. Failures come back as rows; what is raised is a defect of ours.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from contract.failures import FailureClass
from contract.rows import (
    CAME_TO_NOTHING,
    FAILED,
    MEASURED,
    SCHEMA_VERSION,
    Failure,
    PointRow,
    SessionEnd,
    SessionRow,
)
from contract.specs import Point, PointKind, SessionSpec, Start
from workers import (
    caches,
    kv_figures,
    point_rows,
    probe,
    processes,
    provenance,
)
from workers.account import ServerAccount
from workers.cores import free_cores
from workers.devices import open_device
from workers.devices.base import CardLost
from workers.devices.context_probe import context_bytes, library_bytes
from workers.engines import make_engine, vllm_log
from workers.engines.base import Address, inherited_environment
from workers.evidence import Evidence
from workers.kv_figures import KvFigures
from workers.launch import diagnosis, readiness, warm
from workers.launch.process import ServerProcess
from workers.launch.watch import StartLog, TreeWork
from workers.launch.workspace import Workspace
from workers.load import memory, tasks
from workers.load.endpoint import Endpoint, EndpointError
from workers.load.event_loop import client_versions
from workers.load.failed import LoadFailed
from workers.load.plan import LoadPlan, LoadResult
from workers.load_plans import LoadPlans
from workers.measuring import Measuring
from workers.models import cached_model_dir, write_model_dir
from workers.point_rows import Origin
from workers.provenance import Places
from workers.settling import settled_memory
from workers.strangers import Strangers

MIB = 2**20
FORKING_CAN_CAUSE = (
    FailureClass.NO_PROGRESS,
    FailureClass.READY_TIMEOUT,
    FailureClass.START_FAILED,
    FailureClass.ENGINE_DEAD,
    FailureClass.WRONG_SERVER,
    FailureClass.KV_TOO_SMALL,
    FailureClass.FREE_MEMORY_LOW,
    FailureClass.MEMORY_PROFILE,
    FailureClass.OUT_OF_MEMORY,
    FailureClass.GRAPH_MEMORY,
    FailureClass.CUDA_ERROR,
    FailureClass.CARD_FAILED,
)
"""The last eight are what a fork on the cards of others meets: its parent's import may have read which are visible. A
small utilization passes the look at free memory there, and weights, pool or graphs do not fit: a KV pool that is too
small for that would be a result, and never measured again."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
FIRST_COMPLETION_LIMIT_S = {Start.WARM: 120.0, Start.COLD: 600.0}
"""Of one token, by how the server was started. Kernels may be compiled for it, in minutes; a fork that is at it for
longer is only started cold."""
POOL_SHARE = 0.5
"""Of its KV pool, by which each card of a forked server must have grown: the pool is there in one piece, and there are
weights and a context beside it."""


class Session:
    """See the module. `generate` runs load plans on this node, all at once, and returns what each client saw."""

    def __init__(
        self,
        spec: SessionSpec,
        run_id: str,
        attempt: int,
        visible_devices: list[str],
        generate: Callable[[list[LoadPlan]], list[LoadResult]],
        omp_num_threads: str | None = None,
        warm_parent: Path | None = None,
        again: bool = False,
        no_warm_parent: str | None = None,
        first: bool = False,
    ) -> None:
        """`warm_parent` is the socket of the node's, where there is one, `no_warm_parent` why there is none; `again`:
        another start came to nothing; `first`: of a run on this node, so what is read once is read by it."""
        self.spec = spec
        self._warm_parent, self._no_warm_parent, self._again = warm_parent, no_warm_parent, again
        self._first = first
        self._reads_on = False
        """Whether its forked server was reading weights, and went on with it, at the last look."""
        self._generate = generate
        self._omp_num_threads = omp_num_threads
        self._stopping = threading.Event()
        self._hurried = threading.Event()
        self._lifecycle = threading.Lock()
        """Held while probes run, while a process is made and while it is ended, so that a stop never misses a start."""
        self._engine = make_engine(spec.engine)
        self._cache = caches.cache_root()
        self._workspace = Workspace.make()
        try:
            self._device = open_device(spec.device, visible_devices, self._workspace)
            self.row = self._first_row(run_id, attempt, visible_devices)
        except BaseException:
            self._workspace.remove()
            raise
        self._strangers = Strangers(self._device, self.row)
        self._evidence = Evidence(Places(self._workspace.root, self._cache))
        self._process: ServerProcess | None = None
        self._address = Address()
        self.model = ""
        self._endpoint: Endpoint | None = None
        self._origin = self._origin_with(KvFigures(), None)
        self._log_figures = vllm_log.LogFigures()
        self._settled = False
        self._baseline: list[int] = []
        """Of each card, before the server."""
        self._measuring: Measuring | None = None

    def _first_row(self, run_id: str, attempt: int, visible_devices: list[str]) -> SessionRow:
        versions = self._engine.versions()
        return SessionRow(
            schema_version=SCHEMA_VERSION,
            run_id=run_id,
            session_id=self.spec.id,
            attempt=attempt,
            status=MEASURED,
            simulated=self._engine.simulated,
            started_at=point_rows.utc(time.time()),
            node=socket.gethostname(),
            niceness=processes.niceness_reset(),
            visible_devices=visible_devices,
            device_ids=[card.id for card in self._device.cards],
            device_name=self._device.cards[0].name if self._device.cards else None,
            vllm_version=versions.vllm,
            torch_version=versions.torch,
            driver_version=self._device.driver_version,
            python_version=provenance.python_version(),
            load_client=client_versions(),
        )

    # --- start ---

    def start(self) -> SessionRow:
        """Start the server, prove that it answers, read its memory. The row's status says whether it did."""
        try:
            self._baseline = self._device.memory_by_card(None)
            self.row.mem_baseline_bytes = sum(self._baseline)
            self._strangers.look_before()
            self._launch()
        except readiness.StartFailed as error:
            self._fail(error.failure)
        except LoadFailed as error:
            message = f"the load of the first completion came to nothing: {error}"
            self._fail(Failure(error.failure_class, message, self._evidence.tail()))
        except CardLost as error:
            self._fail(Failure(FailureClass.CARD_LOST, str(error), self._evidence.tail()))
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in NO_SPACE
            failed = FailureClass.NO_SPACE if full else FailureClass.INTERNAL
            self._fail(Failure(failed, f"{type(error).__name__}: {error}", self._evidence.tail()))
        if self.row.status != MEASURED and self._process is not None and self._process.running:
            self._strangers.look(self._process.pid)  # while its own can be told from another's
        return self.row

    def _launch(self) -> None:
        with self._lifecycle:  # a stop ends the probes, and closes the device once they do not read it any more
            contexts = self._contexts()
            if self._first and self.spec.device == "cuda":
                name, stopped = self._names_for_cuda()[0], self._stopping.is_set
                self.row.library_bytes = library_bytes(name, partial(self._used, 0), stopped)
        self._serving(lambda made: self._prove(made, contexts))
        self.row.graph_capture_bytes = self._log_figures.graph_capture_bytes
        self.row.compiled = self._log_figures.compiled

    def _serving(self, prove: Callable[[ServerProcess], None]) -> None:
        """Start a server, forked where that was asked for and can be; wait until it is ready, and `prove` that it is.

        What forking has damaged may show at the first completion only, so that one that fails there is started cold.
        """
        if self.spec.start is Start.WARM:
            asked = time.monotonic()
            try:
                self._forked_server(prove)
                return
            except warm.NotWarm as reason:
                if self.row.start is not None:
                    self.row.fork_lost_s = time.monotonic() - asked - (self.row.warm_wait_s or 0.0)
                self.row.start_reason = self._evidence.shown(str(reason))
                with self._lifecycle, contextlib.suppress(FileNotFoundError):
                    self._evidence.set_aside(self._workspace.log)
        self.row.start = Start.COLD
        prove(self._ready(None))

    def _forked_server(self, prove: Callable[[ServerProcess], None]) -> None:
        """Raises `NotWarm` also for a fork that came to nothing in a way that forking could have caused."""
        if not self._engine.warm_modules:
            raise warm.NotWarm("this engine is never forked")
        if self._again:
            raise warm.NotWarm("an earlier start of this session came to nothing")
        if self._warm_parent is None:
            raise warm.NotWarm(self._no_warm_parent or "this node has no warm parent")
        with self._offered(self._warm_parent) as offered:
            self.row.fork_threads = list(offered.threads)
            self.row.start = Start.WARM
            try:
                process = self._ready(offered)
                prove(process)
                _refuse_damage(process, process.log_text())  # the first completion may be the first to have it fork
            except readiness.StartFailed as error:
                only_slow = error.failure.failure_class is FailureClass.READY_TIMEOUT and self._reads_on
                if only_slow or error.failure.failure_class not in FORKING_CAN_CAUSE:
                    raise
                self._discard()
                raise warm.NotWarm(f"{CAME_TO_NOTHING}{error.failure.message}") from None

    def _offered(self, parent: Path) -> warm.Offer:
        """Wait for the warm parent. Raises `NotWarm`; how long it took is in the row all the same."""
        asked = time.monotonic()
        try:
            return warm.offer(parent, self._stopping.is_set)
        finally:
            self.row.warm_wait_s = time.monotonic() - asked

    def _ready(self, offered: warm.Offer | None) -> ServerProcess:
        launched = time.monotonic()
        with self._lifecycle:
            if self._stopping.is_set():
                raise readiness.StartFailed(Failure(FailureClass.STOPPED, "stopped before the server was started"))
            process = self._process = self._make_process(offered)
            self._evidence.of(process)
        self.row.server_pid = process.pid
        log = StartLog(launched, self._engine.is_waiting)
        work = TreeWork(partial(processes.work, process.pid))

        def read() -> int:
            text = process.log_text()
            log.look(text)
            if offered is not None:
                _refuse_damage(process, text)
            return len(text)

        def look() -> None:
            self._evidence.ready_at = read()
            silent_s, self._reads_on = log.silent_s, False
            if offered is not None and self._engine.reads_weights(self.spec, log.lines):
                silent_s = min(silent_s, work.still_s())
                self._reads_on = work.moves
            if silent_s > self._engine.silence_limit_s(self.spec, log.lines, offered is not None):
                message = f"no word from it for {silent_s:.0f} s"
                raise readiness.StartFailed(Failure(FailureClass.NO_PROGRESS, message, process.log_tail()))

        readiness.wait_until_ready(process, self.endpoint, self.spec, self._stopping.is_set, look)
        read()
        self.row.ready_s = time.monotonic() - launched
        self.row.phases = self._engine.phases(log.lines, self.row.ready_s)
        return process

    def _discard(self) -> None:
        """End a server that came to nothing, so that another can be started in its place."""
        with self._lifecycle:
            self.process.hurry()
            self.process.stop()
            self._workspace.socket.unlink(missing_ok=True)
        self._log_figures, self._measuring = vllm_log.LogFigures(), None
        self._origin = self._origin_with(KvFigures(), None)
        self.row.ready_s, self.row.phases, self.row.account, self.row.requests_sent = None, [], [], 0

    def _contexts(self) -> list[int | None]:
        """What a bare CUDA context takes of each card, before the server is there."""
        if self.spec.device != "cuda":
            return [None] * len(self._device.cards)
        names, stopped = self._names_for_cuda(), self._stopping.is_set
        return [context_bytes(name, partial(self._used, at), stopped) for at, name in enumerate(names)]

    def _used(self, at: int) -> int:
        """What a card holds now, whoever has it."""
        return self._device.memory_by_card(None)[at]

    def _make_process(self, offered: warm.Offer | None) -> ServerProcess:
        spec, workspace = self.spec, self._workspace
        self.model = spec.model.path or str(self._model_dir())
        self._address = _address(spec.server.transport, workspace)
        self._evidence.hide(self._address.api_key)
        self._endpoint = _endpoint(spec, self._address)
        environment = inherited_environment(self._omp_num_threads)
        environment |= self._engine.environment(spec, self._address) | caches.compile_caches(self._cache)
        environment |= {
            "TMPDIR": str(workspace.temporary),
            "VLLM_RPC_BASE_PATH": str(workspace.temporary),
            "CUDA_DEVICE_ORDER": warm.CUDA_DEVICE_ORDER,
            "CUDA_VISIBLE_DEVICES": ",".join(self._names_for_cuda()),
        }
        if offered is not None:
            environment = self._engine.forked_environment() | environment
        command = self._engine.command(spec, self.model, self._address)
        self.row.argv = provenance.shown_argv(command, self._evidence.places)
        self.row.environment = provenance.shown_environment(environment, self._evidence.places)
        return ServerProcess(command, environment, workspace, spec.timeouts.stop_grace_s, offered)

    def _model_dir(self) -> Path:
        """The shape's directory: one that other sessions have had too, so that what is compiled for it is found."""
        if self._cache is None:
            return write_model_dir(self.spec.model, self._workspace.model)
        return cached_model_dir(self.spec.model, caches.shape_dir(self._cache))

    def _names_for_cuda(self) -> list[str]:
        """Cards as vLLM takes them: indices, or whole UUIDs where the cluster shortened them."""
        names, cards = self.row.visible_devices, self._device.cards
        return [name if name.isdigit() else card.id for name, card in zip(names, cards, strict=False)]

    def _prove(self, process: ServerProcess, contexts: list[int | None]) -> None:
        """Read the memory of a server that is ready, have it answer a completion, read its figures.

        Raises `StartFailed`, also where a forked one is not on its cards.
        """
        used = settled_memory(self._device, process.pid)
        self._strangers.look_at_ready(process.pid)
        account = ServerAccount(self._device, self.endpoint, self._baseline, contexts)
        self.row.account = account.rows
        if self.endpoint.uds is not None:
            account.at("ready", used)
        plans = LoadPlans(self.spec, self.row, self.endpoint, free_cores(process.pid))
        self._gate(plans)
        self._log_figures = vllm_log.parse(process.log_text())
        try:
            scraped = probe.server_metrics(self.endpoint)
        except probe.NoAnswer as error:
            message = f"ready, but since its first completion it does not answer: {error}"
            raise readiness.StartFailed(Failure(FailureClass.ENGINE_DEAD, message, self._evidence.tail())) from None
        kv = kv_figures.of_server(self.spec, scraped, self._log_figures, self.row.vllm_version)
        self._origin = self._origin_with(kv, self._log_figures.max_num_batched_tokens)
        if self.row.start == Start.WARM and self.spec.device != "cpu":
            self._refuse_other_cards(used, kv.engine_kv_bytes)
        self._measuring = Measuring(
            self._origin, self._device, process, plans, self._send, account, sum(used), self._strangers,
            self._evidence,
        )  # fmt: skip

    def _refuse_other_cards(self, used: list[int], pool: int | None) -> None:
        """Raise `StartFailed` where one of the cards has not grown as with a KV pool: another one has.

        `pool`: bytes of one card's; None only of a log that no known version writes.
        """
        least = POOL_SHARE * pool if pool else 1
        for card, now, before in zip(self._device.cards, used, self._baseline, strict=True):
            if (grown := now - before) < least:
                holds = "memory of it" if pool is None else f"KV pool of {pool // MIB} MiB"
                message = f"ready, but {card.id} has grown by {grown // MIB} MiB and holds no {holds}: it is elsewhere"
                raise readiness.StartFailed(Failure(FailureClass.WRONG_SERVER, message, self._evidence.tail()))

    def _gate(self, plans: LoadPlans) -> None:
        """One short completion: `/health` says that the front end lives, this that the engine computes."""
        plan = plans.plan(concurrency=1, requests=1, prompt_tokens=2, output_tokens=1)
        limit_s = FIRST_COMPLETION_LIMIT_S[Start(self.row.start or Start.COLD)]
        result = self._send(replace(plan, timeout_s=limit_s), 1)
        failed = [request for request in result.requests if not request.ok]
        if failed:
            serves = readiness.still_serves(self.endpoint, self.process)
            log, answered = self.process.log_text(), failed[0].failure_message or ""
            raise readiness.StartFailed(diagnosis.of_first_completion(log, self._evidence.ready_at, answered, serves))

    # --- measure ---

    def measure(self, point: Point) -> PointRow:
        """Measure one point. A failure is a row of status `failed`, with its class and the end of the server's log."""
        try:
            if self.row.status != MEASURED:
                return self._failed_row(point, self._start_failure())
            if self._process is None or not self._process.running or self._settled:
                return self._failed_row(point, self._evidence.death("the server has ended"))
            row = self._memory_or_level(point)
            if row.status == MEASURED and not self.measuring.serves():  # on TCP somebody else could have answered since
                return self._failed_row(point, self._evidence.death("the server or its engine ended in the middle"))
            return row
        except (probe.NoAnswer, EndpointError) as error:
            return self._failed_row(point, self._evidence.death(f"the server does not answer: {error}"))
        except LoadFailed as error:
            return self._failed_row(point, Failure(error.failure_class, f"its load came to nothing: {error}"))
        except CardLost as error:
            self._evidence.dead = True
            return self._failed_row(point, Failure(FailureClass.CARD_LOST, str(error)))
        except Exception as error:
            return self._failed_row(point, Failure(FailureClass.INTERNAL, f"{type(error).__name__}: {error}"))

    def _memory_or_level(self, point: Point) -> PointRow:
        if point.kind is PointKind.MEMORY:
            return self.measuring.memory(point)
        if too_large := memory.refusal(point.num_requests, point.output_tokens):
            return self._failed_row(point, Failure(FailureClass.LOAD_TOO_LARGE, too_large))
        return self.measuring.level(point)

    @property
    def process(self) -> ServerProcess:
        """The server, which was started."""
        assert self._process is not None
        return self._process

    @property
    def endpoint(self) -> Endpoint:
        """Where the server, which was started, answers."""
        assert self._endpoint is not None
        return self._endpoint

    @property
    def measuring(self) -> Measuring:
        """The server, which has answered its first completion, and how it is measured."""
        assert self._measuring is not None
        return self._measuring

    def _send(self, plan: LoadPlan, processes: int) -> LoadResult:
        with self._workspace.fresh_directory() as meeting:
            parts = tasks.split(plan, min(processes, plan.concurrency, plan.num_requests), meeting)
            return tasks.merge(self._generate(parts))

    # --- rows ---

    def _origin_with(self, kv: KvFigures, max_num_batched_tokens: int | None) -> Origin:
        card = self._device.cards[0] if self._device.cards else None
        return Origin(self.spec, self.row, card, kv, max_num_batched_tokens)

    def _failed_row(self, point: Point, failure: Failure) -> PointRow:
        row = point_rows.blank(self._origin, point, time.time())
        row.status = "kv_too_small" if failure.failure_class == FailureClass.KV_TOO_SMALL else FAILED
        row.failure_class = failure.failure_class
        row.failure_message = self._evidence.shown(failure.message)
        row.log_tail = self._evidence.shown(failure.log_tail) or self._evidence.tail()
        row.engine_estimated_max_model_len = diagnosis.estimated_max_model_len(failure.message)
        row.foreign_processes = self.row.foreign_processes
        return row

    def _fail(self, failure: Failure) -> None:
        """Put what ended the session into its row; what failed first stays."""
        if self.row.status != MEASURED:
            return
        self.row.status = FAILED
        self.row.failure_class = failure.failure_class
        self.row.failure_message = self._evidence.shown(failure.message)
        self.row.log_tail = self._evidence.shown(failure.log_tail)

    def _start_failure(self) -> Failure:
        return Failure(
            self.row.failure_class or FailureClass.START_FAILED,
            self.row.failure_message or "",
            self.row.log_tail or "",
        )

    # --- end ---

    def settle(self) -> None:
        """Enter the account's peak and let the server give its memory back. It answers nothing afterwards: stop it."""
        process = self._process
        if process is None or not process.running or self._settled or self.row.status != MEASURED:
            return
        self._strangers.look(process.pid)
        measuring = self._measuring
        if measuring is not None and measuring.account.of_cards:
            self._settled = True
            try:
                measuring.account.settle(process.pid)
            except CardLost as error:
                self._fail(Failure(FailureClass.CARD_LOST, str(error), self._evidence.tail()))

    def hurry(self) -> None:
        """Have `stop`, now or later, take two seconds at the most: whoever asks for it is about to be killed."""
        self._stopping.set()
        self._hurried.set()
        process = self._process
        if process is not None:
            process.hurry()

    def stop(self) -> SessionEnd:
        """Stop the server, wait for its memory to come back, hand over the row and the log, leave nothing behind."""
        self._stopping.set()
        with self._lifecycle:
            if self.row.ended_at is None:
                try:
                    self._end()
                except CardLost as error:
                    self._fail(Failure(FailureClass.CARD_LOST, f"while stopping: {error}"))
                except Exception as error:  # the device's library, say: what was started must be gone all the same
                    self._fail(Failure(FailureClass.INTERNAL, f"while stopping: {type(error).__name__}: {error}"))
                self._log = self._evidence.log()
                self._workspace.remove()
                self.row.ended_at = point_rows.utc(time.time())
                self._device.close()
            return SessionEnd(self.row, self._log)

    def _end(self) -> None:
        if self._process is None:
            return
        asked = time.monotonic()
        nothing_to_lose = self._evidence.dead or self.row.ready_s is None
        if self._hurried.is_set() or nothing_to_lose:
            self._process.hurry()
        self._process.stop()
        self.row.stop_s = time.monotonic() - asked
        self.row.exit_code = self._process.exit_code
        deadline = asked + self.row.stop_s + self.spec.timeouts.memory_back_s
        while True:
            used = self._device.memory_by_card(self._process.pid)
            left = [max(now - before, 0) for now, before in zip(used, self._baseline, strict=True)]
            self.row.mem_after_stop_bytes = sum(self._baseline) + sum(left)
            if not any(left):
                self.row.memory_back_s = time.monotonic() - asked
                break
            if time.monotonic() > deadline or self._hurried.is_set():
                self._strangers.look_after(self._process.pid, left)
                break
            time.sleep(0.1)


def _refuse_damage(process: ServerProcess, log: str) -> None:
    """Raise `StartFailed` where a forked server has forked in turn and left threads behind."""
    damage = next((line for line in log.splitlines() if warm.FORKED_BESIDE in line), None)
    if damage is not None:
        raise readiness.StartFailed(Failure(FailureClass.START_FAILED, damage, process.log_tail()))


def _address(transport: str, workspace: Workspace) -> Address:
    if transport == "uds":
        return Address(uds=workspace.socket)
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return Address(port=probe_socket.getsockname()[1], api_key=secrets.token_hex(16))


def _endpoint(spec: SessionSpec, address: Address) -> Endpoint:
    if address.uds is not None:
        return Endpoint(base_url="http://localhost", model=spec.model.name, uds=str(address.uds))
    return Endpoint(f"http://127.0.0.1:{address.port}", spec.model.name, api_key=address.api_key)
