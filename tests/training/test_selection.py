"""Presets against the architectures of the layer table: names, what moves in training, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from tests.architectures import ARCHITECTURES
from tests.foreign_models import in_process
from tests.training import presets
from tests.training.presets import FILE, table
from torch import nn

from taskvec.errors import ParameterError, UsageError
from taskvec.layers import override
from taskvec.training.rows import RowRanges, hold_rows
from taskvec.training.selection import describe, freeze_rest, select

EXPECTED = json.loads(FILE.read_text())
FOREIGN = [which for which in EXPECTED if which not in ARCHITECTURES]
# Names that are heads, by eye.
HEADS = ("classifier", "score", "cls.", "lm_head", "qa_outputs", "classification_head", "text_head")
HEADS += (
    "vision_model.head.",
    "text_model.head.",
    "model.vision_tower.head.",
    "attn_pool",
    "head.",
)
HEADS += ("visual.attn_pool", "text_projection", "text.text_projection", "visual_projection")
HEADS += ("model.multi_modal_projector", "model.decoder.project_out", "decoder.project_out")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models():
    """Every architecture, built once; tests copy weights that they change."""
    built: dict[str, nn.Module] = {}

    def model(which: str) -> nn.Module:
        if which not in built:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                built[which] = ARCHITECTURES[which].build(presets.BLOCKS)
        return built[which]

    return model


def by_types(module: nn.Module) -> dict[str, set[str]]:
    """What presets should mean, from the classes of modules and not from the layer table."""
    found: dict[str, set[str]] = {"attention": set(), "mlp": set(), "norms": set()}
    modules = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        path, _, leaf = name.rpartition(".")
        kinds = [type(modules[path]).__name__]
        above = path
        while above:
            above = above.rpartition(".")[0]
            kinds.append(type(modules[above]).__name__)
        if name.startswith(HEADS):
            continue
        owner = modules[path]
        is_linear = isinstance(owner, nn.Linear) or kinds[0] == "Conv1D"
        is_linear |= isinstance(owner, nn.MultiheadAttention)
        is_attention = any("Attention" in k and "Block" not in k for k in kinds)
        is_inside = any(part.isdigit() for part in name.split("."))
        is_expert = parameter.ndim == 3 and "Experts" in kinds[0]
        is_router = "Router" in kinds[0] and parameter.ndim == 2
        if "Norm" in kinds[0]:
            found["norms"].add(name)
        elif is_linear and is_attention and is_inside and leaf.endswith("weight"):
            found["attention"].add(name)
        elif is_inside and (is_expert or is_router or (is_linear and leaf == "weight")):
            found["mlp"].add(name)
    return found


@pytest.mark.parametrize("which", ARCHITECTURES)
class TestEveryArchitecture:
    def test_presets_select_exactly_the_expected_tensors_and_rows(self, which, models):
        assert table(models(which)) == EXPECTED[which]

    def test_presets_agree_with_the_classes_of_the_modules(self, which, models):
        module = models(which)

        for preset, names in by_types(module).items():
            assert set(select(module, preset).names) == names, preset

    def test_linear_is_attention_and_mlp_and_all_is_all(self, which, models):
        module = models(which)
        names = [name for name, _ in module.named_parameters()]
        both = {*select(module, "attention").names, *select(module, "mlp").names}

        assert select(module, "linear").names == tuple(n for n in names if n in both)
        assert select(module, "all").names == tuple(names)
        assert select(module, "attention,mlp") == select(module, ["linear"])
        assert select(module, "attention-qkvo") == select(module, "attention")

    @pytest.mark.parametrize("train", ["attention", "attention-qv+bias", "mlp", "norms"])
    def test_what_is_not_selected_stays_bit_for_bit(self, which, models, train):
        trained_only_what_is_selected(models(which), train)


def trained_only_what_is_selected(module: nn.Module, train: str) -> None:
    """Two steps of two optimisers with momentum and weight decay, on a loss that meets everything.

    Tensors change back at the end.
    """
    selection = select(module, train)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    freeze_rest(module, selection)
    parameters = dict(module.named_parameters())
    trainable = [p for p in parameters.values() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    options = {"lr": 0.1, "weight_decay": 0.1}
    with hold_rows(module, selection.rows) as put_back:
        for optimiser in (
            torch.optim.SGD(trainable, momentum=0.9, **options),
            torch.optim.AdamW(trainable, **options),
        ):
            for _ in range(2):
                optimiser.zero_grad()
                noise = {n: torch.randn(p.shape, generator=generator) for n, p in before.items()}
                sum((parameters[n] * noise[n]).sum() for n in parameters).backward()
                optimiser.step()
                put_back()
    for name, parameter in parameters.items():
        changed = parameter.detach() != before[name]
        if name not in selection.names:
            assert not changed.any(), name
            continue
        expected = torch.ones(parameter.shape, dtype=torch.bool)
        if name in selection.rows:
            rows = selection.rows[name]
            expected[:] = False
            for start, stop in rows.ranges:
                expected.narrow(rows.axis, start, stop - start).fill_(True)
        assert torch.equal(changed, expected), name
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])


PROGRAM = """
from tests.training.presets import table
from tests.training.test_selection import by_types, trained_only_what_is_selected
from taskvec.training.selection import select
found = {k: m for k, m in models().items() if k != "open_clip-timm"}
for module in found.values():
    for preset, names in by_types(module).items():
        assert set(select(module, preset).names) == names, preset
    for train in ("attention", "attention-qv+bias", "mlp", "norms"):
        trained_only_what_is_selected(module, train)
print(json.dumps({k: table(m) for k, m in found.items()}))
"""


@pytest.mark.parametrize("which", FOREIGN)
def test_presets_of_open_clip_and_timm(which, foreign):
    assert foreign[which] == EXPECTED[which]


@pytest.fixture(scope="module")
def foreign():
    return in_process(PROGRAM)


def test_every_architecture_has_an_expectation():
    assert set(ARCHITECTURES) <= set(EXPECTED)
    assert len(FOREIGN) == 5


class TestEntries:
    def test_what_is_counted(self, models):
        gpt2 = models("gpt2")
        total = sum(p.numel() for p in gpt2.parameters())

        assert select(gpt2, "attention").parameters == 2 * (16 * 48 + 16 * 16)
        assert select(gpt2, "attention-q+bias").parameters == 2 * (16 * 16 + 16)
        assert select(gpt2, "all").total == total
        assert select(gpt2, "all").share == 1

    def test_a_line_for_people(self, models):
        assert describe(select(models("gpt2"), "attention-qv")) == (
            "trains 2 tensors (2 of them in part), 1,024 of 7,232 parameters (14.2 %)"
        )
        assert describe(select(models("gpt2"), "*.ln_f.bias")) == (
            "trains 1 tensor, 16 of 7,232 parameters (0.2 %)"
        )

    def test_rows_of_several_entries_are_joined(self, models):
        gpt2 = models("gpt2")

        assert select(gpt2, "attention-q,attention-k,attention-v,attention-o") == select(
            gpt2, "attention"
        )
        assert select(gpt2, "attention-q,attention-v") == select(gpt2, "attention-vq")
        assert select(gpt2, ["attention-q", "*c_attn*"]) == select(gpt2, "*c_attn*,attention-q")

    def test_what_is_taken_away(self, models):
        gpt2 = models("gpt2")
        left = select(gpt2, "!attention-q, attention")
        name = "transformer.h.0.attn.c_attn.weight"

        assert left.rows[name] == RowRanges(1, ((16, 48),))
        assert left.names == select(gpt2, "attention").names
        assert left == select(gpt2, "attention-kvo")
        assert name not in select(gpt2, "all,!*c_attn.weight").names
        assert select(gpt2, "attention-qv,!attention-q") == select(gpt2, "attention-v")

    def test_one_tower(self, models):
        clip = models("clip")
        vision = select(clip, "vision:attention")

        assert {n.partition(".")[0] for n in vision.names} == {"vision_model"}
        assert set(select(clip, "vision:attention,text:attention").names) == set(
            select(clip, "attention").names
        )
        assert set(select(clip, "vision:all").names) | set(select(clip, "text:all").names) == {
            n for n, _ in clip.named_parameters() if n != "logit_scale"
        }

    def test_names_and_patterns(self, models):
        llama = models("llama")
        name = "model.layers.0.mlp.up_proj.weight"

        assert select(llama, name).names == (name,)
        assert select(llama, "*.layers.1.*proj.weight").names == tuple(
            n for n in select(llama, "linear").names if ".1." in n
        )

    def test_a_tied_parameter_goes_by_its_first_name(self, models):
        gpt2 = models("gpt2")

        assert select(gpt2, "lm_head.weight").names == ("transformer.wte.weight",)
        assert select(gpt2, "all,!heads").names == select(gpt2, "all,!transformer.wte.*").names

    def test_overrides_say_what_a_name_is(self):
        net = nn.ModuleDict({"mix": nn.Linear(4, 8), "out": nn.Linear(8, 4)})
        rule = override({"pattern": r"^mix\.", "module": "attention", "projection": "v"})

        assert select(net, "attention", [rule]).names == ("mix.weight",)
        assert select(net, "attention-v+bias", [rule]).names == ("mix.weight", "mix.bias")

    def test_an_override_without_projection_is_attention_as_a_whole(self):
        net = nn.ModuleDict({"mix": nn.Linear(4, 8), "norm": nn.LayerNorm(4)})
        rule = override({"pattern": ".", "module": "attention"})

        assert select(net, "attention", [rule]).names == ("mix.weight",)
        with pytest.raises(ParameterError) as caught:
            select(net, "attention-q", [rule])
        assert str(caught.value) == (
            "train 'attention-q': the projection of 'mix.weight' is unknown; set `projection` "
            "(q, k, v, o) in `layers`, or select the whole attention"
        )


class TestTorchsOwnAttention:
    def test_is_known_by_its_type(self):
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12), 2, enable_nested_tensor=False
        )

        assert select(encoder, "attention").names == tuple(
            f"layers.{i}.self_attn.{leaf}"
            for i in range(2)
            for leaf in ("in_proj_weight", "out_proj.weight")
        )
        qv = select(encoder, "attention-qv+bias")
        assert qv.rows["layers.1.self_attn.in_proj_bias"] == RowRanges(0, ((0, 8), (16, 24)))
        trained_only_what_is_selected(encoder, "attention-k+bias")

    def test_inside_a_module_whose_names_the_table_half_knows(self):
        net = nn.ModuleDict({"encoder": nn.Module()})
        net["encoder"].layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 12)])

        assert select(net, "attention").names == (
            "encoder.layers.0.self_attn.in_proj_weight",
            "encoder.layers.0.self_attn.out_proj.weight",
        )

    def test_alone_and_with_other_widths_of_keys_and_values(self):
        attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)

        assert select(attention, "attention").names == (
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "out_proj.weight",
        )
        chosen = select(attention, "attention-v+bias")
        assert chosen.names == ("v_proj_weight", "in_proj_bias")
        assert dict(chosen.rows) == {"in_proj_bias": RowRanges(0, ((16, 24),))}


class LowRank(nn.Module):
    """Attention as in DeepSeek, named so: of its projections the table knows the last."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a_proj = nn.Linear(8, 4, bias=False)
        self.kv_b_proj = nn.Linear(4, 8, bias=False)
        self.o_proj = nn.Linear(8, 8, bias=False)


def deepseek() -> nn.Module:
    layer = nn.ModuleDict({"self_attn": LowRank(), "input_layernorm": nn.RMSNorm(8)})
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([layer])})})


class TestRefusals:
    @pytest.mark.parametrize(
        ("train", "message"),
        [
            (
                "",
                "train is empty; give attention | mlp | linear | norms | embeddings | heads | all",
            ),
            ("attn", "train 'attn' is neither a preset nor a parameter; did you mean "),
            (
                "attention-x",
                "train 'attention-x' is neither a preset nor a parameter; did you mean",
            ),
            ("norms+bias", "train 'norms+bias' is neither a preset nor a parameter; did you mean"),
            ("vision:mlp", "train 'vision:mlp': the module has no tower 'vision'; it has model"),
            (
                "*.lora_A.*",
                "train '*.lora_A.*' matches nothing; the module has attention (qkv, o), "
                "mlp (up, down), norm (such as 'transformer.h.0.ln_1.weight'), embedding "
                "(such as 'transformer.wte.weight'), final_norm (such as "
                "'transformer.ln_f.weight'), head (such as 'lm_head.weight')",
            ),
            ("attention,!*", "train 'attention,!*' leaves nothing; the module has attention (qkv"),
            ("attention,!x*", "train 'x*' matches nothing; the module has attention (qkv, o), mlp"),
        ],
    )
    def test_words_that_mean_nothing(self, models, train, message):
        with pytest.raises(ParameterError) as caught:
            select(models("gpt2"), train)

        assert str(caught.value).startswith(message)

    def test_a_module_that_is_not_known_says_what_there_is(self):
        with pytest.raises(ParameterError) as caught:
            select(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "attention")

        assert str(caught.value) == (
            "train 'attention' matches nothing; the module has other (such as '0.weight')"
        )
        with pytest.raises(ParameterError, match=r"^train: the module has no parameters$"):
            select(nn.ReLU(), "all")

    def test_attention_of_low_rank_is_taken_whole(self):
        assert len(select(deepseek(), "attention").names) == 3

    def test_half_an_attention_is_not_taken_for_the_whole(self):
        other = override({"pattern": r"self_attn\.(q_a|kv_b)_proj", "module": "other"})
        assert len(select(deepseek(), "attention", [other]).names) == 1
        layer = nn.ModuleDict({"mamba": nn.ModuleDict({"out_proj": nn.Linear(8, 8)})})
        layer["mamba"]["norm"] = nn.RMSNorm(8)
        net = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([layer])})})
        with pytest.raises(ParameterError) as caught:
            select(net, "norms")

        assert str(caught.value) == (
            "train 'norms': 'model.layers.0.mamba.out_proj.weight' in 'model.layers.0.mamba' is "
            "unknown to the layer table; describe it in `layers` (module: other if it is neither), "
            "or select parameters by patterns"
        )

    def test_whole_numbers_do_not_train(self):
        net = nn.Linear(2, 2)
        net.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.uint8), False))

        assert select(net, "weight").names == ("weight",)
        with pytest.raises(ParameterError) as caught:
            select(net, "all")
        assert str(caught.value) == (
            "train 'all' selects 'codes', which is torch.uint8; only floating-point weights train: "
            "load the model unquantised, or use lora"
        )

    def test_a_selection_of_another_module(self, models):
        selection = select(models("gpt2"), "mlp")

        with pytest.raises(UsageError) as caught:
            freeze_rest(models("llama"), selection)
        assert str(caught.value) == (
            "the selection names 'transformer.h.0.mlp.c_fc.weight' (4 such), which the module "
            "lacks; select on the module that is trained"
        )
