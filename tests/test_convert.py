"""Conversions lose nothing, and what they write runs in the programs that it is written for."""

import gzip
import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
import shallow
import torch
from safetensors.torch import load_file, save_file

from ssl_xcit.checkpoints import convert as convert_module
from ssl_xcit.checkpoints.convert import convert, describe, layout, main
from ssl_xcit.checkpoints.folder import save_checkpoint
from ssl_xcit.checkpoints.formats import to_timm, unwrap
from ssl_xcit.checkpoints.read import identify, read
from ssl_xcit.models import variants
from ssl_xcit.models.variants import ARCHITECTURES, VARIANTS
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
SHARED = ROOT.parent / "shared" / "fixtures"
upstream_files = pytest.mark.skipif(
    not SHARED.exists(), reason="the shared files of the upstream programs are not beside us"
)
KEYS = json.loads(gzip.decompress((FIXTURES / "official_keys.json.gz").read_bytes()))
FILES = {
    "official": "official.pth",
    "timm": "timm.pth",
    "timm in safetensors": "timm.safetensors",
    "mmpretrain": "mmpretrain.pth",
    "safetensors": "ours.safetensors",
    "dino": "dino.pth",
}


def random_state(
    arch: str, num_classes: int = 1000, depth: int | None = None
) -> dict[str, torch.Tensor]:
    """Weights of which every one counts, at scales that keep the outputs around 1.

    With a `depth` those of so many blocks.
    """
    generator = torch.Generator().manual_seed(len(arch))
    state = {}
    for key, shape in KEYS[arch].items():
        if depth and key.startswith("blocks.") and int(key.split(".")[1]) >= depth:
            continue
        if key.startswith("head."):
            shape = [num_classes, *shape[1:]]
        noise = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(1234)
        elif key.endswith(("running_var", "temperature")):
            state[key] = noise.abs() + 0.5
        elif noise.ndim >= 2 and key != "cls_token":
            state[key] = noise / math.sqrt(noise[0].numel())
        elif key.endswith(("weight", "gamma1", "gamma2", "gamma3")):
            state[key] = 0.5 + 0.1 * noise
        else:
            state[key] = 0.1 * noise
    return state


def in_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file as they stand there."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("model", content.get("state_dict", content))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def converted(source: Path, folder: Path, form: str) -> Path:
    out = folder / FILES[form]
    done = convert(source, out, form.split()[0])
    assert (done.path, done.difference) == (out, 0)
    assert done.tensors == len(in_file(out))
    return out


@pytest.mark.parametrize(
    "distance", [1, *(pytest.param(d, marks=pytest.mark.long) for d in range(2, len(FILES)))]
)
def test_there_and_back_between_all_pairs_of_formats_is_bit_for_bit(micro, distance, tmp_path):
    """The formats in a ring: each is written and read by the pairs of neighbours already."""
    content = torch.load(FIXTURES / micro / "official.pth", weights_only=True)
    torch.save(content, tmp_path / "start.pth")
    starts = {form: converted(tmp_path / "start.pth", tmp_path / "starts", form) for form in FILES}
    assert same(in_file(starts["official"]), content["model"])
    assert same(in_file(starts["safetensors"]), content["model"])
    ring = list(FILES)
    for number, a in enumerate(ring):
        b = ring[(number + distance) % len(ring)]
        folder = tmp_path / str(number)
        there = converted(starts[a], folder / "there", b)
        before, after = in_file(starts[a]), in_file(converted(there, folder / "back", a))
        if b == "dino":
            before = {key: t for key, t in before.items() if not key.startswith("head.")}
        assert same(before, after), f"{a} -> {b} -> {a}"


def test_the_statistics_of_the_images_are_in_every_file_that_has_a_place_for_them(
    micro, tmp_path, capsys
):
    networks = torch.load(FIXTURES / micro / "official.pth", weights_only=True)
    own = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    save_checkpoint(tmp_path / "checkpoints", 1, networks, {"mean": own[0], "std": own[1]})
    for form in ("official", "mmpretrain", "safetensors", "timm in safetensors"):
        found = read(converted(tmp_path, tmp_path / "files", form))
        assert (found.statistics, found.statistics_assumed) == (own, False), form
        assert found.ignored == []
    for form in ("timm", "dino"):
        assert read(converted(tmp_path, tmp_path / "files", form)).statistics_assumed
    main(["convert", str(tmp_path), str(tmp_path / "timm.pth"), "--to", "timm"])
    printed = capsys.readouterr().out
    assert "normalise images by mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6)\n" in printed
    assert "mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))" in printed
    main(["convert", str(tmp_path / "timm.pth"), str(tmp_path / "again.pth"), "--to", "official"])
    assert "ImageNet's: the source states none" in capsys.readouterr().out


@pytest.mark.parametrize("form", FILES)
def test_half_precision_stays_half(form, micro, tmp_path):
    content = torch.load(FIXTURES / micro / "official.pth", weights_only=True)
    content["model"] = {
        key: tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in content["model"].items()
        if form != "dino" or not key.startswith("head.")
    }
    torch.save(content, tmp_path / "start.pth")
    there = converted(tmp_path / "start.pth", tmp_path / "there", form)
    assert same(in_file(converted(there, tmp_path, "official")), content["model"])


@upstream_files
@pytest.mark.parametrize("pattern", ["timm.pth", "*_fixture_*", "*_legacy_*", "dino_backbone.pth"])
def test_a_file_of_another_program_survives_the_official_format(micro, pattern, tmp_path):
    (path,) = (SHARED / micro).glob(pattern)
    official = tmp_path / "official.pth"
    convert(path, official, "official")
    to = {"timm.pth": "timm", "dino_backbone.pth": "dino"}.get(pattern, "mmpretrain")
    convert(official, tmp_path / "back.pth", to)
    assert same(in_file(tmp_path / "back.pth"), in_file(path))


def networks() -> Iterator:
    """(architecture, blocks): the smallest ones whole, each other width and patch size in 2."""
    of_a_kind = {}
    for arch in ARCHITECTURES:
        variant, _, patch_size = arch.rpartition("_p")
        width = VARIANTS[variant].embed_dim
        yield pytest.param(arch, None, marks=[pytest.mark.long] * (width > 128))
        if width > 128:
            of_a_kind[width, patch_size] = arch
    yield from ((arch, 2) for arch in of_a_kind.values())


@pytest.mark.parametrize(("arch", "depth"), networks())
def test_weights_in_each_format_give_the_real_timm_model_our_logits(
    arch, depth, tmp_path, monkeypatch
):
    timm = pytest.importorskip("timm", reason="timm, the oracle, is a development dependency")
    state, name, options = random_state(arch, depth=depth), f"{arch}_224", {}
    if depth:
        variant, _, patch_size = arch.rpartition("_p")
        shallow = VARIANTS[variant]._replace(depth=depth)
        arch, options = f"{shallow.embed_dim}_wide_p{patch_size}", {"depth": depth}
        monkeypatch.setitem(VARIANTS, f"{shallow.embed_dim}_wide", shallow)
        monkeypatch.setattr(variants, "ARCHITECTURES", (*ARCHITECTURES, arch))
    with torch.device("meta"):
        ours = build_xcit(arch)
        theirs = timm.create_model(name, pretrained=False, **options)
    ours.load_state_dict(state, assign=True)
    theirs.load_state_dict(to_timm(state), strict=True, assign=True)
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ours.eval()(x)
        assert 0.3 < expected.std() < 3
        assert (theirs.eval()(x) - expected).abs().max() < 5e-6
    loaded = theirs.state_dict()  # what gave these logits
    for form, name in FILES.items():
        kept = {k: t for k, t in state.items() if form != "dino" or not k.startswith("head.")}
        content = layout(kept, form.split()[0])
        if sum(tensor.numel() for tensor in state.values()) < 3e7:  # more would be gigabytes
            save = save_file if name.endswith(".safetensors") else torch.save
            save(content, tmp_path / name)
            weights = read(tmp_path / name)
        else:
            weights = identify(unwrap(content, name), Path(name))
        assert weights.arch == arch
        again = to_timm(weights.state)
        assert same(again, {key: loaded[key] for key in loaded.keys() & again.keys()})
        assert loaded.keys() - again.keys() == state.keys() - kept.keys()


# Programs that read what is written


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("to", "num_classes"),
    [
        *(("timm.safetensors", count) for count in (1000, 0)),
        ("timm.pth", 10),
        pytest.param("timm.safetensors", 10, marks=pytest.mark.long),
        *(pytest.param("timm.pth", count, marks=pytest.mark.long) for count in (1000, 0)),
    ],
)
def test_the_call_that_is_printed_for_timm_loads_all_tensors(to, num_classes, tmp_path, capsys):
    timm = pytest.importorskip("timm", reason="timm, the oracle, is a development dependency")
    state = random_state("xcit_nano_12_p16", num_classes or 1)
    if not num_classes:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    torch.save({"model": state}, tmp_path / "start.pth")
    main(["convert", str(tmp_path / "start.pth"), str(tmp_path / to), "--to", "timm"])
    call = capsys.readouterr().out.strip().splitlines()[-1].strip()
    theirs = eval(call, {"timm": timm})
    assert same(theirs.state_dict(), to_timm(state))
    ours = build_xcit("xcit_nano_12_p16", num_classes=num_classes).eval()
    ours.load_state_dict(state)
    x = image(2, 3, 64, 64)
    with torch.inference_mode():
        assert (theirs.eval()(x) - ours(x)).abs().max() < 5e-6


EXPORTS = {"onnx": "it.onnx", "torchexport": "it.pt2"}
FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")
POSSIBLE = [to for to in EXPORTS if to != "onnx" or all(map(importlib.util.find_spec, FOR_ONNX))]
SIZES = ((1, 3, 64, 64), (5, 3, 40, 104), (2, 3, 224, 224))
each_export = pytest.mark.parametrize("to", EXPORTS)
SHALLOW = """
import sys
from ssl_xcit.checkpoints.convert import main
from ssl_xcit.models.variants import VARIANTS

VARIANTS["xcit_nano_12"] = VARIANTS["xcit_nano_12"]._replace(depth=1)
folder = sys.argv[1]
for to in sys.argv[2:]:
    to, name = to.split("=")
    main(["convert", f"{folder}/start.pth", f"{folder}/{name}", "--to", to])
"""


def export(folder: Path, depth: int, targets: list[str], run: Callable, *command: str) -> Path:
    """The folder, in which `command` has written a nano of `depth` blocks for `targets`."""
    torch.save({"model": random_state("xcit_nano_12_p8", 10, depth)}, folder / "start.pth")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("largest logit difference") == len(targets)
    written = {"start.pth", *(EXPORTS[to] for to in targets)}
    assert {path.name for path in folder.iterdir()} == written
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A folder with all exports that are possible here, by one process."""
    folder = tmp_path_factory.mktemp("exports")
    words = [f"{to}={EXPORTS[to]}" for to in POSSIBLE]
    return export(folder, 1, POSSIBLE, forked.run, "-c", SHALLOW, str(folder), *words)


def compare_with_timm(to: str, folder: Path, depth: int) -> None:
    """The logits of an export against those of timm's nano with the same weights."""
    timm = pytest.importorskip("timm", reason="timm, the oracle, is a development dependency")
    sizes = {"depth": depth, "num_classes": 10}
    reference = timm.create_model("xcit_nano_12_p8_224", pretrained=False, **sizes).eval()
    reference.load_state_dict(to_timm(in_file(folder / "start.pth")), strict=True)
    path = folder / EXPORTS[to]
    if to == "onnx":
        runtime = importlib.import_module("onnxruntime")
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def program(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch 2.11, which warns of its own buffers
            program = torch.export.load(path).module()
    for size in SIZES:
        with torch.inference_mode():
            expected = reference(image(*size))
            assert expected.std() > 0.1
            assert (program(image(*size)) - expected).abs().max() < 1e-5


def skip_without_packages(to: str) -> None:
    if to not in POSSIBLE:
        pytest.skip("exporting to ONNX needs packages that are not here")


@each_export
def test_an_export_gives_timms_logits_at_any_size_and_number_of_images(to, exports):
    skip_without_packages(to)
    compare_with_timm(to, exports, 1)


@pytest.mark.long
@each_export
def test_the_command_exports_a_whole_network_without_a_word_too_many(to, tmp_path):
    skip_without_packages(to)
    words = ["convert", str(tmp_path / "start.pth"), str(tmp_path / EXPORTS[to]), "--to", to]
    export(tmp_path, 12, [to], subprocess.run, "-m", "ssl_xcit", "checkpoint", *words)
    compare_with_timm(to, tmp_path, 12)


# The commands


def test_converting_says_what_it_found_and_what_it_left_out(micro, tmp_path, capsys):
    content = torch.load(FIXTURES / micro / "official.pth", weights_only=True)
    torch.save(content | {"optimizer": {"state": torch.ones(2)}, "epoch": 3}, tmp_path / "it.pth")
    main(["convert", str(tmp_path / "it.pth"), str(tmp_path / "out.pth"), "--to", "dino"])
    said = capsys.readouterr().out
    assert f"official, {micro}, model, 10 classes" in said
    assert "only for training: epoch, optimizer" in said
    assert "left out, no place in dino: head.weight, head.bias" in said
    assert "largest feature difference 0.0e+00" in said
    main(["convert", str(tmp_path / "it.pth"), str(tmp_path / "all.pth"), "--to", "mmpretrain"])
    said = capsys.readouterr().out
    assert "left out" not in said
    assert "largest logit difference 0.0e+00" in said
    assert f"{len(content['model']) + 8} tensors" in said


@upstream_files
def test_info_describes_every_kind_of_file(micro, tmp_path, capsys):
    facts = describe(SHARED / micro / "dino_full.pth", "student")
    assert facts["format"] == "dino (torch zip)"
    assert facts["architecture"].startswith(f"{micro}, 0.04 million")
    assert (facts["role"], facts["classifier"]) == ("student (there is also: teacher)", "none")
    assert (facts["tensors"], facts["DINO head"]) == (
        str(8 + len(torch.load(SHARED / micro / "dino_backbone.pth", weights_only=True))),
        "8 tensors, 64 prototypes",
    )
    assert facts["ignored"] == "args, dino_loss, epoch, optimizer"
    (legacy,) = (SHARED / micro).glob("*_legacy_*")
    facts = describe(legacy)
    assert facts["format"] == "mmpretrain (torch legacy pickle)"
    assert facts["sha256"] == f"{legacy.stem[-8:]} as in its name"
    altered = tmp_path / legacy.name
    altered.write_bytes(legacy.read_bytes() + b"x")
    assert "NOT as in its name" in describe(altered)["sha256"]
    assert describe(SHARED / micro / "dino_linear.pth")["linear"] == "10 classes of 24 features"
    main(["info", str(legacy)])
    assert f"architecture  {micro}" in capsys.readouterr().out


@pytest.fixture
def _shallow_networks():
    with shallow.networks():
        yield


@pytest.mark.usefixtures("_shallow_networks")
def test_info_describes_a_run_of_ours(tmp_path):
    state = build_xcit("xcit_nano_12_p16", num_classes=0).state_dict()
    teacher = {f"backbone.{key}": tensor for key, tensor in state.items()}
    save_checkpoint(tmp_path / "checkpoints", 12, {"teacher": teacher, "student": teacher}, {})
    facts = describe(tmp_path)
    assert (facts["format"], facts["step"]) == ("ssl_xcit (folder)", "12")
    files = json.loads((tmp_path / "checkpoints/step_00000012/manifest.json").read_text())["files"]
    assert files["teacher.safetensors"]["sha256"].startswith(facts["sha256"])


@pytest.mark.usefixtures("_shallow_networks")
def test_a_run_of_ours_is_converted_with_the_role_asked_for(tmp_path):
    state = build_xcit("xcit_nano_12_p16", num_classes=0).state_dict()
    networks = {
        role: {f"backbone.{key}": torch.full_like(tensor, fill) for key, tensor in state.items()}
        for fill, role in enumerate(("student", "teacher"))
    }
    save_checkpoint(tmp_path / "checkpoints", 12, networks, {})
    for fill, role in enumerate(("student", "teacher")):
        convert(tmp_path, tmp_path / f"{role}.pth", "dino", role=role)
        assert (in_file(tmp_path / f"{role}.pth")["cls_token"] == fill).all()
    convert(tmp_path, tmp_path / "default.pth", "dino")
    assert (in_file(tmp_path / "default.pth")["cls_token"] == 1).all()


# What must not happen


def refused(capsys, *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_what_cannot_be_done_is_said_in_one_line(micro, tmp_path, capsys, monkeypatch):
    source, out = FIXTURES / micro / "official.pth", tmp_path / "out.pth"
    out.write_text("precious")
    assert "exists" in refused(capsys, "convert", source, out, "--to", "timm")
    assert out.read_text() == "precious"
    said = refused(capsys, "convert", source, tmp_path / "x.pth", "--to", "safetensors")
    assert "writes .safetensors, not x.pth" in said
    said = refused(
        capsys, "convert", source, tmp_path / "x.pth", "--to", "dino", "--arch", "xcit_nano_12_p8"
    )
    assert f"is a {micro}, not a xcit_nano_12_p8" in said
    said = refused(
        capsys, "convert", source, tmp_path / "x.pth", "--to", "dino", "--role", "model_ema"
    )
    assert "holds model, not model_ema" in said
    assert "no checkpoint at" in refused(capsys, "info", tmp_path / "nothing")
    assert "cannot be written" in refused(capsys, "convert", source, out / "x.pth", "--to", "dino")
    missing = {"onnxscript"}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    said = refused(capsys, "convert", source, tmp_path / "x.onnx", "--to", "onnx")
    assert "pip install" in said
    assert "onnxscript" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]
    main(["convert", str(source), str(out), "--to", "timm", "--overwrite"])
    assert len(in_file(out)) > 100


@pytest.mark.parametrize("key", ["cls_attn_blocks.1.attn.qkv.bias", "blocks.0.attn.proj.weight"])
def test_a_file_that_was_written_wrongly_never_gets_its_name(micro, key, tmp_path, monkeypatch):
    def wrong(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        altered = to_timm(state)
        k_bias = "cls_attn_blocks.1.attn.k.bias"  # of which the logits know nothing
        if key.endswith("bias"):
            altered[k_bias] = altered[k_bias] + 1
        else:
            altered[key] = altered[key].T.contiguous()  # square: every shape is right
        return altered

    monkeypatch.setattr(convert_module, "to_timm", wrong)
    with pytest.raises(UserError, match=f"{key} came back altered"):
        convert(FIXTURES / micro / "official.pth", tmp_path / "out.pth", "timm")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_no_numbers_are_not_called_equal(micro, tmp_path):
    content = torch.load(FIXTURES / micro / "official.pth", weights_only=True)
    content["model"]["norm.bias"][0] = torch.nan
    torch.save(content, tmp_path / "it.pth")
    with pytest.raises(UserError, match="differ by nan"):
        convert(tmp_path / "it.pth", tmp_path / "out.pth", "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["it.pth"]


def test_no_command_runs_the_code_in_a_file(tmp_path, capsys):
    proof, file = tmp_path / "proof", tmp_path / "evil.pth"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    torch.save({"model": Payload()}, file)
    for arguments in (
        ("info", file),
        *(("convert", file, tmp_path / "x.pth", "--to", to) for to in ("official", "timm")),
        ("convert", file, tmp_path / "x.pt2", "--to", "torchexport"),
    ):
        assert "could run code" in refused(capsys, *arguments)
        assert not proof.exists()
