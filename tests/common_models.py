"""Transformers' own tests of a model on each family of ours. Not collected by itself: test_common_tests.py runs this file
in a process that finds the tests of the installed transformers as the package `transformers_tests`."""

import copy
import re
import unittest

import torch
from torch import nn
from transformers_tests.test_modeling_common import ModelTesterMixin

from vit_hf.models import (
    BitConfig,
    BitForImageClassification,
    BitModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from vit_hf.models.stems import ConvStem, HybridResNetStem, PatchEmbeddings

VIT = dict(
    image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37,
    num_labels=3,
)  # fmt: skip

RESNET = dict(image_size=32, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)


class Tester:
    """What the tests ask for a configuration and a batch."""

    batch_size, is_training, num_hidden_layers, hidden_size, num_attention_heads = 5, True, 2, 32, 2

    def __init__(self, config_class, fields):
        self.config_class, self.fields, self.image_size = config_class, fields, fields["image_size"]
        config = self.get_config()
        if isinstance(config, ViTConfig):
            self.seq_length = config.grid_size[0] * config.grid_size[1] + config.num_prefix_tokens

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, self.image_size, self.image_size)}


class Common(ModelTesterMixin):
    config_class, fields = ViTConfig, VIT
    all_model_classes = (ViTModel, ViTForImageClassification)
    test_resize_embeddings = False  # there is no vocabulary
    test_can_init_all_missing_weights_before_2023 = True  # by the year in a file's first line

    def setUp(self):
        self.model_tester = Tester(self.config_class, self.fields)

    def test_model_get_set_embeddings(self):
        """transformers' own asks for an nn.Embedding; its ViT test has this form too."""
        for model_class in self.all_model_classes:
            model, new = model_class(self.model_tester.get_config()), nn.Linear(2, 3)
            self.assertIsInstance(model.get_input_embeddings(), PatchEmbeddings | ConvStem | HybridResNetStem)
            model.set_input_embeddings(new)
            self.assertIs(model.get_input_embeddings(), new)
            self.assertIsNone(model.get_output_embeddings())


# Left out for the time that they take, which is most of it: part of a test's name -> why.
LEFT_OUT = {
    "test_bc_torch_dtype": "torch_dtype= is dtype= of from_pretrained, whatever the model",
    "sdpa_inference.*pad_right": "the same as pad_left: images have no padding",
    "sdpa_inference.*fp16": "the same as in bf16, which models are trained in",
    "sdpa_inference.*no_attn_mask": "the same as with a mask: images have none",
}
for name in dir(Common):
    for pattern, reason in LEFT_OUT.items():
        if re.search(pattern, name):
            setattr(Common, name, unittest.skip(reason)(getattr(Common, name)))


class Convolutions(Common):
    has_attentions = False

    @unittest.skip("there are no tokens; transformers' tests of its ResNet and BiT skip it too")
    def test_model_get_set_embeddings(self):
        pass

    def test_hidden_states_output(self):
        """transformers' own counts tokens; its tests of ResNet and BiT have this form too."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            by_argument = model_class(config).eval()(**inputs, output_hidden_states=True).hidden_states
            config_with = copy.deepcopy(config)
            config_with.output_hidden_states = True
            by_field = model_class(config_with).eval()(**inputs).hidden_states
            for states in (by_argument, by_field):
                side = 32 if config.cifar_stem else 8
                self.assertEqual([state.shape[1:] for state in states[:2]], [(8, side, side)] * 2)
                self.assertEqual(len(states), len(config.depths) + 1)


class StockTest(Common, unittest.TestCase):
    pass


class MeanSincosTest(Common, unittest.TestCase):
    fields = VIT | dict(pooling="mean", position_embedding="sincos_2d", fc_norm=True, head_hidden_size=8)


class RegistersTest(Common, unittest.TestCase):
    fields = VIT | dict(num_register_tokens=2, qk_norm=True, layer_scale_init=0.1, position_embedding="learned_2d")


class RelativeTest(Common, unittest.TestCase):
    fields = VIT | dict(position_embedding="relative")


class MapConvTest(Common, unittest.TestCase):
    fields = VIT | dict(pooling="map", position_embedding="none", initializer="paper", stem="conv")


class HybridTest(Common, unittest.TestCase):
    fields = VIT | dict(stem="hybrid_resnet", stem_depths=[1], stem_width=32, patch_size=2)


class ResNetCifarTest(Convolutions, unittest.TestCase):
    config_class = ResNetConfig
    all_model_classes = (ResNetModel, ResNetForImageClassification)
    fields = RESNET | dict(cifar_stem=True)


class BitTest(Convolutions, unittest.TestCase):
    config_class = BitConfig
    all_model_classes = (BitModel, BitForImageClassification)
    fields = RESNET | dict(num_groups=2)
