"""torch.hub loads this repository as it lies: architectures, and files in any format."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ssl_xcit.checkpoints.formats import to_mmpretrain, to_timm
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.models.xcit import XCiT, build_xcit
from ssl_xcit.runtime.errors import UserError

ROOT = Path(__file__).parents[1]


def load(name: str, **options: object) -> XCiT:
    return torch.hub.load(str(ROOT), name, source="local", **options)


@pytest.fixture
def nano() -> XCiT:
    torch.manual_seed(0)
    return build_xcit("xcit_nano_12_p16", num_classes=7).eval()


def test_the_entry_points_are_the_architectures():
    # what torch.hub.list would find, which knows GitHub only
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    public = {name: value for name, value in vars(hubconf).items() if not name.startswith("_")}
    assert {name for name, value in public.items() if callable(value)} == set(ARCHITECTURES)
    assert public["xcit_small_12_p8"].__name__ == "xcit_small_12_p8"
    assert "pretrained: path" in public["xcit_small_12_p8"].__doc__


def test_without_a_file_the_architecture_comes_untrained():
    torch.manual_seed(3)
    expected = build_xcit("xcit_tiny_12_p16").state_dict()
    torch.manual_seed(3)
    model = load("xcit_tiny_12_p16", drop_path_rate=0.1)
    assert model.drop_path_rate == 0.1
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert load("xcit_nano_12_p8", num_classes=0).num_classes == 0


@pytest.mark.parametrize("to", [dict, to_timm, to_mmpretrain])
def test_a_file_in_any_format_gives_its_network(to, nano, tmp_path):
    path = str(tmp_path / "it.pth")
    torch.save({"state_dict": to(nano.state_dict())}, path)
    x = torch.randn(2, 3, 48, 64)
    with torch.inference_mode():
        model = load("xcit_nano_12_p16", pretrained=path)
        assert not model.training
        assert torch.equal(model(x), nano(x))
        assert torch.equal(load("xcit_nano_12_p16", pretrained=path, num_classes=7)(x), nano(x))
        features = load("xcit_nano_12_p16", pretrained=path, num_classes=0)(x)
        assert torch.equal(nano.head(features), nano(x))


def test_no_classifier_is_ever_made_up(nano, tmp_path):
    path, backbone = str(tmp_path / "it.pth"), str(tmp_path / "backbone.pth")
    state = nano.state_dict()
    torch.save(state, path)
    torch.save({key: t for key, t in state.items() if not key.startswith("head.")}, backbone)
    with pytest.raises(UserError, match="has 7 classes, not 1000"):
        load("xcit_nano_12_p16", pretrained=path, num_classes=1000)
    with pytest.raises(UserError, match="has no classes, not 7"):
        load("xcit_nano_12_p16", pretrained=backbone, num_classes=7)
    assert load("xcit_nano_12_p16", pretrained=backbone).num_classes == 0
    with pytest.raises(UserError, match="is a xcit_nano_12_p16, not a xcit_small_12_p16"):
        load("xcit_small_12_p16", pretrained=path)
    with pytest.raises(UserError, match="nothing is downloaded"):
        load("xcit_small_12_p16", pretrained=True)


def test_a_pickle_that_would_run_code_does_not_run(tmp_path):
    proof = tmp_path / "proof"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could run code"):
        load("xcit_nano_12_p16", pretrained=str(tmp_path / "evil.pth"))
    assert not proof.exists()


def test_importing_and_loading_never_ask_for_the_network(tmp_path):
    program = textwrap.dedent("""
        import socket, sys
        def refuse(*arguments, **options):
            raise AssertionError("a connection was opened")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        import torch
        model = torch.hub.load(sys.argv[1], "xcit_nano_12_p16", source="local")
        print(sum(parameter.numel() for parameter in model.parameters()))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(tmp_path / "hub")},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == 3_053_224
