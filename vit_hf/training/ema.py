"""An exponential moving average of the weights and of BatchNorm's statistics, kept in fp32 beside them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vit_hf.training.partition import Partition


class EMA:
    """average = decay x average + (1 - decay) x weights, after every step; so for the statistics of BatchNorm, which
    belong to the weights that they were collected with. Each process averages its own share of the fp32 masters, so it
    works under every partition; the average of a whole weight is `partition.full_weight` within `in_place`. Frozen
    weights are their own average.

    Source: Polyak averaging as in arXiv 1512.00567, section 8. Starts from the weights as they are.
    """

    def __init__(self, partition: Partition, model: nn.Module, decay: float):
        self.decay = decay
        self._partition = partition
        self._weights = partition.masters() + list(averaged_buffers(model).values())
        self._averages = [weight.clone().float() for weight in self._weights]

    @torch.no_grad()
    def update(self, left_out: Tensor | bool = False) -> None:
        """Takes the weights of the step just made into the average.

        Args:
            left_out: the step was not made, and the average stays to the bit; a bool scalar where only the device knows.
        """
        if isinstance(left_out, Tensor):
            _move(self._averages, self._weights, torch.where(left_out, 0.0, 1 - self.decay))
        elif not left_out:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    @torch.no_grad()
    def adopt(self) -> None:
        """The average becomes what masters and buffers now hold. A resume writes the averages into the partition, calls
        this, and then writes the weights themselves."""
        torch._foreach_copy_(self._averages, self._weights)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context masters, buffers and the model hold the average, in exchange for their own values, which come
        back afterwards to the bit; the memory stays at one tensor more. Collective where processes hold shares."""
        self._swap()
        self._partition.refresh()
        try:
            yield
        finally:
            self._swap()
        self._partition.refresh()  # not after an error, which other processes may not have: they would not come here

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._averages, strict=True):
            own = weight.clone()
            weight.copy_(average)
            average.copy_(own)


def _move(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """lerp by a scalar on the device. There torch's own takes a kernel for each tensor, and this one three for all."""
    if share.device.type == "cpu":
        torch._foreach_lerp_(averages, weights, [share] * len(averages))
        return
    steps = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(averages, steps)


def averaged_buffers(model: nn.Module) -> dict[str, Tensor]:
    """{name: buffer} that is averaged, such as BatchNorm's statistics."""
    return {name: buffer for name, buffer in saved_buffers(model).items() if buffer.is_floating_point()}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """{name: buffer} that is saved with the model and not computed (a table of sines is)."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
