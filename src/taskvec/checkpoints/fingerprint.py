"""Identity of weights by content.

A tensor's digest is XXH3-128 over the digests of its chunks of 65,536 elements, so it is the same
for any block size, and several threads can work on one tensor. A model's fingerprint is
XXH3-128 over name, dtype, shape and digest of every tensor by name, so it is the same for any
shards. It detects changed weights; it is not cryptographic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from taskvec.streaming import CHUNK


def chunk_digests(block: np.ndarray[Any, Any]) -> bytes:
    """Digests of the chunks of a block, 16 bytes each.

    Args:
        block: Stored elements, shape (n,); begins at a multiple of `CHUNK` elements of its tensor.
    """
    if block.size <= CHUNK:
        return xxhash.xxh3_128_digest(block.data) if block.size else b""
    view = block.view(np.uint8).data
    step = CHUNK * block.itemsize
    return b"".join(xxhash.xxh3_128_digest(view[i : i + step]) for i in range(0, view.nbytes, step))


def tensor_digest(chunks: Iterable[bytes]) -> str:
    """Digest of a tensor, 32 hexadecimal digits, from its chunk digests in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(chunks))


def fingerprint(
    digests: Mapping[str, str], described: Mapping[str, tuple[str, tuple[int, ...]]]
) -> str:
    """Fingerprint of a model from the digests of its tensors.

    Args:
        digests: Digest of each tensor by name.
        described: dtype name and shape of each tensor by name.
    """
    lines = (f"{n}\0{described[n][0]}\0{described[n][1]}\0{digests[n]}\n" for n in sorted(digests))
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())
