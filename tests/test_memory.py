"""A full device: the line that helps, and the micro-batch that fits."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vit_hf.errors import UserError
from vit_hf.training.memory import is_out_of_memory, largest_micro_batch, out_of_memory


class Model(nn.Module):
    """Takes at most so many images; with everything that a trial must leave alone."""

    def __init__(self, most, error=torch.OutOfMemoryError, in_backward=False):
        super().__init__()
        self.most, self.error, self.in_backward, self.seen = most, error, in_backward, []
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.norm, self.drop, self.head = nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Linear(16, 5)

    def full(self, *_):
        if self.error is torch.OutOfMemoryError:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        torch.empty(1 << 56, dtype=torch.uint8)  # more than any machine has: the real error of the CPU

    def forward(self, pixel_values):
        self.seen.append((len(pixel_values), self.head.weight.grad is not None, self.training))
        features = self.drop(self.norm(self.stem(pixel_values)))
        if len(pixel_values) > self.most:
            features.register_hook(self.full) if self.in_backward else self.full()
        return SimpleNamespace(logits=self.head(features.flatten(1)))


def find(model, share, **options):
    return largest_micro_batch(
        model, nn.functional.cross_entropy, (3, 8, 8), 5, share, torch.device("cpu"),
        **{"autocast": contextlib.nullcontext, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("share", "most", "tried", "found"),
    [
        (64, 1000, [64], 64),
        (64, 64, [64], 64),
        (64, 63, [64, 32], 32),
        (64, 5, [64, 32, 16, 8, 4], 4),
        (96, 40, [96, 48, 24], 24),
        (1000, 60, [1000, 500, 250, 125, 50], 50),
        (7, 6, [7, 1], 1),
    ],
)
@pytest.mark.parametrize("in_backward", [False, True])
def test_the_largest_that_fits_divides_the_share(share, most, tried, found, in_backward):
    model = Model(most, in_backward=in_backward)
    assert find(model, share) == found and share % found == 0
    assert list(dict.fromkeys(size for size, _, _ in model.seen)) == tried
    # the one that fits was tried twice in training mode, the second time beside its gradients
    assert model.seen[-2:] == [(found, False, True), (found, True, True)]


def test_everything_is_afterwards_as_it_was():
    model = Model(4)
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradient, random = model.head.bias.grad, torch.get_rng_state()
    assert find(model, 16) == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.head.bias.grad is gradient and torch.equal(gradient, torch.ones(5))
    assert model.head.weight.grad is None and model.stem.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and not model.norm.training and model.drop.training


def test_batch_norm_statistics_do_not_learn_from_the_trial():
    model = Model(100)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    find(model, 8)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.norm.num_batches_tracked.item() == 0


def test_the_allocators_own_error_counts_and_others_do_not():
    assert find(Model(4, RuntimeError), 16) == 4
    assert find(Model(4, RuntimeError, in_backward=True), 16) == 4

    class Broken(Model):
        def full(self, *_):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        find(Broken(4), 16)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_what_the_optimizer_will_hold_is_counted():
    """No machine has room for this optimizer: not even one image fits."""
    with pytest.raises(
        UserError, match="^out of device memory with 1 image at once; set --gradient_checkpointing true"
    ):
        find(Model(100), 16, reserved_bytes=1 << 56)


def test_the_trial_runs_under_the_precision_of_the_run():
    model, seen = Model(8), []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    find(model, 8, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("size", "share", "checkpointing", "said"),
    [
        (8, 8, False, "with 8 images at once; lower --per_device_train_batch_size to 4 "),
        (32, 96, False, "lower --per_device_train_batch_size to 24 .*, or set --gradient_checkpointing true"),
        (32, 96, True, r"to 24 \(the global batch stays: accumulation grows\), or leave the set on the host: --data_"),
        (1, 96, False, "with 1 image at once; set --gradient_checkpointing true, or"),
        (1, 96, True, "with 1 image at once; leave the set on the host .*zero3.yaml"),
    ],
)
def test_the_line_says_which_flag_and_what_value(size, share, checkpointing, said):
    error = out_of_memory(size, share, True, checkpointing)
    with pytest.raises(UserError, match=said):
        raise error
    assert "\n" not in str(error) and ("gradient_checkpointing" in str(error)) is not checkpointing


def test_in_an_evaluation_the_line_names_its_own_flag():
    assert "lower --per_device_eval_batch_size to 128" in str(out_of_memory(8, 8, False, False, 256))
    assert str(out_of_memory(8, 8, False, False)).endswith("lower --per_device_eval_batch_size")
