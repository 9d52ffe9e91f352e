"""The moving average of the weights, in one process; tests/distributed/test_partition.py has it in shares."""

import accelerate
import pytest
import torch
from torch import nn

from vit_hf.training.ema import EMA, _move
from vit_hf.training.partition import Whole


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)


def ema_of(model: nn.Module, decay: float) -> EMA:
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters()))
    return EMA(Whole(accelerator, model, optimizer), model, decay)


def averages_of(model: nn.Module, ema: EMA) -> dict[str, torch.Tensor]:
    with ema.in_place():
        return {name: tensor.clone() for name, tensor in averaged(model).items()}


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
    ema = ema_of(model, decay)
    expected = {name: tensor.clone().double() for name, tensor in averaged(model).items()}
    for number in range(20):
        step(model, number)
        ema.update()
        for name, tensor in averaged(model).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, average in averages_of(model, ema).items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_in_place_shows_the_average_and_restores_to_the_bit():
    model = model_of()
    ema = ema_of(model, 0.9)
    step(model, 0)
    ema.update()
    step(model, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.in_place():
        assert {"1.running_mean", "1.running_var"} < averaged(model).keys()
        for name, tensor in averaged(model).items():
            assert not torch.equal(tensor, before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_in_place_restores_after_an_error_too_but_calls_no_collective():
    """The other processes may not have the error, and would not come to it."""
    model = model_of()
    ema = ema_of(model, 0.9)
    refreshed = []
    ema._partition.refresh = lambda: refreshed.append(True)
    step(model, 0)
    before = model[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), ema.in_place():
        assert not torch.equal(model[0].weight, before)
        raise KeyboardInterrupt
    assert torch.equal(model[0].weight, before) and len(refreshed) == 1


def test_the_kernels_for_a_device_move_as_lerp_does():
    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

    generator = torch.Generator().manual_seed(0)
    start, weights = ([torch.randn(n, 3, generator=generator) for n in (2, 5)] for _ in range(2))
    for share in (0.0, 0.25):
        averages = [tensor.clone() for tensor in start]
        _move(averages, weights, torch.tensor(share).as_subclass(OnDevice))
        expected = [tensor.lerp(weight, share) for tensor, weight in zip(start, weights)]
        torch.testing.assert_close(
            averages, expected if share else start, rtol=1e-6 * bool(share), atol=1e-7 * bool(share)
        )


def test_state_goes_on_to_the_bit():
    """Averages and weights taken out after two steps and written into a new one: as one that was never stopped."""
    model = model_of()
    ema = ema_of(model, 0.9)
    for number in range(2):
        step(model, number)
        ema.update()
    weights, averages = {name: t.clone() for name, t in model.state_dict().items()}, averages_of(model, ema)

    other = model_of()
    resumed = ema_of(other, 0.9)
    other.load_state_dict(averages, strict=False)
    resumed.adopt()
    other.load_state_dict(weights)
    for each, its in ((model, ema), (other, resumed)):
        step(each, 2)
        its.update()
    expected = averages_of(model, ema)
    assert expected.keys() == averages.keys() and not torch.equal(expected["0.weight"], averages["0.weight"])
    assert all(torch.equal(average, expected[name]) for name, average in averages_of(other, resumed).items())


def test_average_follows_the_optimizers_weights_and_needs_no_gradient():
    model = model_of()
    ema = ema_of(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = model[0].weight.detach().clone()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    ema.update()
    average = averages_of(model, ema)["0.weight"]
    torch.testing.assert_close(average, (start + model[0].weight.detach()) / 2)
    assert not average.requires_grad and not torch.equal(model[0].weight, start)
