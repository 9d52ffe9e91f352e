"""From encoded bytes to pixels: equal to what the exported image processor makes of the same image."""

import inspect
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_transforms import convert_to_rgb
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vit_hf.data.augment.pipeline import normalise
from vit_hf.data.decode import DECODE_ERRORS, crop_to_pixels, decode_row, image_size, open_image, to_pixels
from vit_hf.data.preprocessing import Preprocessing, own_preprocessing

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.RandomState(width * height)
    if mode == "I;16":
        return Image.fromarray(rng.randint(0, 2**16, (height, width)).astype(np.uint16))
    channels = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "1": 1}[mode]
    levels = rng.randint(0, 256, (height, width, channels)).astype(np.uint8)
    if mode == "P":
        return Image.fromarray(levels[..., 0]).convert("RGB").quantize(16)
    if mode == "1":
        return Image.fromarray(levels[..., 0]).convert("1")
    return Image.fromarray(levels[..., 0] if channels == 1 else levels, mode=mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def processed(processor, data: bytes) -> torch.Tensor:
    return processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]


def ours(data: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    pixels = to_pixels(open_image({"bytes": data, "path": None}), preprocessing)
    assert pixels.dtype == np.uint8 and pixels.shape == (*preprocessing.image_size, 3)
    batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    return normalise(batch, torch.tensor(preprocessing.image_mean), torch.tensor(preprocessing.image_std))


PREPROCESSINGS = {
    "square": Preprocessing((32, 32), image_mean=MEAN, image_std=STD),
    "non-square": Preprocessing((24, 40), image_mean=MEAN, image_std=STD),
    "shorter side, then centre": Preprocessing((28, 28), shortest_edge=32, image_mean=MEAN, image_std=STD),
    "odd centre": Preprocessing((21, 27), shortest_edge=30),
    "bicubic": Preprocessing((32, 32), resample=Image.Resampling.BICUBIC),
    "both sides, then centre": Preprocessing((28, 27), resized=(33, 32), image_mean=MEAN, image_std=STD),
    "centre larger than the image": Preprocessing((40, 37), shortest_edge=32),
}


@pytest.mark.parametrize("name", PREPROCESSINGS)
@pytest.mark.parametrize("size", [(32, 32), (61, 47), (47, 61), (33, 100), (9, 7), (1, 5)])
def test_pixels_equal_the_exported_processors(tmp_path, name, size):
    """The same uint8 pixels exactly (seen through an identity normalisation), and the same normalised values."""
    preprocessing = PREPROCESSINGS[name]
    data = encoded(picture(*size))
    preprocessing.image_processor().save_pretrained(tmp_path)
    processor = ViTImageProcessorPil.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(data, preprocessing), processed(processor, data).float(), rtol=0, atol=1e-6)
    exact = ViTImageProcessorPil.from_pretrained(tmp_path, do_rescale=False, do_normalize=False)
    pixels = to_pixels(open_image({"bytes": data, "path": None}), preprocessing)
    assert np.array_equal(processed(exact, data)[0].numpy(), pixels.transpose(2, 0, 1))


COMPOSITES = "return_numpy" in inspect.signature(convert_to_rgb).parameters  # transformers 5.17 drops transparency


def encodings() -> dict[str, bytes]:
    palette = picture(40, 30, "P")
    return {
        "gray": encoded(picture(40, 30, "L")),
        "bilevel": encoded(picture(40, 30, "1")),
        "palette": encoded(palette),
        "CMYK JPEG": encoded(picture(40, 30, "CMYK"), "JPEG", quality=95),
        "gray JPEG": encoded(picture(40, 30, "L"), "JPEG"),
        "transparent palette": encoded(palette, transparency=3),
        "gray and alpha": encoded(picture(40, 30, "LA")),
        "RGBA": encoded(picture(40, 30, "RGBA")),
        "RGB with a transparent colour": encoded(picture(40, 30), transparency=picture(40, 30).getpixel((0, 0))),
        "GIF": encoded(palette, "GIF", transparency=5),
        "WebP": encoded(picture(40, 30, "RGBA"), "WEBP", lossless=True),
    }


@pytest.mark.parametrize("name", encodings())
def test_every_kind_of_image_becomes_the_processors_rgb(name):
    data = encodings()[name]
    if not COMPOSITES and ("A" in (bands := Image.open(io.BytesIO(data))).getbands() or "transparency" in bands.info):
        pytest.skip("this transformers drops transparency")
    preprocessing = PREPROCESSINGS["square"]
    expected = processed(preprocessing.image_processor(), data).float()
    torch.testing.assert_close(ours(data, preprocessing), expected, rtol=0, atol=1e-6)


def test_16_bits_are_scaled_to_8():
    """The image processor clips them, which leaves an almost white picture."""
    image = picture(6, 5, "I;16")
    pixels = np.asarray(open_image({"bytes": encoded(image), "path": None}))
    assert np.array_equal(pixels, np.repeat((np.asarray(image) // 256)[..., None], 3, axis=2))


def tiff(samples: np.ndarray, **tags: int | float) -> bytes:
    """A grey TIFF file with tags by their numbers, tag_341=... and so on."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        number = int(name.removeprefix("tag_"))
        info.tagtype[number] = 12 if number in (340, 341) else 3
        info[number] = value
    return encoded(Image.fromarray(samples), "TIFF", tiffinfo=info)


DEEP = {
    "floats from 0 to 1": (tiff(np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)), 0, 1),
    "floats with their range": (
        tiff(np.linspace(-5, 20, 30, dtype=np.float32).reshape(5, 6), tag_340=-5.0, tag_341=20.0), -5, 20
    ),
    "32 bits with their range": (
        tiff(np.linspace(0, 4000, 30).astype(np.int32).reshape(5, 6), tag_280=0, tag_281=4000), 0, 4000
    ),
    "16 bits": (tiff(np.linspace(0, 65535, 30).astype(np.uint16).reshape(5, 6)), 0, 65535),
    "16 bits, PGM": (encoded(Image.fromarray(np.linspace(0, 65535, 30).astype(np.uint16).reshape(5, 6)), "PPM"), 0, 65535),
    "the darkest of 16 bits": (tiff(np.arange(30, dtype=np.uint16).reshape(5, 6), tag_281=30), 0, 65535),
}  # fmt: skip


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", DEEP)
def test_grey_of_more_than_8_bits_is_scaled_by_its_range(name, cut):
    """Where it would decode to black or white without a word. A range that stands in a file of 16 bits does not count:
    TIFF 6.0 keeps it from changing how an image looks."""
    data, low, high = DEEP[name]
    with Image.open(io.BytesIO(data)) as image:
        samples = np.asarray(image).astype(float)
    expected = np.minimum((samples - low) / (high - low) * 256, 255).astype(np.uint8)
    whole = lambda size: (0.0, 0.0, *map(float, size))  # noqa: E731
    found = decode_row({"bytes": data, "path": None}, Preprocessing((5, 6)), whole if cut else None)
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))


UNKNOWN = {
    "32 bits": (tiff(np.arange(30, dtype=np.int32).reshape(5, 6)), "32 .*bits"),
    "floats above 1": (
        tiff(np.linspace(0, 2, 30, dtype=np.float32).reshape(5, 6)),
        "from 0 to 2, its range is 0 to 1",
    ),
    "floats that are none": (tiff(np.full((5, 6), np.nan, dtype=np.float32)), "nan"),
    "outside of what is told": (tiff(np.full((5, 6), 9, dtype=np.float32), tag_340=0.0, tag_341=8.0), "0 to 8"),
    "a range of nothing": (tiff(np.zeros((5, 6), dtype=np.float32), tag_340=0.0, tag_341=0.0), "0 to 0"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_grey_whose_range_is_not_known_is_a_bad_image_with_the_reason(name):
    data, reason = UNKNOWN[name]
    found = decode_row({"bytes": data, "path": None}, Preprocessing((5, 6)))
    assert isinstance(found, str) and re.search(reason, found)


def test_gray_becomes_three_equal_channels():
    image = picture(6, 5, "L")
    pixels = np.asarray(open_image({"bytes": encoded(image), "path": None}))
    assert np.array_equal(pixels, np.repeat(np.asarray(image)[..., None], 3, axis=2))


def test_transparent_parts_become_white():
    levels = np.zeros((1, 3, 4), dtype=np.uint8)  # black, at three opacities
    levels[0, :, 3] = (0, 102, 255)
    pixels = np.asarray(open_image({"bytes": encoded(Image.fromarray(levels)), "path": None}))
    assert pixels[0].tolist() == [[255] * 3, [153] * 3, [0] * 3]


@pytest.mark.parametrize("orientation, turned", [(3, 2), (6, -1), (8, 1)])
def test_orientation_of_the_camera_is_applied(orientation, turned):
    """As `datasets` and transformers' pipelines open the same file."""
    image, exif = picture(6, 4), Image.Exif()
    exif[0x0112] = orientation
    pixels = np.asarray(open_image({"bytes": encoded(image, exif=exif), "path": None}))
    assert np.array_equal(pixels, np.rot90(np.asarray(image), turned))


def test_file_by_path_equals_file_by_bytes(tmp_path):
    data = encoded(picture(8, 9))
    (tmp_path / "a.png").write_bytes(data)
    by_path = open_image({"bytes": None, "path": str(tmp_path / "a.png")})
    assert np.array_equal(np.asarray(by_path), np.asarray(open_image({"bytes": data, "path": "elsewhere"})))


def test_box_of_the_whole_image_is_the_plain_resize():
    image, preprocessing = picture(50, 40), PREPROCESSINGS["square"]
    value = {"bytes": encoded(image), "path": None}
    whole = crop_to_pixels(value, lambda size: (0.0, 0.0, *map(float, size)), preprocessing)
    assert abs(whole.astype(int) - to_pixels(image, preprocessing)).max() <= 1
    cut = crop_to_pixels(value, lambda size: (4.0, 6.0, 32.0, 32.0), preprocessing)
    assert np.array_equal(cut, np.asarray(image)[4:36, 6:38])  # the size of the output: nothing to resize


def photograph(width: int, height: int) -> Image.Image:
    """Smooth with some detail, so that a resize by another road gives nearly the same."""
    rng = np.random.RandomState(5)
    coarse = Image.fromarray(rng.randint(0, 256, (9, 12, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("MPO", "RGB")])
@pytest.mark.parametrize("turned", [False, True])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(monkeypatch, kind, mode, turned):
    """At a quarter where the box allows it, upright, and the box where it belongs: within two grey levels on average of
    the crop of the fully decoded picture. A turned one is decoded whole."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"quality": 95} | ({"exif": exif} if turned else {})
    options |= {"save_all": True, "append_images": [photograph(64, 48)]} if kind == "MPO" else {}
    data = encoded(photograph(640, 480).convert(mode), kind, **options)
    assert Image.open(io.BytesIO(data)).format == kind
    value, preprocessing = {"bytes": data, "path": None}, PREPROCESSINGS["square"]
    whole = open_image(value)
    box, seen, drafts = (101.5, 60.25, 250.0, 300.0), [], []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda self, *a: (drafts.append(a), draft(self, *a))[1])

    def box_of(size):
        seen.append(size)
        return box

    found = crop_to_pixels(value, box_of, preprocessing)
    assert seen == [(whole.height, whole.width)] == [(640, 480) if turned else (480, 640)]
    expected = np.asarray(whole.crop((60, 102, 360, 352)).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert abs(found.astype(int) - expected).mean() < 2
    assert len(drafts) == (0 if turned else 1)


def test_pixels_take_the_place_of_a_file():
    """Rows of a set that is computed and not stored."""
    image, preprocessing = picture(50, 40), PREPROCESSINGS["square"]
    assert np.array_equal(decode_row(np.asarray(image), preprocessing), to_pixels(image, preprocessing))
    cut = decode_row(np.asarray(image), preprocessing, lambda size: (4.0, 6.0, 32.0, 32.0))
    assert np.array_equal(cut, np.asarray(image)[4:36, 6:38])


@pytest.mark.parametrize("bicubic, resample", [(False, Image.Resampling.BILINEAR), (True, Image.Resampling.BICUBIC)])
def test_a_box_is_resized_as_pillow_resizes_the_cut(bicubic, resample):
    image = picture(50, 40)
    value, box = {"bytes": encoded(image), "path": None}, lambda size: (4.0, 6.0, 33.0, 39.0)
    for size in ((20, 24), (64, 48)):
        found = decode_row(value, Preprocessing(size), box, bicubic=bicubic)
        expected = image.crop((6, 4, 45, 37)).resize(size[::-1], resample)
        assert abs(found.astype(int) - np.asarray(expected)).max() <= 1


NOT_PIXELS = {
    "floats": np.zeros((5, 6, 3), dtype=np.float32),
    "64 bits": np.zeros((5, 6, 3), dtype=np.int64),
    "no channels": np.zeros((5, 6), dtype=np.uint8),
    "channels first": np.zeros((3, 5, 6), dtype=np.uint8),
    "empty": np.zeros((0, 6, 3), dtype=np.uint8),
    "no row": None,
}


@pytest.mark.parametrize("name", NOT_PIXELS)
def test_pixels_of_another_kind_are_a_bad_image(name):
    found = decode_row(NOT_PIXELS[name], PREPROCESSINGS["square"])
    assert isinstance(found, str)
    if name != "no row":
        assert "allowed are uint8 (height, width, 3)" in found and str(NOT_PIXELS[name].dtype) in found


def test_no_more_memory_is_not_a_bad_image(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", no_memory)
    with pytest.raises(MemoryError):
        decode_row({"bytes": encoded(picture(8, 9)), "path": "x.png"}, PREPROCESSINGS["square"])


def test_size_is_read_off_the_header():
    assert image_size({"bytes": encoded(picture(50, 40), "JPEG")[:700], "path": None}) == (40, 50)


# --- what is not an image ---

NOT_IMAGES = {
    "text": b"this is no image",
    "empty": b"",
    "truncated PNG": encoded(picture(40, 30))[:600],
    "truncated JPEG": encoded(picture(40, 30), "JPEG")[:500],
    "PNG header alone": encoded(picture(40, 30))[:20],
    "PNG with a changed byte": bytes(255 - b if i == 60 else b for i, b in enumerate(encoded(picture(40, 30)))),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_bytes_that_do_not_decode_raise_a_decode_error(name):
    with pytest.raises(DECODE_ERRORS):
        open_image({"bytes": NOT_IMAGES[name], "path": "x.png"})


@pytest.mark.parametrize("value", [{"bytes": None, "path": None}, {"bytes": None, "path": "/nowhere/x.png"}])
def test_rows_without_a_file_raise_a_decode_error(value):
    with pytest.raises(DECODE_ERRORS):
        open_image(value)


# --- reading processors ---


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_exported_processor_reads_back_as_it_was(tmp_path, name):
    PREPROCESSINGS[name].image_processor().save_pretrained(tmp_path)
    assert own_preprocessing(str(tmp_path), None, (99, 99)) == PREPROCESSINGS[name]


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": True, "do_resize": True}
CROP = {"do_center_crop": True, "resample": 3}
OTHERS = {
    "ViT, size a number": (ViTImageProcessorPil, {**HALF, "resample": 2, "size": 224}),
    "ViT, size two numbers": (ViTImageProcessorPil, {**HALF, "size": {"height": 224, "width": 192}}),
    "not normalised": (ViTImageProcessorPil, {"do_normalize": False, "size": 224, "resample": 2}),
    "DeiT, numbers": (DeiTImageProcessorPil, {**HALF, **CROP, "size": 256, "crop_size": 224}),
    "DeiT, two numbers": (
        DeiTImageProcessorPil,
        {**HALF, **CROP, "size": {"height": 256, "width": 248}, "crop_size": {"height": 224, "width": 200}},
    ),
    "shorter side": (ViTImageProcessorPil, {**HALF, **CROP, "size": {"shortest_edge": 256}, "crop_size": 224}),
    "ConvNext": (
        ConvNextImageProcessorPil,
        {**HALF, "resample": 3, "crop_pct": 0.875, "size": {"shortest_edge": 224}},
    ),
    "ResNet": (ConvNextImageProcessorPil, {**HALF, "resample": 3, "crop_pct": 0.95, "size": {"shortest_edge": 288}}),
    "ConvNext 384": (
        ConvNextImageProcessorPil,
        {**HALF, "resample": 3, "crop_pct": 0.875, "size": {"shortest_edge": 384}},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("size", [(300, 260), (211, 340)])
def test_older_and_other_processors_are_read_as_transformers_reads_them(name, size):
    processor_class, config = OTHERS[name]
    data = encoded(picture(*size))
    preprocessing = Preprocessing.from_config(config, (224, 224))
    expected = processed(processor_class.from_dict(config), data).float()
    torch.testing.assert_close(ours(data, preprocessing), expected, rtol=0, atol=1e-5)
    # and what a run that goes on from such a model exports is the same again
    torch.testing.assert_close(processed(preprocessing.image_processor(), data).float(), expected, rtol=0, atol=1e-5)


def test_config_without_a_size_takes_the_models():
    assert Preprocessing.from_config({}, (48, 64)) == Preprocessing((48, 64))


@pytest.mark.parametrize("config", [{"do_resize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_other_steps_are_refused(config):
    with pytest.raises(ValueError, match="not supported"):
        Preprocessing.from_config({"size": 32, **config}, (32, 32))


def test_folder_without_a_processor_says_nothing(tmp_path):
    assert own_preprocessing(str(tmp_path), None, (32, 32)) is None


def test_exported_processor_names_a_class_of_transformers(tmp_path):
    """One that AutoImageProcessor finds with and without torchvision."""
    Preprocessing((32, 32)).image_processor().save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == "ViTImageProcessor"
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", pytest.param("TIFF", marks=pytest.mark.slow), "GIF", "WEBP", "BMP"])
def test_no_damage_to_a_file_is_more_than_a_bad_image(kind):
    """Single bytes changed all over the file, the camera's notes included: pixels or a reason, never an exception."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(20, 14), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    rng = np.random.RandomState(0)
    for _ in range(150):
        changed = bytearray(data)
        for place in rng.randint(0, min(len(data), 300), 2):
            changed[place] = rng.randint(256)
        result = decode_row({"bytes": bytes(changed), "path": "x"}, PREPROCESSINGS["square"])
        assert isinstance(result, str) or result.shape == (32, 32, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(7, 5), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(open_image({"bytes": data, "path": None})), np.asarray(expected))


def test_a_strip_that_would_be_resized_to_gigabytes_is_a_bad_image():
    data = encoded(Image.new("RGB", (2, 65000)))
    result = decode_row({"bytes": data, "path": "x"}, Preprocessing((224, 224), shortest_edge=256))
    assert "DecompressionBomb" in result and "2 x 65000" in result


def test_the_same_steps_at_another_size():
    """As ImageNet's usual 256 -> 224; a resize of both sides; DeiT's resize before a crop."""
    assert Preprocessing((224, 224), shortest_edge=256).at_size((448, 448)) == Preprocessing(
        (448, 448), shortest_edge=512
    )
    assert Preprocessing((224, 224)).at_size((32, 64)) == Preprocessing((32, 64))
    cut = Preprocessing((100, 100), resized=(110, 110)).at_size((50, 200))
    assert cut == Preprocessing((50, 200), resized=(55, 220))
    assert to_pixels(Image.new("RGB", (300, 500)), Preprocessing((10, 10), 12).at_size((20, 40))).shape == (20, 40, 3)
