"""ResNet and BiT: the same numbers as transformers' own, how they are saved and read, and the stem for small images."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from vit_hf.models.baselines import (
    BASELINES,
    BitConfig,
    BitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

NAMES = {0: "cat", 1: "dog", 2: "ship"}
MODELS = {ResNetConfig: ResNetForImageClassification, BitConfig: BitForImageClassification}
STOCK = [name for name in BASELINES if "cifar" not in name]
FAMILIES = ["resnet-50", "bit-resnet-50"]
CIFAR = [f"{name}-cifar" for name in FAMILIES]


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tiny_config(name: str, **changes):
    """The baseline with three narrow stages and three classes."""
    config_class, fields = BASELINES[name]
    small = dict(embedding_size=8, hidden_sizes=[32, 32, 64], depths=[1, 2, 1], image_size=32)
    labels = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    groups = {"num_groups": 4} if config_class is BitConfig else {}
    return config_class(**{**fields, **small, **labels, **groups, **changes})


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and every mean and variance of a BatchNorm random, so that no default hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            else:
                tensor.fill_(7)  # num_batches_tracked
    return model.eval()


def images(side: int = 32, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def tiny_model(name: str, **changes):
    config = tiny_config(name, **changes)
    return randomised(MODELS[type(config)](config))


def logits_here(model) -> torch.Tensor:
    with torch.no_grad():
        return model(images()).logits


# --- the same numbers as transformers ---


@pytest.mark.parametrize("name", STOCK)
def test_logits_equal_stock(name):
    ours = tiny_model(name)
    stock = ours.stock_class(ours.config.to_stock()).eval()
    stock.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    pixel_values = images(64)
    with torch.no_grad():
        expected = stock(pixel_values, output_hidden_states=True)
        found = ours(pixel_values, output_hidden_states=True)
    assert expected.logits.std() > 0.01  # not all the same
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    torch.testing.assert_close(found.hidden_states[1], expected.hidden_states[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, millions", [("resnet-50", 25.557032), ("resnet-18", 11.689512), ("bit-resnet-50", 25.549352)]
)
def test_parameter_counts(name, millions):
    """At 1000 classes: those of transformers' own; the 3x3 stem has 40 weights fewer for each of 3 x 64 planes."""
    counts = []
    with torch.device("meta"):
        for form in (name, f"{name}-cifar"):
            config_class, fields = BASELINES[form]
            model = MODELS[config_class](config_class(**fields, num_labels=1000))
            counts.append(sum(parameter.numel() for parameter in model.parameters()))
        stock = model.stock_class(BASELINES[name][0](**BASELINES[name][1], num_labels=1000).to_stock())
    assert counts[0] == sum(parameter.numel() for parameter in stock.parameters()) == round(millions * 1e6)
    assert counts[1] == counts[0] - 3 * 64 * (7 * 7 - 3 * 3)


@pytest.fixture
def transformers_log(caplog):
    """Its warnings, which pytest sees only when they propagate."""
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


@pytest.mark.parametrize("name", STOCK)
def test_folder_of_transformers_loads_with_equal_logits(tmp_path, transformers_log, name):
    config = tiny_config(name).to_stock()
    del config.image_size  # as transformers' own writes it
    stock = randomised(MODELS[BASELINES[name][0]].stock_class(config))
    stock.save_pretrained(tmp_path)
    ours, report = MODELS[BASELINES[name][0]].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(ours.config) is BASELINES[name][0] and ours.config.is_stock
    assert (ours.config.id2label, ours.config.image_size) == (NAMES, 224)
    assert ours.config.model_type == BASELINES[name][0].model_type and "model of type" not in transformers_log.text
    torch.testing.assert_close(logits_here(ours), logits_here(stock), rtol=0, atol=1e-6)


# --- saved folders in a process without this package ---

FRESH_PROCESS = """
import json, os, sys
import numpy as np, torch
from transformers import AutoConfig, AutoModelForImageClassification

assert "vit_hf" not in sys.modules
pixel_values = torch.from_numpy(np.load("pixel_values.npy"))
found = {}
for name in sys.argv[2:]:
    folder = os.path.join(sys.argv[1], name)
    found[name] = {"refused": []}
    trust = {}
    if name.endswith("cifar"):
        for auto in (AutoConfig, AutoModelForImageClassification):
            try:
                auto.from_pretrained(folder)
            except ValueError as error:
                found[name]["refused"].append(str(error))
        trust = {"trust_remote_code": True}
    model = AutoModelForImageClassification.from_pretrained(folder, **trust)
    with torch.no_grad():
        logits = model(pixel_values).logits.tolist()
    means = [buffer.tolist() for key, buffer in model.named_buffers()]
    found[name] |= dict(logits=logits, buffers=means, module=type(model).__module__, config=model.config.to_dict())
assert "vit_hf" not in sys.modules
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of the saved models, one for each family and stem, and the models."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    models = {name: tiny_model(name, image_size=[32, 48]) for name in FAMILIES + CIFAR}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root, models


@pytest.fixture(scope="module")
def fresh(folders, tmp_path_factory):
    """What a Python process finds that has transformers but not this package, network or cache."""
    root, models = folders
    cwd = tmp_path_factory.mktemp("elsewhere")
    np.save(cwd / "pixel_values.npy", images().numpy())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(root), *models],
        cwd=cwd,
        env=environment | {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_form_is_saved_as_a_transformers_model(folders, fresh, name):
    root, models = folders
    stock_class = models[name].stock_class
    config = json.loads((root / name / "config.json").read_text())
    assert config["model_type"] == stock_class.config_class.model_type
    assert config["architectures"] == [stock_class.__name__]
    assert not {"auto_map", "cifar_stem"} & set(config) and not list((root / name).glob("*.py"))
    assert fresh[name]["module"] == stock_class.__module__
    assert fresh[name]["config"]["id2label"] == {str(index): label for index, label in NAMES.items()}
    torch.testing.assert_close(torch.tensor(fresh[name]["logits"]), logits_here(models[name]), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CIFAR)
def test_small_image_form_carries_its_code(folders, fresh, name):
    root, models = folders
    config = json.loads((root / name / "config.json").read_text())
    assert config["model_type"] == models[name].config.model_type and config["auto_map"] == models[name].code
    found = fresh[name]
    assert found["module"].startswith("transformers_modules.")
    assert found["config"]["cifar_stem"] is True and found["config"]["image_size"] == [32, 48]
    assert found["config"]["id2label"] == {str(index): label for index, label in NAMES.items()}
    torch.testing.assert_close(torch.tensor(found["logits"]), logits_here(models[name]), rtol=0, atol=1e-6)
    buffers = list(models[name].buffers())
    assert len(buffers) == len(found["buffers"]) and bool(buffers) == (name == "resnet-50-cifar")
    for there, here in zip(found["buffers"], buffers, strict=True):
        torch.testing.assert_close(torch.tensor(there, dtype=here.dtype), here, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CIFAR)
def test_small_image_form_is_refused_without_trust(fresh, name):
    assert len(fresh[name]["refused"]) == 2 and all("trust_remote_code" in line for line in fresh[name]["refused"])


@pytest.mark.parametrize("name", FAMILIES + CIFAR)
def test_own_folder_loads_with_its_fields(folders, name):
    """The stock form too keeps the size that the model is meant for, which transformers' configuration lacks."""
    root, models = folders
    model = type(models[name]).from_pretrained(root / name)
    assert (model.config.image_size, model.config.cifar_stem) == ([32, 48], name in CIFAR)
    assert model.config.id2label == NAMES
    torch.testing.assert_close(logits_here(model), logits_here(models[name]), rtol=0, atol=0)


# --- the stem for small images ---


@pytest.mark.parametrize("name", FAMILIES)
def test_small_image_stem_keeps_the_resolution(name):
    """The stock stem halves it twice, once by pooling."""
    for form, side, poolings in ((name, 8, 1), (f"{name}-cifar", 32, 0)):
        model = tiny_model(form)
        with torch.no_grad():
            stem, first, second, _ = model(images(32), output_hidden_states=True).hidden_states
        assert stem.shape == (3, 8, side, side) and first.shape == (3, 32, side, side)
        assert second.shape == (3, 32, side // 2, side // 2)
        assert len([module for module in model.modules() if isinstance(module, nn.MaxPool2d)]) == poolings


@pytest.mark.parametrize("name", CIFAR)
def test_small_image_stem_starts_as_the_other_convolutions(name):
    """Normal with standard deviation sqrt(2 / fan-out), and with a seed the same again."""
    starts = []
    for _ in range(2):
        torch.manual_seed(0)
        config = tiny_config(name, embedding_size=64)
        starts.append(next(MODELS[type(config)](config).parameters()))
    assert starts[0].shape == (64, 3, 3, 3) and torch.equal(*starts)
    assert starts[0].std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)  # 1728 weights: 3 sigma


def test_small_image_stem_of_bit_is_weight_standardised():
    """Neither the scale nor the mean of a filter matters."""
    model = tiny_model("bit-resnet-50-cifar")
    expected = logits_here(model)
    with torch.no_grad():
        next(model.parameters()).mul_(3).add_(0.5)
    torch.testing.assert_close(logits_here(model), expected, rtol=0, atol=1e-4)


# --- training ---


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_and_tuple_output(name):
    """Class indices give transformers' loss; probabilities give the cross-entropy written out."""
    model = tiny_model(name)
    stock = model.stock_class(model.config.to_stock()).eval()
    stock.load_state_dict(model.state_dict())
    labels = torch.tensor([2, 0, 1])
    targets = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.9, 0.1]])
    with torch.no_grad():
        found = model(images(), labels=labels)
        torch.testing.assert_close(found.loss, stock(images(), labels=labels).loss)
        expected = -(targets * found.logits.log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(model(images(), labels=targets).loss, expected)
        loss, logits = model(images(), labels=labels, return_dict=False)
        assert torch.equal(loss, found.loss) and torch.equal(logits, found.logits)
        model.config.return_dict = False
        logits, hidden_states = model(images(), output_hidden_states=True)
    assert torch.equal(logits, found.logits) and len(hidden_states) == 4
    assert model.config.problem_type is None  # or the model would be saved as one for indices or for many labels only


@pytest.mark.parametrize("name", FAMILIES + CIFAR)
def test_sixteen_bit_weights_take_images_of_32_bits(name):
    config = tiny_config(name)
    torch.manual_seed(0)
    model = MODELS[type(config)](config).eval()
    with torch.no_grad():
        expected = model(images()).logits
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(images()).logits
        found = model.to(torch.bfloat16)(images(), labels=torch.tensor([2, 0, 1]))
    assert found.logits.dtype == torch.bfloat16 and found.loss.dtype == torch.float32
    for logits in (found.logits, autocast):
        torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", list(BASELINES))
def test_two_steps_of_sgd_lower_the_loss(name):
    config = tiny_config(name)
    torch.manual_seed(0)
    model = MODELS[type(config)](config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(images(batch=6), labels=torch.tensor([2, 0, 1, 1, 0, 2])).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES + CIFAR)
def test_compiles_without_a_graph_break(name):
    model = tiny_model(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()).logits, logits_here(model), rtol=0, atol=1e-6)
    compiled.train()
    labels = torch.tensor([2, 0, 1])
    found = compiled(images(), labels=labels)
    torch.testing.assert_close(found.loss, model(images(), labels=labels).loss)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- the configuration ---


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("resnet-50", dict(image_size=0), "image_size: 0"),
        ("resnet-50", dict(image_size=[32, 32, 3]), "image_size: "),
        ("resnet-50", dict(depths=[1, 0, 1]), "depths: "),
        ("resnet-50", dict(hidden_sizes=[]), "hidden_sizes: "),
        ("resnet-50", dict(depths=[1, 1]), "depths has 2 stages, hidden_sizes 3"),
        ("resnet-50", dict(embedding_size=0), "embedding_size: 0 is out of range"),
        ("resnet-50", dict(layer_type="preactivation"), "layer_type: 'preactivation' is not one of basic, bottleneck"),
        ("resnet-50", dict(hidden_act="rely"), "hidden_act: 'rely'"),
        ("bit-resnet-50", dict(layer_type="basic"), "layer_type: 'basic' is not one of preactivation, bottleneck"),
        ("bit-resnet-50", dict(drop_path_rate=1.0), "drop_path_rate: 1.0"),
        ("bit-resnet-50", dict(num_groups=0), "num_groups: 0"),
        ("bit-resnet-50", dict(num_groups=16), "num_groups 16 does not divide 8 channels"),
        ("bit-resnet-50", dict(hidden_sizes=[32, 36, 64]), "are not multiples of 8"),
        ("bit-resnet-50", dict(width_factor=2), "width_factor: 2"),
        ("bit-resnet-50", dict(global_padding="valid"), "global_padding: 'VALID'"),
    ],
)
def test_wrong_values_are_named(name, changes, message):
    with pytest.raises(ValueError) as error:
        tiny_config(name, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", CIFAR)
def test_small_image_form_has_no_stock_configuration(name):
    assert not tiny_config(name).is_stock
    with pytest.raises(ValueError, match="has no cifar_stem"):
        tiny_config(name).to_stock()
