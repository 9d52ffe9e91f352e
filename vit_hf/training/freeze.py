"""Which weights stay as they are, chosen by name."""

import re
import types

from torch import nn

from vit_hf.errors import UserError

RANGE = re.compile(r"(\d+)-(\d+)")


def freeze_parameters(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Leaves parameters out of the training. A BatchNorm whose weights are frozen keeps its statistics too.

    Args:
        patterns: parts of names between dots, such as `embeddings`, `layers.3` or `layers.0-5` (5 included); `encoder` is
            the base model, that is all but the classification head (linear probing).

    Returns:
        The frozen parameters' names.

    Raises:
        UserError: a pattern that fits nothing, or patterns that leave nothing to train.
    """
    parameters = dict(model.named_parameters())
    frozen = {name for pattern in patterns for name in _fitting(model, list(parameters), pattern)}
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


def _fitting(model: nn.Module, names: list[str], pattern: str) -> list[str]:
    """The names that hold a pattern, for each number of its ranges."""
    if pattern == "encoder":
        fitting = [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
        if not fitting:
            raise _unknown(model, pattern)
        return fitting
    words = pattern.split(".")
    single = [pattern]
    for position, word in enumerate(words):
        if match := RANGE.fullmatch(word):
            numbers = range(int(match[1]), int(match[2]) + 1)
            single = [".".join([*words[:position], str(number), *words[position + 1 :]]) for number in numbers]
    fitting = [[name for name in names if f".{one}." in f".{name}."] for one in single]
    if not fitting or not fitting[0] or not fitting[-1]:  # between them there may be modules without weights
        raise _unknown(model, pattern)
    return [name for some in fitting for name in some]


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
