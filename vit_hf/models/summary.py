"""What a configuration costs and what becomes of an image in it, without weights: a model on no device is asked."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .configuration_vit import ViTConfig, pair
from .presets import build, make_config

# the modules whose outputs `stages` shows
STAGE = re.compile(
    r"vit\.embeddings(\.patch_embeddings(\.convolutions|\.backbone(\.conv|\.stages\.\d+)?)?)?|vit\.layers\.\d+"
    r"|vit\.layernorm|vit\.attention_pool|(resnet|bit)\.(embedder|encoder\.stages\.\d+|pooler)|pre_logits|classifier"
)


class Summary(NamedTuple):
    """The size of a model.

    num_parameters: trained numbers. num_tokens: length of the encoder's sequence, None without one.
    forward_flops: operations of one image's forward pass, two for each multiply-add; norms, activations and softmax
    are not counted, and the last layer is counted whole, as is usual, though a model that reads its class token alone
    does without a part of it. A training step takes about three times as many.
    state_bytes: fp32 weights, gradients and both moments of AdamW. activation_bytes: what the forward pass of one image
    keeps for the backward pass under bf16 mixed precision, without gradient checkpointing.
    """

    num_parameters: int
    num_tokens: int | None
    forward_flops: int
    state_bytes: int
    activation_bytes: int


def summarise(config: transformers.PreTrainedConfig) -> Summary:
    """Counts parameters, tokens, operations and memory of the model that `config` describes."""
    parameters, flops, kept = _of_all_layers(config, _measure)
    is_vit = isinstance(config, ViTConfig)
    tokens = config.num_prefix_tokens + config.grid_size[0] * config.grid_size[1] if is_vit else None
    return Summary(parameters, tokens, flops, 16 * parameters, kept)


def training_flops(config: transformers.PreTrainedConfig) -> float:
    """Operations of one image's forward and backward pass: 3 x those of the forward pass; what gradient checkpointing
    computes again is not counted. Source: arXiv 2204.02311, appendix B."""
    return 3.0 * forward_flops(config)


def forward_flops(config: transformers.PreTrainedConfig) -> int:
    """The same number of `summarise` alone, in a third of the time."""
    return _of_all_layers(config, lambda part: (_count_flops(_without_weights(part)),))[0]


def _of_all_layers(
    config: transformers.PreTrainedConfig, measure: Callable[[transformers.PreTrainedConfig], tuple[int, ...]]
) -> tuple[int, ...]:
    """What a measure of a configuration gives. All layers of a ViT cost the same: two models of one and two layers say
    it many times faster than the whole one."""
    if not isinstance(config, ViTConfig):
        return measure(config)
    one, two = (measure(make_config(ViTConfig, {**config.to_dict(), "num_hidden_layers": n})) for n in (1, 2))
    return tuple(a + (config.num_hidden_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))


def stages(config: transformers.PreTrainedConfig) -> list[tuple[str, tuple[int, ...]]]:
    """(part of the model, shape of what it hands on) for one image, in order."""
    seen: list[tuple[str, tuple[int, ...]]] = [("pixel_values", (1, config.num_channels, *pair(config.image_size)))]
    model = _without_weights(config).eval()

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            seen.append((name, tuple(first.shape)))

        return hook

    for name, module in model.named_modules():
        if STAGE.fullmatch(name) and not isinstance(module, nn.Identity):
            module.register_forward_hook(note(name))
    _forward(model, 1, output_hidden_states=True)
    return seen


def _measure(config: transformers.PreTrainedConfig) -> tuple[int, int, int]:
    """Parameters; operations and kept bytes of one image."""
    model = _without_weights(config)
    # Two batches, because what does not grow with them (16-bit copies of the weights) is no activation; not of one
    # image, which BatchNorm refuses where the feature map is a single point.
    (_, two), (_, three) = (_forward(model, batch_size) for batch_size in (2, 3))
    return sum(parameter.numel() for parameter in model.parameters()), _count_flops(model), three - two


def _count_flops(model: transformers.PreTrainedModel) -> int:
    """Of one image, for every token of every layer."""
    return _forward(model, 2, output_hidden_states=True)[0] // 2


def _without_weights(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        model = build(config)
    with FakeTensorMode(allow_non_fake_inputs=True):  # from here on the tensors say that they are on a CPU
        return model.to_empty(device="cpu").train()


def _forward(model: transformers.PreTrainedModel, batch_size: int, **options: bool) -> tuple[int, int]:
    """Operations of a forward pass of the batch, and the bytes that it keeps for the backward pass."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    mode = next(model.parameters()).fake_mode
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa}
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu)
    with mode, counter, torch.autocast("cpu", torch.bfloat16):
        pixel_values = torch.empty(batch_size, model.config.num_channels, *pair(model.config.image_size))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(pixel_values, **options)
    return counter.get_total_flops(), sum(kept.values())


def _sdpa(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    """The counter knows the attention kernels of GPUs alone."""
    return sdpa_flop_count(query_shape, key_shape, value_shape)
