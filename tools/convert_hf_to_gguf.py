"""Hugging Face model directory -> GGUF file, for the architectures in hf_architectures.py.

`python tools/convert_hf_to_gguf.py DIRECTORY --outtype q8_0 --out model.gguf`. Needs NumPy and the
`gguf` package only. Matrices take the type asked for; norms, biases and learned positions stay
F32, and a matrix whose rows are not whole blocks becomes F16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gguf_stream import StoredTensor, block_size, write_gguf
from hf_architectures import hf_name, shape_from_config, to_gguf_values
from hf_checkpoint import Checkpoint, CheckpointError
from hf_tokenizer import tokenizer_fields
from model_shape import ModelShape, TensorSpec, architecture_fields, rope_factors, tensor_specs
from synthetic_blocks import QUANTISABLE, stored_bytes

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # computed, but stored by some old checkpoints


def convert(directory: Path, out: Path, outtype: str = "F16") -> ModelShape:
    """Convert a model and return its shape.

    Raises
    ------
    CheckpointError where something in the directory is missing, unknown or contradictory.
    OSError from the file system.
    """
    if outtype not in QUANTISABLE:
        raise ValueError(f"outtype must be one of {', '.join(QUANTISABLE)}, got {outtype!r}")
    checkpoint = Checkpoint(directory)
    shape = shape_from_config(checkpoint.config)
    sources = _match_tensors(checkpoint, shape)
    fields = architecture_fields(shape, outtype, directory.resolve().name) | tokenizer_fields(
        directory, shape.n_vocab, checkpoint.config
    )
    tensors = [
        StoredTensor(spec.name, spec.shape, _type_of(spec, outtype)) for spec in tensor_specs(shape)
    ]

    def data(tensor: StoredTensor) -> Iterator[np.ndarray]:
        source = sources[tensor.name]
        values = (
            rope_factors(shape, tensor.name)
            if source is None
            else to_gguf_values(shape, tensor.name, checkpoint.load(source))
        )
        yield stored_bytes(np.ascontiguousarray(values), tensor.dtype)

    write_gguf(out, shape.arch, fields, tensors, data)
    return shape


def _match_tensors(checkpoint: Checkpoint, shape: ModelShape) -> dict[str, str | None]:
    """Source of every tensor of the file (None: computed), each checked for its shape."""
    present = {
        _full_name(name, shape.arch): name
        for name in checkpoint.names()
        if not name.endswith(IGNORED_SUFFIXES)
    }
    sources: dict[str, str | None] = {}
    for spec in tensor_specs(shape):
        if spec.kind == "rope_factors":
            sources[spec.name] = None
            continue
        wanted = hf_name(shape.arch, spec.name)
        if wanted not in present:
            raise CheckpointError(f"{checkpoint.directory}: tensor {wanted} is missing")
        source = present.pop(wanted)
        if checkpoint.shape(source) != spec.shape:
            raise CheckpointError(
                f"{checkpoint.directory}: {source} has shape "
                f"{checkpoint.shape(source)}, expected {spec.shape} by the "
                f"config"
            )
        sources[spec.name] = source
    if shape.tied:
        present.pop("lm_head.weight", None)  # a copy of the embedding
    if present:
        raise CheckpointError(
            f"{checkpoint.directory}: {len(present)} tensors are not part of a "
            f"{shape.arch} model, e.g. {min(present)}"
        )
    return sources


def _full_name(name: str, arch: str) -> str:
    """OPT's first checkpoints leave the outer `model.` away."""
    return f"model.{name}" if arch == "opt" and name.startswith("decoder.") else name


def _type_of(spec: TensorSpec, outtype: str) -> str:
    if spec.kind != "matrix":
        return "F32"
    return outtype if spec.shape[-1] % block_size(outtype)[0] == 0 else "F16"


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 fine, 1 cannot convert or write, 2 usage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "directory", type=Path, help="with config.json, *.safetensors and tokenizer.json"
    )
    parser.add_argument(
        "--outtype",
        type=str.lower,
        default="f16",
        choices=[name.lower() for name in QUANTISABLE],
        help="tensor type of the matrices (default: f16)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write (default: DIRECTORY-OUTTYPE.gguf in the working directory)",
    )
    args = parser.parse_args(argv)
    out = args.out or Path(f"{args.directory.resolve().name}-{args.outtype}.gguf")
    try:
        shape = convert(args.directory, out, args.outtype.upper())
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{out}: {shape.arch}, {shape.n_layer} layers, {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
