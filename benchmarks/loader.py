"""Speed of our loader and of alternatives, on the same JPEG bytes and cores.

    python benchmarks/loader.py [--data FOLDER] [--prototype FOLDER]

Each loader runs in its own process. They take turns for several rounds, so that all see the same
machine load, and the table shows the median round. CPU time covers the loader's whole process tree;
on a busy machine it is more reliable than images per second.

    ours          this project's loader, uint8
    ours, float   the same with normalised float32 output, as for training on a CPU
    official      DINO's loader: Pillow and torchvision in a DataLoader
    v2            torchvision's transforms v2 on tensors, decode_jpeg
    ffcv          stock FFCV, a pipeline per view (only crop and flip: no colour, no blur)
    decode        FFCV's JPEG decoder alone, an upper bound on speed
    prototype     an earlier prototype of our loader, if its folder is given
"""

import argparse
import ctypes
import importlib.util
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "imagenet_sample" / "train"
BATCH, MOST_IMAGES = 64, 1000


# --- loaders: each returns a function that consumes one epoch -----------------------------------


def ours(args: argparse.Namespace, dtype: str = "uint8") -> Callable[[], int]:
    import torch

    from ssl_xcit.data.loader import MultiCropLoader
    from ssl_xcit.data.views import dino_views

    loader = MultiCropLoader(
        args.beton,
        dino_views(local_crops_number=args.local_crops),
        args.batch,
        num_threads=args.workers,
        dtype=getattr(torch, dtype),
    )
    return lambda: consume(loader) * args.batch


def official(args: argparse.Namespace) -> Callable[[], int]:
    from PIL import Image, ImageFilter, ImageOps
    from torchvision import transforms as T

    class Blur:
        def __call__(self, image: Image.Image) -> Image.Image:
            return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> T.Compose:
        jitter = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(p=0.5),
                T.RandomApply([jitter], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([Blur()], p=blur),
                T.RandomApply([T.Lambda(ImageOps.solarize)], p=solarize),
                T.ToTensor(),
                T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)]
    views += [view(96, (0.05, 0.4), 0.5, 0.0)] * args.local_crops

    def read(path: Path) -> list:
        with open(path, "rb") as file, Image.open(file) as image:
            image = image.convert("RGB")
        return [transform(image) for transform in views]

    return data_loader(args, read)


def v2(args: argparse.Namespace) -> Callable[[], int]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2 as T

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> T.Compose:
        jitter = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        return T.Compose(
            [
                T.RandomResizedCrop(
                    size, scale, interpolation=T.InterpolationMode.BICUBIC, antialias=True
                ),
                T.RandomHorizontalFlip(p=0.5),
                T.RandomApply([jitter], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur),
                T.RandomSolarize(128, p=solarize),
                T.ToDtype(torch.float32, scale=True),
                T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)]
    views += [view(96, (0.05, 0.4), 0.5, 0.0)] * args.local_crops

    def read(path: Path) -> list:
        image = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
        return [transform(image) for transform in views]

    return data_loader(args, read)


def data_loader(args: argparse.Namespace, read: Callable[[Path], list]) -> Callable[[], int]:
    from torch.utils.data import DataLoader, Dataset

    class Files(Dataset):
        def __init__(self) -> None:
            self.paths = sorted(Path(args.files).iterdir())

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, i: int) -> list:
            return read(self.paths[i])

    loader = DataLoader(
        Files(),
        args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    return lambda: consume(loader) * args.batch


def ffcv(args: argparse.Namespace) -> Callable[[], int]:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    crops = [(224, (0.4, 1.0))] * 2 + [(96, (0.05, 0.4))] * args.local_crops
    pipelines: dict = {"image": None, "label": None}
    for i, (size, scale) in enumerate(crops):
        decoder = RandomResizedCropRGBImageDecoder((size, size), scale=scale)
        operations = [RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
        pipelines[f"view_{i}"] = PipelineSpec("image", decoder=decoder, transforms=operations)
    loader = Loader(
        args.beton,
        args.batch,
        args.workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines=pipelines,
    )
    return lambda: consume(loader) * args.batch


def prototype(args: argparse.Namespace) -> Callable[[], int]:
    sys.path.insert(0, args.prototype)
    import op
    from ffcv.loader import OrderOption
    from ffcv.transforms import ToTensor

    loader = op.DetLoader(
        args.beton,
        args.batch,
        args.workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        seed=0,
        pipelines={"image": [op.MultiCropDecoder(args.local_crops), ToTensor()], "label": None},
    )
    return lambda: consume(loader) * args.batch


def decode(args: argparse.Namespace) -> Callable[[], int]:
    from ssl_xcit.data.beton import Beton

    folder = importlib.util.find_spec("ffcv").submodule_search_locations[0]
    imdecode = ctypes.CDLL(str(next(Path(folder).glob("_libffcv*.so")))).imdecode
    pointer, u32 = ctypes.c_void_p, ctypes.c_uint32
    imdecode.argtypes = [pointer, ctypes.c_uint64, u32, u32, pointer] + [u32] * 6
    imdecode.argtypes += [ctypes.c_bool] * 2
    beton = Beton(args.beton)
    fields = (beton.pointers, beton.sizes, beton.heights, beton.widths)
    images = np.stack(fields, axis=1).tolist()
    largest = 3 * max(h * w for _, _, h, w in images)

    def part(first: int) -> None:
        pixels, stored = np.empty(largest, np.uint8).ctypes, beton.data.ctypes.data
        for place, size, h, w in images[first :: args.workers]:
            imdecode(stored + place, size, h, w, pixels.data, h, w, 0, 0, 1, 1, False, False)

    pool = ThreadPoolExecutor(args.workers)

    def epoch() -> int:
        list(pool.map(part, range(args.workers)))
        return len(images)

    return epoch


def consume(loader: Iterable) -> int:
    batches = 0
    for batch in loader:
        batches += 1
        del batch
    return batches


CONTENDERS = {
    "ours": ours,
    "ours, float": lambda args: ours(args, "float32"),
    "official": official,
    "v2": v2,
    "ffcv": ffcv,
    "decode": decode,
    "prototype": prototype,
}


def child(args: argparse.Namespace) -> None:
    """Run one loader: an epoch per line of standard input, each answered by its image count."""
    warnings.simplefilter("ignore")
    epoch = CONTENDERS[args.child](args)
    epoch()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(epoch(), flush=True)


# --- measuring ----------------------------------------------------------------------------------


class Contender:
    """The process of a loader."""

    def __init__(self, name: str, options: list[str]) -> None:
        self.name = name
        print(f"starting {name}", file=sys.stderr)
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer("ready")
        self.start_seconds = time.perf_counter() - start
        self.rounds: list[tuple[float, float]] = []

    def run(self) -> None:
        """Run one epoch; record images per second and CPU-milliseconds per image."""
        cpu, start = self.cpu_seconds(), time.perf_counter()
        print(file=self.process.stdin, flush=True)
        images = int(self._answer())
        seconds = time.perf_counter() - start
        self.rounds.append((images / seconds, 1000 * (self.cpu_seconds() - cpu) / images))

    def result(self) -> tuple[float, float]:
        """Return the medians over the rounds."""
        speed, cpu = zip(*self.rounds, strict=True)
        return statistics.median(speed), statistics.median(cpu)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process tree."""
        ticks = 0
        for pid in self._tree():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Return the resident bytes of the process tree, with shared pages split among owners."""
        files = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self._tree()]
        lines = [line for file in files for line in file.splitlines() if line.startswith("Pss:")]
        return sum(1024 * int(line.split()[1]) for line in lines)

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()

    def _answer(self, expected: str = "") -> str:
        for line in self.process.stdout:
            if line.strip() == expected or (not expected and line.strip().isdigit()):
                return line
        raise SystemExit(f"{self.name} ended with status {self.process.wait()}")

    def _tree(self) -> list[int]:
        pids = [self.process.pid]
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        return pids


def measure(title: str, names: list[str], options: list[str], rounds: int, workers: int) -> None:
    """Measure the loaders and print a table."""
    contenders = [Contender(name, options) for name in names]
    for _ in range(rounds):
        for contender in contenders:
            contender.run()
    results = {contender.name: contender.result() for contender in contenders}
    print(f"\n{title}; {workers} workers, median of {rounds} interleaved rounds")
    columns = ["loader", "images/s", "per core", "CPU-ms/image", "times official"]
    columns += ["share of decode", "memory, MB", "start, s"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for contender in contenders:
        speed, cpu = results[contender.name]
        ratios = [
            f"{results[other][1] / cpu:.2f}" if other in results else ""
            for other in ("official", "decode")
        ]
        print(
            f"| {contender.name} | {speed:.0f} | {speed / workers:.0f} | {cpu:.2f} | {ratios[0]} | "
            f"{ratios[1]} | {contender.memory() / 1e6:.0f} | {contender.start_seconds:.1f} |",
            flush=True,
        )
        contender.stop()


def main() -> None:
    from ssl_xcit.data.beton import Beton
    from ssl_xcit.data.writer import write_beton

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of images; default: scikit-learn's photographs")
    parser.add_argument("--prototype", help="folder of the prototype")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="fewer contenders")
    for name in ("--child", "--beton", "--files"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    parser.add_argument("--local-crops", type=int, default=8, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    data = args.data or (str(SAMPLE) if SAMPLE.is_dir() else None)
    names = args.only or [name for name in CONTENDERS if name != "prototype" or args.prototype]
    few = [name for name in names if name in ("ours", "official", "decode", "prototype")]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if data is None:
            data = folder / "photographs"
            cut_photographs(data)
        # The same bytes twice: one .beton for us and FFCV, single files for the others.
        original, small = folder / "original.beton", folder / "small.beton"
        write_beton(data, original, mode="jpg", limit=MOST_IMAGES, progress=False)
        shrink(original, folder / "shrunk")
        write_beton(folder / "shrunk", small, labels=False, progress=False)
        for path in (original, small):
            unpack(path)
        for title, path, local_crops, chosen in (
            ("500 pixels, quality 90, 2 + 8 crops", small, 8, names),
            ("500 pixels, quality 90, 2 + 10 crops", small, 10, few),
            ("Original size and bytes, 2 + 8 crops", original, 8, few),
            ("Original size and bytes, 2 + 10 crops", original, 10, few),
        ):
            beton = Beton(path)
            options = ["--beton", path, "--files", path.with_suffix("")]
            options += ["--local-crops", local_crops, "--workers", args.workers]
            options += ["--batch", min(BATCH, len(beton) // 2)]
            if args.prototype:
                options += ["--prototype", args.prototype]
            title += f"; {len(beton)} images of {beton.sizes.mean() / 1024:.0f} KiB"
            measure(title, chosen, list(map(str, options)), args.rounds, args.workers)


def shrink(path: Path, folder: Path) -> None:
    """Write images as FFCV users store ImageNet: long side at most 500, JPEG quality 90."""
    from PIL import Image

    from ssl_xcit.data.beton import Beton

    folder.mkdir()
    beton = Beton(path)
    for i in range(len(beton)):
        image = Image.fromarray(beton.decode(i))
        image.thumbnail((500, 500), Image.BICUBIC)
        image.save(folder / f"{i:06d}.jpg", quality=90)


def unpack(path: Path) -> None:
    """Write the images of a .beton as files in a folder next to it."""
    from ssl_xcit.data.beton import Beton

    beton, folder = Beton(path), path.with_suffix("")
    folder.mkdir()
    for i in range(len(beton)):
        stored = beton.data[beton.pointers[i] : beton.pointers[i] + beton.sizes[i]]
        (folder / f"{i:06d}.jpg").write_bytes(stored.tobytes())


def cut_photographs(folder: Path) -> None:
    """Write 256 images of up to 500 pixels, cut from scikit-learn's two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    draw = random.Random(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(256):
        width, height = draw.randint(300, 500), draw.randint(250, 420)
        left, top = draw.randint(0, 640 - width), draw.randint(0, 427 - height)
        cut = photographs[i % 2].crop((left, top, left + width, top + height))
        cut.save(folder / f"{i:03d}.jpg", quality=90)


if __name__ == "__main__":
    main()
