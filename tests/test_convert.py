"""Checkpoints of timm and of Google's JAX code: the same logits as a reference of their own, and back to the bit."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.references import google_logits, timm_logits
from vit_hf.models import ViTConfig, ViTForImageClassification
from vit_hf.models.convert import load_source, save_timm, to_timm

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = ([0.5] * 3, [0.5] * 3)
PIXELS = {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", "mean": MEAN, "std": STD}
NAMES = ["cat", "dog", "ship", "car", "tree"]
TINY = dict(
    image_size=[24, 16], patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, layer_norm_eps=1e-6, id2label=dict(enumerate(NAMES)),
    label2id={name: index for index, name in enumerate(NAMES)},
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small; threads that wait for each other take most of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Maker(dict):
    """Random tensors by name; the seed is how many there are."""

    def weight(self, name: str, *shape: int, inputs: int | None = None) -> None:
        generator = torch.Generator().manual_seed(len(self))
        scale = 0.5 if inputs is None else inputs**-0.5
        self[name] = scale * torch.randn(shape, generator=generator)

    def norm(self, scale: str, bias: str, *shape: int) -> None:
        self.weight(scale, *shape)
        self[scale] += 1
        self.weight(bias, *shape)

    def linear(self, name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        self.weight(f"{name}.weight", outputs, inputs, inputs=inputs)
        if bias:
            self.weight(f"{name}.bias", outputs)

    def layer_norm(self, name: str, width: int) -> None:
        self.norm(f"{name}.weight", f"{name}.bias", width)


def timm_tensors(
    *, width=32, patches=6, class_token=True, registers=0, position_rows=None, qkv_bias=True, qk_norm=None,
    scaled=False, pool="token", fc_norm=False, classes=5, depths=None, pre_norm=False,
) -> dict[str, Tensor]:  # fmt: skip
    """Two layers under timm's names; the MLP is 48 wide."""
    m = Maker()
    if class_token:
        m.weight("cls_token", 1, 1, width)
    if registers:
        m.weight("reg_token", 1, registers, width)
    rows = patches + class_token + registers if position_rows is None else position_rows
    if rows:
        m.weight("pos_embed", 1, rows, width)
    channels = 3
    if depths is not None:
        backbone, root = "patch_embed.backbone.", "patch_embed.backbone." + ("stem." if depths else "")
        m.weight(f"{root}conv.weight", 64, 3, 7, 7)
        m.layer_norm(f"{root}norm", 64)
        channels = 64
        for stage, depth in enumerate(depths):
            inner = 64 * 2**stage
            for index in range(depth):
                there = f"{backbone}stages.{stage}.blocks.{index}."
                if not index:
                    m.weight(f"{there}downsample.conv.weight", 4 * inner, channels, 1, 1)
                    m.layer_norm(f"{there}downsample.norm", 4 * inner)
                m.weight(f"{there}conv1.weight", inner, channels, 1, 1)
                m.weight(f"{there}conv2.weight", inner, inner, 3, 3)
                m.weight(f"{there}conv3.weight", 4 * inner, inner, 1, 1)
                for number, size in ((1, inner), (2, inner), (3, 4 * inner)):
                    m.layer_norm(f"{there}norm{number}", size)
                channels = 4 * inner
    side = 8 if depths is None else 1
    m.weight("patch_embed.proj.weight", width, channels, side, side, inputs=channels * side**2)
    m.weight("patch_embed.proj.bias", width)
    if pre_norm:
        m.layer_norm("norm_pre", width)
    for index in range(2):
        block = f"blocks.{index}."
        m.layer_norm(f"{block}norm1", width)
        m.linear(f"{block}attn.qkv", width, 3 * width, qkv_bias)
        if qk_norm:
            m.layer_norm(f"{block}attn.q_norm", qk_norm)
            m.layer_norm(f"{block}attn.k_norm", qk_norm)
        m.linear(f"{block}attn.proj", width, width)
        m.layer_norm(f"{block}norm2", width)
        m.linear(f"{block}mlp.fc1", width, 48)
        m.linear(f"{block}mlp.fc2", 48, width)
        if scaled:
            m.weight(f"{block}ls1.gamma", width)
            m.weight(f"{block}ls2.gamma", width)
    m.layer_norm("fc_norm" if fc_norm else "norm", width)
    if pool == "map":
        m.weight("attn_pool.latent", 1, 1, width)
        m.linear("attn_pool.q", width, width)
        m.linear("attn_pool.kv", width, 2 * width)
        m.linear("attn_pool.proj", width, width)
        m.layer_norm("attn_pool.norm", width)
        m.linear("attn_pool.mlp.fc1", width, 48)
        m.linear("attn_pool.mlp.fc2", 48, width)
    if classes:
        m.linear("head", width, classes)
    return dict(m)


def timm_folder(folder, tensors, *, architecture="vit_base_patch16_224", size=(24, 16), pool=None, **model_args):
    """A repository as timm's Hub has them: sizes are in the architecture's code, not in config.json."""
    folder.mkdir(exist_ok=True)
    classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": 768,
        **({"global_pool": pool} if pool else {}),
        "model_args": {"num_heads": 4} | model_args,
        "pretrained_cfg": {
            "tag": "test", "input_size": [3, *size], "fixed_input_size": True, "interpolation": "bicubic",
            "crop_pct": 0.9, "mean": MEAN, "std": STD, "num_classes": classes, "classifier": "head",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def images(height: int, width: int) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def logits(model, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        return model.double().eval()(pixel_values).logits


def assert_near(found: Tensor, expected: Tensor, atol: float) -> None:
    assert expected.std() > 0.1 and (expected - expected[:1]).abs().max() > 0.01  # neither flat nor blind to the image
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name


# --- timm ---

TIMM = {  # tensors, pooling, what the code of a model with these tensors says
    "class token": ({}, "token", {}),
    "no qkv bias": (dict(qkv_bias=False), "token", {}),
    "no_embed_class": (dict(position_rows=6), "token", dict(no_embed_class=True)),
    "no positions": (dict(position_rows=0), "token", dict(pos_embed="none")),
    "no head": (dict(classes=0), "token", {}),
    "layer scale": (dict(scaled=True), "token", dict(init_values=0.1)),
    "qk_norm": (dict(qk_norm=8), "token", dict(qk_norm=True)),
    "registers": (dict(registers=4, position_rows=6), "token", dict(reg_tokens=4, no_embed_class=True)),
    "mean": (dict(class_token=False, pool="avg"), "avg", dict(class_token=False, global_pool="avg", fc_norm=False)),
    "fc_norm": (
        dict(class_token=False, pool="avg", fc_norm=True), "avg", dict(class_token=False, global_pool="avg"),
    ),
    "registers, fc_norm": (
        dict(class_token=False, registers=2, position_rows=6, fc_norm=True), "avg",
        dict(class_token=False, global_pool="avg", reg_tokens=2, no_embed_class=True),
    ),
    "map": (dict(class_token=False, pool="map"), "map", dict(class_token=False, global_pool="map")),
}  # fmt: skip


@pytest.mark.parametrize("case", TIMM)
def test_timm_checkpoint_gives_its_logits_and_comes_back_to_the_bit(tmp_path, case):
    options, pool, told = TIMM[case]
    tensors = timm_tensors(**options)
    model, normalisation = load_source(timm_folder(tmp_path / "there", tensors, pool=pool, **told))
    assert normalisation == (MEAN, STD)
    assert model.config.num_labels == options.get("classes", 5)
    back, config = to_timm(model)
    assert_equal_tensors(back, tensors)
    for name, value in told.items():
        assert config["model_args"][name] == value
    expected = timm_logits(tensors, images(24, 16), 4, pool, None)
    assert_near(logits(model, images(24, 16)), expected, atol=1e-9)


@pytest.mark.parametrize("case", ["class token", "no_embed_class", "registers", "fc_norm", "mean", "map"])
def test_timm_file_alone_tells_everything_by_its_shapes(tmp_path, case):
    options, pool, _ = TIMM[case]
    rows = 16 if "position_rows" in options else None
    tensors = timm_tensors(**options | dict(width=128, patches=16, position_rows=rows))  # 2 heads of 64
    save_file(tensors, tmp_path / "file.safetensors")
    model, normalisation = load_source(str(tmp_path / "file.safetensors"))
    assert normalisation == HALF and model.config.image_size == 32
    assert_near(logits(model, images(32, 32)), timm_logits(tensors, images(32, 32), 2, pool, None), atol=1e-9)


def test_config_beside_a_file_is_used_and_half_precision_becomes_fp32(tmp_path):
    tensors = {name: tensor.half() for name, tensor in timm_tensors().items()}
    model, normalisation = load_source(timm_folder(tmp_path, tensors) / "model.safetensors")
    assert normalisation == (MEAN, STD) and model.config.image_size == [24, 16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_near(logits(model, images(24, 16)), timm_logits(tensors, images(24, 16), 4, "token", None), atol=1e-9)


def test_positions_of_registers_are_added_to_them(tmp_path):
    tensors = timm_tensors(registers=2)
    model, _ = load_source(timm_folder(tmp_path, tensors))
    expected = timm_logits(tensors, images(24, 16), 4, "token", None)
    assert_near(logits(model, images(24, 16)), expected, atol=1e-6)  # the sum is rounded to fp32


def test_zero_positions_of_registers_leave_their_bits(tmp_path):
    tensors = timm_tensors(registers=2)
    tensors["pos_embed"][:, 1:3] = 0
    tensors["reg_token"][0, 0, 0] = -0.0
    model, _ = load_source(timm_folder(tmp_path, tensors))
    assert_equal_tensors(to_timm(model)[0], tensors)
    assert torch.signbit(model.vit.embeddings.register_tokens[0, 0, 0])


@pytest.mark.parametrize("depths", [[1, 2], [1], []])
def test_timm_hybrid_gives_its_logits(tmp_path, depths):
    stride = 4 * 2 ** max(len(depths) - 1, 0)
    size = (2 * stride, 3 * stride)
    tensors = timm_tensors(depths=depths)
    folder = timm_folder(tmp_path, tensors, architecture="vit_base_r50_s16_224", size=size)
    model, _ = load_source(folder)
    assert (model.config.stem_depths, model.config.stem_width) == (depths, 64)
    expected = timm_logits(tensors, images(*size), 4, "token", depths)
    assert_near(logits(model, images(*size)), expected, atol=1e-5)  # timm's eps are others than Google's and ours


def test_timm_hybrid_comes_back_to_the_bit(tmp_path):
    tensors = timm_tensors(depths=[2, 2, 2, 2], patches=2)
    folder = timm_folder(tmp_path, tensors, architecture="vit_small_r26_s32_224", size=(64, 32))
    model, _ = load_source(folder)
    save_timm(model, tmp_path / "back", PIXELS)
    assert_equal_tensors(load_file(tmp_path / "back/model.safetensors"), tensors)
    again, _ = load_source(tmp_path / "back")
    assert_equal_tensors(again.state_dict(), model.state_dict())
    assert described(again.config) == described(model.config)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architecture"] == "vit_small_r26_s32_224"
    assert config["pretrained_cfg"]["first_conv"] == "patch_embed.backbone.stem.conv"


@pytest.mark.parametrize(
    "told, expected",
    [
        ({}, ("gelu", 4)),
        (dict(act_layer="gelu_tanh"), ("gelu_pytorch_tanh", 4)),
        (dict(architecture="vit_so400m_patch16_siglip_256"), ("gelu_pytorch_tanh", 4)),
        (dict(num_heads=None, architecture="vit_base_patch16_gap_224"), ("gelu", 16)),
    ],
)
def test_what_only_timms_code_tells(tmp_path, told, expected):
    model, _ = load_source(timm_folder(tmp_path, timm_tensors(), **told))
    assert (model.config.hidden_act, model.config.num_attention_heads) == expected


def test_wide_timm_vits_have_16_heads_and_normed_heads_tell_their_width(tmp_path):
    """vit_huge has heads 80 wide."""
    for width, qk_norm, heads in ((1280, None, 16), (96, 16, 6)):
        tensors = timm_tensors(width=width, patches=4, qk_norm=qk_norm)
        save_file(tensors, tmp_path / "file.safetensors")
        assert load_source(tmp_path / "file.safetensors")[0].config.num_attention_heads == heads


def test_class_names_of_timm(tmp_path):
    folder = timm_folder(tmp_path, timm_tensors())
    assert load_source(folder)[0].config.id2label == {index: f"LABEL_{index}" for index in range(5)}
    config = json.loads((folder / "config.json").read_text())
    for names in (NAMES, {str(index): name for index, name in enumerate(NAMES)}):
        (folder / "config.json").write_text(json.dumps(config | {"label_names": names}))
        found = load_source(folder)[0].config
        assert found.id2label == TINY["id2label"] and found.label2id == TINY["label2id"]


def test_older_timm_config_without_pretrained_cfg(tmp_path):
    folder = timm_folder(tmp_path, timm_tensors(qk_norm=8))
    config = json.loads((folder / "config.json").read_text())
    older = {"architecture": config["architecture"], "labels": NAMES, **config["pretrained_cfg"]}
    (folder / "config.json").write_text(json.dumps(older))
    model, normalisation = load_source(folder)
    assert normalisation == (MEAN, STD) and model.config.id2label == TINY["id2label"]


# --- ours to timm ---

OURS = {
    "cls": {},
    "mean": dict(pooling="mean"),
    "fc_norm": dict(pooling="mean", fc_norm=True),
    "map": dict(pooling="map", num_register_tokens=3),
    "none": dict(position_embedding="none", pooling="mean"),
    "registers": dict(num_register_tokens=3, qk_norm=True, layer_scale_init=0.1, qkv_bias=False),
    "rates": dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, drop_path_rate=0.3),
    "activation": dict(hidden_act="gelu_pytorch_tanh", intermediate_size=50, patch_size=[8, 4]),
    "no head": dict(id2label={}, label2id={}),
}


def tiny_model(**changes) -> ViTForImageClassification:
    """Every parameter random, so that no zero bias or unit norm hides a difference."""
    model = ViTForImageClassification(ViTConfig(**TINY | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def described(config: ViTConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name not in ("dtype", "_name_or_path")}


@pytest.mark.parametrize("case", OURS)
def test_ours_to_timm_and_back_is_the_same_model(tmp_path, case):
    model = tiny_model(**OURS[case])
    save_timm(model, tmp_path / "timm", PIXELS)
    back, normalisation = load_source(tmp_path / "timm")
    assert normalisation == (MEAN, STD)
    assert_equal_tensors(back.state_dict(), model.state_dict())
    assert described(back.config) == described(model.config)


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d", "sincos_2d"])
@pytest.mark.parametrize("pooling, pool", [("cls", "token"), ("mean", "avg"), ("map", "map")])
def test_logits_of_what_is_written_for_timm_are_the_models(tmp_path, kind, pooling, pool):
    model = tiny_model(position_embedding=kind, pooling=pooling, num_register_tokens=2)
    save_timm(model, tmp_path, PIXELS)
    expected = timm_logits(load_file(tmp_path / "model.safetensors"), images(24, 16), 4, pool, None)
    assert_near(logits(model, images(24, 16)), expected, atol=1e-9)


def test_a_plain_vit_is_written_as_a_timm_repository_has_it(tmp_path):
    sizes = dict(image_size=224, patch_size=16, hidden_size=192, num_hidden_layers=12, num_attention_heads=3)
    model = ViTForImageClassification(ViTConfig(**TINY | sizes | dict(intermediate_size=768)))
    save_timm(model, tmp_path, PIXELS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    tensors = load_file(tmp_path / "model.safetensors")
    no_embed_class = {"no_embed_class": True} if tensors["pos_embed"].shape[1] == 196 else {}
    assert tensors["blocks.11.attn.qkv.weight"].shape == (576, 192)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("model_args", {}) == no_embed_class
    assert config == {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "num_features": 192,
        "global_pool": "token",
        "pretrained_cfg": {
            "input_size": [3, 224, 224], "fixed_input_size": True, "num_classes": 5,
            "first_conv": "patch_embed.proj", "classifier": "head", **PIXELS,
        },
        "label_names": NAMES,
    }  # fmt: skip


def test_model_args_are_those_that_differ():
    _, config = to_timm(tiny_model(pooling="mean", num_register_tokens=1, intermediate_size=50))
    assert config["architecture"] == "vit_base_patch16_224"
    ratio = config["model_args"].pop("mlp_ratio")
    assert int(32 * ratio) == 50
    assert config["model_args"] == {
        "embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "img_size": [24, 16], "class_token": False,
        "no_embed_class": True, "reg_tokens": 1, "global_pool": "avg", "fc_norm": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(position_embedding="relative"), "position_embedding=relative"),
        (dict(stem="conv", head_hidden_size=7), "stem=conv, head_hidden_size=7"),
        (dict(hidden_act="mish"), "hidden_act=mish"),
        (dict(pooling="map", qkv_bias=False), "qkv_bias=False"),
        (
            dict(stem="hybrid_resnet", stem_depths=[1], stem_width=32, patch_size=1),
            "stem_depths=[1], stem_width=32",
        ),
    ],
)  # fmt: skip
def test_options_that_timm_has_not_are_named(changes, named):
    with pytest.raises(ValueError) as error:
        to_timm(tiny_model(**changes))
    assert str(error.value) == f"timm's vit has no {named}"


def test_another_model_class_is_no_timm_vit():
    with pytest.raises(ValueError, match="model_type is resnet; vit and vit_hf can be converted"):
        to_timm(
            transformers.ResNetForImageClassification(
                transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
            )
        )


# --- google-research/vision_transformer ---


def google_arrays(
    *, heads=4, cls=True, pre_logits=0, classes=5, numbers="132", depths=None, rows=None
) -> dict[str, np.ndarray]:
    """Two layers of width 32 under Google's names."""
    m, (attention, mlp, second) = Maker(), numbers
    if cls:
        m.weight("cls", 1, 1, 32)
    channels, side = 3, 8
    if depths is not None:
        channels, side = 64, 1
        m.weight("conv_root/kernel", 7, 7, 3, 64)
        m.norm("gn_root/scale", "gn_root/bias", 1, 1, 1, 64)
        for stage, depth in enumerate(depths):
            inner = 64 * 2**stage
            for index in range(depth):
                there = f"block{stage + 1}/unit{index + 1}/"
                if not index:
                    m.weight(f"{there}conv_proj/kernel", 1, 1, channels, 4 * inner)
                    m.norm(f"{there}gn_proj/scale", f"{there}gn_proj/bias", 1, 1, 1, 4 * inner)
                m.weight(f"{there}conv1/kernel", 1, 1, channels, inner)
                m.weight(f"{there}conv2/kernel", 3, 3, inner, inner)
                m.weight(f"{there}conv3/kernel", 1, 1, inner, 4 * inner)
                for number, size in ((1, inner), (2, inner), (3, 4 * inner)):
                    m.norm(f"{there}gn{number}/scale", f"{there}gn{number}/bias", 1, 1, 1, size)
                channels = 4 * inner
    m.weight("embedding/kernel", side, side, channels, 32, inputs=side**2 * channels)
    m.weight("embedding/bias", 32)
    m.weight("Transformer/posembed_input/pos_embedding", 1, rows or 9 + cls, 32)

    def dense(name: str, inputs: int, outputs: int) -> None:
        m.weight(f"{name}/kernel", inputs, outputs, inputs=inputs)
        m.weight(f"{name}/bias", outputs)

    for index in range(2):
        block = f"Transformer/encoderblock_{index}/"
        m.norm(f"{block}LayerNorm_0/scale", f"{block}LayerNorm_0/bias", 32)
        there = f"{block}MultiHeadDotProductAttention_{attention}/"
        for name in ("query", "key", "value"):
            m.weight(f"{there}{name}/kernel", 32, heads, 32 // heads, inputs=32)
            m.weight(f"{there}{name}/bias", heads, 32 // heads)
        m.weight(f"{there}out/kernel", heads, 32 // heads, 32, inputs=32)
        m.weight(f"{there}out/bias", 32)
        m.norm(f"{block}LayerNorm_{second}/scale", f"{block}LayerNorm_{second}/bias", 32)
        dense(f"{block}MlpBlock_{mlp}/Dense_0", 32, 48)
        dense(f"{block}MlpBlock_{mlp}/Dense_1", 48, 32)
    m.norm("Transformer/encoder_norm/scale", "Transformer/encoder_norm/bias", 32)
    if pre_logits:
        dense("pre_logits", 32, pre_logits)
    if classes:
        dense("head", pre_logits or 32, classes)
    return {name: tensor.numpy() for name, tensor in m.items()}


GOOGLE = {
    "ViT of ImageNet-21k": dict(pre_logits=32),
    "pre_logits of another width": dict(pre_logits=20),
    "AugReg": {},
    "since Linen": dict(numbers="001"),
    "gap": dict(cls=False),
    "no head": dict(classes=0),
    "hybrid": dict(depths=[2, 1], pre_logits=32),
    "three stages": dict(depths=[1, 1, 1]),
}


@pytest.mark.parametrize("case", GOOGLE)
def test_google_checkpoint_gives_its_logits(tmp_path, case):
    arrays = google_arrays(**GOOGLE[case])
    np.savez(tmp_path / "file.npz", **arrays)
    model, normalisation = load_source(tmp_path / "file.npz")
    depths = GOOGLE[case].get("depths")
    side = 24 if depths is None else 3 * 4 * 2 ** max(len(depths) - 1, 0)
    assert normalisation == HALF and model.config.image_size == side
    expected = google_logits(arrays, images(side, side), depths, GOOGLE[case].get("numbers", "132"))
    # the hybrid's weights are standardised in fp32
    assert_near(logits(model, images(side, side)), expected, atol=1e-9 if depths is None else 1e-5)


@pytest.mark.parametrize("depths", [[]])
def test_google_hybrid_without_stages_gives_its_logits(tmp_path, depths):
    arrays = google_arrays(depths=depths)
    np.savez(tmp_path / "file.npz", **arrays)
    expected = google_logits(arrays, images(12, 12), depths, "132")
    assert_near(logits(load_source(tmp_path / "file.npz")[0], images(12, 12)), expected, atol=1e-5)


def test_google_checkpoint_with_the_optimizers_state(tmp_path):
    arrays = google_arrays()
    state = {f"opt/target/{name}": array for name, array in arrays.items()} | {"opt/state/step": np.array(7)}
    np.savez(tmp_path / "file.npz", **state)
    model, _ = load_source(tmp_path / "file.npz")
    assert_near(logits(model, images(24, 24)), google_logits(arrays, images(24, 24), None, "132"), atol=1e-9)


# --- a folder of transformers, and what is refused ---


@pytest.mark.parametrize("original_format", [True, False])
def test_stock_folder_gives_the_same_logits(tmp_path, original_format):
    stock = transformers.ViTForImageClassification(tiny_model().config.to_stock()).eval()
    stock.save_pretrained(tmp_path, save_original_format=original_format)
    model, normalisation = load_source(tmp_path)
    assert isinstance(model, ViTForImageClassification) and normalisation is None
    torch.testing.assert_close(logits(model, images(24, 16)), logits(stock, images(24, 16)), rtol=0, atol=1e-12)


def test_folder_of_ours_is_read_too(tmp_path):
    model = tiny_model(pooling="map")
    model.save_pretrained(tmp_path)
    assert_equal_tensors(load_source(tmp_path)[0].state_dict(), model.state_dict())


def refusal(source) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load_source(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def without(tensors: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


REFUSED = {  # tensors, what timm_folder is told, words of the message
    "another family": (
        {}, dict(architecture="swin_tiny_patch4_window7_224"),
        "its architecture is swin_tiny_patch4_window7_224, and vit_... can be converted",
    ),
    "rope": ({}, dict(architecture="vit_medium_patch16_rope_reg1_gap_256"), "rope_reg1_gap_256, and"),
    "post-norm": ({}, dict(architecture="vit_base_patch16_rpn_224"), "vit_base_patch16_rpn_224, and vit_..."),
    "quick gelu": ({}, dict(architecture="vit_base_patch16_clip_quickgelu_224"), "clip_quickgelu_224, and"),
    "norm_layer": ({}, dict(norm_layer="rmsnorm", block_fn="x"), "norm_layer=rmsnorm, block_fn=x"),
    "activation": ({}, dict(act_layer="prelu"), "act_layer is 'prelu', and gelu, "),
    "pooling": ({}, dict(global_pool="avgmax"), "global_pool is 'avgmax', and token, avg, map"),
    "class token and mean": ({}, dict(pool="avg"), "a class token and global_pool 'avg'"),
    "class token and fc_norm": (dict(fc_norm=True), {}, "a class token and global_pool 'avg'"),
    "norm_pre": (dict(pre_norm=True), {}, "unexpected norm_pre.bias, norm_pre.weight"),
    "width": (dict(width=96, patches=4), dict(size=(16, 16), num_heads=None), "width 96"),
    "heads": ({}, dict(num_heads=5), "hidden_size 32 is not divisible by num_attention_heads 5"),
    "image size": ({}, dict(size=(30, 16)), "image_size 30 is not divisible by patch_size 8"),
    "positions": ({}, dict(size=(24, 24)), "shape (1, 7, 32), and 24x24 pixels make a grid of [3, 3]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_vit_of_timm_is_refused_by_name(tmp_path, case):
    options, told, words = REFUSED[case]
    assert words in refusal(timm_folder(tmp_path, timm_tensors(**options), **told))


def test_missing_extra_and_misshaped_tensors_of_timm_are_named(tmp_path):
    tensors = timm_tensors(scaled=True)
    renamed = {name.replace("mlp.fc1", "mlp.w12"): tensor for name, tensor in tensors.items()}  # SwiGLU
    message = refusal(timm_folder(tmp_path, renamed))
    assert "missing blocks.0.mlp.fc1.weight, blocks.0.mlp.fc1.bias, blocks.1.mlp.fc1.weight" in message
    assert "unexpected blocks.0.mlp.w12.bias, blocks.0.mlp.w12.weight" in message
    fused = {f"blocks.{i}.attn.gate.{kind}": torch.zeros(1) for i in range(2) for kind in "abcd"}
    message = refusal(timm_folder(tmp_path, tensors | fused))
    assert message.endswith("unexpected " + ", ".join(sorted(fused)[:5]) + " and 3 more")
    message = refusal(timm_folder(tmp_path, without(tensors, "cls_token", "blocks.1.ls2.gamma")))
    assert "pos_embed" in message
    message = refusal(timm_folder(tmp_path, without(tensors, "blocks.1.ls2.gamma") | {"norm.bias": torch.zeros(3)}))
    assert message.endswith("missing blocks.1.ls2.gamma; misshaped norm.bias (3,) instead of (32,)")
    message = refusal(timm_folder(tmp_path, without(tensors, "patch_embed.proj.weight")))
    assert message.startswith("no tensor patch_embed.proj.weight, so it is no ViT of timm")
    flat = tensors | {"patch_embed.proj.weight": torch.zeros(32, 192)}
    assert "patch_embed.proj.weight has the shape (32, 192)" in refusal(timm_folder(tmp_path, flat))


def test_a_head_that_the_config_promises_must_be_there(tmp_path):
    folder = timm_folder(tmp_path, timm_tensors())
    save_file(timm_tensors(classes=0), folder / "model.safetensors")
    assert refusal(folder).endswith("missing head.weight, head.bias")


def test_label_names_that_do_not_fit_the_head_are_refused(tmp_path):
    folder = timm_folder(tmp_path, timm_tensors())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": NAMES[:3]}))
    assert refusal(folder) == "label_names has 3 names, the head 5 classes"


@pytest.mark.parametrize("rows, words", [(7, "shape (1, 7, 64)"), (0, "pos_embed has the shape ()")])
def test_positions_of_no_square_need_a_config(tmp_path, rows, words):
    save_file(timm_tensors(position_rows=rows, width=64), tmp_path / "file.safetensors")
    assert words in refusal(tmp_path / "file.safetensors")
    assert "input_size" in refusal(tmp_path / "file.safetensors")


def test_wrong_arrays_of_google_are_named(tmp_path):
    def message(arrays: dict) -> str:
        np.savez(tmp_path / "file.npz", **arrays)
        return refusal(tmp_path / "file.npz")

    arrays = google_arrays()
    key = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"
    found = message(without(arrays, key) | {"extra": np.zeros(1), "head/kernel": np.zeros((31, 5))})
    assert found.endswith(f"missing {key}; unexpected extra; misshaped head/kernel (5, 31) instead of (5, 32)")
    assert message({"stem/kernel": np.zeros(1)}).startswith(
        "no tensor embedding/kernel, so it is no ViT of google-res"
    )
    assert "pos_embedding has the shape (1, 8, 32), no square grid" in message(google_arrays(rows=8))
    assert "no floats: cls" in message(arrays | {"cls": np.zeros((1, 1, 32), dtype=np.int64)})
    assert "no whole .npz file" in message(arrays | {"head/bias": np.array([None] * 5)})  # a pickle inside
    (tmp_path / "file.npz").write_bytes(b"PK\x03\x04 cut short")
    assert "no whole .npz file" in refusal(tmp_path / "file.npz")


@pytest.mark.parametrize("name", ["model.pth", "pytorch_model.bin", "model.pt", "last.ckpt"])
def test_pickles_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    assert "pickles, which are not read: convert it to .safetensors first" in refusal(tmp_path / name)


def test_other_files_are_refused(tmp_path):
    assert refusal(tmp_path / "nothing.safetensors") == refusal(tmp_path / "nothing") == "no such file or folder"
    (tmp_path / "notes.txt").touch()
    assert refusal(tmp_path / "notes.txt") == "it is no folder, no .safetensors and no .npz file"
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    assert "cut.safetensors is no whole safetensors file" in refusal(tmp_path / "cut.safetensors")
    for names in (["vit.layernorm.weight"], ["encoder.layer.0.output.dense.bias"]):
        save_file(dict.fromkeys(names, torch.zeros(1)), tmp_path / "stock.safetensors")
        assert refusal(tmp_path / "stock.safetensors").endswith("give its folder")
    folder = timm_folder(tmp_path / "timm", timm_tensors())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == "no model.safetensors in it (pickles such as pytorch_model.bin are not read)"
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(folder)


def test_a_model_without_a_head_is_refused(tmp_path):
    """Its classifier would be random."""
    transformers.ViTModel(tiny_model().config.to_stock()).save_pretrained(tmp_path)
    assert "it has no head (classifier.bias, classifier.weight)" in refusal(tmp_path)


def test_a_folder_with_a_pickle_is_refused(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "no .safetensors file in it (pickles such as pytorch_model.bin are not read)" in refusal(tmp_path)


def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path):
    save_timm(tiny_model(), tmp_path, PIXELS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["depth"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "its config.json says depth 7, its tensors" in refusal(tmp_path)


def test_one_array_is_no_npz_file(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert "array.npz is no whole .npz file of plain arrays" in refusal(tmp_path / "array.npz")


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("", "architecture", 5), ("", "model_args", [1]), ("", "pretrained_cfg", "x"), ("", "label_names", 3),
        ("model_args", "act_layer", ["gelu"]), ("model_args", "img_size", "a"), ("pretrained_cfg", "input_size", [3]),
        ("pretrained_cfg", "mean", "x"), ("pretrained_cfg", "mean", [0.5]), ("pretrained_cfg", "std", [0, 0, 0]),
    ],
)  # fmt: skip
def test_a_malformed_timm_config_is_one_line(part, name, value, tmp_path):
    save_timm(tiny_model(), tmp_path, PIXELS)
    config = json.loads((tmp_path / "config.json").read_text())
    (config.setdefault(part, {}) if part else config)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert name in refusal(tmp_path)
