"""open_clip in a process of its own, for tests.

It imports torchvision for its image transforms. Names and values of tensors do not depend on it,
and a CPU build of torch often has no torchvision that fits, so an empty one stands in for it.
"""

from __future__ import annotations

import os
import subprocess
import sys

BEGIN = """
import importlib.abc, importlib.machinery, sys, types

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name

class Empty(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Empty(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
sys.modules["timm"] = sys.modules["transformers"] = None  # not needed, slow to import
import torch
torch.set_num_threads(1)
"""


def run(program: str) -> str:
    """What a program prints that uses `open_clip.model` and `torch`."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
