"""torch.compile, torch.export and ONNX of every family of presets."""

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from tests.families import FAMILIES
from vit_hf.models.presets import from_preset


def small(family):
    torch.manual_seed(0)
    preset, changes = FAMILIES[family]
    model = from_preset(preset, list("abc"), changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def images(batch):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_for_training_and_one_for_evaluation(family):
    """fullgraph raises at a break; the counter sees every compilation."""
    torch._dynamo.reset()
    model, counter = small(family), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled.train()
        compiled(images(4)).logits.sum().backward()
        compiled.eval()
        with torch.no_grad():
            found = compiled(images(4)).logits
    assert counter.frame_count == 2
    torch.testing.assert_close(found, model(images(4)).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["relative"])
def test_compiled_kernels_give_the_same_gradients(family):
    """The real back end, not only the trace."""
    torch._dynamo.reset()
    gradients = []
    for compile_it in (False, True):
        model = small(family).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "rate"):
                module.rate = 0.0
        run = torch.compile(model, fullgraph=True) if compile_it else model
        run(images(4)).logits.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_program_gives_the_same_logits_at_any_batch_size(family):
    model = small(family).eval()
    dynamic = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=1024)}}
    for shapes, batches in ((None, [2]), (dynamic, [1, 2, 5])):
        program = torch.export.export(model, (), {"pixel_values": images(2)}, dynamic_shapes=shapes).module()
        for batch in batches:
            with torch.no_grad():
                expected = model(images(batch)).logits
                torch.testing.assert_close(program(pixel_values=images(batch)).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_gives_the_same_logits_at_any_batch_size(family, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    transformers.utils.logging.set_verbosity_error()
    model = small(family).eval()
    dynamic = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=1024)}}
    for shapes, batches in ((None, [2]), (dynamic, [1, 2, 5])):
        torch.onnx.export(
            model, (), tmp_path / "model.onnx", kwargs={"pixel_values": images(2)}, dynamic_shapes=shapes, dynamo=True,
            input_names=["pixel_values"], output_names=["logits"], verbose=False,
        )  # fmt: skip
        session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        for batch in batches:
            (found,) = session.run(["logits"], {"pixel_values": images(batch).numpy()})
            with torch.no_grad():
                np.testing.assert_allclose(found, model(images(batch)).logits.numpy(), rtol=0, atol=1e-4)
