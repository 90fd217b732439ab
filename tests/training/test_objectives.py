"""Losses against those that transformers and PyTorch work out."""

import pytest

pytest.importorskip("transformers")

import torch
from tests.modules import llama
from torch.nn import functional

from taskvec.training.objectives import IGNORED, classifying, predicting_tokens


def test_tokens_are_predicted_from_those_before_them():
    module = llama(0).float()
    ids = torch.arange(12).view(2, 6)
    labels = ids.clone()
    labels[0, :3] = IGNORED
    labels[1, 4:] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    found = predicting_tokens()(module, batch)
    expected = module(**batch)  # shifts labels itself
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    right = (expected.logits[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != IGNORED)
    assert int(found.correct) == int(right.sum())


def test_classes_of_both_kinds_of_batches():
    module = torch.nn.Linear(3, 4)
    inputs, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    expected = functional.cross_entropy(module(inputs), labels)
    for batch in ((inputs, labels), {"input": inputs, "labels": labels}):
        found = classifying()(module, batch)
        assert torch.equal(found.loss, expected)
        assert int(found.correct) == int((module(inputs).argmax(-1) == labels).sum())
