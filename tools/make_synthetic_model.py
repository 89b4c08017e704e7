"""Seeded GGUF models with random weights: tiny ones for tests, paper-size ones for speed.

As a module: `make_tiny_model(path, "llama", "Q4_K")`. As a command, for example:
`python tools/make_synthetic_model.py --shape llama2-7b --type q4_0 --output-type q8_0 --out F`.
The text such a model writes means nothing; shapes, types, metadata and value ranges are real.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from synthetic_blocks import TENSOR_TYPES, block_size, plain_bytes, random_blocks
from synthetic_shapes import (
    PAPER,
    ModelShape,
    TensorSpec,
    metadata,
    rope_factors,
    tensor_specs,
    tiny_shape,
)
from synthetic_vocab import make_vocabulary

QUANTISABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # what the gguf package can quantise to
# What llama.cpp's quantiser takes when a row is not a multiple of 256 values.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
            "IQ4_XS": "IQ4_NL"}
POOL_BYTES = 24 << 20
Edit = Callable[[str, np.ndarray], np.ndarray]


def make_tiny_model(path: str | Path, arch: str = "llama", dtype: str = "F32", *, seed: int = 0,
                    types: Mapping[str, str] | None = None,
                    extra_metadata: Mapping[str, Any] | None = None, edit: Edit | None = None,
                    **overrides: Any) -> ModelShape:
    """Write a tiny model and return its shape.

    The float weights depend on (arch, shape, seed) only, so the same model in another type is
    its quantisation. Types without a quantiser in the `gguf` package get random valid blocks.

    Parameters
    ----------
    path : file to write (replaced as a whole)
    arch : llama, qwen2, qwen3, gemma3 or opt
    dtype : tensor type of all matrices; norms, biases and position tables are always F32
    types : tensor type by part of the tensor's name, e.g. ``{"ffn_down": "Q6_K"}``
    extra_metadata : keys to add or replace; None removes the key
    edit : called with (name, float32 values) of every tensor that is made from float values;
        returns the values to use
    overrides : fields of ModelShape, e.g. ``n_layer=1, n_embd=64, tied=True``

    Raises
    ------
    ValueError for an unknown architecture, type or field, or a row that is not whole blocks.
    """
    shape = tiny_shape(arch, **overrides)
    typed = [(spec, _type_of(spec, dtype, types or {})) for spec in tensor_specs(shape)]

    def data(spec: TensorSpec, tensor_type: str) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        if tensor_type in TENSOR_TYPES[:3] or tensor_type in QUANTISABLE:
            values = _float_values(rng, spec, shape)
            if edit is not None:
                values = np.asarray(edit(spec.name, values), np.float32).reshape(spec.shape)
            if tensor_type in QUANTISABLE:
                yield quants.quantize(values, GGMLQuantizationType[tensor_type])
            else:
                yield plain_bytes(values.reshape(-1), tensor_type)
        else:
            n_blocks = int(np.prod(spec.shape)) // block_size(tensor_type)[0]
            yield random_blocks(rng, tensor_type, n_blocks, spec.scale)

    _write(Path(path), shape, typed, data, dtype, f"tiny {arch} seed {seed}", extra_metadata or {})
    return shape


def make_paper_model(path: str | Path, shape: ModelShape, dtype: str,
                     output_type: str | None = None, *, seed: int = 0,
                     name: str = "synthetic") -> ModelShape:
    """Write a model of real size at disk speed; all matrices are cut from pools of random blocks.

    A pool has a prime number of blocks and every tensor starts elsewhere in it, so rows of a
    tensor are shifted against each other and no two are equal. `output_type` is the head's type
    (the embedding's, where the head is tied). A type that does not fit a tensor's row length is
    replaced as llama.cpp's quantiser does, with a note on stderr.
    """
    head = "token_embd.weight" if shape.tied else "output.weight"
    typed = []
    for spec in tensor_specs(shape.check()):
        wanted = output_type or dtype if spec.name == head else dtype
        tensor_type = wanted if spec.kind == "matrix" else "F32"
        if spec.shape[-1] % block_size(tensor_type)[0]:
            tensor_type = FALLBACK[tensor_type]
        typed.append((spec, tensor_type))
    replaced = [spec.name for spec, t in typed
                if spec.kind == "matrix" and t not in (dtype, output_type)]
    if replaced:
        print(f"note: {len(replaced)} tensors have rows that {dtype} blocks do not divide and "
              f"took the fallback type; the first is {replaced[0]}", file=sys.stderr)
    rng = np.random.default_rng(seed)
    pools: dict[tuple[str, float], np.ndarray] = {}

    def data(spec: TensorSpec, tensor_type: str) -> Iterator[np.ndarray]:
        if spec.kind != "matrix":
            yield plain_bytes(_float_values(rng, spec, shape).reshape(-1), tensor_type)
            return
        per_block, block_bytes = block_size(tensor_type)
        if (tensor_type, spec.scale) not in pools:
            pools[tensor_type, spec.scale] = random_blocks(
                rng, tensor_type, _prime_from(POOL_BYTES // block_bytes), spec.scale)
        pool = pools[tensor_type, spec.scale]
        left, at = int(np.prod(spec.shape)) // per_block, int(rng.integers(len(pool)))
        while left:
            part = pool[at : at + left]
            yield part.reshape(-1)
            left, at = left - len(part), 0

    _write(Path(path), shape, typed, data, dtype, name, {})
    return shape


def _type_of(spec: TensorSpec, dtype: str, types: Mapping[str, str]) -> str:
    wanted = dtype if spec.kind == "matrix" else "F32"
    for part, tensor_type in types.items():
        if part in spec.name:
            wanted = tensor_type
    if wanted not in TENSOR_TYPES:
        raise ValueError(f"tensor type must be one of {', '.join(TENSOR_TYPES)}, got {wanted!r}")
    n_block = block_size(wanted)[0]
    if spec.shape[-1] % n_block:
        raise ValueError(f"{spec.name}: rows of {spec.shape[-1]} values are not whole {wanted} "
                         f"blocks of {n_block}")
    return wanted


def _float_values(rng: np.random.Generator, spec: TensorSpec, shape: ModelShape) -> np.ndarray:
    if spec.kind == "rope_factors":
        return rope_factors(shape)
    noise = rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(spec.scale)
    return noise + np.float32(spec.center)


def _prime_from(n: int) -> int:
    while n < 2 or any(n % k == 0 for k in range(2, int(n**0.5) + 1)):
        n += 1
    return n


def _write(path: Path, shape: ModelShape, typed: list[tuple[TensorSpec, str]],
           data: Callable[[TensorSpec, str], Iterator[np.ndarray]], dtype: str, name: str,
           extra: Mapping[str, Any]) -> None:
    """Stream the file to a temporary name beside `path`, then rename it."""
    fields = metadata(shape, make_vocabulary(shape.n_vocab), dtype, name) | dict(extra)
    writer = GGUFWriter(None, shape.arch)
    for key, value in fields.items():
        if value is not None:
            _add_field(writer, key, value)
    for spec, tensor_type in typed:
        per_block, block_bytes = block_size(tensor_type)
        n_bytes = int(np.prod(spec.shape)) // per_block * block_bytes
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), n_bytes,
                               GGMLQuantizationType[tensor_type])
    partial = path.with_name(f"{path.name}.partial")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        for spec, tensor_type in typed:
            writer.write_padding(out, out.tell())
            for part in data(spec, tensor_type):
                out.write(np.ascontiguousarray(part))
        writer.write_padding(out, out.tell())
        writer.close()
        os.replace(partial, path)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise


def _add_field(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32,
             str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    sub = None
    if isinstance(value, list):
        sub = GGUFValueType.STRING if value and isinstance(value[0], str) else GGUFValueType.INT32
    writer.add_key_value(key, value, kinds[type(value)], sub_type=sub)


def main(argv: list[str] | None = None) -> int:
    """Command line: write one paper-size model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name.lower() for name in TENSOR_TYPES]
    parser.add_argument("--shape", required=True, choices=PAPER)
    parser.add_argument("--type", required=True, type=str.lower, choices=names,
                        help="tensor type of all matrices")
    parser.add_argument("--output-type", type=str.lower, choices=names,
                        help="type of the head (default: as --type)")
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="number of layers (default: the model's own)")
    args = parser.parse_args(argv)
    shape = PAPER[args.shape]
    if args.layers is not None:
        if args.layers < 1:
            parser.error(f"--layers must be at least 1, got {args.layers}")
        shape = replace(shape, n_layer=args.layers)
    try:
        make_paper_model(args.out, shape, args.type.upper(),
                         args.output_type and args.output_type.upper(), seed=args.seed,
                         name=f"synthetic {args.shape} {args.type}")
    except OSError as error:
        print(f"cannot write {args.out}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
