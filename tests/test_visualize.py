"""Pictures of what a network sees: attention by hand, PCA by scikit-learn, files, mistakes."""

import math
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import shallow
import torch
from conftest import photo_tiles
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA

from ssl_xcit.data.writer import write_beton
from ssl_xcit.evaluation.subject import Subject, untrained_subject
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.report import sheet
from ssl_xcit.report import visualize as module
from ssl_xcit.report.config import VisualizeConfig
from ssl_xcit.report.visualize import Look, PatchColours, Picture, look, read_pictures, seen_size
from ssl_xcit.runtime.config import load_config
from ssl_xcit.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ARCH = "xcit_nano_12_p16"


@pytest.fixture(scope="module", autouse=True)
def _shallow_networks():
    with shallow.networks():
        yield


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A network whose biases and gains are not those of the start, which would hide mistakes."""
    found = untrained_subject(ARCH, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in found.backbone.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture(scope="module")
def checkpoint(subject, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "official.pth"
    torch.save({"model": subject.backbone.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def photo() -> Picture:
    """Part of a photograph, of 48 x 80 pixels: 3 x 5 patches."""
    return Picture("temple", load_sample_images().images[0][100:148, 200:280].copy())


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / math.fsum(powers) for power in powers]


def test_the_maps_are_the_softmax_of_query_and_keys_head_by_head(subject, photo):
    # From the weights and from what enters the last layer, in float64 and one number at a time.
    layer = subject.backbone.cls_attn_blocks[1]
    entered = []
    hook = layer.norm1.register_forward_hook(lambda _, inputs, __: entered.append(inputs[0][0]))
    seen = look(subject, photo, 0, CPU)
    hook.remove()
    tokens = entered[0].double().numpy()  # (1 + n, d), before the layer's norm
    names = ("weight", "bias")
    gain, shift = (getattr(layer.norm1, name).detach().double().numpy() for name in names)
    weight, bias = (getattr(layer.attn.qkv, name).detach().double().numpy() for name in names)
    d, heads = tokens.shape[1], layer.attn.num_heads
    size = d // heads
    normed = []
    for token in tokens:
        centred = token - sum(token) / d
        normed.append(gain * centred / math.sqrt(sum(centred**2) / d + 1e-6) + shift)
    assert seen.attention.shape == (heads, 3, 5)
    for head in range(heads):
        q_rows = range(head * size, (head + 1) * size)
        query = [weight[r] @ normed[0] + bias[r] for r in q_rows]
        logits = []
        for token in normed:
            key = [weight[d + r] @ token + bias[d + r] for r in q_rows]
            logits.append(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(size))
        expected = np.array(softmax(logits)[1:]).reshape(3, 5)
        np.testing.assert_allclose(seen.attention[head].numpy(), expected, rtol=2e-4)
        assert np.ptp(expected) > 0.1 * expected.mean()  # a flat map would be no test


def test_the_network_sees_the_image_that_is_shown(subject, photo):
    seen = look(subject, photo, 0, CPU)
    np.testing.assert_array_equal(seen.picture.pixels, photo.pixels)
    pixels = torch.from_numpy(photo.pixels).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in subject[1:3])
    with torch.no_grad():
        tokens = subject.backbone.eval().forward_features((pixels - mean) / std)[1][0]
    torch.testing.assert_close(seen.tokens.flatten(0, 1), tokens)
    assert seen.tokens.shape[:2] == (3, 5)


def test_components_are_those_of_scikit_learn(subject, photo):
    looks = [look(subject, photo, size, CPU) for size in (160, 240)]
    for fitted_to in (looks[:1], looks):
        tokens = np.concatenate([a.tokens.flatten(0, 1).double().numpy() for a in fitted_to])
        attention = np.concatenate([a.attention.mean(0).flatten().numpy() for a in fitted_to])
        oracle = PCA(3, svd_solver="full").fit_transform(tokens)
        oracle *= [1 if np.cov(attention, c)[0, 1] >= 0 else -1 for c in oracle.T]
        colours = PatchColours.fit(fitted_to)
        ours = np.concatenate([colours.components(a.tokens).flatten(0, 1) for a in fitted_to])
        np.testing.assert_allclose(ours, oracle, rtol=1e-5, atol=1e-6 * np.abs(oracle).max())
        low, high = np.percentile(oracle, 1, axis=0), np.percentile(oracle, 99, axis=0)
        shown = np.concatenate([colours(a.tokens).flatten(0, 1) for a in fitted_to])
        np.testing.assert_allclose(shown, ((oracle - low) / (high - low)).clip(0, 1), atol=1e-5)
    joint, alone = PatchColours.fit(looks), PatchColours.fit(looks[:1])
    assert not torch.allclose(joint(looks[0].tokens), alone(looks[0].tokens), atol=0.01)


def test_patches_that_are_looked_at_are_bright_whatever_the_sign_of_an_axis():
    generator = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:3]
    where = torch.linspace(-1, 1, 24)
    noise = torch.randn(24, 2, generator=generator)
    parts = torch.cat((9 * where[:, None], 3 * noise[:, :1], noise[:, 1:]), dim=1)
    attention = (1 + where).view(1, 4, 6)
    picture = Picture("x", np.zeros((4, 6, 3), np.uint8))
    for sign in (1, -1):
        tokens = (sign * parts @ axes).view(4, 6, 8)
        red = PatchColours.fit([Look(picture, attention, tokens)])(tokens)[..., 0].flatten()
        assert np.corrcoef(red, where)[0, 1] > 0.9


def test_equal_patches_are_gray_and_equal_attention_is_dark():
    picture = Picture("flat", np.zeros((16, 32, 3), np.uint8))
    a = Look(picture, torch.full((2, 2, 4), 0.1), torch.full((2, 4, 8), 3.0))
    colours = PatchColours.fit([a])(a.tokens)
    assert colours.unique().tolist() == [0.5]
    assert {m.getcolors()[0][0] for m in module.attention_pictures(a.attention)} == {8}


def test_maps_run_over_a_heads_own_range_or_over_all_heads():
    attention = torch.tensor([[[0.0, 0.2]], [[0.0, 0.4]]])
    dark, light = (tuple(bytes.fromhex(module.RAMP[end][1:])) for end in (0, -1))
    own = module.attention_pictures(attention)
    assert [[m.getpixel((x, 0)) for x in (0, 1)] for m in own] == [[dark, light]] * 2
    weak, strong = module.attention_pictures(attention, shared=True)
    assert strong.getpixel((1, 0)) == light
    assert weak.getpixel((0, 0)) == dark
    assert weak.getpixel((1, 0)) not in (dark, light)
    lightness = [
        0.2126 * r + 0.7152 * g + 0.0722 * b
        for r, g, b in (bytes.fromhex(colour[1:]) for colour in module.RAMP)
    ]
    assert lightness == sorted(lightness)


@pytest.mark.parametrize(
    ("image", "size", "patch", "seen"),
    [
        ((500, 375), 0, 16, (480, 368)),  # 480 x 360, 22.5 patches: up
        ((28, 28), 0, 8, (32, 32)),  # 3.5 patches
        ((28, 28), 0, 16, (32, 32)),
        ((100, 50), 320, 16, (320, 160)),
        ((50, 100), 317, 8, (160, 320)),
        ((1000, 10), 0, 16, (480, 16)),  # never less than a patch
    ],
)
def test_both_sides_are_whole_patches_and_keep_their_ratio(image, size, patch, seen):
    assert seen_size(*image, size, patch) == seen


def options(checkpoint: Path, *words: str) -> VisualizeConfig:
    return load_config(VisualizeConfig, argv=[str(checkpoint), *words, "--precision", "fp32"])


def test_files_folders_and_betons_each_give_a_png(checkpoint, photo, tmp_path, capsys):
    odd = tmp_path / "my photo (1), big.png"
    Image.fromarray(photo.pixels).save(odd)
    tiles = photo_tiles(tmp_path / "tiles", 5)
    write_beton(tiles, tmp_path / "t.beton", progress=False)
    words = [str(odd), str(tiles), str(tmp_path / "t.beton"), str(odd), "--limit", "2"]
    written = module.visualize(options(checkpoint, *words, "--out", str(tmp_path / "out")))
    assert [path.name for path in written] == [
        "my photo (1), big.png",
        "flower_002.png",  # the third and eighth of ten
        "temple_002.png",
        "t_2.png",
        "t_7.png",
        "my photo (1), big_2.png",
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in written}
    assert str(written[0]) in capsys.readouterr().out
    with Image.open(written[0]) as strip:
        # image, colours and four heads of 5 x 3 patches, 48 pixels each, and captions
        assert strip.width > 6 * 5 * 48
        assert 3 * 48 < strip.height < 3 * 48 + 100


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_the_strip_shows_the_image_its_colours_and_the_maps(subject, photo, tmp_path, upsample):
    flags = ["--checkpoint", "c", "--images", "i", "--out", "o", "--upsample", upsample]
    config = load_config(VisualizeConfig, argv=flags)
    a = look(subject, photo, 0, CPU)
    strip = np.asarray(module.draw(a, PatchColours.fit([a]), config))
    zoom = 48
    heads = module.attention_pictures(a.attention)
    cells = [Image.fromarray(photo.pixels), module.colour_picture(PatchColours.fit([a])(a.tokens))]
    for k, small in enumerate([*cells, *heads]):
        kind = Image.Resampling.NEAREST if k == 0 else Image.Resampling[upsample.upper()]
        cell = np.asarray(small.resize((5 * zoom, 3 * zoom), kind))
        found = [
            (x, y)
            for y in range(20, 60)
            for x in range(strip.shape[1] - 5 * zoom)
            if (strip[y, x : x + 5 * zoom] == cell[0]).all()
            and (strip[y : y + 3 * zoom, x : x + 5 * zoom] == cell).all()
        ]
        assert len(found) >= 1, k
    mean = load_config(VisualizeConfig, argv=[*flags, "--heads", "mean"])
    assert module.draw(a, PatchColours.fit([a]), mean).width < strip.shape[1] / 1.5


def test_a_supervised_model_is_looked_at_without_its_classifier(photo, tmp_path):
    Image.fromarray(photo.pixels).save(tmp_path / "a.png")
    path = tmp_path / "supervised.pth"
    torch.save({"model": build_xcit(ARCH, num_classes=10).state_dict()}, path)
    config = options(path, str(tmp_path / "a.png"), "--out", str(tmp_path / "out"))
    assert module.visualize(config) == [tmp_path / "out/a.png"]


def test_one_sheet_holds_all_images_with_the_colours_of_one_pca(checkpoint, photos, tmp_path):
    out = tmp_path / "deep" / "sheet.png"
    config = options(checkpoint, str(photos), "--limit", "3", "--pca", "joint", "--out", str(out))
    assert module.visualize(config) == [out]
    with Image.open(out) as sheet:
        assert sheet.height > 3 * 240
    assert list(out.parent.iterdir()) == [out]


def test_images_turn_as_their_exif_says_and_become_what_the_network_takes(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, :8] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (turned,) = read_pictures([str(tmp_path / "a.png")], 3, 0)
    np.testing.assert_array_equal(turned.pixels, np.rot90(pixels, -1))
    (gray,) = read_pictures([str(tmp_path / "a.png")], 1, 0)
    assert gray.pixels.shape == (24, 8, 1)


def test_a_network_of_gray_images_sees_them(photo):
    gray = Picture("gray", photo.pixels[:, :, :1])
    a = look(untrained_subject(ARCH, 0, in_chans=1), gray, 0, CPU)
    assert a.tokens.shape[:2] == (3, 5)
    assert sheet.to_image(a.picture.pixels).mode == "RGB"


def test_mistakes_are_one_line_that_says_what_to_do(checkpoint, photos, tmp_path, subject, photo):
    def fails(*words: str) -> str:
        with pytest.raises(UserError) as caught:
            module.visualize(options(checkpoint, *words, "--out", str(tmp_path / "out")))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "notes.png").write_text("no image")
    assert "notes.png: cannot be read as an image" in fails(str(tmp_path / "notes.png"))
    assert "nowhere.jpg: cannot be read as an image: No such file" in fails(
        str(tmp_path / "nowhere.jpg")
    )
    write_beton(photo_tiles(tmp_path / "t", 1), tmp_path / "g.beton", channels=1, progress=False)
    assert "takes images of 3 channels" in fails(str(tmp_path / "g.beton"))
    (tmp_path / "file").write_text("")
    config = options(checkpoint, str(photos), "--limit", "1", "--out", str(tmp_path / "file/x"))
    with pytest.raises(UserError, match=r"file/x: cannot be written: .*; choose another place"):
        module.visualize(config)
    with pytest.raises(UserError, match=r"missing --images, --out"):
        options(checkpoint)
    broken = subject._replace(backbone=untrained_subject(ARCH, 0).backbone)
    broken.backbone.cls_token.data.fill_(math.nan)
    with pytest.raises(UserError, match="diverged"):
        look(broken, photo, 0, CPU)


def test_the_command_takes_checkpoint_and_images_first(checkpoint, photos, tmp_path):
    script = str(ROOT / "eval" / "visualize.py")
    start = [sys.executable, shallow.PROGRAM, "2", script]
    command = [*start, str(checkpoint), str(photos), "--limit", "1"]
    whole = [*command, "--size", "64", "--out", str(tmp_path / "a.png")]
    done = forked.run(whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "a.png")
    failed = forked.run(command, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
