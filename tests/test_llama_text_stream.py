"""Ids to text: stop strings across token borders, whole characters, limits, log-probabilities."""

from __future__ import annotations

import codecs
import random

import pytest

from coreinfer.text_stream import StopWatcher, TextStream


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: read character by character, stop where a stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [end - len(s) for s in stops if text[:end].endswith(s)]
        if complete:
            return text[: min(complete)], True
    return text, False


def feed(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    watcher, shown = StopWatcher(stops), []
    for piece in pieces:
        text, stopped = watcher.push(piece)
        shown.append(text)
        if stopped:
            return shown, True
    shown.append(watcher.flush())
    return shown, False


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "stopped"),
    [
        (["Hello"], [], ["Hello", ""], False),
        (["a", "END", "b"], ["END"], ["a", ""], True),
        (["aE", "N", "Db"], ["END"], ["a", "", ""], True),
        (["aE", "N", "Xb"], ["END"], ["a", "", "ENXb", ""], False),
        (["aEN"], ["END"], ["a", "EN"], False),
        (["aEEN", "D"], ["END"], ["aE", ""], True),
        (["abc"], ["abc", "b"], ["a"], True),  # "b" is complete first
        (["abc"], ["bc", "c"], ["a"], True),  # complete together: the longer
        (["aa", "b"], ["aab", "b"], ["", ""], True),
        (["\n", "\n"], ["\n\n"], ["", ""], True),
    ],
)
def test_stop_strings_end_the_text_and_nothing_of_them_is_shown(pieces, stops, shown, stopped):
    assert feed(pieces, stops) == (shown, stopped)


def test_the_text_does_not_depend_on_where_it_is_cut():
    rng = random.Random(5)
    for _ in range(3000):
        text = "".join(rng.choice("ab\n") for _ in range(rng.randint(0, 20)))
        stops = ["".join(rng.choice("ab\n") for _ in range(rng.randint(1, 4))) for _ in range(2)]
        pieces, at = [], 0
        while at < len(text):
            n = rng.randint(0, 5)
            pieces.append(text[at : at + n])
            at += n
        shown, stopped = feed(pieces, stops)
        assert ("".join(shown), stopped) == cut_at_first_stop(text, stops), (pieces, stops)


def test_empty_stop_strings_are_refused():
    with pytest.raises(ValueError, match="expected strings that are not empty"):
        StopWatcher(["a", ""])
    with pytest.raises(ValueError, match="expected strings"):
        StopWatcher([b"a"])


class ByteDecoder:
    """Token i is byte i."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def stream(data: bytes, *, stops=(), max_tokens=None, logprobs=None, closed=None) -> TextStream:
    def source():
        try:
            yield from data
        finally:
            if closed is not None:
                closed.append(True)

    return TextStream(
        source(), ByteDecoder(), frozenset({0}), StopWatcher(stops), max_tokens, logprobs
    )


def test_an_end_token_stops_and_is_not_part_of_the_answer():
    answer = stream(b"ab\0cd")
    assert "".join(text for text, _ in answer) == "ab"
    assert (answer.text, answer.ids, answer.finish_reason) == ("ab", [97, 98], "stop")


def test_a_used_up_source_or_limit_is_length():
    answer = stream(b"abcd", max_tokens=3)
    assert [text for text, _ in answer] == ["a", "b", "c"]
    assert answer.finish_reason == "length"
    answer = stream(b"ab")
    list(answer)
    assert answer.finish_reason == "length"


def test_a_criterion_that_ends_the_source_is_a_stop():
    def source():
        yield 97
        return True

    answer = TextStream(source(), ByteDecoder(), frozenset({0}), StopWatcher([]), None)
    assert [text for text, _ in answer] == ["a"] and answer.finish_reason == "stop"


def test_never_shows_half_a_character():
    answer = stream("aé€😀".encode())
    assert [text for text, _ in answer] == ["a", "é", "€", "😀"]
    cut = stream("a😀".encode()[:-1])
    assert [text for text, _ in cut] == ["a", "\ufffd"]


def test_the_beginning_of_a_stop_string_is_shown_when_nothing_follows():
    answer = stream(b"abEN", stops=["END"])
    assert [text for text, _ in answer] == ["a", "b", "EN"]
    assert answer.finish_reason == "length"
    answer = stream(b"abEN\0", stops=["END"])
    assert "".join(text for text, _ in answer) == "abEN"
    assert answer.finish_reason == "stop"


def test_logprobs_come_with_the_text_of_their_token():
    answer = stream("aé.END".encode(), stops=["END"], logprobs=lambda t: (-float(t), []))
    got = [(text, [i.token for i in infos]) for text, infos in answer]
    assert got == [("a", [97]), ("é", [0xC3, 0xA9]), (".", [46])]
    answer = stream("aé.END".encode(), stops=["END"], logprobs=lambda t: (-float(t), []))
    infos = [info for _, new in answer for info in new]
    assert [info.offset for info in infos] == [0, 1, 1, 2]
    assert [info.logprob for info in infos] == [-97.0, -195.0, -169.0, -46.0]


def test_the_source_is_closed_when_the_reader_stops_early():
    closed: list[bool] = []
    answer = iter(stream(b"abcdef", closed=closed))
    next(answer)
    answer.close()
    assert closed == [True]
