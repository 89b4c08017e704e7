"""Malformed GGUF files, built byte by byte: each is a GGUFError that says where and what."""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path

import pytest

from coreinfer import _core
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    Gguf,
    array,
    small_model,
    text,
    u32,
    u64,
    valid_files,
)


@pytest.fixture
def rejects(tmp_path):
    """Asserts that bytes are refused, and that the message names the file and every fragment."""

    def check(content: Gguf | bytes, *fragments: str, file_name: str = "model.gguf") -> str:
        path = tmp_path / file_name
        path.write_bytes(content.build() if isinstance(content, Gguf) else content)
        with pytest.raises(_core.GGUFError) as caught:
            _core.GgufFile(path)
        message = str(caught.value)
        for fragment in (str(path), *fragments):
            assert fragment in message
        return message

    return check


# ---- Header --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4, 7, 8, 15, 16, 23])
def test_rejects_file_shorter_than_its_header(rejects, n):
    rejects(Gguf().build()[:n], "header: the file ends inside the", "expected at byte", "found")


def test_rejects_bad_magic(rejects):
    rejects(Gguf(magic=b"GGML"), "expected it to start with 'GGUF', found 'GGML'")


def test_shows_binary_magic_escaped(rejects):
    rejects(Gguf(magic=b"\x1b[2J"), "found '\\x1b[2J'")


@pytest.mark.parametrize("version", [0, 1, 4, 0xFFFFFFFF])
def test_rejects_version(rejects, version):
    rejects(Gguf(version=version), f"version is {version}, expected 2 or 3")


def test_rejects_big_endian_file(rejects):
    rejects(Gguf(version=3 << 24), "big-endian", "expected little endian")


@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**32, 2**18 + 1])
def test_rejects_absurd_tensor_count(rejects, count):
    rejects(Gguf(n_tensors=count), f"n_tensors is {count}, at most")


def test_rejects_more_tensors_than_bytes_left(rejects):
    g = Gguf(n_tensors=100).tensor("a", [8])
    rejects(g, "n_tensors is 100, which cannot fit in the")


def test_rejects_tensor_count_one_too_high(rejects):
    g = Gguf(n_tensors=2).tensor("a", [8])
    rejects(g, "tensor info 1")


@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**32, 2**16 + 1])
def test_rejects_absurd_metadata_count(rejects, count):
    rejects(Gguf(n_kv=count), f"n_kv is {count} metadata entries, at most")


def test_rejects_more_metadata_than_bytes_left(rejects):
    g = Gguf(n_kv=10).kv("a", U32, 1)
    rejects(g, "n_kv is 10 metadata entries, which cannot fit in the")


# ---- Metadata ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 65536])
def test_rejects_key_longer_than_the_format_allows(rejects, length):
    g = Gguf().raw_kv(text("key", length) + u32(U32) + u32(1))
    rejects(g, "metadata entry 0", f"length of the key is {length}", "65535")


def test_rejects_key_past_end_of_file(rejects):
    g = Gguf().raw_kv(text("key", 5000) + u32(U32) + u32(1))
    rejects(g, "metadata entry 0: the file ends inside the key: 5000 bytes expected", "11 found")


def test_rejects_empty_key(rejects):
    rejects(Gguf().kv("", U32, 1), "metadata entry 0: the key is empty")


def test_rejects_nul_in_key(rejects):
    rejects(Gguf().kv(b"a\0b", U32, 1), "the key 'a\\x00b' holds a control byte")


def test_rejects_key_that_is_not_utf8(rejects):
    rejects(Gguf().kv(b"a\xc0\x80", U32, 1), "the key 'a\\xc0\\x80' is not valid UTF-8")


def test_rejects_duplicate_key(rejects):
    g = Gguf().kv("a", U32, 1).kv("b", U32, 2).kv("a", STRING, "x")
    rejects(g, "metadata entry 2 'a'", "a second time, first as entry 0")


@pytest.mark.parametrize("kind", [13, 255, 2**32 - 1])
def test_rejects_unknown_value_type(rejects, kind):
    g = Gguf().raw_kv(text("key") + u32(kind) + u64(0))
    rejects(g, "metadata entry 0 'key'", f"value type is {kind}, expected 0 (u8) to 12 (f64)")


def test_rejects_unknown_array_element_type(rejects):
    g = Gguf().raw_kv(text("key") + u32(ARRAY) + u32(13) + u64(0))
    rejects(g, "'key'", "array element type is 13, expected 0 (u8) to 12 (f64)")


def test_rejects_arrays_of_arrays(rejects):
    g = Gguf().raw_kv(text("key") + u32(ARRAY) + u32(ARRAY) + u64(1) + array(U32, [1]))
    rejects(g, "'key': arrays of arrays are not supported")


@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**26 + 1])
@pytest.mark.parametrize("element", [U8, F32, STRING])
def test_rejects_absurd_array_length(rejects, element, count):
    g = Gguf().raw_kv(text("key") + u32(ARRAY) + u32(element) + u64(count))
    rejects(g, "'key'", f"array length is {count}, at most")


def test_rejects_array_past_end_of_file(rejects):
    g = Gguf().kv("key", ARRAY, array(F32, [1.0, 2.0], count=3))
    rejects(g, "'key'", "the file ends inside the value: 12 bytes expected", "8 found")


def test_rejects_more_strings_than_bytes_left(rejects):
    g = Gguf().kv("key", ARRAY, array(STRING, ["a", "b"], count=1000))
    rejects(g, "'key'", "an array of 1000 strings cannot fit: 18 bytes of the file are left")


def test_rejects_string_in_array_past_end_of_file(rejects):
    g = Gguf().raw_kv(text("key") + u32(ARRAY) + u32(STRING) + u64(2) + text("a") + text("b", 9))
    rejects(g, "'key'", "the file ends inside the string value: 9 bytes expected", "1 found")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63 + 1, 2**26 + 1])
def test_rejects_string_longer_than_the_cap(rejects, length):
    g = Gguf().raw_kv(text("key") + u32(STRING) + text("abc", length))
    rejects(g, "'key'", f"length of the string value is {length} bytes, at most 67108864")


def test_rejects_string_past_end_of_file(rejects):
    g = Gguf().raw_kv(text("key") + u32(STRING) + text("abc", 2**26))
    rejects(g, "'key'", "the file ends inside the string value: 67108864 bytes", "3 found")


def test_rejects_boolean_that_is_neither_0_nor_1(rejects):
    rejects(Gguf().kv("key", BOOL, 2), "'key': a boolean value is 2, expected 0 or 1")


def test_rejects_boolean_in_array_that_is_neither_0_nor_1(rejects):
    g = Gguf().kv("key", ARRAY, array(BOOL, [0, 1, 255]))
    rejects(g, "'key': a boolean value is 255, expected 0 or 1")


@pytest.mark.parametrize("alignment", [0, 3, 4, 33, 48, 2**21, 2**31, 2**32 - 1])
def test_rejects_alignment(rejects, alignment):
    g = Gguf().kv("general.alignment", U32, alignment)
    message = rejects(g, "metadata key 'general.alignment'", f"found {alignment}")
    assert "expected a power of two from 8 to 1048576" in message


@pytest.mark.parametrize(
    ("kind", "content", "found"),
    [(STRING, "32", "string"), (U16, 32, "u16"), (I32, 32, "i32"), (F32, 32.0, "f32"),
     (ARRAY, array(U32, [32]), "array")],
)  # fmt: skip
def test_rejects_alignment_of_another_type(rejects, kind, content, found):
    g = Gguf().kv("general.alignment", kind, content)
    rejects(g, "metadata key 'general.alignment': expected u32, found " + found)


# ---- Tensors: names, types, shapes ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["n" * 64, "n" * 5000])
def test_rejects_tensor_name_of_64_bytes_or_more(rejects, name):
    g = Gguf().tensor(name, [8])
    rejects(g, f"tensor info 0: length of the name is {len(name)} bytes, at most 63")


def test_rejects_empty_tensor_name(rejects):
    rejects(Gguf().tensor("", [8]), "tensor info 0: the name is empty")


def test_rejects_control_bytes_in_tensor_name(rejects):
    rejects(Gguf().tensor("a\x1b[31m", [8]), "the name 'a\\x1b[31m' holds a control byte")


def test_rejects_tensor_name_that_is_not_utf8(rejects):
    rejects(Gguf().tensor(b"a\xff", [8]), "tensor info 0: the name 'a\\xff' is not valid UTF-8")


def test_rejects_duplicate_tensor_name(rejects):
    g = Gguf().tensor("a", [8]).tensor("b", [8]).tensor("a", [8])
    rejects(g, "tensor 'a' is there twice, expected once")


@pytest.mark.parametrize("n_dims", [0, 5, 2**31, 2**32 - 1])
def test_rejects_number_of_dimensions(rejects, n_dims):
    g = Gguf().tensor("t", [8], n_dims=n_dims)
    rejects(g, f"'t': number of dimensions is {n_dims}, expected 1 to 4")


@pytest.mark.parametrize("n", [0, -1, -(2**63)])
def test_rejects_dimension_below_one(rejects, n):
    g = Gguf().tensor("t", [8, 2], written_ne=[8, n])
    rejects(g, f"'t': dimension 1 is {n}, expected at least 1")


@pytest.mark.parametrize("ne", [[2**62, 2], [2**32, 2**32], [2**63 - 1, 2], [2**21] * 4])
def test_rejects_more_elements_than_64_bits(rejects, ne):
    g = Gguf().tensor("t", [1] * len(ne), written_ne=ne)
    rejects(g, "'t': shape [", "more elements than 64 bits")


def test_rejects_more_bytes_than_64_bits(rejects):
    g = Gguf().tensor("t", [1], "F64", written_ne=[2**62])
    rejects(g, "'t': shape [4611686018427387904] of type F64 has more bytes than 64 bits")


@pytest.mark.parametrize("n", [2**63 - 1, 2**63 - 32, 2**40])
def test_rejects_bytes_that_would_wrap_when_padded(rejects, n):
    g = Gguf().tensor("t", [1], "I8", written_ne=[n])
    rejects(g, f"tensor 't': {n} bytes expected at offset 0", "which has 1 bytes")


@pytest.mark.parametrize("type_id", [4, 5, 31, 32, 33, 36, 37, 38, 43, 1000, 2**31, 2**32 - 1])
def test_rejects_removed_and_unknown_tensor_types(rejects, type_id):
    g = Gguf().tensor("t", [256], type_id=type_id)
    rejects(g, f"'t': tensor type is {type_id}, which is not (or no longer) a type")


@pytest.mark.parametrize(("type_name", "block"), [("Q4_0", 32), ("Q6_K", 256), ("IQ4_XS", 256)])
def test_rejects_row_that_is_not_whole_blocks(rejects, type_name, block):
    g = Gguf().tensor("t", [block], type_name, written_ne=[block + 16])
    rejects(g, f"'t': a row has {block + 16} elements, expected a multiple of {block}", type_name)


def test_rejects_rows_that_are_whole_blocks_only_together(rejects):
    g = Gguf().tensor("t", [32, 2], "Q8_0", written_ne=[16, 4])
    rejects(g, "'t': a row has 16 elements, expected a multiple of 32, the block of type Q8_0")


# ---- Tensors: places -----------------------------------------------------------------------------


def test_rejects_tensor_past_end_of_file(rejects):
    g = Gguf().tensor("a", [8]).tensor("b", [8], content=bytes(31))
    rejects(g, "tensor 'b': 32 bytes expected at offset 32 of the tensor data, which has 63 bytes")


@pytest.mark.parametrize("offset", [64, 2**32, 2**63, 2**64 - 32])
def test_rejects_offset_past_end_of_file(rejects, offset):
    g = Gguf().tensor("t", [8], offset=offset)
    rejects(g, f"tensor 't': 32 bytes expected at offset {offset}", "which has 32 bytes")


def test_rejects_offset_that_is_not_aligned(rejects):
    g = Gguf().tensor("t", [8], content=bytes(64), offset=8)
    rejects(g, "tensor 't': offset is 8, expected a multiple of the alignment 32")


def test_rejects_offsets_of_another_alignment(rejects):
    g = Gguf().kv("general.alignment", U32, 64).tensor("a", [8]).tensor("b", [8])
    g.data += bytes(64)
    rejects(g, "tensor 'b': offset is 32, expected a multiple of the alignment 64")


def test_rejects_overlapping_tensors(rejects):
    g = Gguf().tensor("a", [16]).tensor("b", [8], offset=32)
    rejects(g, "tensor 'b': offset is 32, inside tensor 'a', expected at least 64")


def test_rejects_tensors_at_the_same_place(rejects):
    g = Gguf().tensor("a", [8]).tensor("b", [8], offset=0)
    rejects(g, "offset is 0, inside tensor '", "expected at least 32")


def test_rejects_file_that_ends_before_the_tensor_data(rejects):
    g = Gguf().tensor("t", [8])
    rejects(g.header(), "tensor data starts at byte 64, behind the end of the file", "truncated")


# ---- Everything at once --------------------------------------------------------------------------


def test_rejects_every_proper_prefix_of_a_valid_file(tmp_path):
    whole = small_model().build()
    path = tmp_path / "prefix.gguf"
    path.write_bytes(whole)
    assert len(_core.GgufFile(path).tensors) == 4
    for n in range(1, len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(_core.GGUFError, match=re.escape(str(path))):
            _core.GgufFile(path)


TELLING = [0, 1, 2, 31, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62,
           2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, 2**64 - 32]  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: a bit, a byte, a telling number, bytes lost, bytes repeated, a cut."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at, kind = rng.randrange(len(out)), rng.randrange(9)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            out[at : at + 8] = struct.pack("<Q", rng.choice(TELLING))[: rng.choice([4, 8])]
        elif kind == 3:
            del out[at : at + rng.randint(1, 16)]
        elif kind == 4:
            where = rng.randrange(len(out))
            out[where:where] = out[at : at + 16]
        elif kind == 5:
            del out[at:]
        elif (run := out.find(bytes(5), at)) >= 2:  # zeros tell of a count, a length, an offset
            start = run + rng.randint(-2, 3)
            out[start : start + 8] = struct.pack("<Q", rng.choice(TELLING))
    return bytes(out)


def use_everything(path: Path) -> bool:
    """Opens a file and asks it everything; False where it was refused as it should be."""
    try:
        file = _core.GgufFile(path)
        assert len(file.metadata) < 1000
        for tensor in file.tensors:
            assert tensor.offset + tensor.nbytes <= path.stat().st_size
            if tensor.type in SUPPORTED:
                file.dequantize(tensor.name)
        assert file.fingerprint >= 0
    except (_core.GGUFError, OSError) as error:  # OSError: the mutation left an empty file
        assert str(path) in str(error)
        return False
    return True


SUPPORTED = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K",
             "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(valid_files()))
def test_survives_random_mutations(tmp_path, name):
    content = valid_files()[name]
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    assert use_everything(path)
    rng = random.Random(f"mutations of {name}")
    accepted = 0
    n = 10_000 // len(valid_files()) + 1
    for _ in range(n):
        path.write_bytes(mutate(content, rng))
        accepted += use_everything(path)
    assert accepted < n  # the mutations do reach what is checked
