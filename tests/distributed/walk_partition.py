"""Walks through everything that a Partition promises, under whatever engine it was launched with, in fp32 and in bf16.

    accelerate launch --config_file F --num_processes 2 tests/distributed/walk_partition.py OUTPUT_DIR

Checks that one engine can answer alone are asserted here; tensors that have to equal one process's are written to
OUTPUT_DIR/{no,bf16}.safetensors by the main process.
"""

import copy
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from tests.families import FAMILIES
from vit_hf.models.presets import from_preset
from vit_hf.training.accelerator import build_accelerator, end, share_buffers
from vit_hf.training.freeze import freeze_parameters
from vit_hf.training.optimizer import OptimizerSettings
from vit_hf.training.schedule import plan_batches
from vit_hf.training.state import prepare

CLASSES = [str(number) for number in range(7)]  # an odd number: shards are of different lengths
IMAGES, FROZEN = 8, ("embeddings", "layers.0")
ADAMW, SGD = OptimizerSettings("adamw_torch", 1e-2, weight_decay=0.1), OptimizerSettings("sgd", 1e-2)


def model_of(family):
    torch.manual_seed(0)
    name, changes = FAMILIES[family]
    none = dict(drop_path_rate=0.0, hidden_dropout_prob=0.0) if family == "vit" else {}
    return from_preset(name, CLASSES, changes | none)


def start(precision, accumulation, family="vit", optimizer=ADAMW, max_grad_norm=1.0, freeze=(), **settings):
    """A fresh accelerator and state, as if the process had just been launched."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    accelerator = build_accelerator(60)
    plan = plan_batches(IMAGES, accelerator.num_processes, IMAGES // accelerator.num_processes // accumulation)
    model = model_of(family)
    freeze_parameters(model, freeze)
    return prepare(accelerator, model, plan, optimizer=optimizer, max_grad_norm=max_grad_norm, **settings), plan


def images_of(state, step):
    """This process's images and labels of a step."""
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(IMAGES, 3, 32, 32, generator=generator), torch.arange(IMAGES) % len(CLASSES)
    share = IMAGES // state.accelerator.num_processes
    mine = slice(share * state.accelerator.process_index, share * (state.accelerator.process_index + 1))
    return images[mine].to(state.accelerator.device), labels[mine].to(state.accelerator.device)


def train_step(state, plan, step, poison=False, max_grad_norm=1.0):
    """One step as train() makes it; returns the gradient's norm."""
    accelerator = state.accelerator
    images, labels = images_of(state, step)
    parts = zip(images.split(plan.micro_batch_size), labels.split(plan.micro_batch_size), strict=True)
    for micro_step, (pixel_values, targets) in enumerate(parts):
        accelerator.sync_gradients = micro_step == plan.accumulation - 1
        loss = cross_entropy(state.engine(pixel_values=pixel_values).logits.float(), targets)
        loss = loss * float("nan") if poison else loss
        if accelerator.sync_gradients:
            accelerator.backward(loss)
        else:
            with accelerator.no_sync(state.engine):
                accelerator.backward(loss)
    norm = state.partition.clip(max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update()
    return norm


@torch.no_grad()
def logits_of(state):
    """Of all images, (IMAGES, K): an evaluation."""
    state.engine.eval()
    logits = state.engine(pixel_values=images_of(state, 99)[0]).logits.float()
    state.engine.train()
    return state.accelerator.gather(logits).cpu()


def weights_of(state):
    names = state.partition.parameter_names()
    return {name: state.partition.full_weight(name).detach().cpu().clone() for name in names}


def moments_of(state):
    names, partition = state.partition.trainable_names(), state.partition
    return {
        f"{key}.{name}": partition.full_moment(name, key).detach().cpu().clone()
        for key in partition.moment_keys()
        for name in names
    }


def write(state, weights, moments, steps):
    partition = state.partition
    for name, weight in weights.items():
        partition.set_weight(name, weight)
    for key_and_name, moment in moments.items():
        key, _, name = key_and_name.partition(".")
        partition.set_moment(name, key, moment)
    partition.set_optimizer_steps(steps)
    partition.refresh()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.shape == expected[name].shape, name
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name


def strange(tensors, seed, positive=()):
    """Values that no run has, with a negative zero, in place of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    for tensor in found.values():
        tensor.view(-1)[0] = -0.0
    return {name: tensor.abs() if name.startswith(positive) else tensor for name, tensor in found.items()}


def walk(precision):
    """Sets, trains, takes out, puts back. Returns what has to equal one process's."""
    state, plan = start(precision, accumulation=2, ema_decay=0.5, freeze=FROZEN)
    partition, out = state.partition, {}
    before = {name: parameter.detach().clone() for name, parameter in model_of("vit").named_parameters()}
    assert partition.parameter_names() == list(before)
    frozen = [name for name in before if name not in partition.trainable_names()]
    assert {name.split(".")[1] for name in frozen} == {"embeddings", "layers"}
    assert_same_bits(weights_of(state), before)  # in 16 bits too

    # before the first step: nothing has moments yet
    assert partition.optimizer_steps() == 0 and partition.moment_keys() == ("exp_avg", "exp_avg_sq")
    assert not any(moment.any() for moment in moments_of(state).values())
    weights, moments = strange(before, seed=1), strange(moments_of(state), seed=2, positive="exp_avg_sq")
    write(state, weights, moments, steps=7)
    assert_same_bits(weights_of(state), weights)
    assert_same_bits(moments_of(state), moments)
    assert partition.optimizer_steps() == 7
    state.ema.adopt()
    out["logits.set"] = logits_of(state)

    for step in range(3):
        out[f"norm.{step}"] = train_step(state, plan, step).reshape(1).cpu()
    assert partition.optimizer_steps() == 10
    out |= {f"weight.{name}": tensor for name, tensor in weights_of(state).items()} | moments_of(state)
    assert_same_bits({name: out[f"weight.{name}"] for name in frozen}, {name: weights[name] for name in frozen})
    average(state, frozen, weights, out)

    # back to where it stood, and the same steps again
    stood = weights_of(state), moments_of(state), partition.optimizer_steps()
    runs = []
    for _ in range(2):
        logits_of(state)  # leaves gathered weights behind, which must not outlive the next lines
        write(state, *stood)
        for step in range(3, 5):
            train_step(state, plan, step)
        runs.append((weights_of(state), moments_of(state), logits_of(state)))
    assert_same_bits(runs[1][0], runs[0][0])
    assert_same_bits(runs[1][1], runs[0][1])
    assert torch.equal(runs[1][2], runs[0][2]) and not torch.equal(runs[0][2], out["logits.set"])
    assert partition.optimizer_steps() == 12

    not_finite(state, plan)
    return out


def average(state, frozen, weights, out):
    """The average in place, and what was there before to the bit afterwards."""
    own, logits = weights_of(state), logits_of(state)
    with state.ema.in_place():
        averages = weights_of(state)
        out["logits.average"] = logits_of(state)
    assert not torch.equal(out["logits.average"], logits)
    assert_same_bits(weights_of(state), own)
    assert torch.equal(logits_of(state), logits)  # the copies that compute, too
    assert_same_bits({name: averages[name] for name in frozen}, {name: weights[name] for name in frozen})
    out |= {f"average.{name}": tensor for name, tensor in averages.items()}
    assert sum(master.numel() for master in state.partition.masters()) < sum(t.numel() for t in own.values())


def not_finite(state, plan):
    """A weight that is not finite is seen by the process that holds it; a NaN gradient never looks finite."""
    partition = state.partition
    assert partition.finite() == 1.0
    stood = weights_of(state), moments_of(state), partition.optimizer_steps()
    name = partition.trainable_names()[-1]  # the head's bias
    partition.set_weight(name, torch.full_like(stood[0][name], float("nan")))
    seen = state.accelerator.reduce(partition.finite(), reduction="sum") / state.accelerator.num_processes
    assert seen < 1.0
    write(state, *stood)
    assert partition.finite() == 1.0
    left_out = partition.steps_left_out()
    norm = train_step(state, plan, 5, poison=True)
    assert not norm.isfinite()
    if partition.name.startswith("zero"):  # DeepSpeed leaves such a step out by itself
        assert partition.steps_left_out() == left_out + 1
        assert_same_bits(weights_of(state), stood[0])
        assert_same_bits(moments_of(state), stood[1])


def gradients(precision):
    """Gradients are added up in fp32, over micro-steps and processes: SGD's momentum after a step is their mean."""
    state, plan = start(precision, accumulation=4, optimizer=SGD, max_grad_norm=0.0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, device = model_of("vit").to(dtype), state.accelerator.device
    model.to(device)
    images, labels = images_of(state, 0)
    for pixel_values, targets in zip(
        images.split(plan.micro_batch_size), labels.split(plan.micro_batch_size), strict=True
    ):
        own = copy.deepcopy(model)
        cross_entropy(own(pixel_values=pixel_values.to(dtype)).logits.float(), targets).backward()
        for parameter, part in zip(model.parameters(), own.parameters(), strict=True):
            total = getattr(parameter, "total", 0)
            parameter.total = total + part.grad.float() / plan.accumulation
    train_step(state, plan, 0, max_grad_norm=0.0)
    worst = 0.0
    for name, parameter in model.named_parameters():
        expected = state.accelerator.reduce(parameter.total, reduction="mean")
        found = state.partition.full_moment(name, "momentum_buffer").to(device)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return {"worst": torch.tensor([worst])}


def batch_norm(precision):
    """A model with BatchNorm trains and is evaluated; its statistics stay in fp32 and are averaged with the weights."""
    state, plan = start(precision, accumulation=1, family="resnet", ema_decay=0.5)
    for step in range(2):
        train_step(state, plan, step)
    share_buffers(state.accelerator, state.model)
    buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers() if buffer.is_floating_point()}
    assert all(buffer.dtype == torch.float32 and buffer.isfinite().all() for buffer in buffers.values())
    assert any("running_mean" in name and buffer.any() for name, buffer in buffers.items())
    logits = logits_of(state)
    with state.ema.in_place():
        assert not torch.equal(logits_of(state), logits)
    assert logits.isfinite().all() and torch.equal(logits_of(state), logits)


def families():
    """Under FSDP2 every family is cut into its layers, trains a step and is evaluated; with a frozen encoder too."""
    for family in FAMILIES:
        for freeze in ((), ("encoder",)):
            state, plan = start("bf16", accumulation=1, family=family, freeze=freeze)
            assert train_step(state, plan, 0).isfinite() and logits_of(state).isfinite().all(), family
            weights = weights_of(state)
            assert weights.keys() == dict(model_of(family).named_parameters()).keys()


def padding():
    """The ends of shares hold no weight; what an engine leaves in that memory, which may be NaN, is no broken weight."""
    empty = torch.empty

    def left_by_others(*sizes, **options):
        tensor = empty(*sizes, **options)
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.detach().fill_(float("nan"))
        return tensor

    model = model_of("vit")
    accelerator = build_accelerator(60)
    torch.empty = left_by_others
    try:
        plan = plan_batches(IMAGES, accelerator.num_processes, IMAGES // accelerator.num_processes)
        state = prepare(accelerator, model, plan, optimizer=ADAMW, max_grad_norm=1.0)
    finally:
        torch.empty = empty
    assert state.partition.finite() == 1.0


def main():
    for precision in ("no", "bf16"):
        out = walk(precision) | gradients(precision)
        batch_norm(precision)
        state = PartialState()
        if state.is_main_process:
            save_file(
                {name: tensor.contiguous() for name, tensor in out.items()},
                Path(sys.argv[1], f"{precision}.safetensors"),
            )
    if state.distributed_type == "FSDP":
        families()
    if state.distributed_type == "DEEPSPEED":
        padding()
    end(build_accelerator(60))


if __name__ == "__main__":
    main()
