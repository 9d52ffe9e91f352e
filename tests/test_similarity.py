"""Similarity of layers against the papers' formula in numpy, on noise, and on models whose layers are known."""

import numpy as np
import pytest
import torch

from tests.families import FAMILIES
from vit_hf.analysis import similarity
from vit_hf.analysis.similarity import centred_gram, layer_similarity, linear_cka
from vit_hf.models.presets import from_preset


def rows(n=40, width=6, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def cka(*layers, minibatches=1):
    """Of features (n, ...), the minibatches' rows apart by their number."""
    return linear_cka([centred_gram(layer[first::minibatches]) for layer in layers] for first in range(minibatches))


def by_the_formula(x, y, minibatches=1):
    """Nguyen et al., equations 2 and 3, as they stand there."""

    def hsic(k, other):
        n, one = len(k), np.ones(len(k))
        k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
        middle = (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ other) + middle - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3))

    grams = [[(z[b::minibatches] @ z[b::minibatches].T) for z in (x, y)] for b in range(minibatches)]
    across, own, others = (np.mean([hsic(pair[i], pair[j]) for pair in grams]) for i, j in ((0, 1), (0, 0), (1, 1)))
    return across / np.sqrt(own * others)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_it_is_the_papers_formula(minibatches):
    x, y = rows(41, 5), rows(41, 9, seed=1) ** 2 + 7  # minibatches of 14, 14 and 13; features whose mean is not 0
    y[:, :5] += x
    found = cka(x, y, minibatches=minibatches)
    expected = by_the_formula(x.double().numpy(), y.double().numpy(), minibatches)
    assert 0.05 < expected < 0.95
    np.testing.assert_allclose(found, [[1, expected], [expected, 1]], rtol=1e-4)


@pytest.mark.parametrize("n, width", [(256, 2176), (512, 512), (1024, 128)])
@pytest.mark.parametrize("minibatches", [1, 4])
def test_noise_has_nothing_in_common(n, width, minibatches):
    """The biased estimator finds 0.90, 0.50 and 0.11 here."""
    x, y = rows(n, width), rows(n, width, seed=1)
    assert abs(cka(x, y, minibatches=minibatches)[0, 1]) < 0.02


def test_rotation_scale_and_shift_change_nothing():
    x = rows(60, 6)
    rotation, _ = torch.linalg.qr(rows(6, 6, seed=1))
    found = cka(x, x, 3 * x @ rotation + 500, rows(60, 8, seed=2), minibatches=2)
    np.testing.assert_allclose(found[:3, :3], 1, atol=1e-5)
    np.testing.assert_allclose(found[:3, 3], found[0, 3], atol=1e-5)


def test_a_layer_that_tells_no_images_apart_has_no_similarity():
    assert np.isnan(cka(torch.full((8, 2), 0.1), rows(8, 2))).tolist() == [[True, True], [True, False]]


def normalise(images):
    return images.float() / 127.5 - 1


def make(family="vit", **changes):
    preset, small = FAMILIES[family]
    torch.manual_seed(0)
    return from_preset(preset, ["a", "b"], small | changes).eval()


IMAGES = np.random.default_rng(0).integers(0, 256, (33, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("family", ["vit", "better-baseline", "hybrid", "resnet", "bit"])
def test_the_features_are_all_values_of_the_models_own_outputs(family):
    """An image is a sample: its tokens, or the places of its feature map, lie in one row."""
    model = make(family)
    seen = []
    found, names, minibatches = layer_similarity(model, IMAGES, normalise, seen.append)
    assert sum(seen) == len(IMAGES) and len(seen) == minibatches
    with torch.no_grad():
        images = normalise(torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
        if family in ("resnet", "bit"):
            states = model(images, output_hidden_states=True).hidden_states
            assert names == ["stem", "1.1", "2.1"]  # one block a stage: transformers' own hidden states
        else:
            states = model.vit(images, output_hidden_states=True).hidden_states[1:]
            assert names == (["stage 1", "stage 2"] if family == "hybrid" else []) + ["1", "2"]
    expected = np.array(
        [[by_the_formula(*(z.flatten(1).double().numpy() for z in (x, y))) for x in states] for y in states]
    )
    assert minibatches == 1
    np.testing.assert_allclose(found[-len(states) :, -len(states) :], expected, atol=1e-4)


def test_large_activations_go_in_smaller_minibatches_from_all_over_the_set(monkeypatch):
    model, seen = make(), []
    model.vit.embeddings.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    monkeypatch.setattr(similarity, "MINIBATCH_VALUES", 1)
    found, _, minibatches = layer_similarity(model, IMAGES, normalise)
    assert minibatches == 5 and [len(batch) for batch in seen] == [1, 7, 7, 7, 6, 6]
    torch.testing.assert_close(seen[2], normalise(torch.from_numpy(IMAGES[1::5]).permute(0, 3, 1, 2)))
    whole = cka(*[torch.cat(parts) for parts in _outputs(model, seen[1:])], minibatches=1)
    assert np.abs(found - whole).max() < 0.05  # another estimate of the same


def _outputs(model, batches):
    with torch.no_grad():
        return zip(*(model.vit(batch, output_hidden_states=True).hidden_states[1:] for batch in batches))


def test_what_listens_is_gone_afterwards():
    model = make()
    layer_similarity(model, IMAGES, normalise)
    assert not any(module._forward_hooks for module in model.modules())
