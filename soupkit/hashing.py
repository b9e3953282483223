"""Hashes of files, for provenance: fast by default, cryptographic on request.

The fast one, ``xxh3_tree``, is XXH3 with 128 bits over the digests of a file's pieces, one after the other. The pieces
of a safetensors file are its header (everything before the tensors' bytes) and its tensors, in the order of their
bytes, each cut after every 2²⁴ elements; any other file is one piece. A merge hashes the pieces as it reads and writes
them, in any order, so that a file whose tensors are merged as they are stored is not read a second time. It finds every
accidental change; SHA-256 of the whole file, which in addition resists forgery and is what hubs show, costs another
reading of all files at a fifth of the speed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from soupkit.errors import MergeError
from soupkit.files import open_regular
from soupkit.safetensors_format import StoredTensor, bytes_of, read_header

PIECE = 2**24  # elements of a tensor in a piece, and in a task of a merge: a multiple of the block
CHUNK = 2**20  # bytes read at once
DEFAULT = "xxh3_tree"
# Name, as soup.json has it, to the number of hexadecimal digits.
ALGORITHMS = {DEFAULT: 32, "sha256": 64}


class Piece(NamedTuple):
    """Where a piece begins: the file, and the byte in it."""

    path: Path
    offset: int


def check_algorithm(name: str) -> str:
    """The name of a known algorithm. Raises MergeError for any other."""
    if name not in ALGORITHMS:
        raise MergeError(f"unknown hash {name!r}: choose one of {', '.join(ALGORITHMS)}")
    return name


def hash_file(
    path: Path,
    algorithm: str = DEFAULT,
    advance: Callable[[int], None] = lambda num_bytes: None,
    known: Mapping[Piece, bytes] | None = None,
) -> str:
    """The hash of a file, in hexadecimal. ``advance`` hears of every number of bytes that are done.

    ``known`` holds digests of pieces that need not be read any more; for SHA-256 there are none.
    """
    if algorithm == "sha256":
        return _digest_of_range(path, 0, path.stat().st_size, hashlib.sha256(), advance).hex()
    tree = new_digest()
    for start, stop in _pieces(path):
        digest = (known or {}).get(Piece(path, start))
        if digest is None:
            digest = _digest_of_range(path, start, stop, new_digest(), advance)
        else:
            advance(stop - start)
        tree.update(digest)
    return str(tree.hexdigest())


class TensorHasher:
    """Digests of a stored tensor's pieces, from its elements as they pass by in order.

    ``start`` is the element to begin with, a multiple of PIECE. What comes again or out of order is left out: a piece
    whose elements never came in order has no digest.
    """

    def __init__(self, path: Path, offset: int, start: int, num_elements: int) -> None:
        self.path, self.offset, self.num_elements = path, offset, num_elements
        self.next = start
        self.digests: dict[Piece, bytes] = {}
        self._digest = new_digest()

    def feed(self, position: int, block: Tensor) -> None:
        """Take the elements from ``position`` on, in their stored dtype."""
        if position != self.next:
            return
        while len(block):
            begin = self.next // PIECE * PIECE
            end = min(begin + PIECE, self.num_elements)
            part, block = block[: end - self.next], block[end - self.next :]
            self._digest.update(bytes_of(part))
            self.next += len(part)
            if self.next == end:
                self.digests[Piece(self.path, self.offset + begin * part.dtype.itemsize)] = self._digest.digest()
                self._digest = new_digest()


def new_digest() -> Any:
    """An empty XXH3 digest of 128 bits."""
    import xxhash

    return xxhash.xxh3_128()


def _pieces(path: Path) -> Iterator[tuple[int, int]]:
    """First byte of each piece, and the one after its last."""
    tensors = _tensors(path)
    yield 0, min((tensor.offset for tensor in tensors), default=path.stat().st_size)
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        end = tensor.offset + tensor.num_bytes
        for start in range(0, math.prod(tensor.shape), PIECE):
            first = tensor.offset + start * tensor.dtype.itemsize
            yield first, min(first + PIECE * tensor.dtype.itemsize, end)


def _tensors(path: Path) -> list[StoredTensor]:
    if path.suffix != ".safetensors":
        return []
    try:
        return list(read_header(path).values())
    except MergeError:  # damaged: its bytes have a hash all the same
        return []


def _digest_of_range(path: Path, start: int, stop: int, digest: Any, advance: Callable[[int], None]) -> bytes:
    buffer = memoryview(bytearray(min(CHUNK, max(stop - start, 0))))
    with open_regular(path) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(start)
        while start < stop and (num_read := file.readinto(buffer[: stop - start])):
            digest.update(buffer[:num_read])
            start += num_read
            advance(num_read)
    return bytes(digest.digest())
