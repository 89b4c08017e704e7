"""Tokenization: ids equal llama.cpp's, bytes come back, and malformed vocabularies are refused."""

from __future__ import annotations

import copy
import json
import random
import time

import numpy as np
import pytest

from coreinfer.tokenizer import Tokenizer, TokenizerError
from gguf_metadata import read_metadata

GGML = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# GPT-2 writes the bytes that print as themselves and the other 68 as U+0100 and following.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in PRINTABLE]
ALPHABET = [chr(b) if b in PRINTABLE else chr(256 + HIDDEN.index(b)) for b in range(256)]


def byte_level(pre="gpt-2", merges=(), extra=(), **more):
    """Metadata of a byte-level vocabulary: bytes, what `merges` make, and (text, type) extras."""
    tokens = list(ALPHABET)
    for merge in merges:
        if (joint := merge.replace(" ", "")) not in tokens:
            tokens.append(joint)
    types = [NORMAL] * len(tokens) + [kind for _, kind in extra]
    tokens += [text for text, _ in extra]
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
    metadata |= {"merges": list(merges), **more}
    return {GGML + key: value for key, value in metadata.items()}


def sentencepiece(pieces, extra=(), bytes_from=0, **more):
    """Metadata of a scored vocabulary: <unk> <s> </s>, byte tokens, {text: score}, extras."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(bytes_from, 256)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * (256 - bytes_from)
    scores = [0.0] * len(tokens) + list(pieces.values()) + [-1000.0] * len(extra)
    types += [NORMAL] * len(pieces) + [kind for _, kind in extra]
    tokens += [*pieces, *(text for text, _ in extra)]
    metadata = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, **more}
    return {GGML + key: value for key, value in metadata.items()}


WORDS = {"▁": -9.0, "a": -1.0, "b": -2.0, "ab": -3.0, "▁ab": -4.0, "ba": -5.0, "▁▁": -6.0}


def texts(metadata, ids):
    return [metadata[GGML + "tokens"][i] for i in ids]


def random_texts(seed, count):
    """Strings of any code points but surrogates, of common ones, and of runs."""
    rng = random.Random(seed)

    def char():
        while True:
            code = rng.randrange(rng.choice((0x80, 0x800, 0x10000, 0x110000)))
            if not 0xD800 <= code < 0xE000:
                return chr(code)

    for _ in range(count):
        kind = rng.randrange(3)
        if kind == 0:
            yield "".join(char() for _ in range(rng.randrange(40)))
        elif kind == 1:
            yield "".join(rng.choice("abh e1'\n\t.▁<>") for _ in range(rng.randrange(60)))
        else:
            yield char() * rng.randrange(50) + " " * rng.randrange(9)


# Goldens: llama.cpp's ids.


def check_golden(path, golden_file):
    golden = json.loads(golden_file.read_text("utf-8"))
    tokenizer = Tokenizer.from_metadata(read_metadata(path))
    assert len(golden["tokenize"]) > 100
    for entry in golden["tokenize"]:
        data = entry["text"].encode("utf-8")
        ids = tokenizer.tokenize(data, entry["add_bos"], entry["special"])
        assert ids == entry["ids"], entry["text"]
        assert tokenizer.detokenize(ids, special=True) == data


def test_ids_equal_llama_cpp_for_smollm2(shared_dir, smollm2_path):
    check_golden(smollm2_path, shared_dir / "golden" / "smollm2-135m-instruct-q4_1.json")


def test_ids_equal_llama_cpp_for_qwen(shared_dir, qwen_path):
    check_golden(qwen_path, shared_dir / "golden" / "qwen2.5-coder-0.5b-instruct-q4_k_m.json")


@pytest.fixture(scope="session", params=["gpt-2", "llama-bpe", "llama-spm"])
def real_vocabulary(request, shared_dir):
    folder = shared_dir / "golden" / "vocab"
    metadata = read_metadata(folder / f"{request.param}.gguf")
    return request.param, folder, Tokenizer.from_metadata(metadata)


def test_ids_equal_llama_cpp_for_its_own_test_strings(real_vocabulary):
    name, folder, tokenizer = real_vocabulary
    inputs = (folder / f"{name}.inp").read_bytes().split(b"\n__ggml_vocab_test__\n")
    outputs = (folder / f"{name}.out").read_text().split("\n")[: len(inputs)]
    assert len(inputs) == len(outputs) > 40
    for data, line in zip(inputs, outputs, strict=True):
        assert tokenizer.tokenize(data, add_bos=False) == [int(i) for i in line.split()], data


def test_real_vocabularies_give_random_text_and_bytes_back(real_vocabulary):
    _, _, tokenizer = real_vocabulary
    for text in random_texts(1, 400):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text.encode("utf-8")
    rng = random.Random(2)
    for _ in range(400):
        data = rng.randbytes(rng.randrange(30)) + rng.choice([b"", b" \xe2\x96", b"a\xf0\x9f\x98"])
        assert tokenizer.detokenize(tokenizer.tokenize(data)) == data


def test_real_vocabularies_are_built_in_seconds(real_vocabulary):
    """128,000 tokens and 280,000 merges take about 0.7 s; the bound allows for a busy machine."""
    name, folder, _ = real_vocabulary
    metadata = read_metadata(folder / f"{name}.gguf")
    start = time.monotonic()
    Tokenizer.from_metadata(metadata)
    assert time.monotonic() - start < 10


# Byte-level vocabularies.


def test_merges_apply_by_rank_and_leftmost_first():
    metadata = byte_level(merges=["b c", "a b", "a bc", "c c"])
    tokenizer = Tokenizer.from_metadata(metadata)
    assert texts(metadata, tokenizer.tokenize("abc")) == ["abc"]
    assert texts(metadata, tokenizer.tokenize("abab")) == ["ab", "ab"]
    assert texts(metadata, tokenizer.tokenize("ccc")) == ["cc", "c"]


DIGITS = ["1 2", "12 3", "123 4", "Ġ 1234", "Ġ 1"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Ġ1234"]),
        ("smollm", ["Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["Ġ", "123", "4"]),
        ("tekken", ["Ġ", "1", "2", "3", "4"]),
        ("gpt-4o", ["Ġ", "123", "4"]),
        ("default", ["Ġ", "123", "4"]),
    ],
)
def test_pre_tokenizers_cut_digits_as_their_models_do(pre, expected):
    metadata = byte_level(pre, DIGITS, bos_token_id=0, eos_token_id=0, add_bos_token=False)
    assert texts(metadata, Tokenizer.from_metadata(metadata).tokenize(" 1234")) == expected


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "'S", ["'", "S"]),
        ("qwen2", "'S", ["'S"]),
        ("gpt-2", ".\n", [".", "Ċ"]),
        ("qwen2", ".\n", [".Ċ"]),
        ("qwen2", "\n\nb", ["ĊĊ", "b"]),
        ("gpt-2", "  b", ["Ġ", "Ġb"]),
        ("smollm", "  b", ["Ġ", "Ġb"]),
        ("qwen2", ".b", [".b"]),
        ("gpt-2", ".b", [".", "b"]),
        ("default", "$b", ["$", "b"]),
        ("default", "`b", ["`", "b"]),
        ("tekken", "bS", ["b", "S"]),
        ("qwen2", "bS", ["bS"]),
        ("gpt-4o", "bS", ["b", "S"]),
        ("gpt-4o", "b'S", ["b'S"]),
        ("tekken", "b'S", ["b", "'S"]),
    ],
)
def test_pre_tokenizers_cut_words_as_their_models_do(pre, text, expected):
    merges = ["' S", ". Ċ", "Ċ Ċ", "ĊĊ b", "Ġ Ġ", "Ġ b", ". b", "$ b", "b S", "b 'S"]
    metadata = byte_level(pre, merges, bos_token_id=0, add_bos_token=False)
    assert texts(metadata, Tokenizer.from_metadata(metadata).tokenize(text)) == expected


def test_words_that_are_tokens_need_no_merges_where_the_model_says_so():
    extra = [("abc", NORMAL), ("<s>", CONTROL)]
    for pre, expected in [("llama3", ["abc"]), ("smaug-bpe", ["a", "b", "c"])]:
        metadata = byte_level(pre, extra=extra, bos_token_id=257, add_bos_token=False)
        assert texts(metadata, Tokenizer.from_metadata(metadata).tokenize("abc")) == expected


@pytest.mark.parametrize(("pre", "adds"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_bos_is_added_by_default_only_where_the_model_expects_it(pre, adds):
    extra = [("<s>", CONTROL), ("</s>", CONTROL)]
    metadata = byte_level(pre, extra=extra, bos_token_id=256, eos_token_id=257)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.add_bos is adds
    assert tokenizer.tokenize("") == [256] * adds
    assert tokenizer.tokenize("", add_bos=False) == []
    for flag in (True, False):
        given = Tokenizer.from_metadata({**metadata, GGML + "add_bos_token": flag})
        assert given.tokenize(b"") == [256] * flag


def test_eos_is_added_with_bos_where_the_model_asks_for_it():
    metadata = byte_level(extra=[("</s>", CONTROL)], eos_token_id=256, add_eos_token=True)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.tokenize("a") == [ALPHABET.index("a"), 256]
    assert tokenizer.tokenize("a", add_bos=False) == [ALPHABET.index("a")]


def test_byte_level_gives_any_text_and_any_bytes_back():
    tokenizer = Tokenizer.from_metadata(byte_level("qwen2", ["h e", "Ġ a", "Ã ©", "ð Ł", "ðŁ ĺ"]))
    rng = random.Random(3)
    for text in random_texts(4, 500):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text.encode("utf-8")
    for _ in range(500):
        data = rng.randbytes(rng.randrange(40))
        assert tokenizer.detokenize(tokenizer.tokenize(data)) == data


def test_bytes_that_are_not_utf8_become_the_tokens_of_those_bytes():
    metadata = byte_level(merges=["Ã ©", "a b"])
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.tokenize(b"\xff") == [255]
    assert texts(metadata, tokenizer.tokenize(b"ab\xc3ab")) == ["ab", "Ã", "ab"]
    assert texts(metadata, tokenizer.tokenize(b"\xc3\xa9")) == ["Ã©"]
    assert tokenizer.tokenize("\udcff") == [255]  # how Python hands on such bytes from the system
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.tokenize("\ud800")
    with pytest.raises(TypeError, match="bytes or str"):
        tokenizer.tokenize(["a"])


def test_bytes_without_a_token_are_left_out_and_keep_neighbours_apart():
    metadata = byte_level(merges=["a b"])
    tokens = metadata[GGML + "tokens"]
    tokens[tokens.index("c")] = "something else"
    tokenizer = Tokenizer.from_metadata(metadata)
    assert texts(metadata, tokenizer.tokenize("acb")) == ["a", "b"]
    assert texts(metadata, tokenizer.tokenize("ab")) == ["ab"]


def test_user_defined_text_is_written_as_it_stands_and_byte_tokens_as_bytes():
    extra = [("éé", USER_DEFINED), ("<0x41>", BYTE), ("naïve text", NORMAL), ("[more]", UNUSED)]
    tokenizer = Tokenizer.from_metadata(byte_level(extra=extra))
    written = [tokenizer.token_bytes(256 + i) for i in range(4)]
    assert written == ["éé".encode(), b"A", "naïve text".encode(), b"[more]"]


# Special tokens.


@pytest.fixture
def marked():
    extra = [("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<tool>", USER_DEFINED)]
    return Tokenizer.from_metadata(
        byte_level(extra=[*extra, ("<tool><tool>", USER_DEFINED), ("<?>", UNKNOWN)])
    )


def test_control_tokens_are_read_only_on_request(marked):
    text = "<|im_start|>a<|im_end|>"
    assert marked.tokenize(text, special=True) == [256, ALPHABET.index("a"), 257]
    ids = marked.tokenize(text)
    assert not {256, 257} & set(ids)
    assert marked.detokenize(ids) == text.encode()
    assert marked.tokenize("<?>", special=True) == [260]
    assert 260 not in marked.tokenize("<?>")


def test_user_defined_tokens_are_always_read_the_longest_first(marked):
    assert marked.tokenize("<tool>") == [258]
    assert marked.tokenize("<tool><tool><tool>") == [259, 258]
    assert marked.detokenize([259, 258]) == b"<tool><tool><tool>"


def test_longer_marks_win_over_earlier_ones():
    extra = [("[ab", USER_DEFINED), ("abc]", USER_DEFINED)]
    tokenizer = Tokenizer.from_metadata(byte_level(extra=extra))
    assert tokenizer.tokenize("[abc]") == [ALPHABET.index("["), 257]


def test_control_tokens_are_written_only_on_request(marked):
    ids = [256, ALPHABET.index("a"), 257, 258]
    assert marked.detokenize(ids) == b"a<tool>"
    assert marked.detokenize(ids, special=True) == b"<|im_start|>a<|im_end|><tool>"
    assert marked.token_bytes(256) == b""
    assert marked.token_bytes(256, special=True) == b"<|im_start|>"


def test_phi3_marks_swallow_the_white_space_behind_them(marked):
    metadata = byte_level(extra=[("<|end|>", CONTROL), ("<s>", CONTROL)])
    plain = Tokenizer.from_metadata(metadata)
    phi = Tokenizer.from_metadata({**metadata, "general.name": "Phi-3 mini"})
    for text in ("<|end|> \n a", "<|end|>a"):
        assert phi.tokenize(text, special=True) == [256, ALPHABET.index("a")]
    assert len(plain.tokenize("<|end|> \n a", special=True)) == 5
    assert len(phi.tokenize("<s> a", special=True)) == 3


def test_end_ids_hold_every_mark_that_ends_a_generation():
    extra = [("<|endoftext|>", CONTROL), ("<|im_end|>", CONTROL), ("<|eom_id|>", USER_DEFINED)]
    extra += [("<|file_sep|>", CONTROL), ("<|im_start|>", CONTROL)]
    tokenizer = Tokenizer.from_metadata(byte_level(extra=extra, eos_token_id=256))
    assert tokenizer.end_ids == {256, 257, 258, 259}
    assert (tokenizer.eos_id, tokenizer.eot_id, tokenizer.eom_id) == (256, 257, 258)
    assert tokenizer.bos_id is None
    assert tokenizer.token_bytes(258) == b""  # a mark, although the file has it as plain text


def test_marks_that_merges_build_are_ordinary_text():
    metadata = byte_level(merges=["< /", "</ s", "</s >"], extra=[("<|im_end|>", CONTROL)])
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.end_ids == {metadata[GGML + "tokens"].index("<|im_end|>")}
    assert tokenizer.detokenize(tokenizer.tokenize("<b></s>")) == b"<b></s>"


# SentencePiece vocabularies.


def naive_merge(text, scores):
    """The definition, word for word: join the best pair, the leftmost of equals, until none."""
    pieces = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:]))  # noqa: B905
                 if a + b in scores]  # fmt: skip
        if not pairs:
            return pieces
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("ties", ["none", "some", "all"])
def test_sentencepiece_merges_by_score_then_leftmost(ties):
    rng = random.Random(5)
    for _ in range(30):
        made = {"".join(rng.choices("ab▁", k=rng.randrange(2, 6))) for _ in range(30)}
        pieces = dict.fromkeys(["▁", "a", "b", *sorted(made)])
        scores = rng.sample(range(1000), len(pieces))
        for text, score in zip(pieces, scores, strict=True):
            pieces[text] = {"none": -score, "some": -(score % 5), "all": 0}[ties] * 1.0
        metadata = sentencepiece(pieces, add_space_prefix=False, add_bos_token=False)
        tokenizer = Tokenizer.from_metadata(metadata)
        for _ in range(30):
            text = "".join(rng.choices("aab ", k=rng.randrange(30)))
            expected = naive_merge(text.replace(" ", "▁"), pieces)
            assert texts(metadata, tokenizer.tokenize(text)) == expected


def test_sentencepiece_puts_a_space_before_text_and_takes_it_away_again():
    metadata = sentencepiece(WORDS)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert texts(metadata, tokenizer.tokenize("ab ab")) == ["<s>", "▁ab", "▁ab"]
    assert texts(metadata, tokenizer.tokenize("  ab")) == ["<s>", "▁▁", "▁ab"]
    assert tokenizer.tokenize("") == [1]
    assert tokenizer.detokenize(tokenizer.tokenize(" ab")) == b" ab"
    continued = tokenizer.tokenize("ab", add_bos=False)
    assert tokenizer.detokenize(continued) == b" ab"  # ids without BOS continue a text
    without = Tokenizer.from_metadata({**metadata, GGML + "add_space_prefix": False})
    assert texts(metadata, without.tokenize("ab")) == ["<s>", "ab"]


def test_sentencepiece_puts_a_space_after_special_tokens():
    metadata = sentencepiece(WORDS, extra=[("<x>", USER_DEFINED)])
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.tokenize("ab<x>ab</s>ab", special=True)
    assert texts(metadata, ids) == ["<s>", "▁ab", "<x>", "▁ab", "</s>", "▁ab"]
    assert tokenizer.detokenize(ids[1:], special=True) == b" ab<x>ab</s>ab"
    plain = tokenizer.tokenize("ab<x>ab")
    assert tokenizer.detokenize(plain) == b"ab<x>ab"


def test_sentencepiece_writes_unknown_characters_as_bytes():
    metadata = sentencepiece(WORDS)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert texts(metadata, tokenizer.tokenize("aé")) == ["<s>", "▁", "a", "<0xC3>", "<0xA9>"]
    assert texts(metadata, tokenizer.tokenize(b"a\xff\x00")) == [
        "<s>", "▁", "a", "<0xFF>", "<0x00>"
    ]  # fmt: skip
    for text in random_texts(6, 500):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text.encode("utf-8")
    rng = random.Random(7)
    for _ in range(500):
        data = rng.randbytes(rng.randrange(40))
        assert tokenizer.detokenize(tokenizer.tokenize(data)) == data


def test_sentencepiece_keeps_the_space_sign_apart_from_spaces():
    tokenizer = Tokenizer.from_metadata(sentencepiece(WORDS))
    assert tokenizer.detokenize(tokenizer.tokenize("a▁b a")) == "a▁b a".encode()
    assert tokenizer.tokenize("a b") != tokenizer.tokenize("a▁b")


def test_characters_of_merged_tokens_need_no_token_of_their_own():
    metadata = sentencepiece({"▁": -1.0, "xy": -2.0})
    tokenizer = Tokenizer.from_metadata(metadata)
    assert texts(metadata, tokenizer.tokenize("xyx")) == ["<s>", "▁", "xy", "<0x78>"]


def test_sentencepiece_without_byte_tokens_uses_unknown_or_says_so():
    metadata = sentencepiece({"▁": -1.0, "a": -2.0}, bytes_from=256)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert texts(metadata, tokenizer.tokenize("aééa")[2:]) == ["a", "<unk>", "<unk>", "a"]
    metadata[GGML + "tokens"] = metadata[GGML + "tokens"][3:]
    metadata[GGML + "token_type"] = [NORMAL] * 2
    metadata[GGML + "scores"] = [0.0, 0.0]
    metadata |= {GGML + "add_bos_token": False}
    tokenizer = Tokenizer.from_metadata(metadata)  # too small for the usual ids of <unk> and </s>
    assert tokenizer.unknown_id == 0 and tokenizer.eos_id is None


def test_text_never_merges_into_a_control_token():
    pieces = {**WORDS, "<": -7.0, "s": -8.0, ">": -9.5, "<s": -10.0}
    tokenizer = Tokenizer.from_metadata(sentencepiece(pieces, add_space_prefix=False))
    assert 1 not in tokenizer.tokenize("<s>", add_bos=False)
    assert tokenizer.detokenize(tokenizer.tokenize("<s>", add_bos=False)) == b"<s>"
    assert tokenizer.tokenize("<s>", add_bos=False, special=True) == [1]


def test_sentencepiece_defaults_are_llama_2s():
    tokenizer = Tokenizer.from_metadata(sentencepiece(WORDS))
    assert (tokenizer.unknown_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.add_bos and not tokenizer.add_eos
    assert tokenizer.end_ids == {2}


# Streaming.


def test_streaming_never_emits_half_a_character():
    tokenizer = Tokenizer.from_metadata(byte_level("qwen2", ["ð Ł", "Ġ a"]))
    for text in random_texts(8, 300):
        decoder = tokenizer.stream_decoder()
        parts = [decoder.push(id) for id in tokenizer.tokenize(text)]
        assert "".join(parts) == text
        assert decoder.finish() == ""
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)


def test_streaming_replaces_what_can_never_become_a_character():
    tokenizer = Tokenizer.from_metadata(byte_level())
    decoder = tokenizer.stream_decoder()
    pushed = "".join(decoder.push(b) for b in tokenizer.tokenize(b"a\xffb\xf0\x9f\x98"))
    assert pushed == "a\ufffdb"
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""
    assert decoder.push(ALPHABET.index("a")) == "a"


def test_streaming_continues_a_text_as_detokenize_does():
    metadata = sentencepiece(WORDS, extra=[("<x>", USER_DEFINED), ("<c>", CONTROL)])
    tokenizer = Tokenizer.from_metadata(metadata)
    rng = random.Random(9)
    for special in (False, True):
        for _ in range(100):
            ids = rng.choices(range(2, tokenizer.n_vocab), k=20)  # without BOS
            decoder = tokenizer.stream_decoder(special)
            streamed = "".join([*(decoder.push(i) for i in ids), decoder.finish()])
            assert streamed == tokenizer.detokenize(ids, special).decode("utf-8", "replace")


def test_ids_outside_the_vocabulary_are_refused():
    tokenizer = Tokenizer.from_metadata(byte_level())
    for id in (-1, 256):
        with pytest.raises(TokenizerError, match=f"token id {id} is outside 0 to 255"):
            tokenizer.detokenize([id])
        with pytest.raises(TokenizerError, match="outside"):
            tokenizer.stream_decoder().push(id)


# Long input.


@pytest.mark.parametrize("unit", ["a", " ", "\n", "é", "<", "ab ", b"\xff", b"a\xff"])
@pytest.mark.parametrize("kind", ["bytes", "scores", "ties"])
def test_long_input_takes_seconds(unit, kind):
    """A third of a megabyte takes well below a second; quadratic work would take hours."""
    if kind == "bytes":
        metadata = byte_level("qwen2", ["a a", "aa aa", "Ġ Ġ", "Ċ Ċ", "Ã ©"], [("<x>", CONTROL)])
    else:
        pieces = dict.fromkeys(WORDS, 0.0) if kind == "ties" else WORDS
        metadata = sentencepiece({**pieces, "aa": 0.0, "aaaa": -0.5}, [("<x>", USER_DEFINED)])
    tokenizer = Tokenizer.from_metadata(metadata)
    data = unit * (333_333 // len(unit))
    start = time.monotonic()
    ids = tokenizer.tokenize(data, special=True)
    back = tokenizer.detokenize(ids)
    assert time.monotonic() - start < 30
    assert back == (data if isinstance(data, bytes) else data.encode())


# Malformed metadata.


def broken(change, base=None):
    metadata = copy.deepcopy(base or sentencepiece(WORDS))
    change(metadata)
    return metadata


def put(key, value):
    return lambda metadata: metadata.update({GGML + key: value})


def drop(key):
    return lambda metadata: metadata.pop(GGML + key)


def put_at(key, index, value):
    return lambda metadata: metadata[GGML + key].__setitem__(index, value)


N = 259 + len(WORDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model"), "no tokenizer.ggml.model"),
        (drop("tokens"), "no tokenizer.ggml.tokens"),
        (drop("scores"), "no tokenizer.ggml.scores"),
        (put("model", "bert"), "model is 'bert', which is not supported; known: 'gpt2', 'llama'"),
        (put("model", 3), "model must be a string, found int"),
        (put("tokens", "abc"), "tokens must be an array, found str"),
        (put("tokens", []), "tokens is empty"),
        (put_at("tokens", 4, 17), r"tokens\[4\] must be a string, found int"),
        (put_at("tokens", 4, "\ud800"), "lone surrogate"),
        (put_at("tokens", N - 1, "x" * 5000), "5000 characters, above 4096"),
        (put_at("tokens", N - 1, "ab"), f"ids {N - 4} and {N - 1} are both 'ab'"),
        (put_at("tokens", 5, "<0xZZ>"), r"tokens\[5\] is a byte token.*found '<0xZZ>'"),
        (put_at("tokens", 5, "<0x-1>"), r"tokens\[5\] is a byte token"),
        (put("scores", [0.0]), f"scores has 1 entries, expected {N}"),
        (put("scores", np.zeros((2, 2))), "scores must be an array"),
        (put("scores", ["x"] * N), "scores must hold numbers"),
        (put("scores", np.full(N, np.nan, np.float32)), r"scores\[0\] is not a number"),
        (put("token_type", [1] * (N + 1)), f"token_type has {N + 1} entries, expected {N}"),
        (put_at("token_type", 7, 9), r"token_type\[7\] is 9, expected 0 to 6"),
        (put_at("token_type", 7, "x"), r"token_type\[7\] is 'x'"),
        (put("bos_token_id", N), f"bos_token_id is {N}, expected an id from 0 to {N - 1}"),
        (put("eos_token_id", -1), "eos_token_id is -1"),
        (put("eot_token_id", "2"), "eot_token_id is '2'"),
        (put("unknown_token_id", True), "unknown_token_id is True"),
        (put("add_bos_token", 1), "add_bos_token must be true or false, found 1"),
        (put("add_space_prefix", "yes"), "add_space_prefix must be true or false"),
    ],
)
def test_malformed_vocabularies_are_refused_with_the_key(change, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(broken(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("merges"), "no tokenizer.ggml.merges"),
        (put("merges", ["a b", "ab"]), r"merges\[1\] must be two pieces.*found 'ab'"),
        (put("merges", ["a b c"]), r"merges\[0\] must be two pieces"),
        (put("merges", [" b"]), r"merges\[0\] must be two pieces"),
        (put("merges", [7]), r"merges\[0\] must be two pieces.*found 7"),
        (put("merges", ["x y"]), "'x' and 'y' .merge 0. need the token 'xy'"),
        (put("pre", "nosuch"), "pre is 'nosuch', an unknown pre-tokenizer; known: .*qwen2.*smollm"),
        (put("pre", 5), "pre must be a string"),
        (put("add_bos_token", True), "no tokenizer.ggml.bos_token_id"),
        (put("add_eos_token", True), "no tokenizer.ggml.eos_token_id"),
    ],
)
def test_malformed_byte_level_vocabularies_are_refused_with_the_key(change, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(broken(change, byte_level(merges=["a b"])))


def test_a_vocabulary_without_pre_tokenizer_uses_the_default_and_warns():
    metadata = byte_level("default", DIGITS)
    expected = Tokenizer.from_metadata(metadata).tokenize(" 1234")
    drop("pre")(metadata)
    with pytest.warns(UserWarning, match="names no pre-tokenizer") as caught:
        assert Tokenizer.from_metadata(metadata).tokenize(" 1234") == expected
    assert [warning.filename for warning in caught] == [__file__]


def test_numpy_arrays_and_bytes_do_as_lists_and_text():
    metadata = sentencepiece({**WORDS, "é": -20.0}, extra=[("<c>", CONTROL)])
    plain = Tokenizer.from_metadata(metadata)
    metadata[GGML + "token_type"] = np.array(metadata[GGML + "token_type"], np.int32)
    metadata[GGML + "scores"] = np.array(metadata[GGML + "scores"], np.float32)
    metadata[GGML + "tokens"] = [token.encode() for token in metadata[GGML + "tokens"]]
    metadata[GGML + "bos_token_id"] = np.uint32(1)
    metadata[GGML + "add_bos_token"] = np.bool_(True)
    other = Tokenizer.from_metadata(metadata)
    assert other.tokenize("ab é <c>", special=True) == plain.tokenize("ab é <c>", special=True)


def test_tokens_that_are_not_utf8_are_written_out_as_they_are():
    for metadata in (sentencepiece(WORDS), byte_level()):
        metadata[GGML + "tokens"].append(b"\xff\xfe")
        metadata[GGML + "token_type"].append(NORMAL)
        metadata.get(GGML + "scores", []).append(-50.0)
        tokenizer = Tokenizer.from_metadata(metadata)
        assert tokenizer.token_bytes(tokenizer.n_vocab - 1) == b"\xff\xfe"
        assert tokenizer.detokenize(tokenizer.tokenize(b"a\xff\xfe")) == b"a\xff\xfe"


def test_the_first_of_equal_merges_counts():
    metadata = byte_level(merges=["a b", "b c", "a b"])
    assert texts(metadata, Tokenizer.from_metadata(metadata).tokenize("abc")) == ["ab", "c"]


def test_metadata_reader_of_these_tests_equals_the_gguf_packages(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_token_list(["a", "é", "▁b"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_token_types([1, 2, 6])
    writer.add_bool("x.flag", True)
    writer.add_uint64("x.big", 1 << 40)
    writer.add_float64("x.real", 0.25)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_metadata(tmp_path / "v.gguf")
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    assert len(metadata) > 6
    for key, value in metadata.items():
        expected = fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected
