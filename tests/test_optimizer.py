"""Which parameters are decayed, and at what rate they learn."""

import pytest
import torch

from vit_hf.models import ViTConfig, ViTForImageClassification
from vit_hf.training.optimizer import OptimizerSettings, make_optimizer, parameter_groups, set_learning_rate


def model_of(**changes) -> ViTForImageClassification:
    fields = dict(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return ViTForImageClassification(ViTConfig(**{**fields, "num_labels": 4, **changes}))


def by_name(model, **options) -> dict[str, dict]:
    """The group of every trainable parameter; fails where one is in no group or in two."""
    groups = parameter_groups(model, **{"weight_decay": 0.1, "layer_decay": 1.0, **options})
    placed = [parameter for group in groups for parameter in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(map(id, placed)) == sorted(trainable)
    return {trainable[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("changes", [{}, {"pooling": "mean", "head_hidden_size": 8}])
def test_only_matrices_and_the_patch_kernel_are_decayed(changes):
    decayed = {name for name, group in by_name(model_of(**changes)).items() if group["weight_decay"]}
    layer = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
    expected = {f"vit.layers.{index}.{part}.weight" for index in range(3) for part in layer}
    expected |= {"vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"}
    expected |= {"pre_logits.0.weight"} if "head_hidden_size" in changes else set()
    assert decayed == expected  # no norm, no bias, no cls_token, no position_embeddings


def test_without_layer_decay_there_are_two_groups():
    groups = parameter_groups(model_of(), weight_decay=0.3, layer_decay=1.0)
    assert sorted((group["weight_decay"], group["lr_scale"]) for group in groups) == [(0.0, 1.0), (0.3, 1.0)]


def test_layer_decay_factors():
    """L = 3: embeddings 0.5**4, layers 0.5**3, 0.5**2, 0.5, final norm and head 1."""
    placed = by_name(model_of(head_hidden_size=8), layer_decay=0.5)
    for name, group in placed.items():
        if ".embeddings." in name:
            expected = 0.0625
        elif ".layers." in name:
            expected = {"0": 0.125, "1": 0.25, "2": 0.5}[name.split(".")[2]]
        else:
            expected = 1.0
        assert group["lr_scale"] == expected, name
    assert {name for name in placed if ".layers." not in name and ".embeddings." not in name} >= {
        "vit.layernorm.weight", "classifier.weight", "pre_logits.0.bias"
    }  # fmt: skip


def test_frozen_parameters_are_left_out():
    model = model_of()
    model.vit.embeddings.requires_grad_(False)
    assert not [name for name in by_name(model) if ".embeddings." in name]


def test_set_learning_rate_scales_each_group():
    groups = parameter_groups(model_of(), weight_decay=0.1, layer_decay=0.5)
    optimizer = make_optimizer(groups, OptimizerSettings("adamw_torch", 1.0, adam_beta1=0.9, adam_beta2=0.95))
    set_learning_rate(optimizer, 0.02)
    assert {group["lr"] for group in optimizer.param_groups} == {0.02 * 0.5**power for power in range(5)}
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def two_steps(optim: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (decayed by 0.1) and a bias after two steps of rate 0.5 with gradients of ones, then twos."""
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.ones_(layer.bias)
    groups = parameter_groups(layer, weight_decay=0.1, layer_decay=1.0)
    optimizer = make_optimizer(groups, OptimizerSettings(optim, 0.0, adam_beta2=0.99, momentum=0.5))
    set_learning_rate(optimizer, 0.5)
    for gradient in (1.0, 2.0):
        layer.weight.grad, layer.bias.grad = torch.full((1, 1), gradient), torch.full((1,), gradient)
        optimizer.step()
    return layer.weight.item(), layer.bias.item()


def test_sgd_with_momentum_written_out():
    weight, bias, moved, shifted = 1.0, 1.0, 0.0, 0.0
    for gradient in (1.0, 2.0):
        moved = 0.5 * moved + gradient + 0.1 * weight
        shifted = 0.5 * shifted + gradient
        weight, bias = weight - 0.5 * moved, bias - 0.5 * shifted
    assert two_steps("sgd") == pytest.approx((weight, bias))


def test_adamw_written_out():
    found, expected = two_steps("adamw_torch"), []
    for decay in (0.1, 0.0):
        value, first, second = 1.0, 0.0, 0.0
        for step, gradient in enumerate((1.0, 2.0), start=1):
            value *= 1 - 0.5 * decay
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
            value -= 0.5 * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)) ** 0.5 + 1e-8)
        expected.append(value)
    assert found == pytest.approx(tuple(expected), rel=1e-5)
