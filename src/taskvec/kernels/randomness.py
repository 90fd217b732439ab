"""Random masks without a generator: element x is kept if a hash of (key, x) is below a bound.

The key represents seed, task and tensor, so a mask does not depend on threads, blocks, the order of
tensors or earlier draws. The hash is the finalizer of splitmix64 (Steele, Lea and Flood, 2014) on
key + x · golden ratio. The 32 bits of every element are uniform, and tests find those of different
elements and keys independent.
"""

from __future__ import annotations

import numpy as np

from taskvec.kernels.jit import jit

ALWAYS = np.uint64(2**32)  # a bound that keeps every element

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@jit
def draw(key: np.uint64, element: np.uint64) -> np.uint64:
    """32 uniform bits for one element."""
    z = key + element * _STEP
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return (z ^ (z >> np.uint64(31))) >> np.uint64(32)
