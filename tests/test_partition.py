"""What one process holds by parameter name, what is frozen, and what is refused before anything runs."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from tests.families import FAMILIES
from vit_hf.errors import UserError
from vit_hf.models.presets import from_preset
from vit_hf.training.accelerator import build_accelerator
from vit_hf.training.freeze import freeze_parameters
from vit_hf.training.optimizer import OptimizerSettings
from vit_hf.training.schedule import BatchPlan
from vit_hf.training.state import prepare

ADAMW = OptimizerSettings("adamw_torch", 1e-2, weight_decay=0.1)


class TwoLayers(nn.Module):
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.classifier = nn.Linear(4, 2)

    def forward(self, values):
        return self.classifier(self.encoder(values))


def fresh(optimizer=ADAMW, model=None, freeze=(), **settings):
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    torch.manual_seed(0)
    accelerator = build_accelerator(60)
    plan = BatchPlan(8, 1, 8, 1)
    model = model or TwoLayers()
    freeze_parameters(model, freeze)
    return prepare(accelerator, model, plan, optimizer=optimizer, max_grad_norm=1.0, **settings)


def step(state, number):
    values = torch.randn(8, 3, generator=torch.Generator().manual_seed(number)).to(state.accelerator.device)
    state.accelerator.backward(state.engine(values).square().mean())
    norm = state.partition.clip(0.01)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return norm


def taken(partition):
    weights = {name: partition.full_weight(name).cpu().clone() for name in partition.parameter_names()}
    keys = [(name, key) for name in partition.trainable_names() for key in partition.moment_keys()]
    return weights, {pair: partition.full_moment(*pair).cpu().clone() for pair in keys}, partition.optimizer_steps()


@pytest.mark.parametrize("optim, keys", [("adamw_torch", ("exp_avg", "exp_avg_sq")), ("sgd", ("momentum_buffer",))])
def test_what_is_put_into_a_fresh_run_goes_on_as_the_old_one(optim, keys):
    """Before its first step: moments do not exist yet, and the count decides AdamW's bias correction."""
    settings = OptimizerSettings(optim, 1e-2, weight_decay=0.1)
    old = fresh(settings)
    for number in range(3):
        step(old, number)
    weights, moments, steps = taken(old.partition)
    assert old.partition.name == "single" and old.partition.moment_keys() == keys
    assert steps == (3 if optim == "adamw_torch" else 0) and all(moment.any() for moment in moments.values())
    buffers = {name: buffer.clone() for name, buffer in old.model.named_buffers()}
    expected = [step(old, number) for number in (3, 4)], taken(old.partition)

    new = fresh(settings)
    assert not any(moment.any() for moment in taken(new.partition)[1].values())
    for name, weight in weights.items():
        new.partition.set_weight(name, weight)
    for (name, key), moment in moments.items():
        new.partition.set_moment(name, key, moment)
    new.partition.set_optimizer_steps(steps)
    new.partition.refresh()
    for name, buffer in new.model.named_buffers():
        buffer.copy_(buffers[name])
    found = [step(new, number) for number in (3, 4)], taken(new.partition)
    assert found[0] == expected[0] and found[1][2] == expected[1][2]
    for one, other in zip(found[1][:2], expected[1][:2], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_sgd_without_momentum_keeps_nothing():
    state = fresh(OptimizerSettings("sgd", 1e-2, momentum=0.0))
    step(state, 0)
    assert state.partition.moment_keys() == () and state.partition.optimizer_steps() == 0
    state.partition.set_optimizer_steps(5)
    step(state, 1)


def test_clip_gives_the_norm_before_and_leaves_the_rest_to_the_optimizer():
    state = fresh(OptimizerSettings("sgd", 1.0, momentum=0.0))
    for limit, expected in ((0.0, None), (1e-3, 1e-3)):
        state.optimizer.zero_grad()
        state.accelerator.backward(state.engine(torch.ones(8, 3) * torch.arange(8.0)[:, None]).square().mean())
        before = nn.utils.get_total_norm([p.grad for p in state.model.parameters()])
        assert state.partition.clip(limit) == before > 1e-2
        after = nn.utils.get_total_norm([p.grad for p in state.model.parameters()])
        torch.testing.assert_close(after, before if expected is None else torch.tensor(expected), rtol=1e-2, atol=0)
    state.model.classifier.weight.grad[0, 0] = float("nan")
    assert not state.partition.clip(0.0).isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_weight_that_is_not_finite_is_seen(value):
    state = fresh()
    assert state.partition.finite() == 1.0
    state.model.encoder[0].bias.data[1] = value
    assert state.partition.finite() == 0.0
    state.model.encoder[0].bias.data[1] = 1e18  # large, and finite, and so is its square
    assert state.partition.finite() == 1.0


def test_masters_are_the_weights_that_the_optimizer_updates():
    state = fresh(freeze=("classifier",))
    masters, before = state.partition.masters(), [master.clone() for master in state.partition.masters()]
    assert len(masters) == len(state.partition.trainable_names()) == 4
    step(state, 0)
    assert all(not torch.equal(master, old) for master, old in zip(masters, before) if old.any())


def small(family):
    torch.manual_seed(0)
    preset, changes = FAMILIES[family]
    return from_preset(preset, list("abc"), dict(changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_is_all_but_the_head(family):
    model = small(family)
    frozen = freeze_parameters(model, ("encoder",))
    head = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert head and all(name.startswith(("classifier", "pre_logits")) for name in head)
    assert sorted(frozen + head) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "family, patterns, expected",
    [
        ("vit", ("layers.1",), ("vit.layers.1.",)),
        ("vit", ("embeddings", "layers.0", "layers.1"), ("vit.embeddings.", "vit.layers.")),
        ("vit", ("embeddings.cls_token",), ("vit.embeddings.cls_token",)),
        ("hybrid", ("backbone.stages.0",), ("vit.embeddings.patch_embeddings.backbone.stages.0.",)),
        (
            "conv",
            tuple(f"convolutions.{number}" for number in range(5)),
            ("vit.embeddings.patch_embeddings.convolutions.",),
        ),
        ("resnet", ("embedder", "stages.0"), ("resnet.embedder.", "resnet.encoder.stages.0.")),
        ("bit", ("stages.1",), ("bit.encoder.stages.1.",)),
    ],
)
def test_patterns_are_parts_of_names(family, patterns, expected):
    model = small(family)
    frozen = freeze_parameters(model, patterns)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != (name in frozen)
    chosen = {name for name, _ in model.named_parameters() if name.startswith(expected)}
    assert frozen and (set(frozen) == chosen or family == "conv" and set(frozen) < chosen)
    assert all(any(name.startswith(one) for name in frozen) for one in expected)


@pytest.mark.parametrize(
    "pattern", ["layer", "layers.2", "layers.0-1", "blocks", "embeddings.cls", "encoder.layer", ""]
)
def test_a_pattern_that_fits_nothing_names_what_exists(pattern):
    model = small("vit")
    with pytest.raises(UserError) as caught:
        freeze_parameters(model, (pattern,))
    assert str(caught.value) == (
        f"--freeze: {pattern!r} fits no parameter of this model; allowed are encoder, embeddings, layers.0-1, layernorm, "
        "classifier"
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_everything_frozen_is_refused():
    with pytest.raises(UserError, match="--freeze: encoder,classifier leaves nothing to train"):
        freeze_parameters(small("resnet"), ("encoder", "classifier"))


def test_a_frozen_batch_norm_keeps_its_statistics():
    state = fresh(freeze=("encoder",))
    before = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
    state.engine.train()
    step(state, 0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in state.model.named_buffers())
    other = fresh()
    other.engine.train()
    step(other, 0)
    assert other.model.encoder[1].running_mean.any()


def test_frozen_weights_stay_and_are_given_out():
    state = fresh(freeze=("encoder.0",), ema_decay=0.5)
    before = taken(state.partition)[0]
    assert state.partition.parameter_names() == list(before) and len(before) == 6
    assert state.partition.trainable_names() == list(before)[2:]
    for number in range(2):
        step(state, number)
        state.ema.update()
    with state.ema.in_place():
        after = taken(state.partition)[0]
    for name in before:
        assert torch.equal(after[name], before[name]) == (name not in state.partition.trainable_names())


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version 1 is not supported, allowed is 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1 is not supported, allowed is 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2 needs more than one process, seen 1"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
    ],
)
def test_what_would_run_as_something_else_is_refused(environment, message, monkeypatch):
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        build_accelerator(60)
    assert "accelerate's --config_file" in str(caught.value) and "\n" not in str(caught.value)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.mark.parametrize(
    "zero, message",
    [
        ({"stage": 0}, "stage 0 splits nothing, and keeps no fp32 weights in 16 bits; allowed are 1, 2, 3"),
        (
            {"stage": 3, "offload_optimizer": {"device": "nvme"}},
            "offload_optimizer has device nvme; allowed are none and",
        ),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param has device nvme; allowed are none and cpu"),
    ],
)
def test_what_deepspeed_would_round_or_hide_is_refused(zero, message, tmp_path):
    pytest.importorskip("deepspeed")
    from accelerate import DeepSpeedPlugin

    from vit_hf.training.accelerator import _set_up_deepspeed

    with pytest.raises(UserError, match=message):
        _set_up_deepspeed(DeepSpeedPlugin(hf_ds_config={"zero_optimization": zero, "train_batch_size": "auto"}))
