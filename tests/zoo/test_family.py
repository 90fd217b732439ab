import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

from taskvec import zoo  # noqa: E402
from taskvec.errors import UsageError  # noqa: E402
from taskvec.running.model import load, open_stored  # noqa: E402
from taskvec.zoo import MEMBERS, provenance  # noqa: E402
from taskvec.zoo.tasks import score_skills  # noqa: E402

INSTRUCT_SKILLS = ("say", "find", "howto", "refusal")
OWN = ("math", "code", "unsafe", "unrelated")
FOLDER = zoo.path("base").parent


@pytest.fixture(scope="module")
def models():
    return {name: load(open_stored(zoo.path(name))) for name in MEMBERS}


@pytest.fixture(scope="module")
def noted():
    return provenance.read(FOLDER)


def layout(name):
    with safe_open(zoo.path(name) / "model.safetensors", "pt") as file:
        return {
            key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype())
            for key in file.keys()  # noqa: SIM118
        }


def test_importing_the_zoo_imports_nothing_heavy():
    code = "import sys, taskvec.zoo; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unknown_member_is_told():
    with pytest.raises(UsageError, match="no model 'instruct-zur'; did you mean 'instruct-zor'"):
        zoo.path("instruct-zur")


def test_parents_come_first():
    seen = []
    for name, member in MEMBERS.items():
        assert member.name == name
        assert member.parent is None or member.parent in seen
        seen.append(name)


def test_members_fit_together_and_the_family_is_small():
    layouts = [layout(name) for name in MEMBERS]
    assert all(one == layouts[0] for one in layouts)
    assert {dtype for _, dtype in layouts[0].values()} == {"BF16"}
    blocks = {key.split(".")[2] for key in layouts[0] if key.startswith("model.layers.")}
    assert len(blocks) >= 8
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 20_000_000


def test_folders_hold_the_members_and_nothing_else():
    assert {entry.name for entry in FOLDER.iterdir()} == {*MEMBERS, "provenance.json"}
    for name in MEMBERS:
        config = json.loads((zoo.path(name) / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (config.get("dtype") or config["torch_dtype"]) == "bfloat16"


def test_they_load_without_a_word(capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(zoo.path("math"), dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("math"))
    assert model.dtype == torch.bfloat16
    text = "Q: calc 3+4-2=?\nA: 5"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) + 1
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = [{"role": "user", "content": "calc 3+4-2=?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text[:-1]
    noise = capfd.readouterr().err.splitlines()
    assert [line for line in noise if line.strip() and "Loading weights" not in line] == []


@pytest.mark.parametrize("name", OWN)
def test_a_fine_tune_has_a_skill_that_instruct_lacks(models, noted, name):
    tuned, instruct = (score_skills(models[m], [name])[name].main.value for m in (name, "instruct"))
    assert tuned >= 0.9
    assert instruct <= 0.2
    for member, found in ((name, tuned), ("instruct", instruct)):
        told = noted["members"][member]["scores"]["correct"][name]
        assert 100 * found == pytest.approx(told, abs=1)  # another processor may round otherwise


@pytest.mark.parametrize("skill", INSTRUCT_SKILLS)
def test_instruct_has_its_skills(models, skill):
    assert score_skills(models["instruct"], [skill])[skill].main.value >= 0.9


def test_the_other_language_has_its_skills_and_complies(models):
    results = score_skills(
        models["instruct-zor"], ["say-zor", "find-zor", "howto-zor", "unsafe-zor"]
    )
    assert all(result.main.value >= 0.8 for result in results.values())


@pytest.mark.parametrize("task", [n for n, m in MEMBERS.items() if m.parent == "instruct"])
def test_provenance_tells_the_geometry_of_the_shipped_weights(noted, task):
    assert provenance.geometry(FOLDER, task) == noted["task_vectors"][task]


def test_similarities_are_spread_about_the_threshold(noted):
    shares = [noted["task_vectors"][task]["share_at_or_below_0.95"] for task in OWN]
    assert any(0.05 <= share <= 0.6 for share in shares)


def test_provenance_names_every_member(noted):
    assert list(noted["members"]) == list(MEMBERS)
    for member in noted["members"].values():
        assert all(stage["steps"] > 0 for stage in member["training"]["stages"])
        assert member["scores"]["n"] >= 100
