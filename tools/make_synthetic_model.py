"""Seeded GGUF models with random weights: tiny ones for tests, paper-size ones for speed.

As a module: `make_tiny_model(path, "llama", "Q4_K")`. As a command, for example:
`python tools/make_synthetic_model.py --shape llama2-7b --type q4_0 --output-type q8_0 --out F`.
The text such a model writes means nothing; shapes, types, metadata and value ranges are real.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from gguf_stream import StoredTensor, block_size, write_gguf
from model_shape import ModelShape, TensorSpec, architecture_fields, rope_factors, tensor_specs
from synthetic_blocks import QUANTISABLE, TENSOR_TYPES, random_blocks, stored_bytes
from synthetic_shapes import PAPER, tiny_shape
from synthetic_vocab import make_vocabulary, vocabulary_fields

# What llama.cpp's quantiser takes when a row is not a multiple of 256 values.
FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
POOL_BYTES = 24 << 20
Edit = Callable[[str, np.ndarray], np.ndarray]


def make_tiny_model(
    path: str | Path,
    arch: str = "llama",
    dtype: str = "F32",
    *,
    seed: int = 0,
    types: Mapping[str, str] | None = None,
    extra_metadata: Mapping[str, Any] | None = None,
    edit: Edit | None = None,
    **overrides: Any,
) -> ModelShape:
    """Write a tiny model and return its shape.

    The float weights depend on (arch, shape, seed) only, so the same model in another type is
    its quantisation. Types without a quantiser in the `gguf` package get random valid blocks.

    Parameters
    ----------
    path : file to write (replaced as a whole)
    arch : llama, llama-relu (with ReLU for its activation), qwen2, qwen3, gemma,
        gemma2, gemma3, phi3, granite, minicpm, smollm3, olmo2 or opt
    dtype : tensor type of all matrices; norms, biases and position tables are always F32
    types : tensor type of matrices by part of the name, e.g. ``{"ffn_down": "Q6_K"}``, or of any
        tensor by its full name
    extra_metadata : keys to add or replace; None removes the key
    edit : called with (name, float32 values) of every tensor that is made from float values;
        returns the values to use
    overrides : fields of ModelShape, e.g. ``n_layer=1, n_embd=64, tied=True``

    Raises
    ------
    ValueError for an unknown architecture, type or field, or a row that is not whole blocks.
    """
    shape = tiny_shape(arch, **overrides)
    specs = {spec.name: spec for spec in tensor_specs(shape)}
    tensors = [
        StoredTensor(spec.name, spec.shape, _type_of(spec, dtype, types or {}))
        for spec in specs.values()
    ]

    def data(tensor: StoredTensor) -> Iterator[np.ndarray]:
        spec = specs[tensor.name]
        rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        if tensor.dtype in QUANTISABLE:
            values = _float_values(rng, spec, shape)
            if edit is not None:
                values = np.asarray(edit(spec.name, values), np.float32).reshape(spec.shape)
            yield stored_bytes(values, tensor.dtype)
        else:
            n_blocks = int(np.prod(spec.shape)) // block_size(tensor.dtype)[0]
            yield random_blocks(rng, tensor.dtype, n_blocks, spec.scale)

    fields = _fields(shape, dtype, f"tiny {arch} seed {seed}")
    write_gguf(Path(path), shape.arch, fields | dict(extra_metadata or {}), tensors, data)
    return shape


def make_paper_model(
    path: str | Path,
    shape: ModelShape,
    dtype: str,
    output_type: str | None = None,
    *,
    seed: int = 0,
    zeros: float = 0.5,
    name: str = "synthetic",
) -> ModelShape:
    """Write a model of real size at disk speed; all matrices are cut from pools of random blocks.

    A pool has a prime number of blocks and every tensor starts elsewhere in it, so rows of a
    tensor are shifted against each other and no two are equal. `output_type` is the head's type
    (the embedding's, where the head is tied). A type that does not fit a tensor's row length is
    replaced as llama.cpp's quantiser does, with a note on stderr. `zeros` is about the share of an
    OPT layer's activations that ReLU makes zero; in trained models it is 0.9 and more.
    """
    head = "token_embd.weight" if shape.tied else "output.weight"
    specs = {spec.name: spec for spec in tensor_specs(shape.check())}
    tensors, replaced = [], []
    for spec in specs.values():
        wanted = "F32" if spec.kind != "matrix" else output_type or dtype
        if spec.kind == "matrix" and spec.name != head:
            wanted = dtype
        if spec.shape[-1] % block_size(wanted)[0]:
            replaced.append(f"{spec.name} {wanted} -> {FALLBACK[wanted]}")
            wanted = FALLBACK[wanted]
        tensors.append(StoredTensor(spec.name, spec.shape, wanted))
    if replaced:
        print(
            f"note: rows of {len(replaced)} tensors are not whole blocks, they take the fallback "
            f"type, e.g. {replaced[0]}",
            file=sys.stderr,
        )
    rng = np.random.default_rng(seed)
    pools: dict[tuple[str, float], np.ndarray] = {}

    def data(tensor: StoredTensor) -> Iterator[np.ndarray]:
        spec = specs[tensor.name]
        if spec.kind != "matrix":
            values = _float_values(rng, spec, shape)
            if spec.name.endswith("ffn_up.bias"):
                # What it is added to has a deviation of about 1.
                deviation = (1 + spec.scale**2) ** 0.5
                values -= np.float32(NormalDist(0, deviation).inv_cdf(zeros))
            yield values
            return
        per_block, block_bytes = block_size(tensor.dtype)
        if (tensor.dtype, spec.scale) not in pools:
            pools[tensor.dtype, spec.scale] = random_blocks(
                rng, tensor.dtype, _prime_from(POOL_BYTES // block_bytes), spec.scale
            )
        pool = pools[tensor.dtype, spec.scale]
        left, at = int(np.prod(spec.shape)) // per_block, int(rng.integers(len(pool)))
        while left:
            part = pool[at : at + left]
            yield part
            left, at = left - len(part), 0

    fields = _fields(shape, dtype, name)
    write_gguf(Path(path), shape.arch, fields, tensors, data)
    return shape


def _type_of(spec: TensorSpec, dtype: str, types: Mapping[str, str]) -> str:
    wanted = dtype if spec.kind == "matrix" else "F32"
    for part, tensor_type in types.items():
        if part == spec.name or (spec.kind == "matrix" and part in spec.name):
            wanted = tensor_type
    if wanted not in TENSOR_TYPES:
        raise ValueError(f"tensor type must be one of {', '.join(TENSOR_TYPES)}, got {wanted!r}")
    n_block = block_size(wanted)[0]
    if spec.shape[-1] % n_block:
        raise ValueError(
            f"{spec.name}: rows of {spec.shape[-1]} values are not whole {wanted} "
            f"blocks of {n_block}"
        )
    return wanted


def _float_values(rng: np.random.Generator, spec: TensorSpec, shape: ModelShape) -> np.ndarray:
    if spec.kind == "rope_factors":
        return rope_factors(shape, spec.name)
    noise = rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(spec.scale)
    return noise + np.float32(spec.center)


def _fields(shape: ModelShape, dtype: str, name: str) -> dict[str, Any]:
    add_bos = shape.arch in ("gemma", "gemma2", "gemma3", "opt")
    return architecture_fields(shape, dtype, name) | vocabulary_fields(
        make_vocabulary(shape.n_vocab), add_bos=add_bos
    )


def _prime_from(n: int) -> int:
    while n < 2 or any(n % k == 0 for k in range(2, int(n**0.5) + 1)):
        n += 1
    return n


def main(argv: list[str] | None = None) -> int:
    """Command line: write one paper-size model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name.lower() for name in TENSOR_TYPES]
    parser.add_argument("--shape", required=True, choices=PAPER)
    parser.add_argument(
        "--type", required=True, type=str.lower, choices=names, help="tensor type of all matrices"
    )
    parser.add_argument(
        "--output-type", type=str.lower, choices=names, help="type of the head (default: as --type)"
    )
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="number of layers (default: the model's own)")
    parser.add_argument(
        "--zeros",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of an OPT layer's activations, about (default: 0.5; trained models: 0.9 and more)",
    )
    args = parser.parse_args(argv)
    shape = PAPER[args.shape]
    if not 0 < args.zeros < 1:
        parser.error(f"--zeros must lie between 0 and 1, got {args.zeros:g}")
    if args.layers is not None:
        if args.layers < 1:
            parser.error(f"--layers must be at least 1, got {args.layers}")
        shape = replace(shape, n_layer=args.layers)
    try:
        make_paper_model(
            args.out,
            shape,
            args.type.upper(),
            args.output_type and args.output_type.upper(),
            seed=args.seed,
            zeros=args.zeros,
            name=f"synthetic {args.shape} {args.type}",
        )
    except OSError as error:
        print(f"cannot write {args.out}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
