"""The stream parser: any cut, any line end, any garbage; and what counts as a success."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.failures import FailureClass
from workers.load import stream as stream_module
from workers.load.chunks import ChunkReader, size_lines
from workers.load.reads import Reads
from workers.load.stream import MAX_EVENT_BYTES, Asked, StreamParser, StreamRecord, digest, judge

ASKED = Asked(max_tokens=3, ignore_eos=True, prompt_tokens=5)
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def event(message: Any) -> bytes:
    return b"data: " + (message if isinstance(message, bytes) else json.dumps(message).encode()) + b"\n\n"


def chunk(reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "é", "finish_reason": reason}], "usage": None}


GOOD_EVENTS = [
    event(chunk()),
    event(chunk()),
    event(chunk("length")),
    event({"choices": [], "usage": USAGE}),
    event(b"[DONE]"),
]
GOOD = b"".join(GOOD_EVENTS)


def parse(*pieces: bytes) -> StreamRecord:
    """Feed pieces at 0, 1, 2 ... and close."""
    parser = StreamParser()
    for at, piece in enumerate(pieces):
        parser.feed(piece, float(at))
    parser.close()
    return parser.record


def verdict(body: bytes, asked: Asked = ASKED) -> str | None:
    failure = judge(parse(body), asked)
    return failure.failure_class if failure else None


def unstamped(record: StreamRecord) -> StreamRecord:
    return replace(record, chunk_at_s=[0.0] * len(record.chunk_at_s))


def test_a_whole_stream_is_a_success_with_its_stamps_and_counts() -> None:
    record = parse(*GOOD_EVENTS)
    assert record == StreamRecord(
        chunk_at_s=[0.0, 1.0, 2.0],  # the usage chunk and [DONE] came later
        finish_reason="length",
        prompt_tokens=5,
        completion_tokens=3,
        saw_done=True,
    )
    assert judge(record, ASKED) is None


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_split_at_every_byte(newline: bytes) -> None:
    body = (b": a comment\n\n" + GOOD).replace(b"\n", newline)
    for cut in range(len(body) + 1):
        record = parse(body[:cut], body[cut:])
        assert judge(record, ASKED) is None
        assert len(record.chunk_at_s) == 3
    assert judge(parse(*(body[i : i + 1] for i in range(len(body)))), ASKED) is None


@given(st.lists(st.integers(0, len(GOOD)), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_cut_gives_the_same_record_and_ordered_stamps(cuts: list[int], newline: bytes) -> None:
    body = GOOD.replace(b"\n", newline)
    edges = [0, *sorted(cuts), len(body)]
    record = parse(*(body[a:b] for a, b in pairwise(edges)))
    assert unstamped(record) == unstamped(parse(body))
    assert 0 <= record.chunk_at_s[0] <= record.chunk_at_s[-1] <= len(edges)
    assert record.chunk_at_s == sorted(record.chunk_at_s)


def test_coalesced_events_share_a_stamp() -> None:
    record = parse(b"", GOOD)
    assert record.chunk_at_s == [1.0, 1.0, 1.0]


def test_an_event_is_stamped_when_its_last_byte_arrives() -> None:
    record = parse(GOOD_EVENTS[0][:-1], GOOD_EVENTS[0][-1:], b"".join(GOOD_EVENTS[1:]))
    assert record.chunk_at_s == [1.0, 2.0, 2.0]


def test_comments_ids_event_names_and_a_byte_order_mark_pass() -> None:
    body = b"\xef\xbb\xbf: hello\nid: 1\nretry: 10\nevent: completion\n" + GOOD.replace(b"data: ", b"data:")
    assert verdict(body) is None


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_data_lines_of_one_event_belong_together_wherever_they_are_cut(newline: bytes) -> None:
    body = b'data: {"choices": [{"finish_reason": "length"}],\ndata: "usage": ' + json.dumps(USAGE).encode()
    body = (body + b"}\n\ndata: [DONE]\n\n").replace(b"\n", newline)
    for cut in range(len(body) + 1):
        assert judge(parse(body[:cut], body[cut:]), ASKED) is None


@given(st.integers(0, len(GOOD) - 1))
def test_no_stream_that_was_cut_short_is_a_success(length: int) -> None:
    assert verdict(GOOD[:length]) == FailureClass.NO_DONE


@given(st.binary(max_size=400))
def test_garbage_neither_raises_nor_succeeds(garbage: bytes) -> None:
    assert verdict(garbage) is not None


@given(
    st.lists(st.one_of(st.sampled_from([*GOOD_EVENTS, b"data", b":", b"\r", b"\n", b"event: error\n"]), st.binary()))
)
def test_garbage_between_events_never_raises(pieces: list[bytes]) -> None:
    record = parse(*pieces)
    if judge(record, ASKED) is None:
        assert record.chunk_at_s
        assert record.completion_tokens == 3


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["choices", "usage", "error", "finish_reason", "completion_tokens"]), inner),
    ),
    max_leaves=8,
)


@given(json_values)
def test_any_json_in_an_event_never_raises(value: Any) -> None:
    parse(event(value), GOOD)


def test_hostile_events_never_raise() -> None:
    deep = b"[" * 100_000
    digits = b'{"choices": [], "usage": {"completion_tokens": ' + b"9" * 10_000 + b"}}"
    for data in (deep, digits, b"\xff\xfe", b'{"choices": [3]}', b'{"choices": [{"finish_reason": 1}]}'):
        assert verdict(event(data) + GOOD) == FailureClass.MALFORMED_STREAM


def test_an_endless_line_is_dropped() -> None:
    parser = StreamParser()
    for _ in range(3):
        parser.feed(b"data: " + b"x" * MAX_EVENT_BYTES, 0.0)
    parser.close()
    failure = judge(parser.record, ASKED)
    assert failure is not None
    assert failure.failure_class == FailureClass.MALFORMED_STREAM
    assert "longer than" in failure.message


LINES_WITHOUT_DATA, ONE_LINE_BYTE_BY_BYTE = (b"data:\n", 4096, 5_000), (b"x", 1, 50_000)


@pytest.mark.parametrize(("of", "read_bytes", "number"), [LINES_WITHOUT_DATA, ONE_LINE_BYTE_BY_BYTE])
def test_judging_takes_work_in_proportion_to_the_body(of: bytes, read_bytes: int, number: int) -> None:
    """Four times the body is four times the work, not sixteen times. CPU time, in which neighbours do not count."""

    def work_s(number: int) -> float:
        pieces = [(of * number)[at : at + read_bytes] for at in range(0, len(of) * number, read_bytes)]
        took = []
        for _ in range(3):
            begun = time.thread_time()
            digest(reads(pieces, http_chunks=False))
            took.append(time.thread_time() - begun)
        return min(took)

    assert work_s(4 * number) < 9 * work_s(number)


@pytest.mark.parametrize("line", [b"data: " + b"x" * 57 + b"\n", b"x" * 64])
def test_a_body_of_64_mib_is_judged(line: bytes) -> None:
    record = digest(reads([line * 1024] * 1024, http_chunks=False))
    assert "longer than" in (record.malformed or "")


def test_lines_without_data_are_an_event_too_long_as_well() -> None:
    body = b"data:\n" * (MAX_EVENT_BYTES + 1) + b"\n"
    assert "longer than" in (parse(body).malformed or "")


def stream(*messages: Any) -> bytes:
    return b"".join(event(message) for message in messages)


ERROR = {"error": {"message": "EngineCore died", "code": 500}}
USAGE_EVENT = {"choices": [], "usage": USAGE}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (stream(chunk(), ERROR, b"[DONE]"), FailureClass.IN_BAND_ERROR),
        (GOOD.replace(GOOD_EVENTS[1], event({"object": "error", "message": "old"})), FailureClass.IN_BAND_ERROR),
        (b"event: error\ndata: died\n\n" + GOOD, FailureClass.IN_BAND_ERROR),
        (b'{"id": "c", "choices": []}', FailureClass.MALFORMED_STREAM),
        (b'{\n  "id": "c"\n}\n', FailureClass.MALFORMED_STREAM),
        (b"<!DOCTYPE html>\n<p>hello\n", FailureClass.MALFORMED_STREAM),
        (b"Service unavailable", FailureClass.MALFORMED_STREAM),
        (stream(b"<p>", b"[DONE]"), FailureClass.MALFORMED_STREAM),
        (GOOD + stream(chunk()), FailureClass.MALFORMED_STREAM),
        (GOOD + event(b"[DONE]"), FailureClass.MALFORMED_STREAM),
        (GOOD + b"data: {", FailureClass.MALFORMED_STREAM),
        (stream(chunk("length"), {"choices": [], "usage": {"completion_tokens": "3"}}, b"[DONE]"),
         FailureClass.MALFORMED_STREAM),
        (stream(chunk(), {"choices": chunk()["choices"] * 2}, chunk("length"), USAGE_EVENT, b"[DONE]"),
         FailureClass.MALFORMED_STREAM),
        (stream({"choices": [{"index": 1, "text": "a"}]}, chunk("length"), USAGE_EVENT, b"[DONE]"),
         FailureClass.MALFORMED_STREAM),
        (stream(chunk("length"), {"choices": [], "usage": USAGE | {"completion_tokens": 4}}, USAGE_EVENT, b"[DONE]"),
         FailureClass.MALFORMED_STREAM),
        (stream(chunk("length"), {"choices": [], "usage": USAGE | {"prompt_tokens": 4}}, USAGE_EVENT, b"[DONE]"),
         FailureClass.MALFORMED_STREAM),
        (stream(chunk("length"), {"choices": [], "usage": {"prompt_tokens": 4}}, USAGE_EVENT, b"[DONE]"),
         FailureClass.MALFORMED_STREAM),
        (stream(chunk("length"), USAGE_EVENT, {"choices": [], "usage": {"prompt_tokens": 5}}, b"[DONE]"),
         FailureClass.MALFORMED_STREAM),
        (b"", FailureClass.NO_DONE),
        (stream(chunk(), chunk("length"), USAGE_EVENT), FailureClass.NO_DONE),
        (stream(chunk(), USAGE_EVENT, b"[DONE]"), FailureClass.NO_FINISH_REASON),
        (stream(b"[DONE]"), FailureClass.NO_FINISH_REASON),
        (stream(chunk("abort"), USAGE_EVENT, b"[DONE]"), FailureClass.UNEXPECTED_FINISH_REASON),
        (stream(chunk("length"), b"[DONE]"), FailureClass.NO_USAGE),
        (stream(chunk("length"), {"choices": [], "usage": {}}, b"[DONE]"), FailureClass.NO_USAGE),
        (stream(chunk("length"), {"choices": [], "usage": USAGE | {"completion_tokens": 2}}, b"[DONE]"),
         FailureClass.WRONG_TOKEN_COUNT),
        (stream(chunk("length"), {"choices": [], "usage": USAGE | {"completion_tokens": 4}}, b"[DONE]"),
         FailureClass.WRONG_TOKEN_COUNT),
        (stream(chunk("length"), {"choices": [], "usage": USAGE | {"prompt_tokens": 4}}, b"[DONE]"),
         FailureClass.WRONG_TOKEN_COUNT),
        (stream(*[chunk()] * 4, chunk("stop"), USAGE_EVENT, b"[DONE]"), FailureClass.WRONG_TOKEN_COUNT),
    ],
)  # fmt: skip
def test_each_lack_has_its_class(body: bytes, expected: FailureClass) -> None:
    assert verdict(body) == expected
    failure = judge(digest(reads([body], http_chunks=False)), ASKED)
    assert failure is not None
    assert failure.failure_class == expected


@pytest.mark.parametrize(
    ("reason", "tokens", "ignore_eos", "success"),
    [
        ("stop", 2, False, True),
        ("stop", 3, False, True),
        ("stop", 4, False, False),
        ("stop", 2, True, False),
        ("stop", 3, True, True),
        ("length", 2, False, False),
        ("length", 3, False, True),
    ],
)
def test_fewer_tokens_succeed_only_where_the_model_was_free_to_stop(
    reason: str, tokens: int, ignore_eos: bool, success: bool
) -> None:
    body = stream(chunk(reason), {"choices": [], "usage": USAGE | {"completion_tokens": tokens}}, b"[DONE]")
    assert (verdict(body, Asked(3, ignore_eos, 5)) is None) == success


def test_the_end_may_come_in_a_chunk_of_its_own_and_usage_with_each_chunk() -> None:
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
    assert verdict(stream(*[chunk()] * 3, end, USAGE_EVENT, b"[DONE]")) is None
    early = {"choices": [], "usage": {"prompt_tokens": None, "completion_tokens": 1}}
    assert verdict(stream(early, chunk("length"), USAGE_EVENT, b"[DONE]")) is None
    counted = [chunk() | {"usage": USAGE | {"completion_tokens": tokens}} for tokens in (1, 2)]
    assert verdict(stream(*counted, chunk("length"), USAGE_EVENT, b"[DONE]")) is None


def test_a_message_keeps_the_servers_words_but_not_endlessly() -> None:
    for body, words in ((stream(ERROR, b"[DONE]"), "EngineCore died"), (b"<html>" + b"x" * 10_000, "<html>xxx")):
        failure = judge(parse(body), ASKED)
        assert failure is not None
        assert words in failure.message
        assert len(failure.message) < 600


def test_text_prompts_are_not_held_to_a_prompt_length() -> None:
    assert verdict(GOOD, Asked(3, True)) is None


# --- HTTP's chunks, and the quick way through an ordinary stream ---


def framed(piece: bytes) -> bytes:
    """One HTTP chunk; none for nothing, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""


def chunked(pieces: list[bytes], trailer: bytes = b"") -> bytes:
    return b"".join(map(framed, pieces)) + b"0\r\n" + trailer + b"\r\n"


def cut(body: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(at, len(body)) for at in cuts), len(body)]
    return [body[a:b] for a, b in pairwise(edges)]


def reads(pieces: list[bytes], http_chunks: bool = True) -> Reads:
    return Reads(pieces, [float(at) for at in range(len(pieces))], http_chunks)


def by_the_parser(body: Reads) -> StreamRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "_quick", lambda _: None)
        return digest(body)


CUTS = st.lists(st.integers(0, 1500), max_size=12)


def ends(pieces: list[bytes]) -> list[int]:
    """Where each HTTP chunk ends: cut there, as servers write, a read is a chunk."""
    return list(accumulate(len(framed(piece)) for piece in pieces))


@given(
    st.lists(st.binary(max_size=40), max_size=6),
    CUTS,
    st.sampled_from([b"", b"Expires: 0\r\nX: y\r\n"]),
    st.binary(max_size=5),
)
def test_a_chunked_body_comes_out_whole_however_it_is_cut(
    pieces: list[bytes], cuts: list[int], trailer: bytes, behind: bytes
) -> None:
    reader, seen = ChunkReader(), b""
    for part in cut(chunked(pieces, trailer) + behind, cuts):
        seen += b"".join(reader.feed(part))
    assert seen == b"".join(pieces)
    assert (reader.ended, reader.behind, reader.broken) == (True, behind, False)


def test_a_body_is_not_at_its_end_before_its_last_byte() -> None:
    wire = chunked([b"a\r\n0\r\n\r\n", b"0\r\n\r\n"])
    reader = ChunkReader()
    for byte in wire[:-1]:
        reader.feed(bytes([byte]))
        assert not reader.ended
    reader.feed(wire[-1:])
    assert reader.ended


@pytest.mark.parametrize("wire", [b"zz\r\n", b"-1\r\n", b"0x5\r\nabcde", b"\r\nab", b"f" * 2000])
def test_sizes_without_sense_break_a_body(wire: bytes) -> None:
    reader = ChunkReader()
    assert reader.feed(wire) == []
    assert (reader.ended, reader.broken) == (False, True)


def broken_after(wire: bytes, cuts: list[int], skipping: bool) -> bool:
    reader = ChunkReader()
    for part in cut(wire, cuts):
        reader.skip(part) if skipping else reader.feed(part)
    return reader.broken and not reader.ended


@given(CUTS, st.booleans(), st.sampled_from([b"XX", b"\rX", b"X\n", b"\n\r", b"\n\n"]))
def test_a_chunk_that_does_not_end_where_its_size_says_breaks_a_body(
    cuts: list[int], skipping: bool, end: bytes
) -> None:
    whole = chunked([GOOD_EVENTS[0]])
    for sized in (b"3\r\nabc\r\n", b""):  # the wrong end in a later chunk, and at once
        wire = sized + whole.replace(b"\n\n\r\n0\r", b"\n\n" + end + b"0\r")
        assert broken_after(wire, cuts, skipping)
        assert broken_after(wire, [len(wire) - 5], skipping)  # one read, one chunk
    body = reads([chunked(GOOD_EVENTS).replace(b"]\n\n\r\n", b"]\n\n" + end)])
    assert judge(digest(body), ASKED) is not None


def test_a_size_may_have_an_extension() -> None:
    reader = ChunkReader()
    assert reader.feed(b"3;name=value\r\nabc\r\n0\r\n\r\n") == [b"abc"]
    assert reader.ended


@given(CUTS, st.booleans(), st.lists(st.sampled_from(range(len(GOOD_EVENTS))), max_size=4))
def test_the_quick_way_gives_the_parsers_record(cuts: list[int], by_chunk: bool, joined: list[int]) -> None:
    pieces: list[bytes] = []
    for at, each in enumerate(GOOD_EVENTS):
        if at in joined and pieces:
            pieces[-1] += each
        else:
            pieces.append(each)
    body = reads(cut(chunked(pieces), [*cuts, *ends(pieces)] if by_chunk else cuts))
    assert stream_module._quick(body) == by_the_parser(body)


def test_the_quick_way_is_taken_for_what_vllm_sends() -> None:
    at_once, by_chunk = (reads(cut(chunked(GOOD_EVENTS), cuts)) for cuts in ([], ends(GOOD_EVENTS)))
    for body in (at_once, by_chunk, by_chunk, reads(GOOD_EVENTS, http_chunks=False)):
        assert stream_module._quick(body) == by_the_parser(body)


@pytest.mark.parametrize(
    ("odd", "failure"),
    [
        ({"choices": chunk()["choices"], "error": {"message": "x"}}, FailureClass.IN_BAND_ERROR),
        ({"choices": [], "object": "error"}, FailureClass.IN_BAND_ERROR),
        (chunk("length"), FailureClass.MALFORMED_STREAM),
        (chunk(""), None),
        ({"choices": [], "object": "what another server calls it"}, None),
    ],
)
def test_what_one_event_says_counts_in_a_stream_that_is_whole_but_for_it(
    odd: dict[str, Any], failure: FailureClass | None
) -> None:
    first, _, *others = GOOD_EVENTS
    body = reads([framed(first), framed(event(odd)), *map(framed, others), b"0\r\n\r\n"])
    found = judge(digest(body), ASKED)
    assert (found and found.failure_class) == failure
    assert digest(body) == by_the_parser(body)


def test_an_empty_finish_reason_is_none() -> None:
    *chunks, _, usage, done = GOOD_EVENTS
    body = reads([chunked([*chunks, event(chunk("")), usage, done])])
    assert digest(body) == by_the_parser(body)
    assert digest(body).finish_reason is None


def wire_chunks() -> list[bytes]:
    """What vLLM writes, a chunk each; the last ends the body."""
    return [*map(framed, GOOD_EVENTS), b"0\r\n\r\n"]


def not_taken(pieces: list[bytes]) -> None:
    """See that a body that is none fails as the parser has it."""
    known = by_the_parser(reads(pieces))
    assert known.malformed is not None
    assert digest(reads(pieces)) == known


def test_what_looks_like_a_chunk_in_the_middle_of_one_is_not_taken_for_it() -> None:
    first, *others = wire_chunks()
    not_taken([first, b"%x\r\n" % len(GOOD_EVENTS[1]), others[0], GOOD_EVENTS[1] + b"\r\n", *others[1:]])


def test_what_looks_like_an_event_in_the_middle_of_one_is_not_taken_for_it() -> None:
    first, *others = wire_chunks()
    not_taken([framed(GOOD_EVENTS[0][:9]), first, framed(GOOD_EVENTS[0][9:]), *others])


@pytest.mark.parametrize(
    "wrong",
    [
        (b"\n\n\r\n", b"\nx\r\n"),
        (b"\n\n\r\n", b"\n\nxx"),
        (b"", b"1"),
        (b", ", b",\n"),
        (b", ", b",\r"),
        (b'"text"', b'"tex\xff"'),
    ],
)
def test_what_is_not_quite_a_chunk_of_one_event_is_not_taken_for_it(wrong: tuple[bytes, bytes]) -> None:
    first, second, *others = wire_chunks()
    assert second.replace(*wrong, 1) != second
    not_taken([first, second.replace(*wrong, 1), *others])


@pytest.mark.parametrize("end", [b"zz\r\n", b"4\r\njunk\r\n0\r\n\r\n"])
def test_junk_behind_the_last_event_is_seen(end: bytes) -> None:
    *events, _ = wire_chunks()
    not_taken([*events, end])


@pytest.mark.parametrize("odd", [b'"%b"' % (b"x" * 2**20), b"1" * 5000])
def test_what_only_the_parser_refuses_is_long(odd: bytes) -> None:
    """An event too long, a number of too many digits."""
    long = event(b'{"choices": [], "x": %b}' % odd)
    not_taken([framed(long), *wire_chunks()])


def test_an_event_without_a_chunk_is_not_taken_for_one() -> None:
    first, _, *others = wire_chunks()
    bare = event(b'{"choices": [], "x": "' + b"x" * 228 + b'"}') + b"\r\n"
    assert len(bare) == 262  # no chunk has so many
    not_taken([first, bare, *others])


def test_a_chunk_where_there_are_none_is_not_taken_for_one() -> None:
    first, *others = GOOD_EVENTS
    body = reads([first, wire_chunks()[0], *others], http_chunks=False)
    assert by_the_parser(body).malformed is not None
    assert digest(body) == by_the_parser(body)


def test_a_size_line_that_looks_like_an_event_is_not_taken_for_one() -> None:
    line = b'16;aaaa{"choices":[]}\n\n\r'
    first, *others = wire_chunks()
    not_taken([first, line + b"\n", *others])


def test_an_object_cut_over_two_events_beside_two_in_one_is_not_taken_for_a_whole_stream() -> None:
    odd = [event(b'{"choices": [], "x": '), event(b"{}}"), event(b'{"choices": []}{"choices": []}')]
    body = reads([chunked([*GOOD_EVENTS[:1], *odd, *GOOD_EVENTS[1:]])])
    assert digest(body) == by_the_parser(body)
    assert digest(body).malformed is not None


# --- chats ---

PREFACE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}


def said(delta: Any, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


CHAT_EVENTS = [
    event(PREFACE),
    event(said({"content": "é"})),
    event(said({"content": ""})),  # a token without text of its own: half a letter, say
    event(said({"content": "x"}, "length")),
    event({"choices": [], "usage": USAGE}),
    event(b"[DONE]"),
]


def test_a_chats_first_token_is_not_the_chunk_that_names_the_role() -> None:
    record = parse(*CHAT_EVENTS)
    assert record.chunk_at_s == [1.0, 2.0, 3.0]
    assert judge(record, Asked(3, True)) is None


@pytest.mark.parametrize(
    ("delta", "reason", "is_token"),
    [
        ({"role": "assistant", "content": ""}, None, False),
        ({"role": "assistant", "content": None}, None, False),
        ({"role": "assistant"}, None, False),
        ({}, None, False),
        ({"content": None}, None, False),
        ({"role": "assistant", "content": "a"}, None, True),  # some servers name the role with every token
        ({"content": ""}, None, True),
        ({"reasoning": "a"}, None, True),
        ({"role": "assistant", "reasoning_content": "a", "content": None}, None, True),
        ({"tool_calls": [{"index": 0}]}, None, True),
        ({}, "stop", True),
        ({"role": "assistant", "content": ""}, "length", True),
        (None, None, True),
    ],
)
def test_a_chunk_of_a_chat_counts_where_it_carries_a_token_or_the_end(
    delta: Any, reason: str | None, is_token: bool
) -> None:
    body = reads([chunked([event(said(delta, reason)), event(b"[DONE]")])])
    assert len(by_the_parser(body).chunk_at_s) == is_token
    assert stream_module._quick(body) == by_the_parser(body)


@pytest.mark.parametrize("delta", [3, ["a"], "a", True])
def test_a_delta_that_is_no_object_is_malformed(delta: Any) -> None:
    assert verdict(stream(said(delta), said({}, "length"), USAGE_EVENT, b"[DONE]")) == FailureClass.MALFORMED_STREAM


def test_the_quick_way_is_taken_for_vllms_chats_too() -> None:
    body = reads([chunked(CHAT_EVENTS)])
    assert stream_module._quick(body) == by_the_parser(body)
    assert len(digest(body).chunk_at_s) == 3


@given(st.dictionaries(st.sampled_from(["role", "content", "reasoning", "tool_calls", "x"]), json_values))
def test_any_delta_is_read_the_same_both_ways(delta: dict[str, Any]) -> None:
    body = reads([chunked([*CHAT_EVENTS[:2], event(said(delta)), *CHAT_EVENTS[2:]])])
    assert digest(body) == by_the_parser(body)


ODD_COUNTS = ({"prompt_tokens": 4}, {"completion_tokens": 2}, {"prompt_tokens": None}, {"completion_tokens": None})
PARTS = st.one_of(
    st.sampled_from(CHAT_EVENTS),
    st.sampled_from([event(said(odd)) for odd in (None, 3, [], {"content": 3}, {"role": 3}, {"content": "\ud800"})]),
    st.sampled_from(
        [*GOOD_EVENTS, event(ERROR), event({"object": "error", "choices": []}), event({"choices": [], "usage": {}}),
         *(event({"choices": [], "usage": {"completion_tokens": odd}}) for odd in (3.0, True, -1, 2**63, None, "3")),
         *(event({"choices": [], "usage": USAGE | odd}) for odd in ODD_COUNTS),
         *(event({"choices": [{"index": odd, "text": "a"}]}) for odd in (1, -1, None, "0", 0.0, False)),
         event({"choices": chunk()["choices"] * 2}), event({"choices": [{"finish_reason": 1}]}),
         event({"choices": [3]}), event(b"{}"), event(b"[]"), event(b"{"),
         b": comment\n\n", b"event: error\n", b"data:x\n\n", b"\r\n", b"\n", b"\xff"]
    ),
    st.binary(max_size=6),
)  # fmt: skip


@given(st.lists(PARTS, max_size=8), CUTS, st.booleans(), st.booleans(), st.integers(0, 40))
def test_whatever_comes_both_ways_agree_and_neither_raises(
    pieces: list[bytes], cuts: list[int], http_chunks: bool, by_chunk: bool, lost: int
) -> None:
    wire = chunked(pieces) if http_chunks else b"".join(pieces)
    body = reads(cut(wire[: max(len(wire) - lost, 0)], [*cuts, *ends(pieces)] if by_chunk else cuts), http_chunks)
    known = by_the_parser(body)
    assert digest(body) == known


def test_an_event_cut_by_a_chunk_is_stamped_by_its_last_byte() -> None:
    head, tail = GOOD_EVENTS[0][:9], GOOD_EVENTS[0][9:]
    wire = chunked([head, tail, *GOOD_EVENTS[1:]])
    at = wire.index(tail) + len(tail)
    assert digest(reads([wire[: at - 1], wire[at - 1 :]])).chunk_at_s == [1.0, 1.0, 1.0]


@given(
    st.lists(st.integers(0, 40), max_size=6),
    CUTS,
    st.sampled_from([b"%x", b"%04x", b"%X;q=1"]),
    st.sampled_from([b"", b"more"]),
)
def test_skipping_finds_the_same_end_as_reading(sizes: list[int], cuts: list[int], line: bytes, behind: bytes) -> None:
    body = b"".join(line % n + b"\r\n" + b"x" * n + b"\r\n" for n in sizes if n) + b"0\r\n\r\n" + behind
    reading, skipping = ChunkReader(), ChunkReader()
    for part in cut(body, cuts):
        reading.feed(part)
        assert skipping.skip(part) == reading.ended
    assert (skipping.ended, skipping.behind) == (True, behind)


def test_a_chunks_first_line_is_told_by_its_length() -> None:
    for length in range(10_000):
        for line in size_lines(length):
            whole = line + b"x" * (length - len(line) - 2) + b"\r\n"
            assert len(whole) == length
            assert ChunkReader().feed(whole) == [whole[len(line) : -2]]
    none = [length for length in range(10_000) if not size_lines(length)]
    assert none == [0, 1, 2, 3, 4, 5, 21, 262, 4103]  # too short, or between the longest of so many digits and the next


def test_a_size_line_cut_between_its_line_ends_is_not_lost() -> None:
    reader = ChunkReader()
    parts = (b"4\r", b"\nabcd\r\n", b"4\r\nabcd\r\n0\r\n\r\n")
    assert [reader.skip(part) for part in parts] == [False, False, True]


@pytest.mark.parametrize(
    "parts",
    [
        (b"1", b"4\r\nabcd\r\n", b"x" * 14 + b"\r\n", b"0\r\n\r\n"),  # in a size line
        (b"14\r\n", b"4\r\nabcd\r\n", b"x" * 11 + b"\r\n", b"0\r\n\r\n"),  # in a chunk
        (b"0\r\n", b"4\r\n\r\nab\r\n"),  # in what follows the last chunk: a line, and the end
    ],
)
def test_a_read_that_looks_like_a_chunk_is_none_in_the_middle_of_something(parts: tuple[bytes, ...]) -> None:
    reader = ChunkReader()
    assert [reader.skip(part) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert not reader.broken


def test_deep_nesting_is_malformed_on_the_quick_way_too() -> None:
    deep = event(b'{"choices": [], "x": ' + b"[" * 5000 + b"]" * 5000 + b"}")
    body = reads([chunked([GOOD_EVENTS[0], deep, *GOOD_EVENTS[1:]])])
    assert judge(digest(body), ASKED) is None or digest(body).malformed
    assert digest(body) == by_the_parser(body)
