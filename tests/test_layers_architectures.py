"""`classify` against the names that real model classes have, in memory and in their saved files.

Every expected table (tests/architectures.py) is compared with the whole model: a name that is
missing from it, or too many, fails.
"""

import json

import pytest
import torch
from tests.architectures import ARCHITECTURES, FOREIGN, expand
from tests.foreign_models import in_process

from taskvec.layers import classify

# One of each way to number blocks has more than ten of them, so that 1 and 10 are both there.
TWELVE = ("llama", "gpt2", "opt", "bert", "t5", "vit", "dinov2", "clip", "gemma3-images")


def names_on_disk(model: torch.nn.Module, folder) -> list[str]:
    """Keys of the saved file, read from its header: 8 bytes of length, then JSON."""
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [name for name in header if name != "__metadata__"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("which", ARCHITECTURES)
def test_every_tensor_of_a_model_is_where_it_should_be(which, tmp_path):
    architecture = ARCHITECTURES[which]
    blocks = 12 if which in TWELVE else architecture.blocks
    with torch.random.fork_rng():
        model = architecture.build(blocks)

    memory = {name: classify(name) for name in model.state_dict()}
    disk = {name: classify(name) for name in names_on_disk(model, tmp_path)}

    assert memory == expand(architecture.memory, blocks)
    expected = expand(architecture.disk or architecture.memory, blocks)
    for name in architecture.tied.split():
        del expected[name]
    assert disk == expected
    for keys in (memory.values(), disk.values()):
        for tower in architecture.towers:
            for module in ("attention", "mlp", "norm"):
                found = {k.block for k in keys if k.tower == tower and k.module == module}
                assert found - {None} == set(range(blocks)), (tower, module)
        assert {k.tower for k in keys if k.block is not None} == set(architecture.towers)


@pytest.fixture(scope="module")
def foreign_names() -> dict[str, list[str]]:
    program = "print(json.dumps({k: list(m.state_dict()) for k, m in models(12).items()}))"
    return in_process(program)


@pytest.mark.parametrize("which", FOREIGN)
def test_every_tensor_of_a_model_of_open_clip_or_timm_is_where_it_should_be(which, foreign_names):
    found = {name: classify(name) for name in foreign_names[which]}

    assert found == expand(FOREIGN[which], 12)
