"""What a valid GGUF file says: metadata of every type, tensors, typed getters, fingerprints."""

from __future__ import annotations

import time

import gguf
import numpy as np
import pytest

from coreinfer import _core
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Gguf,
    array,
    small_model,
    valid_files,
)

testing = _core.testing

NUMPY_TYPES = {U8: np.uint8, I8: np.int8, U16: np.uint16, I16: np.int16, U32: np.uint32,
               I32: np.int32, U64: np.uint64, I64: np.int64, F32: np.float32, F64: np.float64,
               BOOL: np.bool_}  # fmt: skip


@pytest.fixture
def opened(tmp_path):
    def open_file(content: Gguf):
        return _core.GgufFile(content.write(tmp_path / "model.gguf"))

    return open_file


# ---- Metadata ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (U8, [0, 255]), (I8, [-128, 127]), (U16, [0, 65535]), (I16, [-32768, 32767]),
        (U32, [0, 2**32 - 1]), (I32, [-(2**31), 2**31 - 1]), (U64, [0, 2**64 - 1]),
        (I64, [-(2**63), 2**63 - 1]), (F32, [-0.5, float("inf")]), (F64, [1e300, -1e-300]),
        (BOOL, [0, 1]),
    ],
)  # fmt: skip
def test_numbers_and_arrays_of_every_type(opened, kind, values):
    g = Gguf().kv("array", ARRAY, array(kind, values)).kv("none", ARRAY, array(kind, []))
    for i, value in enumerate(values):
        g.kv(f"scalar.{i}", kind, value)
    metadata = opened(g).metadata
    assert [metadata["scalar.0"], metadata["scalar.1"]] == values
    expected_type = bool if kind == BOOL else float if kind in (F32, F64) else int
    assert type(metadata["scalar.0"]) is expected_type
    assert metadata["array"].dtype == NUMPY_TYPES[kind]
    np.testing.assert_array_equal(metadata["array"], np.array(values, NUMPY_TYPES[kind]))
    assert metadata["none"].shape == (0,) and metadata["none"].dtype == NUMPY_TYPES[kind]


def test_strings_are_str_where_utf8_and_bytes_elsewhere(opened):
    strings = ["", "a\0b", "é", "日本", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", "end"]
    g = Gguf().kv("good", STRING, "naïve").kv("bad", STRING, b"\xe2\x82").kv("empty", STRING, "")
    metadata = opened(g.kv("all", ARRAY, array(STRING, strings))).metadata
    assert metadata == {"good": "naïve", "bad": b"\xe2\x82", "empty": "", "all": strings}


def test_keys_keep_the_order_of_the_file(opened):
    keys = ["z", "a", "m.n", "é"]
    g = Gguf()
    for key in keys:
        g.kv(key, U32, 1)
    assert list(opened(g).metadata) == keys


def test_metadata_is_made_once(opened):
    file = opened(small_model())
    assert file.metadata is file.metadata


def test_value_longer_than_the_first_read_is_whole(opened):
    rng = np.random.default_rng(5)
    numbers = rng.integers(0, 2**32, 300_000, dtype=np.uint32)
    words = [f"word {i}" for i in range(100_000)]
    g = Gguf().kv("numbers", ARRAY, array(U32, numbers.tolist()))
    file = opened(g.kv("words", ARRAY, array(STRING, words)).kv("last", STRING, "here"))
    np.testing.assert_array_equal(file.metadata["numbers"], numbers)
    assert file.metadata["words"] == words and file.metadata["last"] == "here"


@pytest.mark.parametrize("version", [2, 3])
def test_reads_versions_2_and_3(opened, version):
    file = opened(Gguf(version=version).kv("a", U32, 1).tensor("t", [4]))
    assert file.version == version
    assert file.metadata == {"a": 1} and len(file.tensors) == 1


# ---- Typed getters -------------------------------------------------------------------------------


@pytest.fixture
def get(tmp_path):
    """get(getter, kind, content): writes one entry and asks for it."""

    def ask(getter, kind, content, key="key"):
        path = Gguf().kv("key", kind, content).write(tmp_path / "model.gguf")
        return testing.metadata_value(str(path), getter, key)

    return ask


@pytest.mark.parametrize("kind", [U8, I8, U16, I16, U32, I32, U64, I64])
@pytest.mark.parametrize("getter", ["u32", "i32", "u64", "maybe_u32", "maybe_i32", "maybe_u64"])
def test_integer_getters_take_any_integer_type(get, getter, kind):
    assert get(getter, kind, 100) == 100


@pytest.mark.parametrize(
    ("getter", "kind", "value"),
    [("u32", U64, 2**32), ("u32", I8, -1), ("i32", U32, 2**31), ("i32", I64, -(2**31) - 1),
     ("u64", I64, -1), ("maybe_u32", I32, -5)],
)  # fmt: skip
def test_integer_getters_reject_what_does_not_fit(get, getter, kind, value):
    wanted = getter.removeprefix("maybe_")
    message = f"key 'key': expected an integer in the range of {wanted}, found .* {value}$"
    with pytest.raises(_core.GGUFError, match=message):
        get(getter, kind, value)


@pytest.mark.parametrize(
    ("getter", "kind", "content", "message"),
    [
        ("u32", F32, 1.0, "expected an integer in the range of u32, found f32"),
        ("u32", BOOL, 1, "expected an integer in the range of u32, found bool"),
        ("u64", STRING, "1", "expected an integer in the range of u64, found string"),
        ("i32", ARRAY, array(U32, [1]), "found array of 1 u32"),
        ("f32", U32, 1, "expected a number \\(f32 or f64\\), found u32"),
        ("boolean", U8, 1, "expected bool, found u8"),
        ("string", ARRAY, array(STRING, ["a"]), "expected string, found array of 1 string"),
        ("string", U32, 1, "expected string, found u32"),
        ("array_size", STRING, "abc", "expected an array, found string"),
        ("strings", STRING, "abc", "expected an array of string, found string"),
        ("strings", ARRAY, array(U64, [3, 4]), "expected an array of string, found array of 2 u64"),
        ("integers", ARRAY, array(F32, [3.0]), "expected an array of integers, found array of 1 f"),
        ("integers", ARRAY, array(U64, [2**63]), "expected integers in the range of i64"),
        ("floats", ARRAY, array(U32, [3]), "expected an array of f32 or f64, found array of 1 u32"),
        ("floats", ARRAY, array(STRING, ["3"]), "found array of 1 string"),
        ("booleans", ARRAY, array(U8, [1]), "expected an array of bool, found array of 1 u8"),
    ],
)
def test_getters_reject_other_types(get, getter, kind, content, message):
    with pytest.raises(_core.GGUFError, match=f"model.gguf: metadata key 'key': .*{message}"):
        get(getter, kind, content)


def test_getters_of_other_types(get):
    assert get("f32", F32, 0.1) == np.float32(0.1)
    assert get("f32", F64, 0.1) == np.float32(0.1)
    assert get("f32", F64, -1e300) == -np.inf
    assert get("boolean", BOOL, 1) is True and get("maybe_boolean", BOOL, 0) is False
    assert get("string", STRING, "é") == "é" and get("maybe_string", STRING, "") == ""
    assert get("maybe_f32", F32, 2.5) == 2.5
    assert get("array_size", ARRAY, array(STRING, ["a", "b"])) == 2
    assert get("strings", ARRAY, array(STRING, [b"\xff", "", "b"])) == [b"\xff", b"", b"b"]
    assert get("integers", ARRAY, array(I8, [-1, 2])) == [-1, 2]
    assert get("floats", ARRAY, array(F32, [0.5])) == [0.5]
    assert get("floats", ARRAY, array(F64, [0.5, 1e300])) == [0.5, np.inf]
    assert get("booleans", ARRAY, array(BOOL, [1, 0])) == [True, False]


@pytest.mark.parametrize("kind", ["u32", "i32", "u64", "f32", "boolean", "string"])
def test_absent_key_is_an_error_or_none(get, kind):
    with pytest.raises(_core.GGUFError, match="model.gguf: metadata key 'other' is missing"):
        get(kind, U32, 1, key="other")
    assert get("maybe_" + kind, U32, 1, key="other") is None


# ---- Tensors -------------------------------------------------------------------------------------


def test_tensors_are_listed_in_file_order(opened):
    tensors = opened(small_model()).tensors
    assert [(t.name, t.type, t.shape, t.nbytes) for t in tensors] == [
        ("norm.weight", "F32", (8,), 32),
        ("ffn.weight", "Q4_0", (64, 3), 108),
        ("cube.weight", "F16", (4, 3, 2), 48),
        ("k.weight", "Q4_K", (256, 1), 144),
    ]
    assert all(t.offset % 32 == 0 and t.part == 0 for t in tensors)


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096, 2**20])
def test_custom_alignment(opened, alignment):
    values = np.arange(6, dtype=np.float32)
    g = Gguf(alignment=alignment).kv("general.alignment", U32, alignment)
    file = opened(g.tensor("a", [3], "F32", bytes(12)).tensor("b", [6], "F32", values.tobytes()))
    assert file.tensors[1].offset - file.tensors[0].offset == max(alignment, 16)
    np.testing.assert_array_equal(file.dequantize("b"), [values])


def test_tensors_may_lie_in_any_order_and_with_gaps(opened):
    g = Gguf().tensor("a", [8], offset=96).tensor("b", [8], offset=0)
    g.data = bytearray(np.arange(32, dtype=np.float32).tobytes())
    file = opened(g)
    np.testing.assert_array_equal(file.dequantize("a"), [np.arange(24, 32)])
    np.testing.assert_array_equal(file.dequantize("b"), [np.arange(8)])


def test_file_without_tensors_or_metadata_opens(opened):
    file = opened(Gguf())
    assert file.tensors == [] and file.metadata == {}


def test_require_gives_the_matrix_in_rows(tmp_path):
    path = str(small_model().write(tmp_path / "model.gguf"))
    assert testing.tensor_as(path, "ffn.weight", [64, 3]) == ("Q4_0", 3, 64)
    assert testing.tensor_as(path, "norm.weight", [8]) == ("F32", 1, 8)
    assert testing.tensor_as(path, "k.weight", [256]) == ("Q4_K", 1, 256)  # trailing 1 or not


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    ("name", "ne", "found"),
    [("ffn.weight", [3, 64], "[64, 3]"), ("ffn.weight", [64], "[64, 3]"),
     ("norm.weight", [9], "[8]"), ("cube.weight", [4, 6], "[4, 3, 2]")],
)  # fmt: skip
def test_tensor_of_another_shape_is_an_error(tmp_path, name, ne, found, required):
    path = str(small_model().write(tmp_path / "model.gguf"))
    with pytest.raises(_core.GGUFError) as caught:
        testing.tensor_as(path, name, ne, required)
    assert str(caught.value) == f"{path}: tensor '{name}': expected shape {ne}, found {found}"


def test_absent_tensor_is_an_error_or_none(tmp_path):
    path = str(small_model().write(tmp_path / "model.gguf"))
    message = "model.gguf: tensor 'bias' is missing, expected with shape \\[8\\]"
    with pytest.raises(_core.GGUFError, match=message):
        testing.tensor_as(path, "bias", [8])
    assert testing.tensor_as(path, "bias", [8], False) is None
    with pytest.raises(_core.GGUFError, match="tensor 'bias' is missing"):
        _core.GgufFile(path).dequantize("bias")


def test_unsupported_types_are_listed_but_not_given(tmp_path):
    g = Gguf().tensor("good", [4]).tensor("odd", [256], "TQ1_0").tensor("worse", [32], "MXFP4")
    path = g.write(tmp_path / "model.gguf")
    file = _core.GgufFile(path)
    assert [(t.type, t.nbytes) for t in file.tensors] == [("F32", 16), ("TQ1_0", 54), ("MXFP4", 17)]
    assert file.dequantize("good").shape == (1, 4)
    message = "tensor 'odd': type TQ1_0 \\(34\\) is not supported; supported are F32 F16 BF16 Q4_0"
    for use in (
        lambda: file.dequantize("odd"),
        lambda: testing.tensor_as(str(path), "odd", [256]),
        lambda: testing.tensor_as(str(path), "odd", [256], False),
        lambda: testing.require_supported_types(str(path)),
    ):
        with pytest.raises(_core.GGUFError, match=message):
            use()


def test_supported_types_are_enough_for_require_supported_types(tmp_path):
    testing.require_supported_types(str(small_model().write(tmp_path / "model.gguf")))


def test_sizes_of_every_type_agree_with_the_gguf_package(tmp_path):
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        g = Gguf().tensor("t", [], content=bytes(3 * size), type_id=kind.value, n_dims=2,
                          written_ne=[block, 3])  # fmt: skip
        tensor = _core.GgufFile(g.write(tmp_path / "model.gguf")).tensors[0]
        assert (tensor.type, tensor.nbytes) == (kind.name, 3 * size)


# ---- Fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_is_the_same_for_the_same_content(tmp_path):
    paths = [small_model().write(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    assert _core.GgufFile(paths[0]).fingerprint == _core.GgufFile(paths[1]).fingerprint


def test_fingerprint_is_stable_between_versions(tmp_path):
    """Sidecar files carry it, so a change of this number is a change of their format."""
    file = _core.GgufFile(small_model().write(tmp_path / "model.gguf"))
    assert file.fingerprint == 5886911921638569067


def test_fingerprint_depends_on_every_small_file(tmp_path):
    prints = set()
    for name, content in valid_files().items():
        path = tmp_path / name
        path.write_bytes(content)
        prints.add(_core.GgufFile(path).fingerprint)
    assert len(prints) == len(valid_files())


def test_fingerprint_depends_on_metadata_names_and_data(tmp_path):
    def fingerprint(key="k", number=1, name="t", last=0):
        data = bytes(99_999) + bytes([last])
        g = Gguf().kv(key, U32, number).tensor(name, [25_000], "F32", data)
        return _core.GgufFile(g.write(tmp_path / "model.gguf")).fingerprint

    variants = [{}, {"key": "l"}, {"number": 2}, {"name": "u"}, {"last": 1}]
    assert len({fingerprint(**v) for v in variants}) == len(variants)


# ---- The gguf package's own writer, and real files -----------------------------------------------


def test_reads_what_the_gguf_package_writes(tmp_path):
    path = tmp_path / "written.gguf"
    rng = np.random.default_rng(6)
    weights = rng.standard_normal((5, 64)).astype(np.float32)
    packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b", b"\xf0\x9f"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_add_bos_token(True)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = _core.GgufFile(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 3
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b", b"\xf0\x9f"]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    np.testing.assert_array_equal(file.metadata["tokenizer.ggml.scores"], [0.5, -1, 2])
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(file.dequantize("w"), expected)
    np.testing.assert_array_equal(file.dequantize("b"), weights[:1])


def assert_tensors_equal_the_gguf_package(path, choose):
    file = _core.GgufFile(path)
    reader = gguf.GGUFReader(path)
    assert [t.name for t in file.tensors] == [t.name for t in reader.tensors]
    seen = set()
    for ours, theirs in zip(file.tensors, reader.tensors, strict=True):
        assert ours.type == theirs.tensor_type.name
        assert list(ours.shape) == theirs.shape.tolist()
        assert (ours.nbytes, ours.offset) == (theirs.n_bytes, theirs.data_offset)
        if choose(ours.name):
            expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            np.testing.assert_array_equal(
                file.dequantize(ours.name), expected.reshape(-1, ours.shape[0])
            )
            seen.add(ours.type)
    file.check_unchanged()
    return seen


def test_smollm2_equals_the_gguf_package(smollm2_path):
    chosen = ("blk.0.", "blk.29.", "output_norm")
    seen = assert_tensors_equal_the_gguf_package(smollm2_path, lambda n: n.startswith(chosen))
    assert {"F32", "Q4_1"} <= seen


def test_qwen_equals_the_gguf_package(qwen_path):
    chosen = ("blk.0.", "blk.12.", "output_norm")
    seen = assert_tensors_equal_the_gguf_package(qwen_path, lambda n: n.startswith(chosen))
    assert {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"} <= seen


@pytest.mark.parametrize(
    ("name", "model", "n_tokens"),
    [("gpt-2", "gpt2", 50257), ("llama-bpe", "gpt2", 128256), ("llama-spm", "llama", 32000)],
)
def test_vocabulary_files_open_quickly(shared_dir, name, model, n_tokens):
    start = time.perf_counter()
    file = _core.GgufFile(shared_dir / "golden" / "vocab" / f"{name}.gguf")
    metadata = file.metadata
    seconds = time.perf_counter() - start
    assert file.tensors == []
    assert metadata["tokenizer.ggml.model"] == model
    assert len(metadata["tokenizer.ggml.tokens"]) == n_tokens
    assert metadata["tokenizer.ggml.token_type"].dtype == np.int32
    assert seconds < 1  # measured 0.08 s for the largest, 400k strings, on a slow core
