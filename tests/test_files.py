"""Files appear complete or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import new_file, write_text
from ssl_xcit.training.run_folder import stored_precision


def test_a_text_takes_the_place_of_an_earlier_one_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    for text in ("a longer text than the second: ü\n", "ü\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_a_write_that_fails_leaves_the_earlier_text_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "before")

    def fail(file):
        file.write(b"half of it")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        fail(file)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"x\.json: cannot be written: No space left on device$"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match=r"a/b: cannot be written: Not a directory; choose another"):
        write_text(tmp_path / "a" / "b" / "x.json", "text")


def test_an_existing_file_is_kept_unless_it_may_be_overwritten(tmp_path):
    write_text(tmp_path / "x", "before")
    with pytest.raises(UserError, match="x: exists"), new_file(tmp_path / "x", overwrite=False):
        raise AssertionError("not reached")
    assert (tmp_path / "x").read_text() == "before"


def test_the_precision_of_runs_features_and_reports_is_read_from_their_files(tmp_path):
    path = tmp_path / "config.yaml"
    for text, expected in (
        ("run: {precision: bf16}\n", "bf16"),  # a training's
        ("precision: fp16\n", "fp16"),  # an evaluation's
        ("run: {precision: auto}\n", None),
        ("seed: 3\n", None),
        ("run: [\n", None),
    ):
        path.write_text(text)
        assert stored_precision(path) == expected
    assert stored_precision(tmp_path / "nothing.yaml") is None
    assert stored_precision(None) is None
    (tmp_path / "x.json").write_text(json.dumps({"settings": {"precision": "fp32"}, "files": []}))
    assert stored_precision(tmp_path / "x.json") == "fp32"
    (tmp_path / "x.json").write_text("{")
    assert stored_precision(tmp_path / "x.json") is None
    features = tmp_path / "train-0.safetensors"
    facts = {"facts": json.dumps({"precision": "bf16"})}
    save_file({"cls": torch.zeros(2, 2)}, features, facts)
    assert stored_precision(features) == "bf16"
    features.write_bytes(features.read_bytes()[:20])
    assert stored_precision(features) is None
