"""A small member of each family of models, for the tests that go through them all."""

VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
RESNET = dict(embedding_size=32, hidden_sizes=[64, 128], depths=[1, 1])
BIT = RESNET | dict(num_groups=8)
HYBRID = VIT | dict(image_size=32, stem_depths=[1, 1], stem_width=32)
# family -> (preset, what makes it small)
FAMILIES = {
    "vit": ("vit-demo-patch8-32", VIT | dict(drop_path_rate=0.1, hidden_dropout_prob=0.1)),
    "better-baseline": ("vit-small-patch16-224-better-baseline", VIT | dict(image_size=32, patch_size=8)),
    "learned_2d": ("vit-demo-patch8-32", VIT | dict(position_embedding="learned_2d", layer_scale_init=0.1)),
    "relative": ("vit-demo-patch8-32", VIT | dict(position_embedding="relative", num_register_tokens=2)),
    "none-map": ("vit-demo-patch8-32", VIT | dict(position_embedding="none", pooling="map", qk_norm=True)),
    "conv": ("vit-demo-patch8-32", VIT | dict(stem="conv", head_hidden_size=16)),
    "hybrid": ("r50-vit-base-patch1-224", HYBRID),
    "resnet": ("resnet-50-cifar", RESNET),
    "resnet-18": ("resnet-18", RESNET | dict(image_size=32)),
    "bit": ("bit-resnet-50-cifar", BIT),
    "bit-224": ("bit-resnet-50", BIT | dict(image_size=32)),
}
