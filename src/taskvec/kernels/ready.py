"""Compiling the kernels ahead of the work, so that a first run can say why it waits."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from taskvec.dtypes import F32
from taskvec.kernels.combine import combine
from taskvec.kernels.gram import STRETCH, gram, gram_scratch


def is_compiled() -> bool:
    """Whether the kernels are in numba's cache, so that using them costs no compilation."""
    try:
        caches = [cast(Any, kernel)._cache._cache_file for kernel in (gram, combine)]
        return all(cache._load_index() for cache in caches)
    except AttributeError:  # no cache here, or numba keeps it in another way
        return False


def compile_kernels() -> None:
    """Run each kernel on one element, which compiles it where it is not in the cache."""
    block = np.zeros(1, np.float32)
    addresses = np.full(3, block.__array_interface__["data"][0], np.int64)
    codes = np.full(3, F32, np.int64)
    scratch = np.zeros((3, STRETCH), np.float32)
    differences = np.zeros(3, np.bool_)
    rows = gram_scratch(3, np.float32)
    products, signs = np.empty((1, 3, 3)), np.empty((1, 1, 1, 2), np.int64)
    gram(addresses, codes, differences, 1, rows, products, signs)
    coefficients = np.zeros(3, np.float32)
    combine(addresses, codes, differences, coefficients, 1, scratch, int(addresses[0]), F32)
