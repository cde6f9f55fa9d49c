"""The kernels against Pillow, torchvision and torch, as a rule bit for bit."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import chisquare, ks_2samp
from sklearn.datasets import load_sample_image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize
from torchvision.transforms import functional as F

from ssl_xcit.data import kernels
from ssl_xcit.data.batches import view_table
from ssl_xcit.data.views import EvalView, View, dino_views, three_augment_views
from ssl_xcit.runtime import draws

PHOTO = load_sample_image("china.jpg")  # (427, 640, 3)
SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "imagenet_sample" / "train"
FILTERS = {kernels.BICUBIC: Image.BICUBIC, kernels.BILINEAR: Image.BILINEAR}


def planes(image: Image.Image) -> np.ndarray:
    """(channels * height * width,) as the kernels hold an image."""
    pixels = np.asarray(image)
    return np.moveaxis(np.atleast_3d(pixels), -1, 0).flatten()


def resized(pixels, box, out_size, window, filter_, flip):
    table = np.zeros(1, kernels.VIEW)
    table["size"], table["sigma"] = window[2], 1
    height, width, channels = pixels.shape
    work = kernels.make_scratch(table, channels, height * width, height, width)
    work.pixels[: pixels.size] = pixels.reshape(-1)
    out = np.zeros(channels * window[2] ** 2, np.uint8)
    kernels.resize(out, work, channels, width, box, out_size, window, filter_, flip)
    return out


def mix(z: int) -> int:
    """SplitMix64's finaliser in Python's integers."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


class Draws:
    """The draws of one view, in Python's integers."""

    def __init__(self, seed: int, epoch: int, index: int, view: int) -> None:
        self.key = mix(mix(mix(mix(seed) ^ epoch) ^ index) ^ mix(view + 1))

    def __getitem__(self, counter: int) -> float:
        return (mix(self.key ^ mix(counter)) >> 11) * 2.0**-53

    def between(self, counter: int, low: float, high: float) -> float:
        return low + (high - low) * self[counter]


def expected_view(image: Image.Image, view: View, draws: Draws) -> np.ndarray:
    """A view by Pillow and torchvision's functions on PIL images; the parameters by these lines."""
    width, height = image.size
    for attempt in range(10):
        area = height * width * draws.between(2 * attempt, *view.scale)
        ratio = math.exp(draws.between(2 * attempt + 1, *np.log(view.ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1))
            break
    else:
        w, h = width, height
        if width / height < view.ratio[0]:
            h = round(width / view.ratio[0])
        elif width / height > view.ratio[1]:
            w = round(height * view.ratio[1])
        top, left = (height - h) // 2, (width - w) // 2
    mode = InterpolationMode(view.interpolation)
    if view.simple_crop:
        image = F.pad(F.resize(image, view.size, mode), 4, padding_mode="reflect")
        room = [side - view.size + 1 for side in image.size[::-1]]
        corner = (int(draws[20 + axis] * room[axis]) for axis in range(2))
        image = F.crop(image, *corner, view.size, view.size)
    else:
        image = F.resized_crop(image, top, left, h, w, [view.size, view.size], mode)
    if draws[22] < view.flip:
        image = F.hflip(image)
    blurred = ImageFilter.GaussianBlur(draws.between(31, *view.blur_sigma))
    if view.one_of:
        image = [
            lambda: F.to_grayscale(image, 3),
            lambda: ImageOps.solarize(image),
            lambda: image.filter(blurred),
        ][int(3 * draws[33])]()
    if draws[23] < view.jitter:
        operations = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
        strengths = [view.brightness, view.contrast, view.saturation]
        factors = [
            draws.between(24 + i, max(0, 1 - strength), 1 + strength)
            for i, strength in enumerate(strengths)
        ]
        operations.append(F.adjust_hue)
        factors.append(draws.between(27, -view.hue, view.hue))
        rank, left = int(draws[28] * 24), [0, 1, 2, 3]
        while left:
            rank, i = divmod(rank, len(left))
            if (*strengths, view.hue)[left[i]]:  # ColorJitter leaves a strength of 0 out
                image = operations[left[i]](image, factors[left[i]])
            del left[i]
    if view.one_of:
        return np.moveaxis(np.asarray(image), -1, 0)
    if draws[29] < view.grayscale:
        image = F.to_grayscale(image, 3)
    if draws[30] < view.blur:
        image = image.filter(blurred)
    if draws[32] < view.solarize:
        image = ImageOps.solarize(image)
    return np.moveaxis(np.asarray(image), -1, 0)


def rendered(stored, views, keys, floats=False, scale=1.0, shift=0.0, channels=3):
    """(status, [(n, channels, size, size) per view]) of stored images, each (bytes, h, w, mode)."""
    n = len(stored)
    data = np.frombuffer(b"".join(item[0] for item in stored), np.uint8)
    sizes = np.array([len(item[0]) for item in stored])
    heights, widths = (np.array([item[i] for item in stored], np.int32) for i in (1, 2))
    modes = np.array([item[3] for item in stored], np.uint8)
    table = view_table(views)
    dtype = np.float32 if floats else np.uint8
    counts = n * channels * table["size"] ** 2 * np.dtype(dtype).itemsize
    offsets = np.cumsum(counts) - counts
    out, status = np.zeros(counts.sum(), np.uint8), np.zeros(n, np.uint8)
    scales, shifts = np.full(channels, scale, np.float32), np.full(channels, shift, np.float32)
    kernels.render(
        data, np.cumsum(sizes) - sizes, sizes, heights, widths, modes, channels, np.arange(n),
        np.arange(n), np.asarray(keys, np.uint64), table, offsets, scales, shifts, floats, out,
        status, np.zeros(1, np.int64),
    )  # fmt: skip
    shapes = [(n, channels, view.size, view.size) for view in views]
    parts = np.split(out, offsets[1:])
    return status, [
        part.view(dtype).reshape(shape) for part, shape in zip(parts, shapes, strict=True)
    ]


def jpeg(pixels: np.ndarray, **options) -> tuple[bytes, int, int, int]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue(), *pixels.shape[:2], 0


def decoded(stored: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))


# --- random numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 299), (2**63 + 5, 7)])
def test_keys_are_those_of_the_torch_module_and_of_python_integers(seed, epoch):
    indices = np.array([0, 1, 5, 1_281_166])
    keys = kernels.sample_keys(seed, epoch, indices)
    for view in (0, 1, 9):
        view_keys = kernels.mix64_array(keys ^ np.uint64(mix(view + 1)))
        assert view_keys.tolist() == [Draws(seed, epoch, int(i), view).key for i in indices]
        expected = draws.stream(seed, epoch, torch.from_numpy(indices), view)
        assert view_keys.view(np.int64).tolist() == expected.tolist()


def test_draws_are_the_top_53_bits_and_the_torch_modules_are_their_top_24():
    key = kernels.sample_keys(3, 4, np.array([5]))
    drawn = np.empty(kernels.DRAWS)
    kernels.draw(drawn, key[0])
    python = [(mix(int(key[0]) ^ mix(c)) >> 11) * 2.0**-53 for c in range(kernels.DRAWS)]
    assert drawn.tolist() == python
    single = draws.uniform(torch.from_numpy(key.view(np.int64)), torch.arange(kernels.DRAWS))
    assert np.floor(drawn * 2**24).tolist() == (single * 2**24).flatten().tolist()


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_crops_have_the_distribution_of_torchvisions(scale):
    height, width, n = 375, 500, 20_000
    drawn = np.empty(kernels.DRAWS)
    ours = np.empty((n, 4))
    keys = kernels.sample_keys(0, 0, np.arange(n))
    for i in range(n):
        kernels.draw(drawn, keys[i])
        ours[i] = kernels.random_crop(drawn, height, width, np.array(scale), np.log([0.75, 4 / 3]))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)], float
    )
    for name, (a, b) in {
        "top": (ours[:, 0], theirs[:, 0]),
        "left": (ours[:, 1], theirs[:, 1]),
        "area": (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        "ratio": (ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]),
    }.items():
        assert ks_2samp(a, b).pvalue > 0.01, name


def test_the_four_colour_operations_come_in_all_orders_equally_often():
    orders = [int(Draws(0, 0, index, 0)[28] * 24) for index in range(4800)]
    assert chisquare(np.bincount(orders, minlength=24)).pvalue > 0.01


# --- resampling --------------------------------------------------------------------------------


@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("size", [224, 96, 50, 16, 7, 1])
def test_a_resized_crop_is_pillows(filter_, size):
    random = np.random.default_rng(size)
    image = Image.fromarray(PHOTO)
    for flip in (False, True, False, True):
        h, w = random.integers(1, 428), random.integers(1, 641)
        top, left = random.integers(0, 428 - h), random.integers(0, 641 - w)
        box = (int(top), int(left), int(h), int(w))
        ours = resized(PHOTO, box, (size, size), (0, 0, size), filter_, flip)
        crop = image.crop((left, top, left + w, top + h)).resize((size, size), FILTERS[filter_])
        np.testing.assert_array_equal(ours, planes(ImageOps.mirror(crop) if flip else crop))


@pytest.mark.parametrize(
    ("h", "w"),
    [(427, 60), (427, 213), (427, 325), (427, 326), (1, 640), (427, 1), (1, 1), (2, 3), (32, 32)],
)
def test_extreme_shapes_and_either_order_of_the_passes_are_pillows(h, w):
    # (427, 325) to 224 shrinks the height by 203 > 2 x 101 pixels: there Pillow 13 goes vertically
    # first, and horizontally from width 326 on
    for size in (224, 32):
        ours = resized(PHOTO, (0, 0, h, w), (size, size), (0, 0, size), kernels.BICUBIC, False)
        crop = Image.fromarray(PHOTO).crop((0, 0, w, h)).resize((size, size), Image.BICUBIC)
        np.testing.assert_array_equal(ours, planes(crop))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_every_channel_is_resized_as_pillows_gray_image(channels):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (61, 83, channels), dtype=np.uint8)
    box = (5, 7, 50, 60)
    ours = resized(pixels, box, (48, 48), (0, 0, 48), kernels.BICUBIC, False)
    for c, plane in enumerate(ours.reshape(channels, 48 * 48)):
        image = Image.fromarray(np.ascontiguousarray(pixels[..., c]))
        crop = image.crop((7, 5, 67, 55)).resize((48, 48), Image.BICUBIC)
        np.testing.assert_array_equal(plane, planes(crop))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width"), [(427, 640), (640, 427), (300, 301), (301, 300), (90, 61), (500, 130)]
)
def test_evaluation_views_are_torchvisions(height, width, interpolation):
    pixels = np.asarray(Image.fromarray(PHOTO).resize((width, height)))
    mode = InterpolationMode(interpolation)
    views = [
        EvalView(64, 57, interpolation),
        EvalView(72, 72, interpolation),
        EvalView(48, None, interpolation),
    ]
    stored = pixels.tobytes(), height, width, 1
    _, ours = rendered([stored], views, [0])
    transforms = [
        Compose([Resize(64, mode), CenterCrop(57)]),
        Compose([Resize(72, mode), CenterCrop(72)]),
        Resize((48, 48), mode),
    ]
    for view, transform in zip(ours, transforms, strict=True):
        expected = np.moveaxis(np.asarray(transform(Image.fromarray(pixels))), -1, 0)
        np.testing.assert_array_equal(view[0], expected)


# --- colour and blur ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(PHOTO).resize((90, 90), Image.BICUBIC)


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.61, 1.0, 1.39, 2.4])
def test_colour_adjustments_are_pillows(image, factor):
    factor = float(np.float32(factor))
    brightness, contrast, saturation = (planes(image) for _ in range(3))
    kernels.adjust_brightness(brightness, np.float32(factor))
    kernels.adjust_contrast(contrast, 3, np.float32(factor))
    kernels.adjust_saturation(saturation, np.float32(factor))
    np.testing.assert_array_equal(brightness, planes(F.adjust_brightness(image, factor)))
    np.testing.assert_array_equal(contrast, planes(F.adjust_contrast(image, factor)))
    np.testing.assert_array_equal(saturation, planes(F.adjust_saturation(image, factor)))


def test_contrast_of_one_channel_is_that_of_a_gray_image(image):
    ours = planes(image.convert("L"))
    kernels.adjust_contrast(ours, 1, np.float32(1.3))
    np.testing.assert_array_equal(ours, planes(F.adjust_contrast(image.convert("L"), 1.3)))


def test_hue_is_pillows_for_every_colour_there_is():
    codes = np.arange(1 << 24, dtype=np.uint32)
    cube = codes.view(np.uint8).reshape(4096, 4096, 4)[..., :3]
    image = Image.fromarray(np.ascontiguousarray(cube))
    ours = planes(image)
    hue = -0.0731
    kernels.adjust_hue(ours, np.float32(int(hue * 255) & 255))
    np.testing.assert_array_equal(ours, planes(F.adjust_hue(image, hue)))


@pytest.mark.parametrize("hue", [-0.5, -0.1, -0.001, 0.0, 0.004, 0.1, 0.5])
def test_hue_is_pillows_for_every_shift(image, hue):
    ours = planes(image)
    kernels.adjust_hue(ours, np.float32(int(hue * 255) & 255))
    np.testing.assert_array_equal(ours, planes(F.adjust_hue(image, hue)))


def test_grayscale_and_solarize_are_pillows(image):
    gray, solarized = planes(image), planes(image)
    kernels.grayscale(gray)
    kernels.solarize(solarized)
    np.testing.assert_array_equal(gray, planes(F.to_grayscale(image, 3)))
    np.testing.assert_array_equal(solarized, planes(ImageOps.solarize(image, 128)))


@pytest.mark.parametrize(("size", "channels"), [(90, 3), (90, 1), (3, 3), (1, 3)])
def test_blur_is_pillows_at_every_sigma(image, size, channels):
    image = image.resize((size, size)).convert("RGB" if channels == 3 else "L")
    a, b = (np.empty((size + 20) ** 2, np.uint8) for _ in range(2))
    for sigma in [0.0, *np.arange(0.1, 2.01, 0.05), 3.3, 5.0]:
        ours = planes(image)
        kernels.blur(ours, channels, size, sigma, a, b)
        expected = planes(image.filter(ImageFilter.GaussianBlur(float(sigma))))
        np.testing.assert_array_equal(ours, expected, err_msg=f"sigma {sigma}")


# --- whole views -------------------------------------------------------------------------------


def test_decoding_is_pillows_bit_for_bit():
    tiles = [PHOTO[80 * i : 80 * i + 77, 60 * i : 60 * i + 77] for i in range(4)]
    options = [{"quality": 90}, {"quality": 40, "subsampling": 0}, {"progressive": True}]
    stored = [jpeg(np.ascontiguousarray(tile), **o) for tile in tiles for o in options]
    stored.append(jpeg(np.ascontiguousarray(tiles[0][..., 0])))  # a gray JPEG becomes RGB
    status, (same_size,) = rendered(stored, [EvalView(77)], np.zeros(len(stored)))
    assert not status.any()
    for view, (data, *_) in zip(same_size, stored, strict=True):
        np.testing.assert_array_equal(view, np.moveaxis(decoded(data), -1, 0))


def test_every_view_of_a_dino_recipe_is_what_pillow_gives_for_the_same_parameters():
    tiles = [PHOTO[:300, :400], PHOTO[100:400, 400:], PHOTO[:60, :90], PHOTO[:200, :30]]
    stored = [jpeg(np.ascontiguousarray(tile), quality=90) for tile in tiles] * 6
    recipe = dino_views(global_crops_size=64, local_crops_size=30, local_crops_number=4)
    # Every operation often enough that no order or combination goes unseen
    recipe.append([View(40, (0.05, 1.0), (0.2, 5.0), "bilinear", **ALWAYS)])
    views = [view for group in recipe for view in group]
    keys = kernels.sample_keys(7, 3, np.arange(len(stored)))
    status, ours = rendered(stored, views, keys)
    assert not status.any()
    for i, (data, *_) in enumerate(stored):
        image = Image.fromarray(decoded(data))
        for v, view in enumerate(views):
            expected = expected_view(image, view, Draws(7, 3, i, v))
            np.testing.assert_array_equal(ours[v][i], expected, err_msg=f"image {i}, view {v}")


def test_three_augment_is_what_pillow_gives_for_the_same_parameters():
    tiles = [PHOTO[:300, :400], PHOTO[100:400, 400:], PHOTO[:60, :90], PHOTO[:33, :31]]
    stored = [jpeg(np.ascontiguousarray(tile), quality=90) for tile in tiles] * 12
    views = [three_augment_views(40, simple_crop=simple)[0][0] for simple in (True, False)]
    # Small enough that most windows reach over an edge, with every operation that there is
    views.append(View(5, (1.0, 1.0), simple_crop=True, interpolation="bilinear", **ALWAYS))
    keys = kernels.sample_keys(2, 9, np.arange(len(stored)))
    status, ours = rendered(stored, views, keys)
    assert not status.any()
    chosen = set()
    for i, (data, *_) in enumerate(stored):
        image = Image.fromarray(decoded(data))
        for v, view in enumerate(views):
            drawn = Draws(2, 9, i, v)
            expected = expected_view(image, view, drawn)
            np.testing.assert_array_equal(ours[v][i], expected, err_msg=f"image {i}, view {v}")
            chosen.add((v, int(3 * drawn[33])))
    assert {(v, c) for v in (0, 1) for c in range(3)} <= chosen


ALWAYS = {
    **{"jitter": 1.0, "brightness": 0.8, "contrast": 1.2, "saturation": 0.8, "hue": 0.5},
    **{"grayscale": 0.1, "blur": 0.9, "blur_sigma": (0.0, 3.0), "solarize": 0.5},
}


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_spared_what_needs_rgb(channels):
    random = np.random.default_rng(channels)
    pixels = random.integers(0, 256, (40, 50, channels), dtype=np.uint8)
    colours = {"saturation": 0.8, "hue": 0.4, "grayscale": 1.0}
    plain = {"jitter": 1.0, "brightness": 0.5, "blur": 1.0, "solarize": 0.5}
    views = [View(24, (0.3, 1.0), **plain, **colours), View(24, (0.3, 1.0), **plain)]
    stored = [(pixels.tobytes(), 40, 50, 1)]
    key = int(kernels.sample_keys(0, 0, np.array([0]))[0])
    _, (with_colours, _) = rendered(stored, views, [key], channels=channels)
    _, (without, _) = rendered(stored, views[::-1], [key], channels=channels)
    np.testing.assert_array_equal(with_colours, without)


def test_normalised_views_are_the_bytes_normalised():
    stored = [jpeg(np.ascontiguousarray(PHOTO[:120, :160]))]
    views = dino_views(global_crops_size=40, local_crops_size=24)[0]
    keys = kernels.sample_keys(0, 0, np.array([4]))
    _, plain = rendered(stored, views, keys)
    scale, shift = np.float32(1 / (255 * 0.226)), np.float32(-0.45 / 0.226)
    _, floats = rendered(stored, views, keys, True, scale, shift)
    for bytes_, single in zip(plain, floats, strict=True):
        expected = F.normalize(torch.from_numpy(bytes_) / 255, [0.45] * 3, [0.226] * 3)
        torch.testing.assert_close(torch.from_numpy(single), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the optional ImageNet sample is not there")
def test_views_of_the_imagenet_sample_are_pillows():
    files = sorted(SAMPLE.rglob("*.JPEG"))[::8]
    stored = []
    for file in files:
        with Image.open(file) as image:
            stored.append((file.read_bytes(), image.height, image.width, 0))
    views = [view for group in dino_views(local_crops_number=1) for view in group]
    status, ours = rendered(stored, views, kernels.sample_keys(0, 0, np.arange(len(stored))))
    assert not status.any()
    for i, (data, *_) in enumerate(stored):
        for v, view in enumerate(views):
            expected = expected_view(Image.fromarray(decoded(data)), view, Draws(0, 0, i, v))
            np.testing.assert_array_equal(ours[v][i], expected, err_msg=f"{files[i]}, view {v}")


# --- broken images -----------------------------------------------------------------------------


def pillow_refuses(data: bytes) -> bool:
    try:
        decoded(data)
    except (OSError, SyntaxError):
        return True
    return False


def test_a_cut_jpeg_is_reported_wherever_it_is_cut():
    data, height, width, _ = jpeg(np.ascontiguousarray(PHOTO[:100, :100]), quality=90)
    cuts = np.linspace(0, len(data) - 3, 50).astype(int)
    stored = [(data[:cut] or b"\0", height, width, 0) for cut in cuts]
    status, _ = rendered(stored, [EvalView(16)], np.zeros(len(stored)))
    assert (status > kernels.DAMAGED).all()
    assert all(pillow_refuses(item[0]) for item in stored)


def test_bit_flips_are_survived_and_reported_and_the_next_image_is_not_affected():
    intact = jpeg(np.ascontiguousarray(PHOTO[:100, :100]), quality=90)
    data, height, width, _ = intact
    random = np.random.default_rng(0)
    stored = []
    for flips in [1] * 200 + [4] * 200:
        flipped = bytearray(data)
        for position in random.integers(0, len(data), flips):
            flipped[position] ^= 1 << random.integers(8)
        stored += [(bytes(flipped), height, width, 0), intact]
    status, (views,) = rendered(stored, [EvalView(16)], np.zeros(len(stored)))
    assert (status[1::2] == kernels.OK).all()
    assert (views[1::2] == views[1]).all()
    status = status[::2]
    refused = np.array([pillow_refuses(item[0]) for item in stored[::2]])
    assert 0 < refused.sum() < 200
    assert (status[refused] != kernels.OK).all()
    # The decoder names the first of several faults only; that may be superfluous bytes
    assert (status[refused] > kernels.DAMAGED).mean() > 0.95
    # Pillow is lenient; JPEG has no checksum, so a wrong bit may also go unnoticed
    assert refused.sum() < (status > kernels.DAMAGED).sum() < 400


def test_an_image_of_another_size_than_stated_is_reported_not_written():
    data, height, width, _ = jpeg(np.ascontiguousarray(PHOTO[:100, :100]))
    status, _ = rendered([(data, height - 1, width, 0)], [EvalView(16)], [0])
    assert status[0] == kernels.WRONG_SIZE


def test_superfluous_bytes_are_noted_and_the_picture_is_kept():
    data, height, width, _ = jpeg(np.ascontiguousarray(PHOTO[:96, :96]))
    padded = data[:-2] + bytes(7) + data[-2:]
    status, (view,) = rendered([(padded, height, width, 0)], [EvalView(96)], [0])
    assert status[0] == kernels.DAMAGED
    np.testing.assert_array_equal(view[0], np.moveaxis(decoded(padded), -1, 0))


# --- start-up ----------------------------------------------------------------------------------

COLD = """
import numpy as np
from ssl_xcit.data import kernels
import sys
z = kernels.mix64(np.uint64(1))
print(int(z), kernels.CACHE, "ffcv" in sys.modules)
"""


@pytest.mark.parametrize("user_cache", [True, False])
def test_a_read_only_installation_works_with_and_without_a_cache_folder(tmp_path, user_cache):
    package = tmp_path / "install" / "ssl_xcit"
    (package / "data").mkdir(parents=True)
    (package / "runtime").mkdir()
    runtime = [f"runtime/{name}" for name in ("__init__", "errors")]
    data = [f"data/{name}" for name in ("__init__", "kernels", "turbojpeg")]
    for name in ("__init__", *runtime, *data):
        source = Path(kernels.__file__).parents[1] / f"{name}.py"
        (package / f"{name}.py").write_bytes(source.read_bytes())
    # A file where the folder should be keeps even root from writing there
    (package / "data/__pycache__").touch()
    cache = tmp_path / "cache"
    if not user_cache:
        cache.touch()
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "XDG_CACHE_HOME": str(cache)}
    environment.pop("NUMBA_CACHE_DIR", None)
    result = subprocess.run(
        [sys.executable, "-B", "-c", COLD],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert result.stdout.split() == [str(mix(1)), str(user_cache), "False"]
    assert ("NUMBA_CACHE_DIR" in result.stderr) != user_cache
    assert any(cache.rglob("*.nbi")) == user_cache
