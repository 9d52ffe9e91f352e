"""The model: the same numbers as transformers' ViT, how it is saved and read, and what it adds to the stock one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from vit_hf.data.decode import to_pixels
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.models import ViTConfig, ViTForImageClassification, ViTModel
from vit_hf.models.layers import DropPath, Layer
from vit_hf.models.positions import resize_position_embeddings
from vit_hf.models.presets import PRESETS, preset_config

STOCK = [name for name in PRESETS if "vit" in name and preset_config(name).is_stock]
NAMES = {0: "cat", 1: "dog", 2: "ship"}
TINY = dict(
    image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
)


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tiny_config(**changes) -> ViTConfig:
    labels = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    return ViTConfig(**{**TINY, **labels, **changes})


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that no zero bias or unit norm hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(*size: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def tiny_model(**changes) -> ViTForImageClassification:
    return randomised(ViTForImageClassification(tiny_config(**changes)))


# --- the same numbers as transformers ---


@pytest.mark.parametrize("preset", STOCK)
def test_logits_equal_stock_for_every_preset(preset):
    """The preset's grid, heads and options, two narrow layers deep, with one state dict in both classes."""
    _, fields = PRESETS[preset]
    width = 4 * fields["num_attention_heads"]
    small = dict(hidden_size=width, num_hidden_layers=2, intermediate_size=4 * width, num_labels=7)
    config = ViTConfig(**{**fields, **small})
    stock = randomised(transformers.ViTForImageClassification(config.to_stock())).double()
    ours = ViTForImageClassification(config).eval().double()
    ours.load_state_dict(stock.state_dict())  # strict: the same names and shapes
    pixel_values = images(fields["image_size"], fields["image_size"], batch=1).double()
    with torch.no_grad():
        expected = stock(pixel_values, output_hidden_states=True)
        found = ours(pixel_values, output_hidden_states=True)
    assert expected.logits.std() > 0.01  # not all the same
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    torch.testing.assert_close(found.hidden_states[1], expected.hidden_states[1], rtol=0, atol=1e-9)


def test_dropout_and_no_qkv_bias_are_as_in_stock():
    config = tiny_config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1, qkv_bias=False)
    stock = randomised(transformers.ViTForImageClassification(config.to_stock()))
    ours = ViTForImageClassification(config)
    ours.load_state_dict(stock.state_dict())
    stock.set_attn_implementation("eager")
    ours.set_attn_implementation("eager")
    outputs = []
    for model in (stock, ours):
        torch.manual_seed(3)
        outputs.append(model.train()(images(16, 16), output_hidden_states=True).logits)  # every token draws
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("original_format", [True, False])
def test_stock_checkpoint_loads_with_equal_logits(tmp_path, original_format):
    """As transformers writes it, with the older tensor names, and with the names in memory."""
    stock = randomised(transformers.ViTForImageClassification(tiny_config().to_stock()))
    stock.save_pretrained(tmp_path, save_original_format=original_format)
    names = " ".join(tensor_names(tmp_path))
    assert ("encoder.layer.0.attention.attention.query" in names) == original_format
    ours, report = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ours.config.id2label == NAMES
    with torch.no_grad():
        torch.testing.assert_close(ours(images(16, 16)).logits, stock(images(16, 16)).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stock_class", [transformers.ViTModel, transformers.ViTForMaskedImageModeling])
def test_encoder_of_another_stock_model_loads_and_only_the_head_is_missing(tmp_path, stock_class):
    stock = randomised(stock_class(tiny_config().to_stock()))
    stock.save_pretrained(tmp_path)
    ours, report = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        encoder = stock if stock_class is transformers.ViTModel else stock.vit
        expected = encoder(images(16, 16)).last_hidden_state
        torch.testing.assert_close(ours.vit(images(16, 16)).last_hidden_state, expected, rtol=0, atol=1e-6)


def tensor_names(folder) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


# --- saved folders in a process without this package ---

FRESH_PROCESS = """
import json, os, sys
import numpy as np, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

stock, extended = sys.argv[1:]
assert "vit_hf" not in sys.modules
pixel_values = torch.from_numpy(np.load("pixel_values.npy"))
found = {}

def logits(model):
    with torch.no_grad():
        return model(pixel_values).logits.tolist()

model = AutoModelForImageClassification.from_pretrained(stock)
found["stock"] = dict(module=type(model).__module__, logits=logits(model), id2label=model.config.id2label)
found["processed"] = AutoImageProcessor.from_pretrained(stock)(np.load("image.npy"), return_tensors="np")["pixel_values"].tolist()
found["pipeline"] = pipeline("image-classification", stock)("image.png")

found["refused"] = {}
for auto in (AutoConfig, AutoModel, AutoModelForImageClassification):
    try:
        auto.from_pretrained(extended)
    except ValueError as error:
        found["refused"][auto.__name__] = str(error)
assert not [name for name in sys.modules if "modeling_vit" in name and "transformers_modules" in name]

config = AutoConfig.from_pretrained(extended, trust_remote_code=True)
encoder = AutoModel.from_pretrained(extended, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(extended, trust_remote_code=True)
with torch.no_grad():
    pooled = encoder(pixel_values).pooler_output.tolist()
found["extended"] = dict(
    model_type=config.model_type, pooling=config.pooling, logits=logits(model), pooled=pooled,
    id2label=model.config.id2label, module=type(model).__module__, architecture=type(model).__name__,
)
assert "vit_hf" not in sys.modules
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock-option model and one with extra options, saved with their processor."""
    root = tmp_path_factory.mktemp("folders")
    processor = Preprocessing((16, 16), image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)).image_processor()
    models = {"stock": tiny_model(), "extended": tiny_model(pooling="mean", head_hidden_size=12, drop_path_rate=0.2)}
    for name, model in models.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root, models


@pytest.fixture(scope="module")
def fresh(folders, tmp_path_factory):
    """What a process sees that never imported this package and stands elsewhere."""
    root, _ = folders
    cwd = tmp_path_factory.mktemp("elsewhere")
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(cwd / "image.png")
    np.save(cwd / "image.npy", pixels)
    np.save(cwd / "pixel_values.npy", images(16, 16).numpy())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(root / "stock"), str(root / "extended")],
        cwd=cwd,
        env=environment | {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    return result | {"image": pixels}


def logits_here(model) -> torch.Tensor:
    with torch.no_grad():
        return model(images(16, 16)).logits


@pytest.mark.slow
def test_stock_folder_is_a_transformers_model(folders, fresh):
    root, models = folders
    config = json.loads((root / "stock/config.json").read_text())
    assert config["model_type"] == "vit" and config["architectures"] == ["ViTForImageClassification"]
    assert not {"auto_map", "pooling", "head_hidden_size", "drop_path_rate"} & set(config)
    assert not list((root / "stock").glob("*.py"))
    assert fresh["stock"]["module"] == "transformers.models.vit.modeling_vit"
    assert fresh["stock"]["id2label"] == {str(index): name for index, name in NAMES.items()}
    torch.testing.assert_close(torch.tensor(fresh["stock"]["logits"]), logits_here(models["stock"]), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_stock_folder_works_in_a_pipeline(folders, fresh):
    """Scores and names of the trained model on pixels as the training saw them."""
    _, models = folders
    preprocessing = Preprocessing((16, 16))
    pixels = to_pixels(Image.fromarray(fresh["image"]), preprocessing).astype(np.float32) / 255
    pixels = (pixels - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.4])
    pixel_values = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    torch.testing.assert_close(torch.tensor(fresh["processed"]), pixel_values, rtol=0, atol=1e-5)
    with torch.no_grad():
        scores = models["stock"](pixel_values).logits.softmax(-1)[0]
    expected = sorted(((NAMES[index], score.item()) for index, score in enumerate(scores)), key=lambda x: -x[1])
    assert [entry["label"] for entry in fresh["pipeline"]] == [name for name, _ in expected]
    np.testing.assert_allclose([entry["score"] for entry in fresh["pipeline"]], [s for _, s in expected], atol=1e-5)


@pytest.mark.slow
def test_extended_folder_carries_its_code(folders, fresh):
    root, models = folders
    config = json.loads((root / "extended/config.json").read_text())
    assert config["model_type"] == "vit_hf" and "AutoModelForImageClassification" in config["auto_map"]
    assert {"configuration_vit.py", "layers.py", "modeling_vit.py"} <= {p.name for p in (root / "extended").iterdir()}
    found = fresh["extended"]
    assert found["module"].startswith("transformers_modules.") and found["architecture"] == "ViTForImageClassification"
    assert (found["model_type"], found["pooling"]) == ("vit_hf", "mean")
    assert found["id2label"] == {str(index): name for index, name in NAMES.items()}
    torch.testing.assert_close(torch.tensor(found["logits"]), logits_here(models["extended"]), rtol=0, atol=1e-6)
    with torch.no_grad():
        pooled = models["extended"].vit(images(16, 16)).pooler_output
    torch.testing.assert_close(torch.tensor(found["pooled"]), pooled, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_extended_folder_is_refused_without_trust(fresh):
    assert set(fresh["refused"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert all("trust_remote_code" in message for message in fresh["refused"].values())


@pytest.mark.parametrize("trust", [None, True])
def test_with_the_package_imported_its_own_class_is_used(folders, trust):
    root, models = folders
    trusted = {} if trust is None else {"trust_remote_code": trust}
    model = transformers.AutoModelForImageClassification.from_pretrained(root / "extended", **trusted)
    assert type(model) is ViTForImageClassification and model.config.id2label == NAMES
    torch.testing.assert_close(logits_here(model), logits_here(models["extended"]), rtol=0, atol=0)
    encoder = transformers.AutoModel.from_pretrained(root / "extended", **trusted)
    assert type(encoder) is ViTModel


def test_encoder_alone_is_saved_and_read(tmp_path, folders):
    """ViTModel of stock options: a `vit` folder for transformers' ViTModel; of a classifier's folder: its encoder."""
    root, models = folders
    encoder = models["stock"].vit
    encoder.save_pretrained(tmp_path)
    stock = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(stock) is transformers.ViTModel
    ours = ViTModel.from_pretrained(root / "stock")
    with torch.no_grad():
        expected = encoder(images(16, 16)).last_hidden_state
        torch.testing.assert_close(stock(images(16, 16)).last_hidden_state, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours(images(16, 16)).last_hidden_state, expected, rtol=0, atol=0)


# --- forward passes that must agree ---


@pytest.mark.parametrize("pooling, kind", [("cls", "learned_1d"), ("mean", "relative"), ("map", "none")])
def test_back_ends_and_output_attentions_agree(pooling, kind):
    model = tiny_model(pooling=pooling, position_embedding=kind)
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs.append(logits_here(model))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        shown = model(images(16, 16), output_attentions=True)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(shown.logits, outputs[1], rtol=0, atol=1e-6)
    assert len(shown.attentions) == 3
    tokens = 16 + (pooling == "cls")
    for weights in shown.attentions:
        assert weights.shape == (3, 2, tokens, tokens) and (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["learned_1d", "relative"])
def test_flex_attention_agrees(kind):
    model = tiny_model(position_embedding=kind)
    expected = logits_here(model)
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(logits_here(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"position_embedding": "relative", "layer_scale_init": 0.1, "qk_norm": True}])
def test_gradient_checkpointing_gives_the_same_gradients(changes):
    """Also with dropout and drop path: the recomputed pass draws the same numbers."""
    config = tiny_config(hidden_dropout_prob=0.2, drop_path_rate=0.3, pooling="mean", **changes)
    gradients = []
    for checkpointing in (False, True):
        model = randomised(ViTForImageClassification(config)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.vit.layers[0].gradient_checkpointing
        torch.manual_seed(5)
        model(images(16, 16), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


def test_tuple_output_and_labels():
    """Class indices give transformers' loss; probabilities give the cross-entropy written out."""
    model = tiny_model()
    stock = transformers.ViTForImageClassification(model.config.to_stock()).eval()
    stock.load_state_dict(model.state_dict())
    labels = torch.tensor([2, 0, 1])
    targets = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.9, 0.1]])
    with torch.no_grad():
        found = model(images(16, 16), labels=labels)
        torch.testing.assert_close(found.loss, stock(images(16, 16), labels=labels).loss)
        expected = -(targets * found.logits.log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(model(images(16, 16), labels=targets).loss, expected)
        loss, logits = model(images(16, 16), labels=labels, return_dict=False)
    assert torch.equal(loss, found.loss) and torch.equal(logits, found.logits)


def test_wrong_input_size_names_both_sizes():
    with pytest.raises(ValueError, match="12x16 pixels, the model takes 16x16"):
        tiny_model()(images(12, 16))


def test_interpolated_input_equals_a_model_with_resized_positions():
    """A larger, non-square image in one model, and the same weights in a model made for that size."""
    model = tiny_model()
    larger = randomised(ViTForImageClassification(tiny_config(image_size=[24, 32])))
    weights = model.state_dict()
    key = "vit.embeddings.position_embeddings"
    weights[key] = resize_position_embeddings(weights[key], (4, 4), (6, 8))
    larger.load_state_dict(weights)
    with torch.no_grad():
        found = model(images(24, 32), interpolate_pos_encoding=True).logits
        torch.testing.assert_close(found, larger(images(24, 32)).logits, rtol=0, atol=1e-6)


# --- what stock ViT does not have ---


def test_mean_pooling_has_no_class_token_and_reads_the_mean():
    model = tiny_model(pooling="mean")
    assert model.vit.embeddings.cls_token is None and not [k for k in model.state_dict() if "cls_token" in k]
    assert model.vit.embeddings.position_embeddings.shape == (1, 16, 16)
    with torch.no_grad():
        encoded = model.vit(images(16, 16))
        mean = sum(encoded.last_hidden_state[:, token] for token in range(16)) / 16
        torch.testing.assert_close(encoded.pooler_output, mean, rtol=0, atol=1e-6)
        expected = mean @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(logits_here(model), expected, rtol=0, atol=1e-5)


def test_mlp_head_is_one_tanh_layer():
    model = tiny_model(head_hidden_size=12)
    hidden = model.pre_logits[0]
    with torch.no_grad():
        token = model.vit(images(16, 16)).last_hidden_state[:, 0]
        expected = (
            torch.tanh(token @ hidden.weight.T + hidden.bias) @ model.classifier.weight.T + model.classifier.bias
        )
    assert hidden.weight.shape == (12, 16)
    torch.testing.assert_close(logits_here(model), expected, rtol=0, atol=1e-5)


def test_drop_path_keeps_or_scales_each_sample():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    branch = torch.randn(4000, 3, 2)
    kept = drop(branch)
    whole = torch.isclose(kept, branch / 0.75, rtol=1e-6, atol=0).all(dim=(1, 2))
    gone = (kept == 0).all(dim=(1, 2))
    assert (whole ^ gone).all()
    assert abs(gone.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(drop.eval()(branch), branch)
    assert torch.equal(DropPath(0.0).train()(branch), branch)


def test_drop_path_in_a_layer_drops_both_branches_for_a_sample_independently():
    """Every sample's output is one of the four sums of its input and its branches, kept ones scaled by 2."""
    layer = randomised(Layer(tiny_config(), drop_path_rate=0.5)).train()
    torch.manual_seed(1)
    tokens = torch.randn(64, 5, 16)
    with torch.no_grad():
        output, _ = layer(tokens)
        attention, _ = layer.attention(layer.layernorm_before(tokens))
        met = set()
        for sample in range(64):
            matches = []
            for first in (0, 2):
                middle = tokens[sample] + first * attention[sample]
                for second in (0, 2):
                    expected = middle + second * layer.mlp(layer.layernorm_after(middle))
                    if torch.allclose(output[sample], expected, rtol=0, atol=1e-5):
                        matches.append((first, second))
            assert len(matches) == 1
            met.add(matches[0])
    assert met == {(0, 0), (0, 2), (2, 0), (2, 2)}


def test_drop_path_grows_linearly_and_is_off_in_evaluation():
    model = tiny_model(drop_path_rate=0.4)
    assert [layer.drop_path.rate for layer in model.vit.layers] == pytest.approx([0.0, 0.2, 0.4])
    plain = ViTForImageClassification(tiny_config()).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits_here(model), logits_here(plain))
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(images(16, 16)).logits, logits_here(plain))
