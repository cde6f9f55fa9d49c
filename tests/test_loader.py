"""The loaders: what they promise about order, randomness, memory, threads and faults."""

import gc
import hashlib
import logging
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from ssl_xcit.data.batches import default_threads
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.loader import EvalLoader, MultiCropLoader, epoch_order
from ssl_xcit.data.views import EvalView, View, dino_views, supervised_views
from ssl_xcit.data.writer import write_beton
from ssl_xcit.runtime.errors import UserError

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"  # china.jpg and flower.jpg, 640 x 427
RECIPE = dino_views(
    global_crops_size=48, local_crops_size=32, local_crops_number=3, local_blur_prob=0.5
)
GOLDEN = ("37d3a4e7f55c0541", "880afa90e26b9810", "32ae72fe57fecb9e")
"""SHA-256 of samples 0-31, 32-63 and 64-95 of epoch 5 with seed 11, see `sequence`."""


@pytest.fixture(autouse=True)
def watchdog():
    """A hang is a failure after five minutes, not a test run that never ends."""

    def bark(*_):
        raise TimeoutError("the test hangs")

    previous = signal.signal(signal.SIGALRM, bark)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Beton:
    """96 images: scikit-learn's two photographs in turn, their JPEG bytes untouched."""
    folder = tmp_path_factory.mktemp("originals")
    for i in range(96):
        os.link(folder / f"{i % 2:03d}.jpg", folder / f"{i:03d}.jpg") if i > 1 else shutil.copy(
            PHOTOS / ("china.jpg", "flower.jpg")[i], folder / f"{i:03d}.jpg"
        )
    write_beton(folder, folder / "originals.beton", labels=False, progress=False)
    return Beton(folder / "originals.beton")


@pytest.fixture(scope="session")
def cuttings(tmp_path_factory) -> Path:
    """A .beton of 60 labelled JPEGs of many sizes and shapes, cut from the two photographs."""
    folder = tmp_path_factory.mktemp("cuttings")
    draw = random.Random(0)
    for name in ("china", "flower"):
        (folder / "images" / name).mkdir(parents=True)
        with Image.open(PHOTOS / f"{name}.jpg") as photo:
            for i in range(30):
                width, height = draw.randint(40, 300), draw.randint(40, 300)
                left, top = draw.randint(0, 640 - width), draw.randint(0, 427 - height)
                cutting = photo.crop((left, top, left + width, top + height))
                cutting.save(folder / "images" / name / f"{i:02d}.jpg", quality=90)
    write_beton(folder / "images", folder / "cuttings.beton", progress=False)
    return folder / "cuttings.beton"


def broken_copy(path: Path, folder: Path, broken: dict[int, str]) -> Path:
    """A copy of a .beton in which some images are `cut` (their second half zero) or `gone`."""
    beton = Beton(path)
    data = bytearray(path.read_bytes())
    for index, how in broken.items():
        start, size = int(beton.pointers[index]), int(beton.sizes[index])
        begin = start + (size // 2 if how == "cut" else 0)
        data[begin : start + size] = bytes(start + size - begin)
    copy = folder / "broken.beton"
    copy.write_bytes(data)
    return copy


def rows(loader: MultiCropLoader) -> list[tuple[int, list[np.ndarray]]]:
    """(index, views) of every image in the order in which they come."""
    found = []
    for *groups, indices in loader:
        for place, index in enumerate(indices.tolist()):
            found.append((index, [group[:, place].numpy().copy() for group in groups]))
    return found


def collect(loader) -> dict[int, list[np.ndarray]]:
    """{image: its views} of one iteration; an image that comes twice is an error."""
    views = {}
    for *groups, indices in loader:
        for n, index in enumerate(indices.tolist()):
            assert index not in views
            views[index] = [group[:, n].numpy().copy() for group in groups]
    return views


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- layout and order --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_holds_globals_locals_and_indices_in_contiguous_memory(cuttings, dtype):
    loader = MultiCropLoader(cuttings, RECIPE, 8, dtype=dtype)
    large, small, indices = next(iter(loader))
    assert (large.shape, small.shape) == ((2, 8, 3, 48, 48), (3, 8, 3, 32, 32))
    assert large.dtype == small.dtype == dtype
    assert indices.dtype == torch.int64
    assert indices.shape == (8,)
    assert large.is_contiguous()
    assert small.is_contiguous()
    assert large.untyped_storage().data_ptr() % 16 == 0


def test_normalised_batches_are_the_bytes_normalised_per_channel(cuttings):
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    plain = collect(MultiCropLoader(cuttings, RECIPE, 8))
    floats = collect(MultiCropLoader(cuttings, RECIPE, 8, dtype=torch.float32, mean=mean, std=std))
    for index, views in plain.items():
        for bytes_, values in zip(views, floats[index], strict=True):
            expected = T.functional.normalize(torch.from_numpy(bytes_) / 255, mean, std)
            torch.testing.assert_close(torch.from_numpy(values), expected, rtol=0, atol=1e-5)


def test_without_local_crops_the_second_tensor_is_empty(cuttings):
    recipe = dino_views(global_crops_size=32, local_crops_number=0)
    large, small, _ = next(iter(MultiCropLoader(cuttings, recipe, 8)))
    assert (len(large), len(small)) == (2, 0)


def test_another_recipe_is_another_list_through_the_same_loader(cuttings):
    images, indices = next(iter(MultiCropLoader(cuttings, supervised_views(40), 8)))
    assert images.shape == (1, 8, 3, 40, 40)
    assert len(set(indices.tolist())) == 8


def test_an_epoch_is_a_permutation_less_the_incomplete_batch(cuttings):
    loader = MultiCropLoader(cuttings, RECIPE, 8)
    assert len(loader) == 7
    seen = collect(loader)
    assert len(seen) == 56
    assert set(seen) < set(range(60))


def test_the_order_is_a_hash_sort_of_seed_and_epoch():
    order = epoch_order(3, 4, 1000)
    assert sorted(order) == list(range(1000))
    assert order[:5].tolist() == epoch_order(3, 4, 1000)[:5].tolist()
    assert not np.array_equal(order, epoch_order(3, 5, 1000))
    assert not np.array_equal(order, epoch_order(4, 4, 1000))
    # Frozen: a checkpoint of today must be resumed in today's order by every later version
    assert order[:5].tolist() == [317, 437, 16, 876, 137]
    assert abs(np.corrcoef(np.arange(1000), order)[0, 1]) < 0.1


@pytest.mark.parametrize(("world", "accumulation", "batch"), [(1, 1, 24), (2, 3, 4), (4, 1, 6)])
def test_step_k_is_the_same_set_of_images_however_it_is_divided(
    cuttings, world, accumulation, batch
):
    order = epoch_order(0, 2, 60)
    for rank in range(world):
        loader = MultiCropLoader(
            cuttings, RECIPE, batch, rank=rank, world_size=world, accumulation_steps=accumulation
        )
        loader.set_epoch(2)
        assert len(loader) == 2
        micro_batches = [indices.tolist() for *_, indices in loader]
        assert len(micro_batches) == 2 * accumulation
        for number, indices in enumerate(micro_batches):
            step, micro = divmod(number, accumulation)
            place = rank * accumulation + micro
            first = step * 24 + place * batch
            assert indices == order[first : first + batch].tolist()
            assert loader.place(micro) == place


# --- determinism -------------------------------------------------------------------------------


def sequence(beton, world, batch, threads, resume_at=None) -> list[str]:
    """Digests of three times 32 samples in the order of the epoch: indices and all views."""
    samples = [b""] * 96
    for rank in range(world):
        loader = MultiCropLoader(
            beton, RECIPE, batch, seed=11, rank=rank, world_size=world, num_threads=threads
        )
        loader.set_epoch(5)
        number = 0
        for large, small, indices in loader:
            place = (number * world + rank) * batch
            for n in range(batch):
                parts = (indices[n], large[:, n], small[:, n])
                samples[place + n] = b"".join(part.numpy().tobytes() for part in parts)
            number += 1
            if number == resume_at:
                break
        if resume_at is not None:
            resumed = MultiCropLoader(
                beton, RECIPE, batch, seed=11, rank=rank, world_size=world, num_threads=threads
            )
            resumed.set_epoch(5, resume_at)
            for large, small, indices in resumed:
                place = (number * world + rank) * batch
                for n in range(batch):
                    parts = (indices[n], large[:, n], small[:, n])
                    samples[place + n] = b"".join(part.numpy().tobytes() for part in parts)
                number += 1
    return [
        hashlib.sha256(b"".join(samples[first : first + 32])).hexdigest()[:16]
        for first in (0, 32, 64)
    ]


@pytest.mark.parametrize(
    ("world", "batch", "threads", "resume_at"),
    [
        (1, 32, 1, None),
        (1, 32, 2, None),
        (1, 32, 4, 2),
        (1, 48, 2, None),
        (2, 16, 2, 1),
        (2, 48, 1, None),
        (4, 8, 2, 2),
    ],
)
def test_three_batches_are_the_committed_bits(originals, world, batch, threads, resume_at):
    assert sequence(originals, world, batch, threads, resume_at) == list(GOLDEN)


OLD_CPU = """
import sys
from test_loader import Beton, sequence
print(*sequence(Beton(sys.argv[1]), world=1, batch=32, threads=1))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the name of the old CPU is x86-64's")
def test_a_cpu_without_wide_vectors_gives_the_same_bits(originals):
    # Numba's cache tells CPUs apart: this one's kernels are compiled once for each change of them
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "nehalem",  # SSE 4.2: vectors of 16 bytes, no fused multiply-add
        "NUMBA_CPU_FEATURES": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", OLD_CPU, str(originals.path)],
        cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=300,
        check=True,
    )  # fmt: skip
    assert tuple(result.stdout.split()) == GOLDEN


def test_every_epoch_and_every_view_is_drawn_anew(originals):
    loader = MultiCropLoader(originals, [[View(32, (0.1, 1.0))] * 2], 32)
    first = collect(loader)
    loader.set_epoch(1)
    second = collect(loader)
    loader.set_epoch(0)
    again = collect(loader)
    for index, (views,) in first.items():
        assert not np.array_equal(views[0], views[1])
        assert not equal([views], second[index])
        assert equal([views], again[index])
        # Images 0, 2, 4 ... are copies of one photograph
        assert not equal([views], first[(index + 2) % 96])


def test_channel_histograms_are_within_torchvisions_own_spread(cuttings):
    """32-bin histograms of both global views and the local ones, over 5 seeds each."""
    recipe = dino_views(global_crops_size=64, local_crops_size=32, local_crops_number=2)
    beton = Beton(cuttings)
    images = [Image.fromarray(beton.decode(i)) for i in range(len(beton))]

    def histogram(pixels: np.ndarray) -> np.ndarray:
        counts = [np.bincount(channel.ravel() >> 3, minlength=32) for channel in pixels]
        return np.concatenate([count / count.sum() for count in counts])

    def official(size, scale, blur, solarize):
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(0.5),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                T.RandomGrayscale(0.2),
                lambda image: (
                    image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
                    if random.random() < blur
                    else image
                ),
                lambda image: ImageOps.solarize(image) if random.random() < solarize else image,
            ]
        )

    kinds = [
        official(64, (0.4, 1.0), 1.0, 0.0),
        official(64, (0.4, 1.0), 0.1, 0.2),
        official(32, (0.05, 0.4), 0.5, 0.0),
    ]
    theirs, ours = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        random.seed(seed)
        views = [
            np.stack([np.asarray(kind(image)) for image in images for _ in range(2)])
            for kind in kinds
        ]
        theirs.append([histogram(np.moveaxis(v, -1, 0)) for v in views])
        # Two epochs, as each of torchvision's images is seen twice
        collected = []
        for epoch in range(2):
            loader = MultiCropLoader(beton, recipe, 60, seed=seed)
            loader.set_epoch(epoch)
            large, small, _ = next(iter(loader))
            collected.append([large[0], large[1], small[0]])
        views = [torch.cat(pair).transpose(0, 1).numpy() for pair in zip(*collected, strict=True)]
        ours.append([histogram(v) for v in views])
    for kind in range(3):
        distance = [[np.abs(a[kind] - b[kind]).sum() for b in theirs] for a in theirs + ours]
        between_seeds = np.mean([distance[i][j] for i in range(5) for j in range(5) if i != j])
        to_ours = np.mean(distance[5:])
        assert to_ours < 1.5 * between_seeds, f"kind {kind}"


# --- evaluation --------------------------------------------------------------------------------


def test_evaluation_batches_are_torchvisions_transforms_of_every_image_in_order(cuttings):
    beton = Beton(cuttings)
    loader = EvalLoader(beton, EvalView(64, 56), 16, dtype=torch.float32)
    transform = T.Compose(
        [
            T.Resize(64, InterpolationMode.BICUBIC),
            T.CenterCrop(56),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    batches = list(loader)
    assert [len(images) for images, _, _ in batches] == [16, 16, 16, 12]
    assert len(loader) == 4
    images, labels, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert indices.tolist() == list(range(60))
    assert labels.tolist() == beton.labels.tolist()
    expected = torch.stack([transform(Image.fromarray(beton.decode(i))) for i in range(60)])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world", [1, 3, 64])
def test_over_all_ranks_evaluation_sees_every_image_once(cuttings, world):
    seen = []
    for rank in range(world):
        loader = EvalLoader(cuttings, EvalView(24), 7, rank=rank, world_size=world)
        parts = [indices for *_, indices in loader]
        assert len(parts) == len(loader)
        seen += torch.cat(parts).tolist() if parts else []
    assert sorted(seen) == list(range(60))


def test_without_labels_they_are_minus_one(originals):
    _, labels, _ = next(iter(EvalLoader(originals, EvalView(24), 7)))
    assert labels.tolist() == [-1] * 7


def test_images_of_one_channel_are_stored_and_loaded(tmp_path):
    (tmp_path / "gray").mkdir()
    for i in range(8):
        pixels = np.asarray(Image.open(PHOTOS / "china.jpg").convert("L"))[i : i + 90, :80]
        np.save(tmp_path / "gray" / f"{i}.npy", pixels)
    write_beton(tmp_path / "gray", tmp_path / "gray.beton", channels=1, progress=False)
    loader = MultiCropLoader(
        tmp_path / "gray.beton", RECIPE, 4, dtype=torch.float32, mean=(0.5,), std=(0.25,)
    )
    large, _, _ = next(iter(loader))
    assert large.shape == (2, 4, 1, 48, 48)
    evaluation = EvalLoader(tmp_path / "gray.beton", EvalView(80, 80), 8)
    images, _, indices = next(iter(evaluation))
    beton = Beton(tmp_path / "gray.beton")
    for image, index in zip(images, indices, strict=True):
        assert np.array_equal(image[0], beton.decode(int(index))[5:85, :, 0])


# --- threads and memory ------------------------------------------------------------------------


def test_leaving_an_epoch_early_leaves_no_thread(cuttings):
    before = threading.active_count()
    loader = MultiCropLoader(cuttings, RECIPE, 4, num_threads=3)
    for _ in loader:
        break
    gc.collect()
    assert threading.active_count() == before
    iterator = iter(loader)
    next(iterator)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before
    iterator = iter(loader)
    del iterator
    gc.collect()
    assert threading.active_count() == before
    list(loader)
    assert threading.active_count() == before


def test_a_second_iteration_ends_the_first(cuttings):
    loader = MultiCropLoader(cuttings, RECIPE, 4)
    first = iter(loader)
    next(first)
    second = iter(loader)
    assert len(list(second)) == 15
    with pytest.raises(StopIteration):
        next(first)


def test_an_error_in_a_worker_thread_reaches_the_caller_with_its_cause(cuttings, monkeypatch):
    before = threading.active_count()
    loader = MultiCropLoader(cuttings, RECIPE, 4, num_threads=2)
    render = loader._renderer.render
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 6:
            raise MemoryError("no memory for the views")
        return render(*arguments)

    monkeypatch.setattr(loader._renderer, "render", failing)
    with pytest.raises(MemoryError, match="no memory for the views") as caught:
        list(loader)
    assert any(entry.name == "failing" for entry in caught.traceback)
    assert threading.active_count() == before


def test_two_loaders_live_in_one_process_and_do_not_disturb_each_other(cuttings):
    alone = [batch[2].tolist() for batch in MultiCropLoader(cuttings, RECIPE, 6)]
    views = collect(MultiCropLoader(cuttings, RECIPE, 6))
    training = MultiCropLoader(cuttings, RECIPE, 6, num_threads=2)
    evaluation = EvalLoader(cuttings, EvalView(32), 6, num_threads=2)
    together = []
    for (large, small, indices), (images, _, _) in zip(training, evaluation, strict=True):
        assert images.shape == (6, 3, 32, 32)
        together.append(indices.tolist())
        for n, index in enumerate(indices.tolist()):
            assert equal([large[:, n].numpy(), small[:, n].numpy()], views[index])
    assert together == alone


def test_torch_keeps_its_threads_and_ffcv_is_not_imported(cuttings):
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(3)\n"
        "from ssl_xcit.data.views import EvalView\n"
        "from ssl_xcit.data.loader import EvalLoader\n"
        f"list(EvalLoader({str(cuttings)!r}, EvalView(24), 8, num_threads=2))\n"
        "print(torch.get_num_threads(), 'ffcv' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout.split() == ["3", "False"]


def test_the_threads_are_this_processs_share_of_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for processes, expected in {None: 16, "1": 16, "4": 16, "8": 2, "100": 1}.items():
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_threads() == expected


def test_a_batch_stays_as_it_is_while_any_tensor_of_it_lives(cuttings):
    loader = MultiCropLoader(cuttings, RECIPE, 4)
    kept, copies = [], []
    for number, (large, small, _) in enumerate(loader):
        kept.append((large[1, :, 0], small.flatten(0, 1)[2:], large.numpy())[number % 3])
        copies.append(np.array(kept[-1]))
        del large, small
    assert len(kept) == 15
    for tensor, copy in zip(kept, copies, strict=True):
        assert np.array_equal(tensor, copy)


def test_memory_is_reused_once_a_batch_is_dropped(cuttings):
    loader = MultiCropLoader(cuttings, RECIPE, 4)
    for _ in range(3):
        for large, small, _ in loader:
            del large, small
    # Two in the making, one with the caller
    assert 1 <= len(loader._renderer.memory.free) <= 3


def test_waiting_is_accounted_for(cuttings, monkeypatch):
    loader = MultiCropLoader(cuttings, RECIPE, 60, num_threads=1)
    render = loader._renderer.render

    def slow(*arguments):
        time.sleep(0.2)
        return render(*arguments)

    monkeypatch.setattr(loader._renderer, "render", slow)
    start = time.perf_counter()
    list(loader)
    assert 0.2 <= loader.wait_seconds <= time.perf_counter() - start


# --- faults ------------------------------------------------------------------------------------


def test_a_corrupt_image_is_replaced_counted_and_logged_once_by_its_index(
    cuttings, tmp_path, caplog
):
    path = broken_copy(cuttings, tmp_path, {7: "cut", 8: "gone"})
    intact = rows(MultiCropLoader(cuttings, RECIPE, 20))
    order = [index for index, _ in intact]
    for batch, threads in ((20, 1), (20, 2), (60, 2)):
        caplog.clear()
        loader = MultiCropLoader(path, RECIPE, batch, num_threads=threads)
        with caplog.at_level(logging.WARNING, "ssl_xcit.data.loader"):
            found = rows(loader)
            rows(loader)
        assert set(loader.corrupt) == {7, 8}
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2
        assert any("image 7 is corrupt" in message for message in messages)
        assert any("image 8 is corrupt (the decoder rejects it)" in m for m in messages)
        first = found if batch == 20 and threads == 1 else first
        for place, (index, views) in enumerate(found):
            assert index == first[place][0]
            assert equal(views, first[place][1])
            if order[place] in (7, 8):
                # another image, named by its own index so that its label fits
                assert index not in (7, 8)
                assert f"image {order[place]} is corrupt" in "".join(messages)
                assert f"image {index} takes its place" in "".join(messages)
                assert not equal(views, intact[place][1])
                assert all(part.std() > 1 for part in views)  # a picture, nothing blank
            else:
                assert index == order[place]
                assert equal(views, intact[place][1])


def test_too_many_corrupt_images_stop_the_run(cuttings, tmp_path):
    path = broken_copy(cuttings, tmp_path, dict.fromkeys(range(20, 25), "gone"))
    loader = MultiCropLoader(path, RECIPE, 30)
    with pytest.raises(UserError, match=r"5 of \d+ images are corrupt .* more than 0\.1%"):
        list(loader)


def test_a_file_without_one_good_image_is_refused_and_does_not_loop(cuttings, tmp_path):
    path = broken_copy(cuttings, tmp_path, dict.fromkeys(range(60), "gone"))
    with pytest.raises(UserError, match="no image of 1000 can be decoded"):
        list(MultiCropLoader(path, RECIPE, 2))


def test_evaluation_refuses_a_corrupt_image_by_its_index(cuttings, tmp_path):
    path = broken_copy(cuttings, tmp_path, {33: "cut"})
    with pytest.raises(UserError, match="image 33 is corrupt"):
        list(EvalLoader(path, EvalView(24), 8))


def test_random_bit_flips_in_the_images_never_crash_or_hang_the_loader(cuttings, tmp_path):
    beton = Beton(cuttings)
    clean = cuttings.read_bytes()
    draw = random.Random(1)
    first, last = int(beton.pointers.min()), int((beton.pointers + beton.sizes).max())
    for trial in range(10):
        data = bytearray(clean)
        for _ in range(3):
            data[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
        path = tmp_path / f"{trial}.beton"
        path.write_bytes(data)
        loader = MultiCropLoader(path, RECIPE, 60)
        assert len(rows(loader)) == 60
        assert len(loader.corrupt) <= 3


def test_a_deleted_file_is_read_to_the_end_of_the_run(cuttings, tmp_path):
    path = tmp_path / "copy.beton"
    shutil.copy(cuttings, path)
    loader = MultiCropLoader(path, RECIPE, 20)
    path.unlink()
    assert len(list(loader)) == 3


def test_wrong_arguments_are_refused_with_what_was_expected(cuttings):
    with pytest.raises(UserError, match="60 images are fewer than one global batch of 64"):
        MultiCropLoader(cuttings, RECIPE, 8, world_size=4, accumulation_steps=2)
    with pytest.raises(UserError, match="3 channels, but mean has 1 values"):
        MultiCropLoader(cuttings, RECIPE, 8, dtype=torch.float32, mean=(0.5,), std=(0.5,))
    with pytest.raises(UserError, match="dtype: expected one of"):
        MultiCropLoader(cuttings, RECIPE, 8, dtype=torch.float64)
    with pytest.raises(UserError, match="one size"):
        MultiCropLoader(cuttings, [[View(32, (0.4, 1.0)), View(48, (0.4, 1.0))]], 8)
    with pytest.raises(UserError, match="no view"):
        MultiCropLoader(cuttings, [[], []], 8)


# --- memory ------------------------------------------------------------------------------------

MEMORY = """
import sys, torch
from ssl_xcit.data.views import dino_views
from ssl_xcit.data.loader import MultiCropLoader

def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])

recipe = dino_views(global_crops_size=96, local_crops_size=48)
next(iter(MultiCropLoader(sys.argv[1], recipe, 2, num_threads=1)))  # compiled
before = anonymous()
loader = MultiCropLoader(sys.argv[1], recipe, 32, num_threads=2)
peak = 0
for batch in loader:
    size = sum(part.nbytes for part in batch[:2])
    peak = max(peak, anonymous())
    del batch
pixels = int((loader.beton.heights.astype("i8") * loader.beton.widths).max())
print(peak - before, size, pixels)
"""


def test_anonymous_memory_is_the_batches_and_a_few_megabytes_per_thread(tmp_path):
    (tmp_path / "large").mkdir()
    with Image.open(PHOTOS / "flower.jpg") as photo:
        large = photo.resize((2400, 1600))
    large.save(tmp_path / "large" / "00.jpg")
    for i in range(1, 96):
        os.link(tmp_path / "large" / "00.jpg", tmp_path / "large" / f"{i}.jpg")
    write_beton(tmp_path / "large", tmp_path / "l.beton", labels=False, progress=False)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "l.beton")],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    used, batch, pixels = map(int, result.stdout.split())
    assert pixels == 2400 * 1600
    # PREFETCH + 1 batches
    assert used < 1.2 * 3 * batch + 2 * (8e6 + 3 * pixels)


@pytest.mark.parametrize("world", [1, 2])
def test_a_subset_comes_in_the_files_order_with_the_same_views_and_the_others_left_out(
    originals, world
):
    subset = np.array([1, 2, 3, 5, 8, 13, 21, 34, 40, 41, 42, 43])
    views, seen = dino_views(32, local_crops_number=0), {}
    full = MultiCropLoader(originals, views, 1, seed=3, num_threads=1)
    for images, _, indices in full:
        seen[int(indices)] = images.clone()
    steps = zip(
        *(
            MultiCropLoader(originals, views, 2, seed=3, rank=rank, world_size=world, subset=subset)
            for rank in range(world)
        ),
        strict=True,
    )
    order = []
    for step in steps:
        for images, _, indices in step:
            order += indices.tolist()
            for place, index in enumerate(indices.tolist()):
                assert torch.equal(images[:, place], seen[index][:, 0])
    assert order == [index for index in seen if index in subset]
    evaluated = EvalLoader(originals, EvalView(16), 5, rank=1, world_size=2, subset=subset)
    assert [i for _, _, indices in evaluated for i in indices.tolist()] == subset[6:].tolist()


RANK = """
import sys, zlib
from ssl_xcit.data.views import dino_views
from ssl_xcit.data.loader import MultiCropLoader
path, rank, start = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
views = dino_views(48, local_crops_number=2, local_crops_size=32)
loader = MultiCropLoader(path, views, 4, seed=1, rank=rank, world_size=2, num_threads=2)
loader.set_epoch(0, start)
for step, (large, small, indices) in enumerate(loader, start):
    digest = zlib.crc32(small.numpy().tobytes(), zlib.crc32(large.numpy().tobytes()))
    print(step, digest, *indices.tolist(), flush=True)
    if len(sys.argv) == 5 and step == int(sys.argv[4]):
        sys.stdin.read()  # wait to be killed, in the middle of an epoch
"""


def test_a_killed_rank_disturbs_no_other_and_its_successor_goes_on_where_it_was(originals):
    def start(*arguments):
        command = [sys.executable, "-c", RANK, str(originals.path), *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return forked.Popen(command, **pipes)

    undisturbed = [start(rank, 0) for rank in (0, 1)]
    expected = [process.communicate(timeout=200)[0].splitlines() for process in undisturbed]
    assert [len(lines) for lines in expected] == [12, 12]

    victim, other = start(0, 0, 4), start(1, 0)
    seen = [victim.stdout.readline().strip() for _ in range(5)]
    victim.kill()
    assert other.communicate(timeout=200)[0].splitlines() == expected[1]
    assert other.returncode == 0
    victim.communicate(timeout=60)
    successor = start(0, 5).communicate(timeout=200)[0].splitlines()
    assert seen + successor == expected[0]
