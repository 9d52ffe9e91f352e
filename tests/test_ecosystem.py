"""The models in other people's hands: the losses of `problem_type`, plain `Trainer`, peft, torchao, features."""

import copy
import functools
import re

import pytest
import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.runs import ROOT
from vit_hf.models import (
    BitConfig,
    BitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

VIT = dict(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
           intermediate_size=48, initializer_range=0.15)  # fmt: skip
SWITCHED = dict(
    pooling="mean", position_embedding="sincos_2d", num_register_tokens=2, qk_norm=True, layer_scale_init=1.0
)
CONVOLUTIONS = dict(image_size=16, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
CLASSIFIERS = {
    "vit": (ViTForImageClassification, ViTConfig, VIT),
    "switched": (ViTForImageClassification, ViTConfig, VIT | SWITCHED),
    "resnet": (ResNetForImageClassification, ResNetConfig, CONVOLUTIONS),
    "resnet-cifar": (ResNetForImageClassification, ResNetConfig, CONVOLUTIONS | dict(cifar_stem=True)),
    "bit": (BitForImageClassification, BitConfig, CONVOLUTIONS | dict(num_groups=4)),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def classifier(name, **changes):
    model_class, config_class, fields = CLASSIFIERS[name]
    torch.manual_seed(0)
    return model_class(config_class(**{**fields, "num_labels": 10, **changes}))


def images(batch=4):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def logits_of(model, pixel_values):
    with torch.no_grad():
        return model.eval()(pixel_values=pixel_values).logits


# --- the loss of labels ---

INDICES = torch.tensor([2, 0, 1, 1])
FLOATS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize("name", ["vit", "resnet", "bit"])
@pytest.mark.parametrize("problem_type, num_labels, labels", [
    ("single_label_classification", 3, INDICES),
    ("multi_label_classification", 3, FLOATS),
    ("multi_label_classification", 1, FLOATS[:, :1]),
    ("regression", 3, FLOATS),
    ("regression", 1, FLOATS[:, 0]),
    ("regression", 1, FLOATS[:, :1]),
    (None, 3, INDICES),
    (None, 1, FLOATS[:, 0]),
])  # fmt: skip
def test_the_loss_is_that_of_transformers(name, problem_type, num_labels, labels):
    """One state in transformers' class and in ours: the same loss and gradients for every problem type."""
    ours = classifier(name, num_labels=num_labels, problem_type=problem_type).eval()
    stock = ours.stock_class(ours.config.to_stock()).eval()
    stock.load_state_dict(ours.state_dict())
    assert stock.config.problem_type == problem_type
    found, expected = ours(images(), labels=labels), stock(images(), labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    expected.loss.backward()
    gradients = {key: parameter.grad for key, parameter in stock.named_parameters()}
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-5)
    assert ours.config.problem_type == problem_type  # transformers' writes its guess there, and it is saved


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("problem_type", ["single_label_classification", None])
def test_probabilities_get_cross_entropy(name, problem_type, monkeypatch):
    """As mixup makes them. Where the problem type is open a warning says what they are taken for, once."""
    said = []
    monkeypatch.setattr("vit_hf.models.losses.logger.warning_once", said.append)
    model = classifier(name, num_labels=3, problem_type=problem_type).eval()
    targets = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.9, 0.1], [0.5, 0.5, 0.0]])
    with torch.no_grad():
        output = model(images(), labels=targets)
    expected = -(targets * output.logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(output.loss, expected)
    assert len(said) == (problem_type is None) and all("multi_label_classification" in line for line in said)


@pytest.mark.parametrize("problem_type, labels", [("multi_label_classification", FLOATS), ("regression", FLOATS)])
def test_sixteen_bit_weights_have_a_loss_of_32_bits(problem_type, labels):
    model = classifier("vit", num_labels=3, problem_type=problem_type).to(torch.bfloat16)
    loss = model(images(), labels=labels).loss
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float64])
def test_labels_of_0_and_1_may_have_any_type(kind):
    model = classifier("vit", num_labels=3, problem_type="multi_label_classification").eval()
    assert torch.equal(model(images(), labels=FLOATS.to(kind)).loss, model(images(), labels=FLOATS).loss)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", None])
def test_the_loss_is_traced_without_a_graph_break(problem_type):
    model = classifier("vit", num_labels=3, problem_type=problem_type)
    labels = INDICES if problem_type is None else FLOATS
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(images(), labels=labels).loss
    torch.testing.assert_close(found, model(images(), labels=labels).loss)


# --- plain Trainer ---


class Digits(torch.utils.data.Dataset):
    """scikit-learn's handwritten digits, 8x8, as 16x16 images of three channels. `labels` makes of a digit what the model
    is handed."""

    def __init__(self, part, labels=int):
        pixels, digits = load_digits(return_X_y=True)
        pixels = torch.from_numpy(pixels[part]).float().reshape(-1, 1, 8, 8) / 8 - 1
        self.pixel_values = nn.functional.interpolate(pixels, 16, mode="nearest").expand(-1, 3, -1, -1)
        self.digits, self.labels = torch.from_numpy(digits[part]), labels

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": self.labels(self.digits[index])}

    def accuracy(self, model):
        return (logits_of(model, self.pixel_values).argmax(-1) == self.digits).float().mean().item()


TRAIN, TEST = slice(0, 640), slice(1400, 1700)


def make_trainer(model, folder, labels=int, **settings):
    settings = dict(per_device_train_batch_size=32, max_steps=60, learning_rate=4e-3, logging_steps=10) | settings
    return Trainer(
        model=model,
        train_dataset=Digits(TRAIN, labels),
        eval_dataset=Digits(TEST, labels),
        args=TrainingArguments(folder, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **settings),
    )


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name) -> the Trainer of that classifier after its 60 steps."""
    trainers = {}

    def train(name):
        if name not in trainers:
            trainers[name] = make_trainer(classifier(name), str(tmp_path_factory.mktemp(name)))
            trainers[name].train()
        return trainers[name]

    return train


@pytest.mark.parametrize("name", ["switched", "resnet-cifar", "bit"])
def test_plain_trainer_trains_saves_and_reloads(trained, tmp_path, name):
    trainer, test = trained(name), Digits(TEST)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.15
    assert test.accuracy(trainer.model) > 0.25  # a tenth is chance
    found, logits = trainer.evaluate()["eval_loss"], logits_of(trainer.model, test.pixel_values)
    expected = nn.functional.cross_entropy(logits, test.digits).item()
    assert found == pytest.approx(expected, rel=0.02)  # a mean over batches, of which the last is smaller
    trainer.save_model(str(tmp_path))
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) in (type(trainer.model), trainer.model.stock_class)
    torch.testing.assert_close(logits_of(again, test.pixel_values), logits, rtol=0, atol=1e-5)


def parts(digit):
    """Three labels that do not exclude each other: even, prime, above 4."""
    return torch.tensor([digit % 2 == 0, digit in (2, 3, 5, 7), digit > 4], dtype=torch.float32)


def test_plain_trainer_learns_several_labels_an_image(tmp_path):
    model = classifier("resnet", num_labels=3, problem_type="multi_label_classification")
    trainer = make_trainer(model, str(tmp_path), parts)
    trainer.train()
    test = Digits(TEST, parts)
    found = logits_of(model, test.pixel_values) > 0
    expected = torch.stack([parts(digit) for digit in test.digits]) > 0
    assert ((found == expected).float().mean(0) > 0.75).all()
    trainer.save_model(str(tmp_path / "saved"))
    assert type(model).from_pretrained(tmp_path / "saved").config.problem_type == "multi_label_classification"


def test_plain_trainer_learns_a_number(tmp_path):
    trainer = make_trainer(classifier("vit", num_labels=1), str(tmp_path), lambda digit: digit / 9)
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path):
    """Trainer divides the loss where the model does not: it takes a `**kwargs` in forward() for a model that does."""
    states = []
    for number, accumulation in enumerate((1, 4)):
        settings = dict(max_steps=2, per_device_train_batch_size=32 // accumulation, optim="sgd", learning_rate=0.1)
        model = classifier("vit")
        make_trainer(model, str(tmp_path / str(number)), gradient_accumulation_steps=accumulation, **settings).train()
        states.append(model.state_dict())
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=0, atol=1e-5)


# --- peft ---


def test_lora_trains_its_own_weights_saves_reloads_and_merges(tmp_path):
    peft, name = pytest.importorskip("peft"), "switched"
    base = classifier(name)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(base, settings)
    trainer = make_trainer(model, str(tmp_path), learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    changed = set()
    for key, tensor in model.get_base_model().state_dict().items():
        plain = key.replace(".base_layer", "").replace(".original_module", "")
        if plain not in before or not torch.equal(tensor, before[plain]):
            changed.add(key)
    assert changed and all(".lora_" in key or "classifier.modules_to_save" in key for key in changed), changed
    assert {key.split(".")[-4] for key in changed if ".lora_" in key} == {"q_proj", "v_proj"}
    pixel_values = Digits(TEST).pixel_values
    expected = logits_of(model, pixel_values)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(classifier(name), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again, pixel_values), expected, rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    assert type(merged) is ViTForImageClassification and set(merged.state_dict()) == set(before)
    torch.testing.assert_close(logits_of(merged, pixel_values), expected, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    whole = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(whole, pixel_values), expected, rtol=0, atol=1e-4)


# --- torchao ---


def test_int8_weights_give_nearly_the_same_logits(trained):
    """A byte for each weight of a linear layer. On 300 digits at most 2 % of the predictions are others."""
    torchao = pytest.importorskip("torchao.quantization")
    model, pixel_values = copy.deepcopy(trained("switched").model), Digits(TEST).pixel_values
    expected = logits_of(model, pixel_values)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 13 and {type(weight).__name__ for weight in linear} == {"Int8Tensor"}
    found = logits_of(model, pixel_values)
    assert 0 < rms(found - expected) < 0.03 * rms(expected - expected.mean(-1, keepdim=True))
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.98


def rms(values):
    return values.square().mean().sqrt().item()


# --- the page ---


def lines_of(topic):
    """The Python lines under a topic of docs/models.md, "In the ecosystem"."""
    page = (ROOT / "docs/models.md").read_text()
    section = page[page.index("## In the ecosystem") : page.index("## Other checkpoints")]
    (text,) = (part for part in section.split("\n**") if part.startswith(f"{topic}.**"))
    return "".join(re.findall(r"```python\n(.*?)```", text, re.S))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """What the page's lines find: names, and a folder to write in."""
    monkeypatch.chdir(tmp_path)
    return dict(
        torch=torch, model=classifier("switched"), images=images(), train=Digits(TRAIN), test=Digits(TEST),
        resnet=classifier("resnet").eval(),
    )  # fmt: skip


def test_the_lines_about_trainer_peft_and_torchao_run(page, monkeypatch):
    for name in ("peft", "torchao"):
        pytest.importorskip(name)
    monkeypatch.setattr("transformers.TrainingArguments", functools.partial(TrainingArguments, use_cpu=True))
    exec(lines_of("Trainer").replace("max_steps=60", "max_steps=3"), page)
    saved = ViTForImageClassification.from_pretrained("runs/by_trainer/final")
    before = logits_of(saved, images())
    exec(lines_of("peft"), page)
    adapted = page["peft"].PeftModel.from_pretrained(saved, "runs/adapter")
    expected = logits_of(page["model"], images())
    torch.testing.assert_close(logits_of(adapted, images()), expected, rtol=0, atol=1e-4)
    merged = ViTForImageClassification.from_pretrained("runs/merged")
    torch.testing.assert_close(logits_of(merged, images()), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)
    exec(lines_of("torchao"), page)
    assert type(page["model"].classifier.weight).__name__ == "Int8Tensor"


def test_the_lines_about_compile_run(page, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # as fast as it gets
    with torch.no_grad():
        exec(lines_of("torch.compile"), page)
        torch.testing.assert_close(page["faster"](images()).logits, page["model"](images()).logits)


def test_the_lines_about_features_give_the_maps_of_a_vit_and_of_a_resnet(page):
    page["model"].eval()
    with torch.no_grad():
        exec(lines_of("Features"), page)
        feature_maps = page["backbone"].eval()(images()).feature_maps
        states = page["resnet"](images(), output_hidden_states=True).hidden_states
    assert [tuple(one.shape) for one in page["maps"]] == 3 * [(4, 32, 4, 4)]
    tokens = page["model"].vit.layernorm(page["states"][-1])
    torch.testing.assert_close(tokens, page["encoded"].last_hidden_state)
    # row 1, column 2 of the grid is the seventh patch, behind two registers
    assert torch.equal(page["maps"][-1][:, :, 1, 2], page["states"][-1][:, 2 + 6])
    pooled = tokens[:, 2:].mean(1)
    torch.testing.assert_close(page["encoded"].pooler_output, pooled)
    assert len(feature_maps) == 2
    for found, expected in zip(feature_maps, states[1:], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_the_lines_about_onnx_give_a_model_of_the_same_logits(page):
    onnxruntime = pytest.importorskip("onnxruntime")
    exec(lines_of("ONNX"), page)
    session = onnxruntime.InferenceSession("model.onnx")
    for batch in (4, 7):
        (found,) = session.run(None, {"pixel_values": images(batch).numpy()})
        expected = logits_of(page["model"], images(batch))
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
