"""The Python API: every block of docs/api.md, in its order, and what the blocks do not show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import photo_tiles
from PIL import Image
from safetensors.torch import load_file
from shallow import networks
from sklearn.datasets import load_sample_images

import ssl_xcit
from ssl_xcit import api
from ssl_xcit.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime.errors import UserError

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the page's blocks have written, all of them run in order; of 4 blocks, to be quick."""
    folder = tmp_path_factory.mktemp("api")
    photo_tiles(folder / "path/to/images", 8)
    photo_tiles(folder / "path/to/test_images", 4)
    for number, photo in enumerate(load_sample_images().images, 1):
        Image.fromarray(photo).save(folder / f"photo_{number}.jpg")
    names: dict[str, object] = {}
    with networks(4), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            exec(compile(block, "docs/api.md", "exec"), names)
        names["folder"] = folder
        yield names


def test_every_block_of_the_page_runs_and_says_what_it_says(folder):
    assert len(BLOCKS) == 5
    assert (folder["folder"] / "runs/a/metrics.jsonl").exists()
    assert 0 < folder["last"]["train/loss"] < 20
    assert folder["last"]["step"] == 3  # 16 images, 8 a step, two epochs
    assert [row["k"] for row in folder["result"]["accuracy"]] == [5, 10]
    assert folder["labels"].tolist() == [int(i >= 8) for i in folder["indices"].tolist()]
    assert folder["loss"].isfinite()
    assert folder["dino_loss"].center.abs().max() > 0


def test_the_page_uses_every_public_name():
    used = set(re.findall(r"\w+", " ".join(re.findall(r"^from ssl_xcit import (.*)$", PAGE, re.M))))
    assert used == set(ssl_xcit.__all__)
    assert set(ssl_xcit.__all__) <= set(dir(ssl_xcit))


def test_the_embedding_is_the_normalised_images_through_the_teacher(folder):
    tensors = load_file(folder["folder"] / "runs/a/checkpoints/step_00000004/teacher.safetensors")
    prefix = "backbone."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    backbone = build_xcit("xcit_nano_12_p16", num_classes=0).eval()
    backbone.load_state_dict(state)
    images = folder["images"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = backbone.forward_features((images / 255 - mean) / std)
    for given in (images, images / 255):
        found = folder["model"].embed(given)
        torch.testing.assert_close(found.cls, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.patches, expected[1], rtol=1e-4, atol=1e-4)
    assert not found.cls.requires_grad
    assert folder["model"].facts["step"] == 4


def test_embedding_leaves_the_mode_and_the_statistics_alone(folder):
    model = folder["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = model.embed(folder["images"])
    assert model.backbone.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert found.cls.equal(model.embed(folder["images"]).cls)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (torch.randn(1, 3, 32, 32), r"floats in \[0, 1\] that are not normalised yet"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "expected uint8 images"),
        (torch.zeros(1, 1, 32, 32), "the images have 1 channels but mean has 3"),
    ],
)
def test_images_that_would_be_embedded_wrongly_are_refused(folder, images, complaint):
    with pytest.raises(UserError, match=complaint):
        folder["model"].embed(images)


def test_a_mistake_in_a_setting_is_the_commands_message():
    with pytest.raises(UserError, match=r"unknown option --epoch; nearest: --optim\.epochs"):
        api.pretrain(arch="xcit_nano_12_p16", data="a", out="b", epoch=3)
    with pytest.raises(UserError, match="give exactly one of --checkpoint"):
        api.knn(train="a", test="b")
    with pytest.raises(UserError, match="no checkpoint at nowhere"):
        api.load("nowhere")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ssl_xcit.nothing  # noqa: B018


def test_settings_reach_the_configuration_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr(api, "train", lambda config: seen.append(config) or {})
    api.pretrain(
        arch="xcit_nano_12_p16", data=Path("a b"), out="", lr=1 / 3, norm_last_layer=True,
        global_crops_scale=(0.3, 1.0), mean=[0.5, 0.25, 1 / 7], seed=2**62,
    )  # fmt: skip
    (config,) = seen
    assert (config.data, config.out, config.optim.lr, config.seed) == ("a b", "", 1 / 3, 2**62)
    assert config.head.norm_last_layer
    assert config.crops.global_crops_scale == (0.3, 1.0)
    assert config.crops.mean == (0.5, 0.25, 1 / 7)
    assert config.optim.epochs == 300  # the recipe's


@pytest.mark.parametrize(("threads", "expected"), [(8, 3), (2, 2)])
def test_training_takes_no_more_threads_than_cores(monkeypatch, threads, expected):
    chosen = []
    monkeypatch.setattr(api, "train", lambda _: {})
    monkeypatch.setattr(api.processor, "usable_cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which would be set
    api.pretrain(arch="xcit_nano_12_p16", data="a", out="b")
    assert chosen == [expected]


def test_importing_the_package_loads_nothing():
    code = "import sys, ssl_xcit; print({'torch', 'numpy', 'yaml', 'numba'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
