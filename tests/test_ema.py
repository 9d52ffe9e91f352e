"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from vit_hf.training.ema import EMA


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)


def averaged(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights, and BatchNorm's statistics, which belong to them."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def step(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for tensor in averaged(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_average_equals_the_loop(decay):
    """decay x average + (1 - decay) x weights after every step, from the initial weights on."""
    model = model_of()
    ema = EMA(model, decay)
    expected = {name: tensor.clone().double() for name, tensor in averaged(model).items()}
    for number in range(20):
        step(model, number)
        ema.update()
        for name, tensor in averaged(model).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    assert ema.state_dict().keys() == expected.keys()
    for name, average in ema.state_dict().items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_in_place_shows_the_average_and_restores_to_the_bit():
    model = model_of()
    ema = EMA(model, 0.9)
    step(model, 0)
    ema.update()
    step(model, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.in_place():
        assert {"1.running_mean", "1.running_var"} < ema.state_dict().keys()
        for name, tensor in averaged(model).items():
            assert torch.equal(tensor, ema.state_dict()[name])
            assert not torch.equal(tensor, before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_in_place_restores_after_an_error_too():
    model = model_of()
    ema = EMA(model, 0.9)
    step(model, 0)
    before = model[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), ema.in_place():
        assert not torch.equal(model[0].weight, before)
        raise KeyboardInterrupt
    assert torch.equal(model[0].weight, before)


def test_state_goes_on_to_the_bit():
    """Saved after two steps and loaded into a new average: the same as one that was never stopped."""
    model, other = model_of(), model_of()
    whole, first = EMA(model, 0.9), EMA(other, 0.9)
    for number in range(2):
        for each, ema in ((model, whole), (other, first)):
            step(each, number)
            ema.update()
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    resumed = EMA(other, 0.9)
    resumed.load_state_dict(saved)
    for each, ema in ((model, whole), (other, resumed)):
        step(each, 2)
        ema.update()
    for name, average in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], average)


def test_average_follows_the_optimizers_weights_and_needs_no_gradient():
    model = model_of()
    ema = EMA(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = model[0].weight.detach().clone()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    ema.update()
    average = ema.state_dict()["0.weight"]
    torch.testing.assert_close(average, (start + model[0].weight.detach()) / 2)
    assert not average.requires_grad and not torch.equal(model[0].weight, start)
