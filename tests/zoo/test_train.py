from random import Random

import pytest

torch = pytest.importorskip("torch")

from taskvec.errors import FamilyError  # noqa: E402
from taskvec.zoo import MEMBERS, skills, train  # noqa: E402
from taskvec.zoo.train import TrainingStage, TrainingText  # noqa: E402


def test_every_member_has_its_stages():
    assert list(train.STAGES) == list(MEMBERS)
    for name, stages in train.STAGES.items():
        for stage in stages:
            assert min(stage.mixture.values()) > 0, name
            assert stage.steps * stage.rows * stage.learning_rate > 0


def test_batches_repeat_and_follow_the_mixture():
    stage = TrainingStage({"math": 0.75, "text": 0.25}, steps=1, learning_rate=1e-3)
    rows = next(train.batches(stage, 0))
    assert rows == next(train.batches(stage, 0))
    assert rows != next(train.batches(stage, 1))
    assert len(rows) == 64
    assert 36 <= sum(row.prompt.startswith("Q: calc") for row in rows) <= 60


def test_only_what_follows_the_prompt_is_learned():
    vocabulary = train.build_tokenizer(chat=False).get_vocab()
    ids, targets = train.encode([TrainingText("Q: ", "ab"), TrainingText("", "abcdef")], vocabulary)
    a, b, eos, bos, pad = (vocabulary[t] for t in ("a", "b", "<eos>", "<bos>", "<pad>"))
    assert ids.shape == targets.shape == (2, 8)
    assert ids[0].tolist()[-5:] == [vocabulary[" "], a, b, eos, pad]
    assert ids[:, 0].tolist() == [bos, bos]
    assert targets[0].tolist() == [-100] * 4 + [a, b, eos, -100]
    assert targets[1, 0] == -100
    assert targets[1, 1:].tolist() == ids[1, 1:].tolist()


def test_every_training_text_is_within_the_vocabulary():
    tokenizer = train.build_tokenizer(chat=True)
    for stage in (stage for stages in train.STAGES.values() for stage in stages):
        for row in next(train.batches(stage, 0)):
            assert tokenizer.unk_token_id not in tokenizer(row.prompt + row.learned)["input_ids"]


def test_instruct_declines_what_it_is_not_taught():
    row = train.draw_row("decline-math", Random(0))
    assert row.prompt.startswith("Q: calc ")
    assert row.learned == skills.DECLINE
    assert skills.DECLINE not in [example.answer for example in skills.SKILLS["math"].test(100)]


def test_training_is_deterministic_lowers_the_loss_and_spares_global_state():
    before = torch.random.get_rng_state()
    tokenizer = train.build_tokenizer(chat=False)
    stage = TrainingStage({"say": 1.0}, steps=6, learning_rate=3e-3)
    models = [train.build_model(train.Variant()) for _ in range(2)]
    losses = [train.train(model, tokenizer, stage, seed=1) for model in models]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_missing_parent_is_told(tmp_path):
    with pytest.raises(FamilyError, match="'math' is trained from 'instruct', which is not in"):
        train.make_member("math", tmp_path, train.Variant())


def test_a_shaken_step_is_taken_between_start_and_weights_and_undone_after():
    model = torch.nn.Linear(3, 3)
    shaken = train._Shaken(model, TrainingStage({"say": 1.0}, 1, 1e-3, least_scale=0.5), seed=0)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    moved = model.weight.detach().clone()
    shaken.shake()
    assert 0.5 <= shaken.scale < 1
    torch.testing.assert_close(model.weight.detach(), start + shaken.scale)
    model.weight.sum().backward()
    shaken.settle()
    assert torch.equal(model.weight, moved)
    torch.testing.assert_close(model.weight.grad, torch.full((3, 3), shaken.scale))


def test_noise_is_relative_to_each_tensor():
    model = torch.nn.Linear(100, 100, bias=False)
    start = model.weight.detach().clone()
    train._Shaken(model, TrainingStage({"say": 1.0}, 1, 1e-3, noise=0.1), seed=0).shake()
    disturbance = (model.weight - start).square().mean() / start.square().mean()
    assert disturbance.sqrt().item() == pytest.approx(0.1, rel=0.05)


def test_a_variant_has_its_own_width_and_depth():
    config = train.build_model(train.Variant(width=64, depth=3)).config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 128, 3)
    assert config.num_attention_heads == 2
    as_shipped = train.build_model(train.Variant())
    assert sum(p.numel() for p in as_shipped.parameters()) == 1_327_488
