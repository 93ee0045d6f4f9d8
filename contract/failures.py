"""Why something was not measured: one name for every class of failure.

Workers put them into rows, the driver decides by them what to try again (`contract.causes`), `analysis` counts them.
Values are written to Parquet, so a name once released is never given another meaning.
"""

from __future__ import annotations

from enum import StrEnum


class FailureClass(StrEnum):
    """Value of the `failure_class` columns."""

    # --- one request, as the load generator saw it ---
    CONNECTION_FAILED = "connection_failed"  # no connection: refused, no such socket, name not resolved, TLS
    CONNECTION_LOST = "connection_lost"  # closed or reset before the answer was whole
    TIMEOUT = "timeout"  # the request's own time limit
    HTTP_ERROR = "http_error"  # any status but 200
    IN_BAND_ERROR = "in_band_error"  # an error object inside a stream that began with 200
    MALFORMED_STREAM = "malformed_stream"  # not HTTP, events or completions; a choice or usage too many
    NO_DONE = "no_done"  # the stream ended without [DONE]
    NO_FINISH_REASON = "no_finish_reason"
    UNEXPECTED_FINISH_REASON = "unexpected_finish_reason"  # neither "length" nor "stop"
    NO_USAGE = "no_usage"  # the token counts were asked for and did not come
    WRONG_TOKEN_COUNT = "wrong_token_count"  # more or fewer tokens than asked for, or more chunks than tokens
    CLIENT_SOCKETS = "client_sockets"  # no connection: the client's own host had no file or port left; of a level, too
    # --- one server's start ---
    BAD_ARGUMENT = "bad_argument"  # vLLM refused its command line
    LENGTH_ABOVE_MODEL = "length_above_model"  # max_model_len beyond what the model was made for
    MODEL_MISSING = "model_missing"
    NOT_INSTALLED = "not_installed"  # no vLLM on the session's node
    KV_TOO_SMALL = "kv_too_small"  # not one sequence of max_model_len fits: a result, with the engine's own estimate
    NO_SPACE = "no_space"  # a disk of the session's node is full
    FREE_MEMORY_LOW = "free_memory_low"  # somebody else uses the card
    MEMORY_PROFILE = "memory_profile"  # memory changed under vLLM while it measured
    OUT_OF_MEMORY = "out_of_memory"
    GRAPH_MEMORY = "graph_memory"  # out of memory while CUDA graphs were captured, after the pool was made
    PORT_TAKEN = "port_taken"
    WRONG_SERVER = "wrong_server"  # what answers is not the server that was started
    READY_TIMEOUT = "ready_timeout"  # it went on, but not to its end: the hard cap
    NO_PROGRESS = "no_progress"  # it was silent for several times what its phase usually takes
    CUDA_ERROR = "cuda_error"  # an error of CUDA or NCCL before it had answered: of a card or of a kernel, nobody knows
    START_FAILED = "start_failed"  # any other end before it was ready, or at its first completion
    # --- one point on a live server ---
    ENGINE_DEAD = "engine_dead"  # the server ended or no longer answers
    MEMORY_UNDER_LOAD = "memory_under_load"  # it ended, out of memory, while it served
    POINT_TIMEOUT = "point_timeout"  # the point's own time limit
    LOAD_LOST = "load_lost"  # a load process ended before its level, or did not come to its start
    LOAD_TOO_LARGE = "load_too_large"  # its answers would take more memory than the node has for them: nothing was sent
    CLIENT_LIMITED = "client_limited"  # the load client was the limit: of older rows, which do not say which of four:
    CLIENT_CORES_FEW = "client_cores_few"  # it was the limit, and the host had no cores for more processes
    CLIENT_STREAMS_FEW = "client_streams_few"  # it was the limit with a process for every few of the level's streams
    CLIENT_PROCESSES_FIXED = "client_processes_fixed"  # it was the limit with the processes that the user named
    CLIENT_PROCESSES_FEW = "client_processes_few"  # it was the limit, and the host had cores for more processes
    PREFIX_HITS = "prefix_hits"  # prompts were answered from the prefix cache: the level measured that, not the engine
    LOAD_ERROR_RATE = "load_error_rate"  # too many requests failed for the rest to be a measurement
    # --- the run ---
    NOT_TRIED = "not_tried"  # its session's servers ended before its turn came, and it got no further start
    STOPPED = "stopped"  # the user or the scheduler stopped the run
    ACTOR_LOST = "actor_lost"  # the session's actor is gone, or not to be reached
    CARD_LOST = "card_lost"  # a card of the session does not answer NVML, or no more
    CARD_FAILED = "card_failed"  # NVML reads the session's cards, and CUDA cannot use one of them
    NODE_LOST = "node_lost"  # the session's node is gone for good
    NOT_WRITTEN = "not_written"  # the run directory takes no more files: a full disk, say
    INTERNAL = "internal"  # a defect of ours: the message is the exception
