"""The tutorial's batch client: the same requests one by one, then concurrently, and where asked for an open loop.

Run by people, against any OpenAI-compatible server: `python -m workers.load --url URL --n 32 --concurrency 8
--max-tokens 64`. It must never send a prompt twice, nor count a failed request as done, nor keep quiet where its own
limits are in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from contract.arrivals import HIGHEST_RATE, ArrivalProcess, Arrivals, Stage
from contract.lateness import LAG, RAISED, SLIP, in_ms
from contract.rows import JUDGED_FROM_S, RequestRow
from contract.specs import Api
from workers.load import event_loop
from workers.load.bodies import prepare
from workers.load.client import allow_connections
from workers.load.endpoint import QUOTED_BYTES, STREAMED, Endpoint, EndpointError, ask, served_models
from workers.load.failed import TooFewFiles
from workers.load.limits import added_s, client_limits, connecting_s, send_delay_s
from workers.load.memory import refusal
from workers.load.plan import LoadPlan, LoadResult
from workers.load.progress import HOPELESS, Hopeless, run_watched
from workers.load.prompts import GivenText
from workers.load.summary import LoadSummary, percentile, summarize
from workers.load.tokenizer import count_tokens

PROG = "python -m workers.load"
MODELS_TIMEOUT_S = 15.0
KEY_VARIABLES = ("VLLM_API_KEY", "OPENAI_API_KEY")
LONGEST_S = 366 * 86400.0
BUSY_OR_BROKEN = {429, *range(500, 600)} - {501, 505}
"""HTTP statuses of a server that takes such requests, now or another time: 501 and 505 say that it never will."""
TOTALS = ("s", "qps", "tok_s")
"""Of a part, among the first keys of what is printed."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the parts gave, one after the other."""

    model: str
    parts: dict[str, LoadResult]
    """Those that went to their end."""
    given_up: Hopeless | None = None
    interrupted: str | None = None
    """The part that Ctrl-C broke off."""

    @property
    def why_no_more(self) -> str | None:
        """Why there are no more parts; None where all are there."""
        if self.interrupted is not None:
            return f"{self.interrupted}: interrupted"
        return None if self.given_up is None else str(self.given_up)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROG}: {message}\n")


def _count(value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {value!r}")
    return number


def _above_zero(unit: str) -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number of {unit} above 0, not {value!r}")
        return number

    return parse


def _name(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        allow_abbrev=False,
        description="Send the same number of completions one by one, then concurrently, and print both as JSON. With "
        "--rate there is a third part, an open loop.",
        epilog="Times are in seconds, *_qps in successful requests per second, *_tok_s in completion tokens of "
        "successful requests per second, TTFT and E2EL from a request's send to its first and last token. "
        "*_client_limited says why a part measured this client and not the server: [] where it was not found to be, "
        f"null where the part lasted less than {JUDGED_FROM_S:g} s, too short to tell; notes name from 2 ms on what "
        "this client added to a part's figures all the same. A part is given up once "
        f"{HOPELESS} requests in a row, sent after the last answer, ran into --timeout: its totals and those of parts "
        "behind it are null, notes say so, and the parts before it stand; completed and failed count what had ended. "
        "So it is with a part that Ctrl-C breaks off, but that none of its requests are counted. "
        f"The API key is read from {' or '.join(KEY_VARIABLES)}, proxies from http_proxy, https_proxy and no_proxy; "
        "SSL_CERT_FILE names the certificates to trust beside the system's. "
        "Exit code: 0 something succeeded (see completed and failed), 1 nothing did, "
        "2 bad arguments, lengths that do not fit the server's max_model_len, too few open files for --concurrency, "
        "too little memory for --n answers, or no usable server, 130 interrupted (the parts before are printed).",
    )
    add = parser.add_argument
    add(
        "--url",
        default="http://127.0.0.1:8000/v1/completions",
        help="server, with or without /v1, /v1/completions or /v1/chat/completions (default: %(default)s)",
    )
    add(
        "--chat",
        action="store_true",
        help="ask for chat completions, --prompt as the message of a user; implied by a --url that ends so",
    )
    add("--n", type=_count, default=32, metavar="REQUESTS", help="requests in each part (default: %(default)s)")
    add(
        "--concurrency",
        type=_count,
        default=8,
        metavar="REQUESTS",
        help="requests in flight in the concurrent part (default: %(default)s)",
    )
    add("--max-tokens", type=_count, default=64, metavar="TOKENS", help="tokens per answer (default: %(default)s)")
    add("--model", type=_name, help="model to ask for (default: the first one in the server's /v1/models)")
    add(
        "--prompt",
        default="Explain what a GPU is in one sentence.",
        metavar="TEXT",
        help="sent behind a short prefix that makes every request's prompt unique (default: %(default)r)",
    )
    add(
        "--rate",
        type=_above_zero("requests a second"),
        metavar="REQUESTS_PER_SECOND",
        help="a third part, open loop: so many arrive a second on average (Poisson), however many are in flight; "
        f"at most {HIGHEST_RATE:,.0f}",
    )
    add(
        "--timeout",
        type=_above_zero("seconds"),
        default=300.0,
        metavar="SECONDS",
        help="time limit of one request (default: %(default)g)",
    )
    add(
        "--no-ignore-eos",
        dest="ignore_eos",
        action="store_false",
        help="let answers end before --max-tokens, and do not send vLLM's ignore_eos, which other servers may refuse",
    )
    return parser


async def _models(endpoint: Endpoint, wanted: str | None) -> Mapping[str, int | None] | None:
    """The served models and their max_model_len; None where there is no such list and `wanted` is named instead."""
    try:
        models = await served_models(endpoint, MODELS_TIMEOUT_S)
    except EndpointError as error:
        if wanted is not None and error.status == 404:
            return None
        raise
    if wanted is not None and wanted not in models:
        raise EndpointError(f"unknown model {wanted!r}: {endpoint.root} serves {', '.join(models)}")
    return models


async def _try_one(plan: LoadPlan) -> int | None:
    """Send a plan's first request, for one token and not streamed; return its prompt's tokens by the server's count.

    No list of models tells whether this server takes such requests at all: it may refuse a field of theirs, have no
    such path (some say 501), lead elsewhere, serve a model that only embeds, or answer 200 with a page or an error. One
    that is busy or broken does take them, and counts nothing; so does one that streams whatever is asked for.

    Raises:
        EndpointError: it does not take them, or did not answer in time.
    """
    one = replace(plan, num_requests=1, output_tokens=1, due_s=())
    body = json.loads(next(each.body for each in prepare(one) if each is not None))
    del body["stream"], body["stream_options"]
    url = plan.endpoint.load_url(plan.api)
    try:
        answer = await ask(plan.endpoint, url, plan.timeout_s, body)
    except EndpointError as error:
        if error.status not in BUSY_OR_BROKEN:
            raise
        return None
    if answer is STREAMED:
        return None
    if not _is_completion(answer):
        words = json.dumps(answer)[:QUOTED_BYTES] if isinstance(answer, dict) else "no JSON object"
        raise EndpointError(f"{url} answered HTTP 200 and no completion ({words}): no OpenAI-compatible server?", 200)
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None


def _is_completion(answer: Any) -> bool:
    return isinstance(answer, dict) and isinstance(answer.get("choices"), list) and answer.get("error") is None


async def _check(plan: LoadPlan, max_tokens: int, max_model_len: int | None) -> None:
    """Refuse what the server would refuse, before any of the load is sent: what is too long for it, by its `/tokenize`
    (vLLM) and by the one request of one token that is tried, and whatever it refuses that one for. `plan` is the last
    part."""
    longest = plan.first_ordinal + plan.num_requests - 1  # the last one's number has the most digits
    if max_model_len is not None:
        if max_tokens >= max_model_len:
            room = f"max_model_len {max_model_len} of {plan.endpoint.model}"
            raise EndpointError(f"--max-tokens {max_tokens} leaves no room for a prompt in {room}")
        text = GivenText(plan.text or "", plan.seed).prompt(longest)
        chat = {"messages": [{"role": "user", "content": text}]}
        counted = await count_tokens(plan.endpoint, chat if plan.api is Api.CHAT else {"prompt": text})
        _fit(plan, counted, max_tokens, max_model_len)
    # Another seed: a prompt as long as the longest, and none of the load's own.
    _fit(plan, await _try_one(replace(plan, seed=plan.seed ^ 1, first_ordinal=longest)), max_tokens, max_model_len)


def _fit(plan: LoadPlan, prompt_tokens: int | None, max_tokens: int, max_model_len: int | None) -> None:
    if prompt_tokens is None or max_model_len is None or prompt_tokens + max_tokens <= max_model_len:
        return
    asked = f"a prompt of {prompt_tokens} tokens and --max-tokens {max_tokens}"
    raise EndpointError(f"{asked} do not fit max_model_len {max_model_len} of {plan.endpoint.model}")


async def _measure(args: argparse.Namespace, endpoint: Endpoint) -> _Measured:
    """Send the parts, one after the other. A server that answers nothing any more and Ctrl-C end that, not what parts
    have given by then."""
    models = await _models(endpoint, args.model)
    model = args.model or next(iter(models or {}))
    sequential = LoadPlan(
        replace(endpoint, model=model),
        concurrency=1,
        num_requests=args.n,
        prompt_tokens=0,
        output_tokens=args.max_tokens,
        first_ordinal=0,
        vocab_size=0,
        # Not fixed: a second run on the same server must not find the prompts of the first in its cache.
        seed=secrets.randbits(32),
        timeout_s=args.timeout,
        ignore_eos=args.ignore_eos,
        text=args.prompt,
        api=Api.CHAT if args.chat or endpoint.names_chat else Api.COMPLETIONS,
    )
    concurrent = replace(sequential, concurrency=args.concurrency, first_ordinal=args.n)
    open_loop = None if args.rate is None else _open_loop(sequential, args.rate)
    await _check(open_loop or concurrent, args.max_tokens, (models or {}).get(model))
    wanted = ("sequential", "concurrent", "open_loop")[: 2 if open_loop is None else 3]
    parts: dict[str, LoadResult] = {}
    try:
        await run_watched("sequential", sequential, parts)
        await run_watched("concurrent", concurrent, parts)
        if open_loop is not None:
            lines = _lines(open_loop, args.rate, args.concurrency, parts["concurrent"])
            await run_watched("open_loop", replace(open_loop, concurrency=lines), parts)
    except Hopeless as error:
        return _Measured(model, parts, error)
    except asyncio.CancelledError:
        if not parts:
            raise
        return _Measured(model, parts, interrupted=next((part for part in wanted if part not in parts), None))
    return _Measured(model, parts)


def _open_loop(sequential: LoadPlan, rate: float) -> LoadPlan:
    n = sequential.num_requests
    due_s = Arrivals(ArrivalProcess.POISSON, rate, (Stage(n / rate),)).times(n, str(sequential.seed))
    return replace(sequential, first_ordinal=2 * n, due_s=tuple(due_s))


def _lines(plan: LoadPlan, rate: float, most: int, before: LoadResult) -> int:
    """Lines to connect before the open loop `plan`: as many as by Little's law its rate brings into flight, if requests
    last as long as they did in the part before; no more than `most`, which this process was found to have files for."""
    expected = rate * (summarize(before.requests, before.duration_s).mean_e2e_s or 0.0)
    return max(1, min(plan.num_requests, most, math.ceil(expected)))


def _report(args: argparse.Namespace, measured: _Measured) -> dict[str, Any]:
    """Return what is printed: the tutorial's eight keys first, then what it left out."""
    parts = measured.parts
    sums = {part: summarize(result.requests, result.duration_s) for part, result in parts.items()}
    report: dict[str, Any] = {"n": args.n, "concurrency": args.concurrency}
    rates = {part: {"s": total.duration_s, "qps": total.qps, "tok_s": total.tok_s} for part, total in sums.items()}
    nothing = dict.fromkeys(TOTALS)
    for key in TOTALS:
        report |= {f"{part}_{key}": rates.get(part, nothing)[key] for part in ("sequential", "concurrent")}
    ended: list[LoadSummary | Hopeless] = [*sums.values()]
    if measured.given_up is not None:
        ended.append(measured.given_up)
    report["completed"] = sum(part.completed for part in ended)
    report["failed"] = sum(part.failed for part in ended)
    report["model"] = measured.model
    if args.rate is not None:
        report["rate"] = args.rate
        report |= {f"open_loop_{key}": value for key, value in rates.get("open_loop", nothing).items()}
    if "open_loop" in parts:
        requests = parts["open_loop"].requests
        report["open_loop_offered_qps"] = len(requests) / max(row.due_s or 0.0 for row in requests)
        report["open_loop_p99_send_delay_s"] = send_delay_s(requests)
        report["open_loop_p99_connect_s"] = connecting_s(requests)
        report["open_loop_most_in_flight"] = sums["open_loop"].most_in_flight
    for part, total in sums.items():
        report |= _part(part, total, parts[part].requests)
        report[f"{part}_client_limited"] = _limits(parts[part])
    notes = [
        measured.why_no_more,
        event_loop.note(),
        *(_tail_note(part, total.completed) for part, total in sums.items()),
    ]
    report["notes"] = [note for note in notes if note is not None]
    report["notes"] += [note for part, result in parts.items() for note in _client_notes(part, result)]
    return report


def _limits(result: LoadResult) -> list[str] | None:
    limits = client_limits(result)
    if not limits and result.duration_s < JUDGED_FROM_S:
        return None
    return limits


def _client_notes(part: str, result: LoadResult) -> list[str]:
    """What this client added to a part's figures, whether it was the limit or not: as a session's tables name it."""
    if result.duration_s < JUDGED_FROM_S:
        return []
    words = {**RAISED, **SLIP, **LAG}
    return [f"{part}: {words[column].format(n=in_ms(worst))}" for column, worst in added_s(result).items()]


def _tail_note(part: str, completed: int) -> str | None:
    """What to think of percentiles whose rank, (completed - 1) * q / 100, comes behind the last but one."""
    few = [f"p{q}" for q in (95, 99) if (completed - 1) * (100 - q) < 100]
    if not few or not completed:
        return None
    return f"{part}: {' and '.join(few)} of {completed} requests: between the two highest"


def _part(part: str, total: LoadSummary, requests: Sequence[RequestRow]) -> dict[str, Any]:
    ttft = [row.ttft_s for row in requests if row.ok and row.ttft_s is not None]
    return {
        f"{part}_failed": total.failed,
        f"{part}_p50_e2e_s": total.p50_e2e_s,
        f"{part}_p95_e2e_s": total.p95_e2e_s,
        f"{part}_p99_e2e_s": total.p99_e2e_s,
        f"{part}_p50_ttft_s": total.p50_ttft_s,
        f"{part}_p95_ttft_s": total.p95_ttft_s,
        f"{part}_p99_ttft_s": percentile(ttft, 99),
    }


def _complain(message: str) -> None:
    print(f"{PROG}: {' '.join(message.split())}", file=sys.stderr)


def _print(report: dict[str, Any]) -> None:
    try:
        print(json.dumps(report, indent=2), flush=True)
    except BrokenPipeError:  # whoever reads has read enough; Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _comment(args: argparse.Namespace, measured: _Measured, report: dict[str, Any]) -> None:
    """Say on stderr what must not be overlooked in the figures."""
    if measured.why_no_more is not None:
        _complain(measured.why_no_more)
    failures = [row for result in measured.parts.values() for row in result.requests if not row.ok]
    if failures:
        first = failures[0]
        _complain(f"{len(failures)} requests failed, the first with {first.failure_class}: {first.failure_message}")
    for part in measured.parts:
        if limits := report[f"{part}_client_limited"]:
            _complain(f"{part}: this client was the limit, its figures are not the server's: {'; '.join(limits)}")
    if args.concurrency > args.n:
        _complain(f"note: {args.n} requests cannot keep {args.concurrency} in flight")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client and return its exit code: 0, 1, 2 or 130 as its help says."""
    try:
        parser = _parser()
        args = parser.parse_args(argv)
        if args.rate is not None and args.n / args.rate > LONGEST_S:
            parser.error(f"--rate {args.rate:g}: {args.n} requests would take more than a year")
        if args.rate is not None and args.rate > HIGHEST_RATE:
            parser.error(f"--rate {args.rate:g}: at most {HIGHEST_RATE:g} requests a second, as for sweeps")
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        try:
            endpoint = Endpoint(args.url, model="", api_key=key)
        except ValueError as error:
            _complain(str(error))
            return 2
        if too_large := refusal(args.n, args.max_tokens):
            _complain(too_large)
            return 2
        try:
            allow_connections(min(args.concurrency, args.n))
            measured = event_loop.run(_measure(args, endpoint))
        except (TooFewFiles, EndpointError) as error:
            _complain(str(error))
            return 2
        report = _report(args, measured)
        _print(report)
        _comment(args, measured, report)
        if measured.interrupted is not None:
            return 130
        return 0 if report["completed"] else 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
