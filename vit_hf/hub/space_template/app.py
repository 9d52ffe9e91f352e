"""Which class is it, and where does the model look? Upload a picture. Made by `vit-hf space`."""

from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image
from transformers import pipeline

MODEL, REVISION, REMOTE_CODE, NAME = "model", None, False, "model"
HERE = Path(__file__).resolve().parent
SOURCE = str(HERE / MODEL) if (HERE / MODEL).is_dir() else MODEL  # a folder that lies beside this file, or a Hub id

torch.set_num_threads(2)
loaded = pipeline(
    "image-classification", SOURCE, revision=REVISION, trust_remote_code=REMOTE_CODE,
    model_kwargs={"attn_implementation": "eager"},  # the form that tells its weights
)  # fmt: skip
model, processor = loaded.model.eval(), loaded.image_processor
LOOKS = model.config.model_type in ("vit", "vit_hf", "deit")  # a convolutional network has no attention


@torch.no_grad()
def rollout(attentions, tokens) -> np.ndarray:
    """Share of each patch in what the model reads, (h, w): the product over layers of half attention, half identity
    (Abnar and Zuidema, arXiv 2005.00928).

    Args:
        attentions: (1, heads, N, N) of each layer, class and register tokens first.
        tokens: (1, N, D) of the last layer, before the final norm.
    """
    count = attentions[0].shape[-1]
    rolled = torch.eye(count)
    for attention in attentions:
        rolled = (attention[0].mean(dim=0) / 2 + torch.eye(count) / 2) @ rolled
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    has_token = getattr(model.config, "has_class_token", True)
    prefix = int(has_token) + getattr(model.config, "num_register_tokens", 0) + (model.config.model_type == "deit")
    rows = round(((count - prefix) * height / width) ** 0.5)
    columns = (count - prefix) // rows
    pool = getattr(getattr(model, "vit", None), "attention_pool", None)
    if pool is not None:  # a probe reads, with its own attention to the patches
        patches = model.vit.layernorm(tokens)[:, prefix:]
        _, looks = pool.attention(patches, output_attentions=True, queries=pool.probe)
        read = looks[0, :, 0].mean(dim=0) @ rolled[prefix:]
    else:  # the class token, or the mean of the patches
        read = rolled[0] if has_token else rolled[prefix:].mean(dim=0)
    return read[prefix:].reshape(rows, columns).numpy()


@torch.no_grad()
def classify(picture: Image.Image):
    """A picture -> {class: probability}, and the model's input with what it looked at in red."""
    if picture is None:
        return None, None
    pixels = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    output = model(pixels, **({"output_attentions": True, "output_hidden_states": True} if LOOKS else {}))
    several = model.config.problem_type == "multi_label_classification"
    shares = (output.logits.sigmoid() if several else output.logits.softmax(dim=-1))[0]
    answers = {str(model.config.id2label[number]): float(share) for number, share in enumerate(shares)}
    if not LOOKS:
        return answers
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    seen = (pixels[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    heat = rollout(output.attentions, output.hidden_states[-1])
    heat = Image.fromarray(((heat - heat.min()) / max(np.ptp(heat), 1e-9) * 255).astype(np.uint8))
    heat = np.asarray(heat.resize(seen.shape[1::-1], Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    shown = Image.fromarray(
        (((1 - 0.6 * heat) * seen + 0.6 * heat * np.array([1.0, 0.1, 0.1])) * 255).astype(np.uint8)
    )
    return answers, shown.resize((320, 320 * shown.height // shown.width), Image.Resampling.NEAREST)


examples = [[str(path)] for path in sorted((HERE / "examples").glob("*.png"))]
demo = gr.Interface(
    classify,
    gr.Image(type="pil", label="Picture", height=320, elem_classes="picture"),
    [gr.Label(num_top_classes=5, label="Top 5")]
    + ([gr.Image(label="Attention rollout", height=320)] if LOOKS else []),
    examples=examples or None,
    cache_examples=False,
    flagging_mode="never",
    title=NAME,
    description="The five likeliest classes" + (", and which patches reached the answer." if LOOKS else "."),
)

if __name__ == "__main__":
    demo.launch(
        css=".picture img { min-height: 220px; object-fit: contain; image-rendering: pixelated }"
    )  # tiny pictures too
