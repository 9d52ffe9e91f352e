"""The objective is torch's cross-entropy with soft targets over fp32 logits; here is what that means, written out."""

import pytest
import torch
from torch.nn.functional import cross_entropy


def written_out(logits, targets):
    return -(targets * torch.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def batch(samples=7, classes=11, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=rng) * 5
    labels = torch.randint(classes, (samples,), generator=rng)
    other = torch.randint(classes, (samples,), generator=rng)
    one_hot, share = torch.eye(classes), torch.rand(samples, 1, generator=rng)
    mixed = share * one_hot[labels] + (1 - share) * one_hot[other]
    return logits, {"hard": one_hot[labels], "smoothed": 0.9 * one_hot[labels] + 0.1 / classes, "mixed": mixed}


@pytest.mark.parametrize("kind", ["hard", "smoothed", "mixed"])
def test_soft_targets_have_the_formulas_value_and_gradient(kind):
    logits, targets = batch()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = written_out(theirs, targets[kind])
    found = cross_entropy(ours, targets[kind])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
