from importlib.util import find_spec

import pytest


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The models are tiny: on a busy machine several threads only wait for each other."""
    if find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
