"""`beton preview` shows the very pixels that the training's loader makes."""

import inspect
import sys

import forked
import numpy as np
import pytest
from PIL import Image

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.views import dino_views
from ssl_xcit.data.writer import write_beton
from ssl_xcit.dino.config import Crops, TrainConfig, read_crops
from ssl_xcit.report.preview import main, write_preview
from ssl_xcit.runtime.config import CONFIGS, load_config, save_config
from ssl_xcit.runtime.errors import UserError

COMMAND = [sys.executable, "-m", "ssl_xcit", "data", "preview"]
RAISED = {"global_crops_size": 72, "local_crops_size": 64, "local_crops_number": 3}  # no zoom
TINY = {"global_crops_size": 30, "local_crops_size": 16, "local_crops_number": 3}


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def corners(picture: np.ndarray, cell: np.ndarray) -> list[tuple[int, int]]:
    """(y, x) of every place of `picture` that shows `cell`, found by looking at all of them."""
    height, width, _ = cell.shape
    found = (picture[: len(picture) - height + 1] == cell[0, 0]).all(-1)
    return [
        (y, x)
        for y, x in np.argwhere(found).tolist()
        if np.array_equal(picture[y : y + height, x : x + width], cell)
    ]


def loader_views(beton, sizes: dict, images: int, seed: int, epoch: int):
    """Views by image (views, h, w, 3), from a loader of another batch size, and the indices."""
    loader = MultiCropLoader(beton, dino_views(**sizes), 1, seed=seed, num_threads=1)
    loader.set_epoch(epoch)
    for _, (large, small, index) in zip(range(images), loader, strict=False):
        yield int(index), [v.permute(1, 2, 0).numpy() for g in (large, small) for v in g[:, 0]]


@pytest.mark.parametrize(("sizes", "zoom"), [(RAISED, 1), (TINY, 4)])
def test_each_row_shows_the_bytes_of_the_loaders_views_in_their_order(
    photos, tmp_path, sizes, zoom
):
    out = tmp_path / "views.png"
    write_preview(photos, out, crops=Crops(**sizes), images=3, seed=5, epoch=2)
    picture, rows = pixels(out), []
    for _, views in loader_views(photos, sizes, 3, seed=5, epoch=2):
        enlarged = [view.repeat(zoom, axis=0).repeat(zoom, axis=1) for view in views]
        places = [corners(picture, view) for view in enlarged]
        assert [len(found) for found in places] == [1] * 5
        first, second, *small = (found[0] for found in places)
        assert first[0] == second[0] == small[0][0]
        assert first[1] < second[1] < small[0][1]
        assert small == sorted(small)  # as one reads
        rows.append(first[0])
    assert rows == sorted(set(rows))
    assert len(set(np.diff(rows))) == 1


def test_a_row_begins_with_the_stored_image(tmp_path):
    """Images smaller than a row are shown on the scale of the views, to the pixel."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    stored = rng.integers(0, 256, (4, 20, 24, 3), np.uint8)
    for i, image in enumerate(stored):
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    write_beton(tmp_path / "in", tmp_path / "x.beton", progress=False)
    write_preview(tmp_path / "x.beton", tmp_path / "x.png", crops=Crops(**TINY), images=99)
    picture, last = pixels(tmp_path / "x.png"), (0, 0)
    for index, views in loader_views(tmp_path / "x.beton", TINY, 4, seed=0, epoch=0):
        (place,) = corners(picture, stored[index].repeat(4, axis=0).repeat(4, axis=1))
        ((y, x),) = corners(picture, views[0].repeat(4, axis=0).repeat(4, axis=1))
        assert place[0] == y
        assert place[1] < x
        assert place[0] > last[0]
        last = place


def test_the_same_seed_and_epoch_give_the_same_file_and_others_another(photos, tmp_path):
    def draw(**chosen) -> bytes:
        write_preview(photos, tmp_path / "x.png", crops=Crops(**TINY), images=2, **chosen)
        return (tmp_path / "x.png").read_bytes()

    drawn = [draw(seed=1, epoch=3), draw(seed=1, epoch=3), draw(seed=2, epoch=3), draw(seed=1)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_one_channel_is_gray_and_of_many_the_first_three_are_shown(tmp_path, channels):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(2):
        image = rng.integers(0, 256, (40, 40, channels), np.uint8)
        np.save(tmp_path / "in" / f"{i}.npy", image)
    path = tmp_path / "x.beton"
    write_beton(tmp_path / "in", path, channels=channels, progress=False)
    write_preview(path, tmp_path / "x.png", crops=Crops(**RAISED))
    picture = pixels(tmp_path / "x.png")
    for _, views in loader_views(path, RAISED, 2, seed=0, epoch=0):
        shown = [0, 1, 2] if channels == 5 else [0, 0, 0]
        assert len(corners(picture, views[1][..., shown])) == 1


def test_a_corrupt_image_is_named_and_the_views_are_its_substitutes(photos, tmp_path):
    beton = Beton(photos)
    index = next(loader_views(photos, TINY, 1, seed=0, epoch=0))[0]
    data = bytearray(photos.read_bytes())
    start = beton.pointers[index]
    data[start : start + 100] = bytes(100)
    (tmp_path / "x.beton").write_bytes(data)
    sizes = {"crops": Crops(**RAISED), "images": 1}
    write_preview(tmp_path / "x.beton", tmp_path / "corrupt.png", **sizes)
    write_preview(photos, tmp_path / "good.png", **sizes)
    ((_, views),) = loader_views(tmp_path / "x.beton", RAISED, 1, seed=0, epoch=0)
    assert len(corners(pixels(tmp_path / "corrupt.png"), views[0])) == 1
    assert corners(pixels(tmp_path / "good.png"), views[0]) == []


def test_without_local_views_and_with_one_it_still_draws(photos, tmp_path):
    for number in (0, 1):
        crops = Crops(global_crops_size=40, local_crops_size=8, local_crops_number=number)
        assert write_preview(photos, tmp_path / "x.png", crops=crops, images=1)[0] == 1


def test_the_settings_of_the_views_are_the_arguments_of_dino_views():
    """So that a training, and a preview, of the defaults are DINO's."""
    parameters = inspect.signature(dino_views).parameters.values()
    assert Crops().view_arguments() == {p.name: p.default for p in parameters}
    assert dino_views(**Crops(hue=0.2).view_arguments()) == dino_views(hue=0.2)


def test_views_of_a_file_are_those_of_a_training_with_it(tmp_path):
    def trained(*flags: str) -> Crops:
        argv = ["--data", "x", "--out", "y", "--probe.every", "0", *flags]
        return load_config(TrainConfig, ("pretrain/{arch}.yaml",), argv).crops

    arch = "xcit_nano_12_p8"
    recipe = CONFIGS / "pretrain" / f"{arch}.yaml"
    assert read_crops(recipe) == trained("--arch", arch) != Crops()
    demo = CONFIGS / "demo.yaml"
    assert read_crops(demo) == trained("--config", str(demo))
    # A file that names its architecture is laid over the architecture's recipe
    (tmp_path / "mine.yaml").write_text(f"arch: {arch}\ncrops: {{hue: 0.2}}\n")
    mine = read_crops(tmp_path / "mine.yaml")
    assert mine == trained("--config", str(tmp_path / "mine.yaml"))
    assert (mine.hue, mine.local_crops_number) == (0.2, 6)
    save_config(TrainConfig(arch, "x", "y", crops=mine), tmp_path / "config.yaml")
    assert read_crops(tmp_path / "config.yaml") == mine
    (tmp_path / "none.yaml").write_text("lr: 1e-3\n")
    assert read_crops(tmp_path / "none.yaml") == Crops()


def test_the_command_draws_with_a_configuration(photos, tmp_path, capsys):
    out, config = tmp_path / "views.png", CONFIGS / "demo.yaml"
    main([str(photos), "--out", str(out), "--config", str(config), "--images", "2"])
    height, width, _ = pixels(out).shape
    assert capsys.readouterr().out == f"wrote {out}: views of 2 images, {width} x {height} pixels\n"
    write_preview(photos, tmp_path / "again.png", crops=read_crops(config), images=2)
    assert np.array_equal(pixels(out), pixels(tmp_path / "again.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, r"images must be in \[1, 2\^63\), got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"epoch": -1}, r"epoch must be in \[0, 2\^63\), got -1"),
        ({"crops": Crops(global_crops_size=9000)}, "show fewer images"),
        ({"out": "views.jpg"}, r"expected a name that ends in \.png"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(photos, tmp_path, options, message):
    arguments = {"path": photos, "out": tmp_path / "x.png"} | options
    if "out" in options:
        arguments["out"] = tmp_path / options["out"]
    with pytest.raises(UserError, match=message):
        write_preview(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_process_ends_in_one_line_and_status_2(photos, tmp_path):
    command = [*COMMAND, tmp_path / "no.beton", "--out", tmp_path / "x.png"]
    done = forked.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path}/no.beton: expected a .beton file, found none; "
        "write one with `ssl-xcit data write`\n"
    )


def test_a_picture_that_cannot_be_written_is_one_line(photos, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    for out, reason in (
        ("nowhere/x.png", "cannot be written: No such file or directory"),
        ("folder.png", "is a folder, expected the name of a file to write"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(photos), "--out", str(tmp_path / out), "--images", "1"])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: {tmp_path / out}: {reason}\n"
    with pytest.raises(SystemExit) as stopped:
        main([str(photos), "--out", "x.png", "--config", str(tmp_path / "no.yaml")])
    assert stopped.value.code == 2
    assert "cannot read the configuration" in capsys.readouterr().err
