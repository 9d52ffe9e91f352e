"""`vit-hf figures` and --log_figures_steps end to end, with tiny models."""

import base64
import io
import re

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from tests.families import FAMILIES, VIT
from tests.runs import launch, python, trajectory
from tests.test_convert import google_arrays, timm_folder, timm_tensors
from vit_hf.analysis import figures
from vit_hf.analysis.document import Picture
from vit_hf.analysis.gallery import DISTANCES, model_figures, sample_images
from vit_hf.cli import dispatch
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.rows.table import TableRows
from vit_hf.errors import ArgumentError, UserError
from vit_hf.models.presets import from_preset

EVERY = {
    "patch_embedding_filters", "position_similarity", "attention_distance", "attention_rollout", "attention_heads",
    "saliency", "layer_cka", "feature_pca",
}  # fmt: skip
PREPROCESSING = Preprocessing((32, 32))


def make(family="vit", **changes):
    preset, small = FAMILIES[family]
    torch.manual_seed(0)
    return from_preset(preset, ["zero", "one"], small | changes)


def save(model, folder):
    model.save_pretrained(folder)
    PREPROCESSING.image_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save(make(), tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture
def some_images(tmp_path):
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for name, size in (("b.png", (40, 40)), ("a.jpg", (64, 20)), ("below/c.png", (9, 9))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def drawn(folder):
    return {path.stem for path in folder.glob("*.png")}


def pictures_in(page):
    """{alt text: image} of a page that must hold all in itself."""
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', text) and "url(" not in text
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', text)
    return {alt: Image.open(io.BytesIO(base64.b64decode(content))) for content, alt in found}


def test_without_images_it_looks_at_digits_and_the_page_holds_all(vit, tmp_path, capsys):
    dispatch(["figures", vit, "--num_images", "2", "--output_dir", str(tmp_path)])
    assert drawn(tmp_path) == EVERY
    inside = pictures_in(tmp_path / "index.html")
    assert len(inside) == 8 and min(min(image.size) for image in inside.values()) > 100
    page = (tmp_path / "index.html").read_text()
    assert "Figures of vit" in page and "2 images of digits (test), at 32 x 32 pixels" in page
    said = capsys.readouterr().out
    assert str(tmp_path / "attention_rollout.png") in said and said.endswith(f"{tmp_path / 'index.html'}\n")


@pytest.mark.slow
def test_files_and_folders_at_another_size(vit, some_images, tmp_path):
    out = tmp_path / "out"
    dispatch(["figures", vit, "--image_size", "48x64", "--output_dir", str(out),
              "--images", str(some_images / "b.png"), str(some_images)])  # fmt: skip
    page = (out / "index.html").read_text()
    assert "4 images (b.png, a.jpg, b.png, c.png), at 48 x 64 pixels" in page and drawn(out) == EVERY - {"layer_cka"}
    assert "32 images or more; here are 4." in page
    dispatch(
        ["figures", vit, "--images", str(some_images), "--num_images", "1", "--output_dir", str(tmp_path / "one")]
    )
    assert "1 images (a.jpg), at 32 x 32" in (tmp_path / "one/index.html").read_text()


@pytest.mark.slow
def test_a_stock_vit_of_transformers_has_all_figures(tmp_path):
    config = transformers.ViTConfig(**VIT, image_size=32, patch_size=8, num_labels=3)
    save(transformers.ViTForImageClassification(config), tmp_path / "stock")
    dispatch(["figures", str(tmp_path / "stock"), "--num_images", "1", "--output_dir", str(tmp_path / "out")])
    assert drawn(tmp_path / "out") == EVERY


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["timm", "google"])
def test_a_converted_checkpoint_has_all_figures(tmp_path, origin):
    if origin == "timm":  # 24 x 16 pixels in patches of 8, and names its classes by number
        source = timm_folder(tmp_path / "source", timm_tensors(), pool="token")
    else:
        source = tmp_path / "source.npz"
        np.savez(source, **google_arrays())
    dispatch(["convert", str(source), str(tmp_path / "model")])
    dispatch(["figures", str(tmp_path / "model"), "--num_images", "2", "--output_dir", str(tmp_path / "out")])
    assert drawn(tmp_path / "out") == EVERY


PATCHES = {"patch_embedding_filters"}
CONVOLUTIONS = {"stem_filters", "grad_cam", "feature_pca", "layer_cka", "saliency"}
HAVE = {
    "vit": EVERY,
    "better-baseline": EVERY,  # pooling mean
    "relative": EVERY,
    "none-map": EVERY - {"position_similarity"},
    "conv": EVERY - PATCHES | {"stem_filters"},
    "hybrid": EVERY - PATCHES | {"stem_filters", "grad_cam"},
    "resnet": CONVOLUTIONS,
    "bit": CONVOLUTIONS,
}


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("vit", "conv", "hybrid", "bit")]


@pytest.mark.parametrize("family", ["better-baseline", "relative", "none-map", "resnet", *SLOW])
def test_each_family_has_what_it_can_have_and_says_what_it_has_not(family):
    model, many = make(family), np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    modes = [module.training for module in model.modules()]
    blocks = model_figures(model, many[:2], PREPROCESSING, many)
    assert {block.name for block in blocks if isinstance(block, Picture)} == HAVE[family]
    told = " ".join(block for block in blocks if isinstance(block, str))
    said = {"none-map": "no position embeddings", "resnet": "A ResNet has no", "bit": "A Bit has no"}
    assert said[family] in told if family in said else told == ""
    # the model goes on training as if nobody had looked
    assert modes == [module.training for module in model.modules()] and all(p.grad is None for p in model.parameters())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tolist()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert family in ("resnet", "bit") or model.config._attn_implementation == "sdpa"


def captions(blocks):
    return {block.name: block.caption for block in blocks if isinstance(block, Picture)}


def test_each_figure_names_its_definition():
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    told = {}
    for definition, other in (("paper", "renormalised"), ("renormalised", "paper")):
        blocks = model_figures(make(pooling="cls"), images[:1], PREPROCESSING, images, definition)
        (distance,) = (block for block in blocks if getattr(block, "name", "") == "attention_distance")
        (axes,) = distance.figure.axes
        assert DISTANCES[definition] in axes.get_title() and DISTANCES[definition] in distance.caption
        assert DISTANCES[other] not in distance.caption
        told[definition] = axes.get_lines()[0].get_ydata()[0]
    assert told["paper"] == pytest.approx(told["renormalised"] * 16 / 17)  # uniform attention
    assert "over 32 images" in captions(blocks)["layer_cka"]
    output = {pooling: captions(model_figures(make(pooling=pooling), images[:1], PREPROCESSING))["attention_rollout"]
              for pooling in ("mean", "map")}  # fmt: skip
    assert "of the mean of all patches to the input" in output["mean"] and "of the pooling probe" in output["map"]


def test_with_few_images_layers_are_not_compared():
    images = np.zeros((31, 32, 32, 3), np.uint8)
    blocks = model_figures(make("resnet"), images[:1], PREPROCESSING, images)
    assert "over 32 images or more; here are 31." in blocks[-2]


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_weights_of_16_bits_are_drawn_too(family):
    """As a run under ZeRO-2 in bf16 has them."""
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    blocks = model_figures(make(family).bfloat16(), images[:1], PREPROCESSING, images)
    assert set(captions(blocks)) == HAVE[family]


@pytest.mark.parametrize("family", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_filters_of_grey_images_are_grey(family):
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    name = "patch_embedding_filters" if family == "vit" else "stem_filters"
    pictures = {}
    for kind, seen in (("grey", images[..., :1].repeat(3, axis=-1)), ("coloured", images)):
        (block,) = (b for b in model_figures(make(family), seen, PREPROCESSING) if getattr(b, "name", "") == name)
        assert ("colours are added up" in block.caption) == (kind == "grey")
        pictures[kind] = np.asarray(block.figure.axes[0].images[0].get_array())
    assert (pictures["grey"] == pictures["grey"][..., :1]).all()
    assert not (pictures["coloured"] == pictures["coloured"][..., :1]).all()


def test_similarity_below_0_has_a_colour_of_its_own():
    (image,) = figures.layer_matrix(np.array([[1, -0.03], [-0.03, np.nan]]), ["1", "2"]).axes[0].images
    assert image.get_clim() == (-0.03, 1)
    (image,) = figures.layer_matrix(np.array([[1, 0.5], [0.5, 1]]), ["1", "2"]).axes[0].images
    assert image.get_clim() == (0, 1)


def test_a_tile_lies_at_its_place_and_is_labelled():
    similarity = np.arange(36.0).reshape(2, 3, 2, 3) / 36
    axes = figures.similarity_tiles(similarity).axes[0]
    mosaic = np.asarray(axes.images[0].get_array().filled(np.nan))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("input patch column", "input patch row")
    down, across = (ticks[1] - ticks[0] for ticks in (axes.get_yticks(), axes.get_xticks()))
    middle, centre = axes.get_yticks()[1], axes.get_xticks()[2]  # of the tile in row 2, column 3: 2 x 3 values
    assert mosaic[int(middle - down / 4), int(centre)] == similarity[1, 2, 0, 1]
    assert mosaic[int(middle + down / 4), int(centre + across / 3)] == similarity[1, 2, 1, 2]
    assert np.isnan(mosaic).any() and np.nanmax(mosaic) == similarity.max()


def test_the_distance_figure_has_a_dot_for_each_head():
    axes = figures.distance_by_layer(np.array([[1.0, 2], [3, 4], [5, 6]]), uniform=4.5, definition="x").axes[0]
    assert [dots.get_offsets().tolist() for dots in axes.collections] == [
        [[1, 1], [2, 3], [3, 5]], [[1, 2], [2, 4], [3, 6]]
    ]  # fmt: skip
    assert axes.get_xlabel() == "network depth (layer)" and axes.get_ylabel() == "mean attention distance (pixels)"


def test_a_map_covers_its_image_with_the_brightest_at_one():
    images = np.zeros((3, 20, 10, 3), dtype=np.uint8)
    maps = np.random.default_rng(0).random((3, 2, 4, 2)) / 100
    figure = figures.maps_over_images(images, maps, ["x", "y", "z"], ["head 1", "head 2"], "heads")
    over = [image for axes in figure.axes for image in axes.images if image.get_cmap().name == "inferno"]
    assert len(over) == 6 and all(image.get_array().max() == 1 for image in over)
    assert all(image.get_extent() == [-0.5, 9.5, 19.5, -0.5] for image in over)
    shown = [image.get_array() for image in over]
    np.testing.assert_allclose(shown[3], maps[1, 1] / maps[1, 1].max())


def test_a_class_may_be_called_like_a_formula():
    images, maps = np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 1, 2, 2))
    figures.maps_over_images(images, maps, [r"$\no_such{$ (0.21)"], ["m"], "heads").savefig(io.BytesIO())
    figures.pairs_of_images(images, maps.repeat(3, 1).transpose(0, 2, 3, 1), ["$^$"], "m", "x").savefig(io.BytesIO())


def test_a_black_map_and_a_flat_filter_are_drawn():
    figures.maps_over_images(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 1, 2, 2)), ["x"], ["m"], "none")
    assert figures.stretched(np.full((2, 2, 3), 7.0)).tolist() == np.zeros((2, 2, 3)).tolist()


def test_images_are_taken_all_over_a_set_and_bad_ones_left_out():
    import datasets

    def png(grey):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (grey, grey, grey)).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    images = [png(10 * number) for number in range(10)]
    images[5] = {"bytes": b"broken", "path": None}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a"]))
    rows = TableRows(datasets.Dataset.from_dict({"image": images, "label": [0] * 10}, features=features))
    assert sample_images(rows, PREPROCESSING, 4)[:, 0, 0, 0].tolist() == [0, 20, 70]  # rows 0, 2, 5, 7
    assert len(sample_images(rows, PREPROCESSING, 99)) == 9


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--images {tmp}/nothing.png", "--images: .*nothing.png does not exist"),
        ("--images {tmp}/broken.png", "--images: file .*broken.png, UnidentifiedImageError"),
        ("--images {tmp}/empty", "--images: .*empty holds no images; their names end in .png"),
        ("--image_size 36", "--image_size: 36x36 pixels are not divided by the model's patches; allowed .* of 8"),
        ("--output_dir {tmp}/broken.png", "--output_dir: .*broken.png is a file; name a folder"),
        ("--dataset_name {tmp}/empty", "empty"),
    ],
)
def test_wrong_input_is_one_line(vit, tmp_path, flags, said):
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    argv = ["figures", vit, "--output_dir", str(tmp_path / "out"), *flags.format(tmp=tmp_path).split()]
    with pytest.raises(UserError, match=said) as caught:
        dispatch(argv)
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "--output_dir is missing"),
        (["--output_dir", "x", "--images", "a.png", "--dataset_name", "digits"], "give only one of --images and"),
        (["--output_dir", "x", "--image_size", "big"], "--image_size: 'big' is not"),
        (["--output_dir", "x", "--num_images", "0"], "--num_images: 0 is out of range"),
        (["--output_dir", "x", "--images"], "--images"),
        (["--output_dir", "x", "--image", "a.png"], "unknown flag --image, did you mean 'images'"),
    ],
)
def test_wrong_flags_are_named(vit, flags, said):
    with pytest.raises(ArgumentError, match=said):
        dispatch(["figures", vit, *flags])


def test_models_of_other_families_are_refused(tmp_path):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=2)
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path / "convnext")
    argv = ["figures", str(tmp_path / "convnext"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="model_type. is convnext; figures are drawn of vit, vit_hf, resnet"):
        dispatch(argv)
    with pytest.raises(UserError, match="cannot be loaded: no such folder"):
        dispatch(["figures", str(tmp_path / "nothing"), "--output_dir", str(tmp_path / "out")])
    save(make(num_channels=1), tmp_path / "grey")
    with pytest.raises(UserError, match="num_channels is 1"):
        dispatch(["figures", str(tmp_path / "grey"), "--output_dir", str(tmp_path / "out")])


@pytest.mark.slow
def test_the_command_ends_with_its_status(vit, tmp_path):
    failed = python(
        "-m", "vit_hf.cli", "figures", vit, "--images", tmp_path / "no.png", "--output_dir", tmp_path / "o"
    )
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.startswith(f"error: --images: {tmp_path / 'no.png'} does not exist")


DROPS = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,hidden_dropout_prob=0.1,drop_path_rate=0.2"  # fmt: skip


@pytest.mark.slow
def test_training_draws_and_goes_on_as_if_it_had_not(run, tmp_path):
    flags = dict(config_overrides=DROPS, random_crop="padding=2", mixup_alpha=0.2, ema_decay=0.9)
    plain = run("pretrain", output_dir=tmp_path / "plain", **flags)
    watched = run("pretrain", output_dir=tmp_path / "watched", log_figures_steps=2, report_to="tensorboard", **flags)
    assert trajectory(plain) == trajectory(watched)
    ours, theirs = load_file(watched / "model.safetensors"), load_file(plain / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert drawn(watched / "figures") == EVERY and not (plain / "figures").exists()
    assert "Figures at step 6" in (watched / "figures/index.html").read_text()
    card = (watched / "README.md").read_text()
    assert (
        all(f"](figures/{name}.png)" in card for name in EVERY) and "figures/" not in (plain / "README.md").read_text()
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in watched.rglob("events.out.tfevents*") if "1" not in path.parent.name}
    logged = EventAccumulator(str(events), size_guidance={"images": 0})
    logged.Reload()
    assert [image.step for image in logged.Images("figures/attention_rollout")] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("config, precision", [("cpu_2proc", "no"), ("zero2", "bf16")])
def test_one_of_two_processes_draws_and_the_course_is_the_same(tmp_path, config, precision):
    flags = dict(preset="vit-demo-patch8-32", dataset_name="digits", config_overrides=DROPS, max_steps=4,
                 global_batch_size=32, logging_steps=1, max_eval_samples=50)  # fmt: skip
    launcher = ("--num_processes", "2", "--mixed_precision", precision)
    for name, more in (("plain", {}), ("watched", {"log_figures_steps": 2})):
        done = launch("pretrain", config, launcher=launcher, output_dir=tmp_path / name, **flags, **more)
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr  # no bar where nobody can look at it, but each step's line, of one process
        logged = re.findall(r"^step (\d) of 4: loss [\d.]+, learning rate \S+, [\d,]+ images/s", done.stderr, re.M)
        assert logged == ["1", "2", "3", "4"] and len(done.stderr) < 20_000
    assert drawn(tmp_path / "watched/figures") == EVERY
    assert trajectory(tmp_path / "plain") == trajectory(tmp_path / "watched")


def test_zero_3_is_refused_in_one_line(monkeypatch):
    from vit_hf.training import accelerator

    monkeypatch.setattr(accelerator, "zero_stage", lambda launched: 3)
    here = accelerator.build_accelerator(60)
    with pytest.raises(UserError, match="--log_figures_steps does not work with DeepSpeed ZeRO stage 3"):
        accelerator.check_drawing(here, 5)
    accelerator.check_drawing(here, None)
