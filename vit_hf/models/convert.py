# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of timm's `vit_*` and of google-research/vision_transformer as models of ours, and ours as timm's.

N patches, k class tokens (0 or 1), D hidden size. This module must not know training.
"""

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .configuration_vit import hybrid_stride, pair
from .layouts import (
    count,
    fill_model,
    find_grid,
    label_fields,
    listed,
    make_layout,
    need_tensors,
    side_of,
    size_of,
)
from .modeling_vit import ViTForImageClassification
from .transfer import load_pretrained

PICKLES = (".pth", ".bin", ".pt", ".ckpt")
POSITIONS = "vit.embeddings.position_embeddings"
POOLINGS = {"token": "cls", "avg": "mean", "map": "map"}
ACTIVATIONS = {name: name for name in ("gelu", "quick_gelu", "relu", "silu")} | {"gelu_tanh": "gelu_pytorch_tanh"}

# Patterns that make timm's and Google's names of ours, replaced one after the other.
TIMM_NAMES = (
    (r"^vit\.(embeddings\.)?", ""), ("^position_embeddings", "pos_embed"), ("^register_tokens", "reg_token"),
    (r"^patch_embeddings\.projection", "patch_embed.proj"), ("^patch_embeddings", "patch_embed"),
    (r"\.backbone\.(conv|norm)", r".backbone.stem.\1"), (r"(\.stages\.\d+)", r"\1.blocks"),
    (r"(conv|norm)_shortcut", r"downsample.\1"), ("^layers", "blocks"), ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"), ("layernorm", "norm"), ("layer_scale", "ls"), ("^attention_pool", "attn_pool"),
    ("probe", "latent"), (r"pool\.attention\.q_proj", "pool.q"), (r"pool\.attention\.[kv]_proj", "pool.kv"),
    (r"pool\.attention\.o_proj", "pool.proj"), ("attention.[qkv]_proj", "attn.qkv"), (r"attention\.o_", "attn."),
    (r"attention\.", "attn."), ("^classifier", "head"),
)  # fmt: skip
GOOGLE_NAMES = (
    (r"^vit\.(embeddings\.)?(patch_embeddings\.)?", ""), ("cls_token", "cls"), ("^projection", "embedding"),
    ("^position_embeddings", "Transformer/posembed_input/pos_embedding"), (r"\.", "/"),
    ("^backbone/(conv|norm)/", r"\1_root/"), ("_shortcut", "_proj"), ("(^|/)norm(?=[123_])", r"\1gn"),
    (r"^backbone/stages/(\d+)/(\d+)", lambda found: f"block{int(found[1]) + 1}/unit{int(found[2]) + 1}"),
    ("^layernorm", "Transformer/encoder_norm"), ("^layers/", "Transformer/encoderblock_"),
    ("layernorm_before", "LayerNorm_0"), ("layernorm_after", "LayerNorm_2"),
    ("attention/", "MultiHeadDotProductAttention_1/"), ("/q_proj", "/query"), ("/k_proj", "/key"),
    ("/v_proj", "/value"), ("/o_proj", "/out"), ("mlp/fc1", "MlpBlock_3/Dense_0"), ("mlp/fc2", "MlpBlock_3/Dense_1"),
    ("^classifier", "head"), ("^pre_logits/0", "pre_logits"), (r"(Norm_\d|norm|gn\w+)/weight$", r"\1/scale"),
    ("weight$", "kernel"),
)  # fmt: skip
# before Linen, flax counted all modules together; since then, those of each class
LINEN_NAMES = (("Attention_1", "Attention_0"), ("LayerNorm_2", "LayerNorm_1"), ("MlpBlock_3", "MlpBlock_0"))

# What timm's code has and neither its config.json nor its tensors tell (timm/models/vision_transformer.py):
WIDTHS_WITH_16_HEADS = (1152, 1280, 1408, 1536, 1664)  # so400m, huge, giant, giantopt, gigantic
OTHER_BLOCKS = re.compile("_(rope|rpn|quickgelu)(_|$)")
TANH_GELU = re.compile("vit_(base_patch32_siglip|large_patch16_siglip.*_512|so400m_(patch16|.*tips)|giantopt)")
UNSEEN = "norm_layer block_fn attn_layer mlp_layer embed_layer embed_norm_layer pool_include_prefix".split()
# architectures to save as: (embed_dim, depth, num_heads, patch_size, blocks of the hybrid's stages)
ARCHITECTURES = {
    "vit_base_patch16_224": (768, 12, 12, 16, None), "vit_tiny_patch16_224": (192, 12, 3, 16, None),
    "vit_small_patch16_224": (384, 12, 6, 16, None), "vit_large_patch16_224": (1024, 24, 16, 16, None),
    "vit_tiny_r_s16_p8_224": (192, 12, 3, 8, []), "vit_small_r26_s32_224": (384, 12, 6, 1, [2, 2, 2, 2]),
    "vit_base_r50_s16_224": (768, 12, 12, 1, [3, 4, 9]), "vit_large_r50_s32_224": (1024, 24, 16, 1, [3, 4, 6, 3]),
}  # fmt: skip


def load_source(source: str | Path) -> tuple[ViTForImageClassification, tuple[list[float], list[float]] | None]:
    """A model in fp32 and the (mean, std) that its images are normalised with. The source is a folder with timm's
    config.json and model.safetensors, a .safetensors file with timm's names (what no timm config.json beside it tells
    is read off the shapes), a .npz file of google-research/vision_transformer, or any other folder, as
    `load_pretrained` reads it; its (mean, std) is None.

    Raises:
        ValueError: a file of another kind, another architecture, or tensors that are missing, extra or misshaped.
        OSError: no such file or folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        config = _timm_config(path)
        if not config:
            if path.joinpath("config.json").is_file() and not any(path.glob("*.safetensors")):
                raise OSError("no .safetensors file in it (pickles such as pytorch_model.bin are not read)")
            return load_pretrained(str(path), need_head=True), None
        if not (path / "model.safetensors").is_file():
            raise OSError("no model.safetensors in it (pickles such as pytorch_model.bin are not read)")
        return _from_timm(_read_safetensors(path / "model.safetensors"), config)
    if path.suffix in PICKLES:
        raise ValueError(f"{path.suffix} files are pickles, which are not read: convert it to .safetensors first")
    if not path.is_file():
        raise OSError("no such file or folder")
    if path.suffix == ".npz":
        return _from_google(_read_npz(path))
    if path.suffix != ".safetensors":
        raise ValueError("it is no folder, no .safetensors and no .npz file")
    tensors = _read_safetensors(path)
    if any(name.startswith(("vit.", "encoder.layer")) for name in tensors):
        raise ValueError("its tensor names are those of a transformers ViT, which has a config.json: give its folder")
    return _from_timm(tensors, _timm_config(path.parent))


def _timm_config(folder: Path) -> dict[str, Any]:
    """timm's config.json, {} where there is none. Raises ValueError for a file that is not JSON."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return config if isinstance(config, dict) and {"architecture", "pretrained_cfg"} & set(config) else {}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no whole safetensors file: {error}") from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is one array")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is no whole .npz file of plain arrays: {error}") from None
    if any(name.startswith("opt/target/") for name in arrays):  # with the optimizer's state
        arrays = {name[11:]: array for name, array in arrays.items() if name.startswith("opt/target/")}
    if others := [name for name, array in arrays.items() if array.dtype.kind != "f"]:
        raise ValueError(f"{path.name} has arrays that are no floats: {listed(others)}")
    return arrays


def _from_timm(tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[ViTForImageClassification, tuple]:
    """Source: timm/models/vision_transformer.py and vision_transformer_hybrid.py."""
    _check_timm(config)
    pretrained, arguments = config.get("pretrained_cfg") or config, config.get("model_args") or {}
    architecture = config.get("architecture") or pretrained.get("architecture") or ""
    activation = _timm_activation(architecture, arguments)
    need_tensors(tensors, "timm", {"patch_embed.proj.weight": 4})
    width, channels, *patch_size = tensors["patch_embed.proj.weight"].shape
    heads = _timm_heads(tensors, width, architecture, arguments)
    for name, found in (("embed_dim", width), ("depth", count(tensors, r"blocks\.(\d+)\."))):
        if arguments.get(name) not in (None, found):
            raise ValueError(f"its config.json says {name} {arguments[name]}, its tensors {found}")
    pool = arguments.get("global_pool") or config.get("global_pool") or pretrained.get("global_pool")
    pooling, stem, registers = _timm_pooling(tensors, pool), _timm_stem(tensors), size_of(tensors, "reg_token", 1)
    stride = hybrid_stride(stem["stem_depths"]) if stem else 1
    token, prefix = [side * stride for side in patch_size], ("cls_token" in tensors) + registers
    size = list(pair(arguments.get("img_size") or (pretrained.get("input_size") or [0, 0, 0])[1:]))
    grid = find_grid("pos_embed", tensors.get("pos_embed"), prefix, token, size)
    tensors = _join_positions(tensors, grid[0] * grid[1])
    num_labels = size_of(tensors, "head.weight", 0) or config.get("num_classes", pretrained.get("num_classes")) or 0
    names = config.get("label_names") or pretrained.get("label_names") or pretrained.get("labels")
    fields = {
        "hidden_size": width, "num_hidden_layers": count(tensors, r"blocks\.(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": size_of(tensors, "blocks.0.mlp.fc1.weight", 0) or 4 * width,
        "hidden_act": activation,
        "image_size": side_of(size if any(size) else [grid[0] * token[0], grid[1] * token[1]]),
        "patch_size": side_of(patch_size), "num_channels": size_of(tensors, _timm_root(stem), 1) if stem else channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors, "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "hidden_dropout_prob": float(arguments.get("proj_drop_rate") or 0),
        "attention_probs_dropout_prob": float(arguments.get("attn_drop_rate") or 0),
        "drop_path_rate": float(arguments.get("drop_path_rate") or 0),
        "position_embedding": "learned_1d" if "pos_embed" in tensors else "none",
        "pooling": pooling, "fc_norm": pooling == "mean" and "fc_norm.weight" in tensors,
        "layer_scale_init": float(arguments.get("init_values") or 1e-5) if "blocks.0.ls1.gamma" in tensors else None,
        "num_register_tokens": registers, **stem, **label_fields(num_labels, names),
    }  # fmt: skip
    mean, std = (list(pretrained.get(name) or [0.5] * fields["num_channels"]) for name in ("mean", "std"))
    if len(mean) != fields["num_channels"] or len(std) != fields["num_channels"] or min(std) <= 0:
        raise ValueError(f"its mean {mean} and std {std} are not those of {fields['num_channels']} channels")
    return fill_model(fields, tensors, _timm_patterns(fields)), (mean, std)


def _check_timm(config: dict[str, Any]) -> None:
    """Raises ValueError where a value that is read is of another kind than timm writes."""
    number, numbers = (int, float), lambda value: isinstance(value, list) and all(isinstance(v, number) for v in value)
    kinds = {
        "architecture": str, "global_pool": str, "act_layer": str, "num_classes": int, "num_heads": int,
        "pretrained_cfg": dict, "model_args": dict, "proj_drop_rate": number, "attn_drop_rate": number,
        "drop_path_rate": number, "init_values": number, "label_names": (list, dict), "labels": (list, dict),
    }  # fmt: skip
    lengths = {"input_size": 3, "img_size": 2, "mean": None, "std": None}
    parts = [
        config,
        *(part for name in ("pretrained_cfg", "model_args") if isinstance(part := config.get(name), dict)),
    ]
    for part in parts:
        for name, value in part.items():
            wrong = name in kinds and not isinstance(value, kinds[name])
            if name in lengths and not (name == "img_size" and isinstance(value, int)):
                wrong = not numbers(value) or lengths[name] not in (None, len(value))
            if value is not None and wrong:
                raise ValueError(f"its config.json has {name}: {value!r}, which timm does not write")


def _timm_activation(architecture: str, arguments: dict[str, Any]) -> str:
    """What ViTConfig calls the activation. Raises ValueError for a model that is none of timm's plain ViTs."""
    if architecture and (not architecture.startswith("vit_") or OTHER_BLOCKS.search(architecture)):
        raise ValueError(f"its architecture is {architecture}, and vit_... can be converted (no rope, rpn, quickgelu)")
    if unseen := [f"{name}={arguments[name]}" for name in UNSEEN if arguments.get(name)]:
        raise ValueError(f"its model_args have {', '.join(unseen)}, which ViTConfig has not")
    activation = arguments.get("act_layer") or ("gelu_tanh" if TANH_GELU.match(architecture) else "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"its act_layer is {activation!r}, and {', '.join(ACTIVATIONS)} can be converted")
    return ACTIVATIONS[activation]


def _timm_heads(tensors: dict[str, Tensor], width: int, architecture: str, arguments: dict[str, Any]) -> int:
    """Heads as told, as the norms of queries show, or as timm's code has them. Raises ValueError where nothing tells."""
    if head_width := size_of(tensors, "blocks.0.attn.q_norm.weight", 0):
        return arguments.get("num_heads") or width // head_width
    if heads := arguments.get("num_heads"):
        return heads
    if width in WIDTHS_WITH_16_HEADS or architecture == "vit_base_patch16_gap_224":
        return 16
    if width % 64:
        raise ValueError(f"its width {width} is no multiple of 64: model_args in a config.json must tell num_heads")
    return width // 64


def _timm_pooling(tensors: dict[str, Tensor], pool: str | None) -> str:
    """What ViTConfig calls it. Raises ValueError for a pooling that it has not."""
    by_tensors = {"attn_pool.latent": "map", "fc_norm.weight": "avg", "cls_token": "token"}
    pool = pool or next((pool for name, pool in by_tensors.items() if name in tensors), "avg")
    if pool not in POOLINGS:
        raise ValueError(f"its global_pool is {pool!r}, and {', '.join(POOLINGS)} can be converted")
    if "cls_token" in tensors and pool != "token":
        raise ValueError(f"it has a class token and global_pool {pool!r}: here a class token goes with 'token' alone")
    return POOLINGS[pool]


def _timm_stem(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration's fields of a hybrid's ResNet; none for a ViT."""
    stages = count(tensors, r"patch_embed\.backbone\.stages\.(\d+)\.")
    depths = [count(tensors, rf"patch_embed\.backbone\.stages\.{i}\.blocks\.(\d+)\.") for i in range(stages)]
    stem = {"stem": "hybrid_resnet", "stem_depths": depths}
    channels = size_of(tensors, _timm_root(stem), 0)
    return stem | {"stem_width": channels} if channels else {}


def _timm_root(fields: dict[str, Any]) -> str:
    return f"patch_embed.backbone.{'stem.' if fields['stem_depths'] else ''}conv.weight"


def _timm_patterns(fields: dict[str, Any]) -> tuple:
    changes = () if fields.get("stem_depths") else ((r"backbone\.stem", "backbone"),)
    return TIMM_NAMES + changes + ((("^norm", "fc_norm"),) if fields["fc_norm"] else ())


def _join_positions(tensors: dict[str, Tensor], num_patches: int) -> dict[str, Tensor]:
    """The same with positions for class token and patches alone, pos_embed (1, L, D) -> (1, k + N, D): zeros for a
    class token that has none, and what registers have is added to them."""
    if "pos_embed" not in tensors:
        return tensors
    k, table, tensors = int("cls_token" in tensors), tensors["pos_embed"], dict(tensors)
    prefix, patches = table[:, : table.shape[1] - num_patches], table[:, table.shape[1] - num_patches :]
    first = prefix[:, :k] if prefix.shape[1] else torch.zeros_like(patches[:, :k])
    if prefix[:, k:].any() and tensors["reg_token"].shape == prefix[:, k:].shape:
        tensors["reg_token"] = tensors["reg_token"] + prefix[:, k:]
    tensors["pos_embed"] = torch.cat((first, patches), dim=1)
    return tensors


def to_timm(model: ViTForImageClassification) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under timm's names, and what timm's config.json says of them.

    Positions of `learned_2d` and `sincos_2d` become the table that they make. A hybrid has the same tensors in timm,
    and nearly the same logits: timm standardises weights by sqrt(variance + 1e-8) and has an eps of 1e-5 in GroupNorm,
    where Google and this package have deviation + 1e-5 and 1e-6. timm's LayerNorm has an eps of 1e-6, whatever the
    model's own is.

    Raises:
        ValueError: options that timm's vit has not.
    """
    config = model.config
    if not isinstance(model, ViTForImageClassification):
        raise ValueError(f"its model_type is {config.model_type}; vit and vit_hf can be converted")
    lacking = {
        "position_embedding": config.position_embedding == "relative", "stem": config.stem == "conv",
        "stem_depths": all(facts[4] != config.stem_depths for facts in ARCHITECTURES.values()),
        "stem_width": config.stem_width != 64, "head_hidden_size": config.head_hidden_size is not None,
        "hidden_act": config.hidden_act not in ACTIVATIONS.values(),
        "qkv_bias": config.pooling == "map" and not config.qkv_bias,  # its pooling always has them
    }  # fmt: skip
    if names := [f"{name}={getattr(config, name)}" for name, lacks in lacking.items() if lacks]:
        raise ValueError(f"timm's vit has no {', '.join(names)}")
    ours = {name: value.detach().cpu() for name, value in model.state_dict().items() if "_position_" not in name}
    no_embed_class, table = False, model.vit.embeddings.positions(config.grid_size)
    if table is not None:
        num_patches = math.prod(config.grid_size)
        prefix, patches = table.detach().cpu().split((table.shape[1] - num_patches, num_patches), dim=1)
        no_embed_class = config.num_prefix_tokens > 0 and not prefix.any().item()
        registers = patches.new_zeros(1, config.num_register_tokens, config.hidden_size)
        ours[POSITIONS] = patches if no_embed_class else torch.cat((prefix, registers, patches), dim=1)
    layout = make_layout(ours, _timm_patterns(config.to_dict()))
    tensors = {there: torch.cat([ours[name] for name in here]) for there, here in layout.items()}
    return tensors, _timm_json(config, no_embed_class)


def _timm_json(config: Any, no_embed_class: bool) -> dict[str, Any]:
    """config.json: the nearest of ARCHITECTURES, and model_args for what is different from it."""
    names, width, depths = ("embed_dim", "depth", "num_heads", "patch_size"), config.hidden_size, config.stem_depths
    facts = [width, config.num_hidden_layers, config.num_attention_heads, side_of(pair(config.patch_size))]
    candidates = [name for name, there in ARCHITECTURES.items() if there[4] == depths]
    architecture = max(candidates, key=lambda name: sum(a == b for a, b in zip(facts, ARCHITECTURES[name])))
    pool = next(there for there, here in POOLINGS.items() if here == config.pooling)
    ratio = config.intermediate_size / width
    if int(width * ratio) != config.intermediate_size:  # timm takes the whole part
        ratio = (config.intermediate_size + 0.5) / width
    arguments = dict(zip(names, zip(facts, ARCHITECTURES[architecture]))) | {  # (here, where timm is not told)
        "img_size": (side_of(pair(config.image_size)), 224), "in_chans": (config.num_channels, 3),
        "mlp_ratio": (ratio, 4.0), "qkv_bias": (config.qkv_bias, True), "qk_norm": (config.qk_norm, False),
        "init_values": (config.layer_scale_init, None), "class_token": (config.has_class_token, True),
        "pos_embed": ("none" if config.position_embedding == "none" else "learn", "learn"),
        "no_embed_class": (no_embed_class, False), "reg_tokens": (config.num_register_tokens, 0),
        "global_pool": (pool, "token"), "fc_norm": (config.fc_norm, pool == "avg"),
        "act_layer": (next(there for there, here in ACTIVATIONS.items() if here == config.hidden_act), "gelu"),
        "pos_drop_rate": (config.hidden_dropout_prob, 0), "proj_drop_rate": (config.hidden_dropout_prob, 0),
        "attn_drop_rate": (config.attention_probs_dropout_prob, 0), "drop_path_rate": (config.drop_path_rate, 0),
    }  # fmt: skip
    model_args = {name: here for name, (here, there) in arguments.items() if here != there}
    root = "patch_embed.proj" if depths is None else _timm_root({"stem_depths": depths}).removesuffix(".weight")
    half = [0.5] * config.num_channels
    described = {"architecture": architecture, "num_classes": config.num_labels, "num_features": width}
    described |= {"global_pool": pool} | ({"model_args": model_args} if model_args else {})
    described["pretrained_cfg"] = {
        "input_size": [config.num_channels, *pair(config.image_size)], "fixed_input_size": True,
        "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "mean": half, "std": half,
        "num_classes": config.num_labels, "first_conv": root, "classifier": "head",
    }  # fmt: skip
    return described


def save_timm(model: ViTForImageClassification, directory: str | Path, preprocessing: dict[str, Any]) -> None:
    """Writes config.json and model.safetensors as a timm repository on the Hub has them. Raises ValueError as `to_timm`
    does.

    Args:
        preprocessing: interpolation, crop_pct, crop_mode, mean and std, as timm's `pretrained_cfg` names them.
    """
    tensors, config = to_timm(model)
    config["pretrained_cfg"] |= preprocessing
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if names and names != [f"LABEL_{index}" for index in range(len(names))]:
        config["label_names"] = names
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _from_google(arrays: dict[str, np.ndarray]) -> tuple[ViTForImageClassification, tuple]:
    """A file without `cls` is of the `gap` kind, which takes the mean of the tokens. GELU is exact, as timm and
    transformers have it for these files; flax's own is the tanh approximation unless told otherwise.

    Source: google-research/vision_transformer, vit_jax/models_vit.py, models_resnet.py and checkpoint.py.
    """
    older = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel" in arrays
    patterns = GOOGLE_NAMES if older else GOOGLE_NAMES + LINEN_NAMES
    ours = (f"vit.layers.0.{part}.weight" for part in ("attention.q_proj", "mlp.fc1"))
    query, mlp, table = make_layout((*ours, POSITIONS), patterns)
    need_tensors(arrays, "google-research/vision_transformer", {"embedding/kernel": 4, query: 3, mlp: 2, table: 3})
    *patch_size, channels, width = arrays["embedding/kernel"].shape
    depths = [count(arrays, rf"block{i + 1}/unit(\d+)/") for i in range(count(arrays, r"block(\d+)/"))]
    stem = {"stem": "hybrid_resnet", "stem_depths": depths, "stem_width": size_of(arrays, "conv_root/kernel", 3)}
    stem = stem if stem["stem_width"] else {}
    token = [side * (hybrid_stride(stem["stem_depths"]) if stem else 1) for side in patch_size]
    grid = find_grid(table, arrays[table], int("cls" in arrays), token, [0, 0])
    fields = {
        "hidden_size": width, "num_hidden_layers": count(arrays, r"Transformer/encoderblock_(\d+)/"),
        "num_attention_heads": arrays[query].shape[1], "intermediate_size": arrays[mlp].shape[1], "hidden_act": "gelu",
        "image_size": side_of([grid[0] * token[0], grid[1] * token[1]]), "patch_size": side_of(patch_size),
        "num_channels": size_of(arrays, "conv_root/kernel", 2) if stem else channels,
        "pooling": "cls" if "cls" in arrays else "mean",
        "head_hidden_size": size_of(arrays, "pre_logits/kernel", 1) or None,
        "num_labels": size_of(arrays, "head/kernel", 1), **stem,
    }  # fmt: skip
    tensors = {name: _google_tensor(name, array) for name, array in arrays.items()}
    return fill_model(fields, tensors, patterns), tuple([0.5] * fields["num_channels"] for _ in range(2))


def _google_tensor(name: str, array: np.ndarray) -> Tensor:
    """As torch has it: kernels (inputs, outputs) and (H, W, inputs, outputs) with outputs first, heads joined."""
    tensor = torch.from_numpy(array.astype(np.float32))
    if name.endswith(("/bias", "/scale")):  # (heads, D/heads) of attention, (1, 1, 1, C) of older GroupNorms
        return tensor.flatten()
    if not name.endswith("/kernel") or tensor.ndim < 2:
        return tensor
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return (tensor.flatten(end_dim=-2) if name.endswith("/out/kernel") else tensor.flatten(1)).T
