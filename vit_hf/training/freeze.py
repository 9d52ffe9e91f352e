"""Which weights stay as they are, chosen by name."""

import types

from torch import nn

from vit_hf.errors import UserError


def freeze_parameters(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Leaves parameters out of the training. A BatchNorm whose weights are frozen keeps its statistics too.

    Args:
        patterns: parts of names between dots, such as `embeddings` or `layers.3`; `encoder` is the base model, that is all
            but the classification head (linear probing).

    Returns:
        The frozen parameters' names.

    Raises:
        UserError: a pattern that fits nothing, or patterns that leave nothing to train.
    """
    parameters = dict(model.named_parameters())
    frozen = {name for pattern in patterns for name in _fitting(model, pattern)}
    if patterns and not frozen:
        raise _unknown(model, ",".join(patterns))
    if frozen and len(frozen) == len(parameters):
        raise UserError(f"--freeze: {','.join(patterns)} leaves nothing to train; allowed are {_parts(model)}")
    for name in frozen:
        parameters[name].requires_grad_(False)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()
            module.train = types.MethodType(lambda self, mode=True: self, module)
    return [name for name in parameters if name in frozen]


def _fitting(model: nn.Module, pattern: str) -> list[str]:
    """The parameters of what bears a pattern in its name; none of a module without weights, as an activation is."""
    modules, parameters = (dict(named()).keys() for named in (model.named_modules, model.named_parameters))
    if pattern == "encoder":
        found = [name for name in parameters if name.startswith(f"{model.base_model_prefix}.")]
    else:
        found = [name for name in (*modules, *parameters) if name and f".{pattern}." in f".{name}."]
    if not found:
        raise _unknown(model, pattern)
    return [name for name in found if name in parameters]


def _unknown(model: nn.Module, pattern: str) -> UserError:
    return UserError(f"--freeze: {pattern!r} fits no parameter of this model; allowed are {_parts(model)}")


def _parts(model: nn.Module) -> str:
    """What there is to freeze: "encoder, embeddings, layers.0-11, layernorm, classifier"."""
    numbers: dict[str, list[int]] = {}
    for name, _ in model.named_parameters():
        words = name.removeprefix(f"{model.base_model_prefix}.").split(".")
        number = next((position for position, word in enumerate(words) if word.isdecimal()), None)
        part = words[0] if number is None else ".".join(words[:number])
        numbers.setdefault(part, []).extend([] if number is None else [int(words[number])])
    ranges = (f"{part}.{min(found)}-{max(found)}" if found else part for part, found in numbers.items())
    return ", ".join(["encoder", *ranges])
