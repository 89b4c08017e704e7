"""A byte-level GGUF writer that checks nothing, so that tests can build malformed files."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALAR_FORMATS = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
    U64: "Q", I64: "q", F64: "d",
}  # fmt: skip

# Tensor type ids with elements and bytes of a block.
TENSOR_TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66), "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136), "I8": (24, 1, 1), "F64": (28, 1, 8), "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54), "MXFP4": (39, 32, 17),
}  # fmt: skip


def u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value & 0xFFFFFFFFFFFFFFFF)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string as the format has it; `length` overrides the length that is written."""
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def value(kind: int, content) -> bytes:
    if kind == STRING:
        return text(content)
    return struct.pack("<" + SCALAR_FORMATS[kind], content)


def array(element: int, contents, count: int | None = None) -> bytes:
    """Element type, count (overridable) and the packed elements."""
    packed = b"".join(value(element, c) for c in contents)
    return u32(element) + u64(len(contents) if count is None else count) + packed


def tensor_bytes(type_name: str, ne: list[int]) -> int:
    _, block, size = TENSOR_TYPES[type_name]
    total = 1
    for n in ne:
        total *= n
    return total // block * size


@dataclass
class Gguf:
    """Parts of a file in order; whatever is set is written as it is.

    Parameters
    ----------
    version, magic, alignment
        Header fields; `alignment` also pads the data (it writes no metadata key).
    n_tensors, n_kv
        Override the counts in the header.
    """

    version: int = 3
    magic: bytes = b"GGUF"
    alignment: int = 32
    n_tensors: int | None = None
    n_kv: int | None = None
    entries: list[bytes] = field(default_factory=list)
    infos: list[bytes] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)

    def kv(self, key: str | bytes, kind: int, content) -> Gguf:
        """Adds one metadata entry; for ARRAY, `content` is the result of `array()`."""
        packed = content if kind == ARRAY else value(kind, content)
        return self.raw_kv(text(key) + u32(kind) + packed)

    def raw_kv(self, raw: bytes) -> Gguf:
        self.entries.append(raw)
        return self

    def tensor(
        self,
        name: str | bytes,
        ne: list[int],
        type_name: str = "F32",
        content: bytes | None = None,
        *,
        offset: int | None = None,
        type_id: int | None = None,
        n_dims: int | None = None,
        written_ne: list[int] | None = None,
    ) -> Gguf:
        """Adds a tensor and its data; the keyword arguments override what the header says."""
        self.data += b"\0" * (-len(self.data) % self.alignment)
        self.infos.append(
            text(name)
            + u32(len(ne) if n_dims is None else n_dims)
            + b"".join(u64(n) for n in (ne if written_ne is None else written_ne))
            + u32(TENSOR_TYPES[type_name][0] if type_id is None else type_id)
            + u64(len(self.data) if offset is None else offset)
        )
        self.data += bytes(tensor_bytes(type_name, ne)) if content is None else content
        return self

    def header(self) -> bytes:
        return (
            self.magic
            + u32(self.version)
            + u64(len(self.infos) if self.n_tensors is None else self.n_tensors)
            + u64(len(self.entries) if self.n_kv is None else self.n_kv)
            + b"".join(self.entries)
            + b"".join(self.infos)
        )

    def build(self) -> bytes:
        head = self.header()
        if not self.data:
            return head
        return head + b"\0" * (-len(head) % self.alignment) + bytes(self.data)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


def small_model() -> Gguf:
    """Every kind of metadata value, and tensors of four types and of one to three dimensions."""
    g = Gguf()
    g.kv("general.architecture", STRING, "llama")
    numbers = {U8: 7, I8: -7, U16: 700, I16: -700, U32: 70000, I32: -70000, U64: 2**40,
               I64: -(2**40), F32: 0.5, F64: 0.25, BOOL: 1}  # fmt: skip
    for kind, number in numbers.items():
        g.kv(f"scalar.{kind}", kind, number)
        g.kv(f"array.{kind}", ARRAY, array(kind, [number, 0, number]))
    g.kv("tokens", ARRAY, array(STRING, ["a", "", "é", b"\xff\xfe"]))
    g.kv("empty", ARRAY, array(I32, []))
    ramp = struct.pack("<8f", *range(8))
    g.tensor("norm.weight", [8], "F32", ramp)
    g.tensor("ffn.weight", [64, 3], "Q4_0", bytes(range(108)))
    g.tensor("cube.weight", [4, 3, 2], "F16", bytes(48))
    g.tensor("k.weight", [256, 1], "Q4_K", bytes(range(144)))
    return g


def valid_files() -> dict[str, bytes]:
    """Small valid files by name."""
    custom = Gguf(version=2, alignment=64).kv("general.alignment", U32, 64)
    custom.kv("general.name", STRING, "custom alignment")
    custom.tensor("a", [32, 2], "Q8_0").tensor("b", [3], "F32").tensor("c", [32], "IQ4_NL")
    vocabulary = Gguf().kv("tokenizer.ggml.model", STRING, "gpt2")
    vocabulary.kv("tokenizer.ggml.tokens", ARRAY, array(STRING, [f"t{i}" for i in range(40)]))
    vocabulary.kv("tokenizer.ggml.scores", ARRAY, array(F32, [float(-i) for i in range(40)]))
    vocabulary.kv("tokenizer.ggml.token_type", ARRAY, array(I32, [1] * 40))
    unsupported = Gguf().kv("general.architecture", STRING, "llama")
    unsupported.tensor("t", [256], "TQ1_0").tensor("u", [5], "F64")
    one_part = Gguf().kv("split.no", U16, 0).kv("split.count", U16, 1)
    one_part.kv("split.tensors.count", I32, 1).tensor("t", [3])
    return {
        "small_model": small_model().build(),
        "custom_alignment": custom.build(),
        "vocabulary": vocabulary.build(),
        "unsupported_types": unsupported.build(),
        "one_part": one_part.build(),
        "empty": Gguf().build(),
    }
