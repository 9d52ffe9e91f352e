"""What makes tokens of pixels, each against plain arithmetic."""

import itertools

import pytest
import torch
from torch import nn

from vit_hf.models import ViTConfig
from vit_hf.models.stems import BatchNorm, ConvStem, HybridResNetStem, PatchProjection, StandardisedConv

TINY = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


@pytest.mark.parametrize(
    "channels, width, patch, size", [(3, 64, (16, 16), (224, 224)), (3, 8, (4, 8), (12, 32)), (5, 8, (1, 1), (7, 7))]
)
def test_patch_projection_is_the_convolution(channels, width, patch, size):
    """The matrix product and torch's convolution with the same weights: equal to 1e-6, relative, gradients too."""
    projection = PatchProjection(channels, width, patch)
    images = torch.randn(2, channels, *size)
    results = []
    for run in (
        projection,
        lambda x: nn.functional.conv2d(x, projection.weight, projection.bias, patch).flatten(2).mT,
    ):
        projection.zero_grad()
        inputs = images.clone().requires_grad_()
        output = run(inputs)
        output.square().mean().backward()
        results.append((output.detach(), inputs.grad, projection.weight.grad.clone(), projection.bias.grad.clone()))
    for found, expected in zip(*results):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("patch, widths", [(16, [6, 12, 24, 48]), (4, [24, 48]), (2, [48])])
def test_conv_stem_halves_the_image_step_by_step(patch, widths):
    """arXiv 2106.14881: for patch 16 four 3x3 convolutions of doubling width, BatchNorm and ReLU after each, a 1x1."""
    stem = ConvStem(ViTConfig(hidden_size=48, image_size=64, patch_size=patch, stem="conv", **TINY))
    convolutions = [module for module in stem.convolutions if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == widths
    assert {(conv.kernel_size, conv.stride) for conv in convolutions} == {((3, 3), (2, 2))}
    kinds = [type(module) for module in stem.convolutions]
    assert kinds == [nn.Conv2d, BatchNorm, nn.ReLU] * len(widths)
    images = torch.randn(2, 3, 64, 64)
    tokens = stem(images)
    assert tokens.shape == (2, (64 // patch) ** 2, 48)
    # a token sees its patch and a margin, not the far end of the image
    changed = images.clone()
    changed[:, :, -1, -1] += 100
    stem.eval()
    differs = (stem(images) - stem(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert differs[-1] and not differs[0]


def test_batch_norm_with_16_bit_weights_keeps_fp32_statistics():
    """To the bit those of torch's own BatchNorm in fp32 on the same numbers."""
    ours, reference = BatchNorm(4), nn.BatchNorm2d(4)
    ours.weight.data, ours.bias.data = (parameter.data.bfloat16() for parameter in (ours.weight, ours.bias))
    for _ in range(3):
        images = torch.randn(8, 4, 5, 5).bfloat16()
        found, expected = ours(images), reference(images.float())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(reference, name))
    images = torch.randn(2, 4, 5, 5).bfloat16()
    torch.testing.assert_close(ours.eval()(images).float(), reference.eval()(images.float()), rtol=0.01, atol=0.01)
    assert ours.num_batches_tracked == 3


def test_standardised_convolution_written_out():
    """Mean 0 and deviation 1 for each output channel, and padding that gives half the size, as TensorFlow's SAME."""
    for kernel, stride, pads in ((1, 1, (0, 0)), (3, 1, (1, 1)), (3, 2, (0, 1)), (7, 2, (2, 3)), (1, 2, (0, 0))):
        conv = StandardisedConv(3, 4, kernel, stride).double()
        with torch.no_grad():
            conv.weight.add_(0.7)
        weight = conv.weight
        mean = sum(weight[:, c, i, j] for c, i, j in itertools.product(range(3), *[range(kernel)] * 2)) / (
            3 * kernel**2
        )
        centred = weight - mean[:, None, None, None]
        deviation = centred.square().sum(dim=(1, 2, 3)).div(3 * kernel**2).sqrt()
        expected_weight = centred / (deviation + 1e-5)[:, None, None, None]
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        padded = nn.functional.pad(images, (*pads, *pads))
        expected = nn.functional.conv2d(padded, expected_weight, stride=stride)
        found = conv(images)
        assert found.shape[-1] == 8 // stride
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_hybrid_does_not_see_the_scale_of_its_convolutions():
    """Which is what standardised convolutions are for; its GroupNorm does not look at other images either."""
    config = ViTConfig(
        hidden_size=24, image_size=32, patch_size=1, stem="hybrid_resnet", stem_depths=[1, 2], stem_width=32, **TINY
    )
    stem = HybridResNetStem(config)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = stem(images)
        torch.testing.assert_close(stem(images[:1]), before[:1], rtol=1e-4, atol=1e-5)
        for module in stem.modules():
            if isinstance(module, StandardisedConv):
                module.weight.mul_(3).add_(0.5)
        torch.testing.assert_close(stem(images), before, rtol=1e-2, atol=1e-2)
    assert before.shape == (3, 16, 24)
    assert [len(stage) for stage in stem.backbone.stages] == [1, 2]
