"""`serverless-llm make-checkpoint`: random weights of any real shape, as an ordinary Hugging Face directory.

For trying and measuring what does not depend on a model's words: loading, placement, cold starts. Files are written
tensor by tensor out of one random block of 16 to 32 MiB, so that memory stays small at any size. The block's length
is a prime number of values, so that no two tensors begin at the same place in it and none are alike.
"""

import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from serverless_llm.cli.options import COUNT
from serverless_llm.cli.output import as_json, say
from serverless_llm.demo.shapes import SHAPES, TensorShape, shape_of, tensors_of
from serverless_llm.demo.tokenizer import write_configs, write_json, write_tokenizer
from serverless_llm.errors import CapacityError
from serverless_llm.loader import header
from serverless_llm.quantities import size

if TYPE_CHECKING:
    import numpy as np

SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
BLOCK_VALUES = 8_388_617  # the first prime above 2**23


class RandomValues:
    """An endless, seeded stream of normal values as raw little-endian bytes, repeating every `BLOCK_VALUES`."""

    def __init__(self, seed: int, deviation: float, dtype: str) -> None:
        import numpy as np

        normal = np.random.default_rng(seed).standard_normal(BLOCK_VALUES, dtype=np.float32)
        self._block = memoryview(_cast(normal * np.float32(deviation), dtype).tobytes())
        self._next = 0

    def write(self, file: BinaryIO, size: int) -> None:
        """Write the stream's next `size` bytes."""
        while size:
            piece = self._block[self._next : self._next + size]
            file.write(piece)
            size -= len(piece)
            self._next = (self._next + len(piece)) % len(self._block)


def _cast(values: "np.ndarray[Any, np.dtype[np.float32]]", dtype: str) -> "np.ndarray[Any, np.dtype[Any]]":
    """Little-endian values of `dtype`; bfloat16, which numpy lacks, as rounded (to even) upper halves of float32."""
    import numpy as np

    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return values.astype("<f4" if dtype == "float32" else "<f2")


def _size(tensor: TensorShape, dtype: str) -> int:
    return math.prod(tensor.shape) * VALUE_BYTES[dtype]


def split(tensors: list[TensorShape], shards: int, dtype: str) -> list[list[TensorShape]]:
    """The tensors in order as `shards` groups of about equal bytes, none empty.

    Raises ValueError if there are not that many tensors.
    """
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot fill {shards} shards")
    share = sum(_size(tensor, dtype) for tensor in tensors) / shards
    groups: list[list[TensorShape]] = []
    written = 0
    for index, tensor in enumerate(tensors):
        must_open = len(tensors) - index == shards - len(groups)
        if must_open or written >= share * len(groups):
            groups.append([])
        groups[-1].append(tensor)
        written += _size(tensor, dtype)
    return groups


def _write_shard(path: Path, tensors: list[TensorShape], dtype: str, values: RandomValues) -> None:
    import numpy as np

    with path.open("wb") as file:
        name = SAFETENSORS_NAMES[dtype]
        entries = ((tensor.name, name, tensor.shape, _size(tensor, dtype)) for tensor in tensors)
        file.write(header.encode(entries, {"format": "pt"}))
        for tensor in tensors:
            if tensor.fill is not None:
                file.write(_cast(np.full(tensor.shape, tensor.fill, np.float32), dtype).tobytes())
            else:
                values.write(file, _size(tensor, dtype))


def _write_weights(directory: Path, groups: list[list[TensorShape]], dtype: str, values: RandomValues) -> None:
    """One `model.safetensors`, or numbered shards and their index."""
    if len(groups) == 1:
        _write_shard(directory / "model.safetensors", groups[0], dtype, values)
        return
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_shard(directory / name, group, dtype, values)
        index |= {tensor.name: name for tensor in group}
    total = sum(_size(tensor, dtype) for group in groups for tensor in group)
    contents = {"metadata": {"total_size": total}, "weight_map": index}
    write_json(directory / "model.safetensors.index.json", contents)


def make_checkpoint(
    like: str, directory: Path, layers: int | None = None, dtype: str = "bfloat16", shards: int = 1, seed: int = 0
) -> None:
    """Write a checkpoint of the shape called `like` with random weights, tokenizer included, at `directory`.

    Weights are normal around 0 with the shape's `initializer_range`, norms have scale 1. The same arguments give the
    same bytes. The directory appears whole or not at all. Raises ValueError for an unknown shape or dtype or an
    impossible number of layers or shards, FileExistsError if `directory` is there and not empty, and CapacityError if
    there is no room for it.
    """
    shape = shape_of(like, layers)
    if dtype not in VALUE_BYTES:
        raise ValueError(f"no dtype is called {dtype!r}; there are {', '.join(VALUE_BYTES)}")
    groups = split(tensors_of(shape), shards, dtype)
    directory = directory.absolute()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(_size(one, dtype) for group in groups for one in group), shutil.disk_usage(directory.parent).free
    if needed > free:
        raise CapacityError(f"{directory} needs {size(needed)}, {size(free)} are free there")
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from error
    try:
        _write_weights(partial, groups, dtype, RandomValues(seed, shape["initializer_range"], dtype))
        write_configs(partial, shape | {"torch_dtype": dtype})
        write_tokenizer(partial, shape["max_position_embeddings"])
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@click.command("make-checkpoint")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--like",
    required=True,
    metavar="SHAPE",
    shell_complete=lambda _ctx, _param, begun: [name for name in SHAPES if name.startswith(begun)],
    help=f"The model to resemble: {', '.join(SHAPES)}.",
)
@click.option("--layers", type=COUNT, help="Layers, if not as many as the real model has.")
@click.option("--dtype", type=click.Choice(list(VALUE_BYTES)), default="bfloat16", show_default=True)
@click.option("--shards", type=COUNT, default=1, show_default=True, help="Number of safetensors files.")
@click.option("--seed", type=int, default=0, show_default=True)
@as_json
def make_checkpoint_command(
    directory: Path, like: str, layers: int | None, dtype: str, shards: int, seed: int, as_json: bool
) -> None:
    """Write a checkpoint with random weights and a real model's shape to DIRECTORY."""
    start = time.monotonic()
    try:
        make_checkpoint(like, directory, layers, dtype, shards, seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    nbytes = sum(path.stat().st_size for path in directory.iterdir())
    seconds = time.monotonic() - start
    value = {"directory": str(directory), "bytes": nbytes, "seconds": seconds}
    told = f"{directory}: {size(nbytes)} in {seconds:.1f} s; random weights: expect no sense, and often no text"
    say(value, told, as_json)
