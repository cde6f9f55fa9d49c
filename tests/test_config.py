import dataclasses
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_xcit.dino.config import Head, TrainConfig
from ssl_xcit.evaluation.config import KnnConfig
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.runtime import config, options
from ssl_xcit.runtime.config import (
    CONFIGS,
    RUN_KEYS_THAT_MAY_CHANGE,
    config_differences,
    load_config,
    read_config,
    run_command,
    save_config,
)
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.slurm.config import SubmitConfig

ROOT = Path(__file__).parents[1]
RECIPE = ("pretrain/{arch}.yaml",)
GIVEN = ["--arch", "xcit_small_12_p16", "--data", "train.beton", "--out", "runs/a"]
COMMANDS = [TrainConfig, KnnConfig, SubmitConfig]


def train_config(*flags: str, files=()) -> TrainConfig:
    return load_config(TrainConfig, files, [*GIVEN, *flags])


def fails(cls, argv, files=()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(cls, files, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Settings


@pytest.mark.parametrize("cls", COMMANDS)
def test_flat_names_are_unique(cls):
    flat_names = [name.rpartition(".")[2] for name in options.leaves(cls)]
    assert len(set(flat_names)) == len(flat_names)
    assert "config" not in flat_names  # --config is not a setting
    assert "help" not in flat_names


def test_defaults_are_those_of_dino():
    # main_dino.py's own options by their own names, from its argument parser and the paper.
    dino = {
        "out_dim": 65536,
        "norm_last_layer": True,
        "use_bn_in_head": False,
        "momentum_teacher": 0.996,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.04,
        "warmup_teacher_temp_epochs": 0,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "clip_grad": 3.0,
        "batch_size_per_gpu": 64,
        "epochs": 100,
        "freeze_last_layer": 1,
        "lr": 0.0005,
        "warmup_epochs": 10,
        "min_lr": 1e-6,
        "optimizer": "adamw",
        "drop_path_rate": 0.1,
        "global_crops_scale": (0.4, 1.0),
        "local_crops_number": 8,
        "local_crops_scale": (0.05, 0.4),
        "saveckp_freq": 20,
        "seed": 0,
        # constants of its code
        "student_temp": 0.1,
        "center_momentum": 0.9,
        "global_crops_size": 224,
        "local_crops_size": 96,
        "head_layers": 3,
        "head_hidden_dim": 2048,
        "head_bottleneck_dim": 256,
    }
    values = options.flat(train_config())
    ours = {name.rpartition(".")[2]: value for name, value in values.items()}
    assert {name: ours[name] for name in dino} == dino


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        train_config().optim.lr = 1.0


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("global_crops_size", ["0", "-1"], ["1"]),
        ("local_crops_size", ["0"], ["1"]),
        ("local_crops_number", ["-1"], ["0"]),
        ("global_crops_scale", ["0 1", "0.4 1.1", "1.0 0.4"], ["0.4 0.4", "0.1 1"]),
        ("local_crops_scale", ["0 1", "0.4 1.1", "0.4 0.05"], ["1 1"]),
        ("color_jitter_prob", ["-0.1", "1.1"], ["0", "1"]),
        ("grayscale_prob", ["-0.1", "1.1"], ["0", "1"]),
        ("solarize_prob", ["-0.1", "1.1"], ["0", "1"]),
        ("global1_blur_prob", ["-0.1", "1.1"], ["0", "1"]),
        ("global2_blur_prob", ["-0.1", "1.1"], ["0", "1"]),
        ("local_blur_prob", ["-0.1", "1.1"], ["0", "1"]),
        ("brightness", ["-0.1"], ["0", "2"]),
        ("contrast", ["-0.1"], ["0", "2"]),
        ("saturation", ["-0.1"], ["0", "2"]),
        ("hue", ["-0.1", "0.6"], ["0", "0.5"]),
        ("blur_sigma", ["0 1", "2 1"], ["1 1"]),
        ("mean", ["0.5", "0 0 0 0"], ["0 0 0"]),
        ("std", ["0 1 1", "1"], ["1 1 1"]),
        ("drop_path_rate", ["-0.1", "1"], ["0"]),
        ("in_chans", ["0", "1"], []),  # 1 needs one mean and one std
        ("out_dim", ["0"], ["1"]),
        ("head_layers", ["0"], ["1"]),
        ("head_hidden_dim", ["0"], ["1"]),
        ("head_bottleneck_dim", ["0"], ["1"]),
        ("student_temp", ["0", "-1"], ["0.01"]),
        ("teacher_temp", ["0"], ["0.01"]),
        ("warmup_teacher_temp", ["0"], ["0.01"]),
        ("warmup_teacher_temp_epochs", ["-1"], ["0"]),
        ("center_momentum", ["-0.1", "1.1"], ["0", "1"]),
        ("momentum_teacher", ["-0.1", "1.1"], ["0", "1"]),
        ("lr", ["0", "-1"], ["1e-9"]),
        ("min_lr", ["-1"], ["0"]),
        ("warmup_epochs", ["-1"], ["0"]),
        ("weight_decay", ["-1"], ["0"]),
        ("weight_decay_end", ["-1"], ["0"]),
        ("clip_grad", ["-1"], ["0"]),
        ("freeze_last_layer", ["-1"], ["0"]),
        ("epochs", ["0"], ["1"]),
        ("batch_size_per_gpu", ["0"], ["1"]),
        ("accumulation_steps", ["0"], ["1"]),
        ("num_workers", ["-1"], ["0"]),
        ("log_every", ["0"], ["1"]),
        ("save_every", ["-1"], ["0"]),
        ("keep_last", ["0", "1"], ["2"]),
        ("max_bad_steps", ["0"], ["1"]),
        ("stall_timeout", ["-1"], ["0"]),
        ("saveckp_freq", ["-1"], ["0"]),
        ("every", ["-1", "1"], ["0"]),  # 1 needs betons
        ("probe_k", ["0"], ["1"]),
        ("probe_resize", ["0", "223"], ["224"]),
        ("probe_crop", ["0", "257"], ["256"]),
        ("probe_limit", ["-1"], ["0"]),
        ("seed", ["-1", str(2**63)], ["0", str(2**63 - 1)]),
    ],
)
def test_values_out_of_bounds_are_refused_by_name_value_and_bound(name, bad, good):
    for text in bad:
        message = fails(TrainConfig, [*GIVEN, f"--{name}", *text.split()])
        assert name in message
        assert re.search(r"must|expected", message)
        assert text.split()[0].lstrip("-") in message
    for text in good:
        train_config(f"--{name}", *text.split())


def test_no_number_may_be_nan_or_infinite(tmp_path):
    for name, kind in options.leaves(TrainConfig).items():
        if kind is float:
            for text in (".nan", ".inf", "-.inf"):
                (tmp_path / "a.yaml").write_text(f"{name}: {text}")
                message = fails(TrainConfig, [*GIVEN, "--config", str(tmp_path / "a.yaml")])
                assert name.rpartition(".")[2] in message


def test_one_channel_takes_one_mean_and_one_deviation():
    loaded = train_config("--in_chans", "1", "--mean", "0.5", "--std", "0.25")
    assert (loaded.model.in_chans, loaded.crops.mean, loaded.crops.std) == (1, (0.5,), (0.25,))


def test_a_probe_needs_its_betons():
    assert "probe_test" in fails(TrainConfig, [*GIVEN, "--every", "1", "--probe_train", "a.beton"])
    train_config("--every", "1", "--probe_train", "a.beton", "--probe_test", "b.beton")


def test_knn_takes_exactly_one_source_of_features():
    given = ["--train", "a.beton", "--test", "b.beton"]
    assert "--checkpoint" in fails(KnnConfig, given)
    assert "--pixels" in fails(KnnConfig, [*given, "--pixels", "--checkpoint", "runs/a"])
    assert "arch" in fails(KnnConfig, [*given, "--random-init"])
    assert "xcit_nano_12_p8" in fails(KnnConfig, [*given, "--pixels", "--arch", "xcit_nano_12_p88"])
    load_config(KnnConfig, argv=[*given, "--pixels"])
    load_config(KnnConfig, argv=[*given, "--random-init", "--arch", "xcit_nano_12_p8"])
    assert load_config(KnnConfig, argv=[*given, "--checkpoint", "runs/a", "--k", "1", "5"]).k == (
        1,
        5,
    )
    for flags in (["--k", "0"], ["--k", "[]"], ["--temperature", "0"], ["--crop", "300"]):
        fails(KnnConfig, [*given, "--pixels", *flags])


# Flags


@pytest.mark.parametrize(
    "flags",
    [
        ["--crops.global_crops_scale", "0.25", "0.9"],
        ["--global_crops_scale", "0.25", "0.9"],
        ["--global-crops-scale", "0.25", "0.9"],
        ["--crops.global-crops-scale", "0.25", "0.9"],
        ["--crops.global_crops_scale", "[0.25,0.9]"],
        ["--crops.global_crops_scale=[0.25, 0.9]"],
        ["--global_crops_scale=(0.25,0.9)"],
        ["--global_crops_scale", "0.25,0.9"],
        ["--global_crops_scale", "0.1", "0.2", "--global-crops-scale", "0.25", "0.9"],
    ],
)
def test_every_spelling_of_a_pair_is_the_same(flags):
    loaded = train_config(*flags, "--lr", "1e-3")
    assert loaded.crops.global_crops_scale == (0.25, 0.9)
    assert loaded.optim.lr == 1e-3


@pytest.mark.parametrize("cls", COMMANDS)
def test_every_setting_can_be_set_by_its_flat_dino_name(cls):
    samples = {int: "7", float: "0.5", bool: "true", str: "text"}
    for name, kind in options.leaves(cls).items():
        choices = getattr(kind, "__args__", ())
        if kind in samples:
            text, expected = (
                samples[kind],
                {"7": 7, "0.5": 0.5, "true": True}.get(samples[kind], "text"),
            )
        elif isinstance(choices[0], str):
            text, expected = choices[-1], choices[-1]
        elif words := getattr(choices[0], "__args__", ()):  # several of some words
            text, expected = " ".join(words[:2]), words[:2]
        else:
            text, expected = "1 2", (choices[0](1), choices[0](2))
        for spelling in (name, name.rpartition(".")[2], name.rpartition(".")[2].replace("_", "-")):
            flags, _, _ = options.read_flags(cls, [f"--{spelling}", *text.split()])
            assert flags == {name: expected}
            assert type(flags[name]) is type(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--norm_last_layer", "false"], False),
        (["--norm_last_layer=False"], False),
        (["--norm-last-layer", "0"], False),
        (["--head.norm_last_layer", "off"], False),
        (["--norm_last_layer", "true"], True),
        (["--norm_last_layer", "1"], True),
        (["--norm_last_layer", "on"], True),
        (["--norm_last_layer"], True),
        (["--norm_last_layer", "false", "--norm_last_layer"], True),
    ],
)
def test_booleans_are_spelled_as_in_dino(flags, expected):
    assert train_config(*flags, "--seed", "3").head.norm_last_layer is expected


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--optim.lrr", "3"], ["--optim.lrr", "nearest: --optim.lr"]),
        (["--learning-rate", "3"], ["--learning-rate"]),
        (["--loss.lr", "3"], ["--loss.lr", "nearest: --optim.lr"]),
        (["--warmup_epoch", "3"], ["nearest: --optim.warmup_epochs"]),
        (["--epoch", "3"], ["nearest: --optim.epochs"]),  # no abbreviations
        (["--optim", "a.yaml"], ["--optim"]),
        (["--data_path", "x"], ["nearest: --data"]),
        (["--output_dir", "x"], ["nearest: --out"]),
        (["--output-dir", "x"], ["nearest: --out"]),
        (["--use_fp16", "true"], ["nearest: --run.precision"]),
        (["--zzzzz", "3"], ["--zzzzz", "--help"]),
        (["--lr", "ten"], ["--optim.lr", "a number", "ten"]),
        (["--lr", "true"], ["--optim.lr", "a number"]),
        (["--lr="], ["--optim.lr", "a number"]),
        (["--lr"], ["--optim.lr needs a value", "a number"]),
        (["--lr", "--seed", "3"], ["--optim.lr needs a value"]),
        (["--epochs", "1.5"], ["--optim.epochs", "an integer", "1.5"]),
        (["--epochs", "1e2"], ["--optim.epochs", "an integer"]),
        (["--global_crops_scale", "0.4"], ["2 numbers", "0.4"]),
        (["--global_crops_scale", "0.1", "0.2", "0.3"], ["2 numbers"]),
        (["--global_crops_scale"], ["needs a value: 2 numbers"]),
        (["--global_crops_scale", "a", "b"], ["2 numbers", "a b"]),
        (["--compile", "perhaps"], ["--run.compile", "true or false", "perhaps"]),
        (["--optimizer", "adamx"], ["adamw, sgd, lars", "adamx", "nearest: adamw"]),
        (["--precision", "fp8"], ["auto, bf16, fp16, fp32", "fp8"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["-x"], ["unexpected argument '-x'"]),
        (["--"], ["unexpected argument '--'"]),
    ],
)
def test_wrong_flags_are_named_with_the_nearest_right_one(flags, parts):
    message = fails(TrainConfig, [*GIVEN, *flags])
    for part in parts:
        assert part in message


def test_a_wrong_architecture_names_the_nearest():
    for files in (RECIPE, ()):
        argv = ["--arch", "xcit_smal_12_p16", "--data", "a", "--out", "b"]
        message = fails(TrainConfig, argv, files)
        assert "'xcit_smal_12_p16'" in message
        assert "nearest xcit_small_12_p16" in message


def test_missing_settings_are_one_line():
    assert fails(TrainConfig, ["--arch", "xcit_nano_12_p8"], RECIPE).startswith(
        "missing --data, --out"
    )
    assert fails(TrainConfig, [], RECIPE).startswith("missing --arch, --data, --out")
    assert fails(KnnConfig, ["--pixels"]).startswith("missing --train, --test")


def test_a_path_is_taken_as_it_is_written():
    for path in ("123", "true", "null", "1e3", "[a]", "a b.beton", "ünï/ç", "a=b", "~", ""):
        loaded = load_config(
            TrainConfig, argv=["--arch", "xcit_nano_12_p8", "--data=" + path, "--out=x"]
        )
        assert loaded.data == path


def test_the_parser_knows_both_names_of_an_option_and_its_choices():
    actions = options.build_parser(TrainConfig)._option_string_actions
    assert actions["--optimizer"] is actions["--optim.optimizer"]
    assert actions["--optimizer"].choices == ("adamw", "sgd", "lars")


# Files and precedence


def test_flags_win_over_files_over_the_recipe_over_defaults(tmp_path):
    recipe = yaml.safe_load((CONFIGS / "pretrain/xcit_small_12_p16.yaml").read_text())
    assert (
        recipe["loss"]["teacher_temp"] != TrainConfig("xcit_nano_12_p8", "", "").loss.teacher_temp
    )
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optim: {epochs: 7, weight_decay: 0.1}\nseed: 5\nhead: {out_dim: 10}")
    second.write_text("seed: 6\nout_dim: 11\n")
    flags = ["--config", str(first), "--out_dim", "12", f"--config={second}"]
    loaded = train_config(*flags, files=RECIPE)
    assert loaded.loss.teacher_temp == recipe["loss"]["teacher_temp"]  # the recipe
    assert loaded.optim.epochs == 7  # a file over the recipe
    assert loaded.seed == 6  # the later file
    assert loaded.head.out_dim == 12  # a flag, wherever it stands
    assert loaded.loss.student_temp == 0.1  # the default


def test_the_architecture_of_a_file_selects_the_recipe_unless_a_flag_does(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("arch: xcit_medium_24_p8\ndata: a\nout: b\n")
    medium = load_config(TrainConfig, RECIPE, ["--config", str(path)])
    assert (medium.arch, medium.model.drop_path_rate) == ("xcit_medium_24_p8", 0.15)
    large = load_config(TrainConfig, RECIPE, ["--config", str(path), "--arch", "xcit_large_24_p8"])
    assert (large.arch, large.model.drop_path_rate) == ("xcit_large_24_p8", 0.3)


def test_a_resolved_config_repeats_itself_whatever_the_recipe_says(tmp_path):
    original = load_config(
        TrainConfig, (), ["--arch", "xcit_medium_24_p8", "--data", "a", "--out", "b", "--lr", "0.1"]
    )  # without the recipe: its every field differs from the recipe's
    save_config(original, tmp_path / "config.yaml")
    argv = ["--config", str(tmp_path / "config.yaml")]
    assert load_config(TrainConfig, RECIPE, argv) == original
    again = read_config(TrainConfig, tmp_path / "config.yaml")
    assert again == original
    assert config_differences(original, again) == []
    elsewhere = load_config(TrainConfig, RECIPE, [*argv, "--out", "c"])
    assert elsewhere == dataclasses.replace(original, out="c")


@pytest.mark.parametrize(
    "text",
    [
        "optim:\n  lr: 5e-4\n  epochs: 3\ncrops:\n  local_crops_scale: [0.1, 0.2]\n",
        "lr: 5e-4\nepochs: 3\nlocal_crops_scale: [0.1, 0.2]\n",
        "optim.lr: 5.0E-4\noptim.epochs: 3\ncrops.local-crops-scale: [1e-1, .2]\n",
        "lr: 0.0005\noptim: {epochs: 3}\nloss:\nlocal-crops-scale: [0.1, 0.2]\n",
    ],
)
def test_yaml_keys_may_be_nested_flat_or_dotted(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    loaded = train_config("--config", str(tmp_path / "a.yaml"))
    assert loaded == train_config(
        "--lr", "5e-4", "--epochs", "3", "--local_crops_scale", "0.1", "0.2"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: {lrr: 3}", ["unknown key optim.lrr", "nearest: optim.lr"]),
        ("loss: {lr: 3}", ["unknown key loss.lr", "nearest: optim.lr"]),
        ("learning: 3", ["unknown key learning"]),
        ("optimm: {lr: 3}", ["unknown key optimm"]),
        ("3: 4", ["unknown key 3"]),
        ("optim: 3", ["unknown key optim"]),
        ("lr: ten", ["optim.lr: expected a number, got ten"]),
        ("lr: true", ["optim.lr: expected a number, got true"]),
        ("epochs: 1e2", ["optim.epochs: expected an integer, got 1e2"]),
        ("lr:", ["optim.lr: expected a number, got nothing"]),
        ("lr: [1]", ["optim.lr: expected a number"]),
        ("epochs: 3.0", ["optim.epochs: expected an integer, got 3.0"]),
        ("epochs: true", ["optim.epochs: expected an integer, got true"]),
        ("epochs: {a: 1}", ["optim.epochs: expected an integer"]),
        ("compile: 1", ["run.compile: expected true or false, got 1"]),
        ("data: 3", ["data: expected text, got 3"]),
        ("global_crops_scale: 0.4", ["expected 2 numbers, got 0.4"]),
        ("global_crops_scale: [0.4]", ["expected 2 numbers, got [0.4]"]),
        ("optimizer: AdamW", ["expected one of adamw, sgd, lars, got AdamW"]),
        ("optim: {lr: 1}\nlr: 2", ["optim.lr is given twice"]),
        ("lr: 1\nlr: 2", ["line 2", "lr is given twice"]),
        ("optim:\n  lr: 1\n  lr: 2", ["line 3", "lr is given twice"]),
        ("lr: [1", ["line 1"]),
        ("? [lr]\n: 1", ["line 1"]),
        ("- lr", ["expected 'key: value' lines"]),
        ("!!python/object/apply:os.system [echo]", ["line 1"]),
        ("epochs: 0", ["epochs must be >= 1, got 0"]),
    ],
)
def test_wrong_files_are_named_with_their_key(tmp_path, text, parts):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    message = fails(TrainConfig, [*GIVEN, "--config", str(path)])
    for part in parts:
        assert part in message
    if "must be" not in message:
        assert str(path) in message


def test_a_setting_that_no_longer_exists_is_skipped_in_the_config_of_an_old_run(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "arch: xcit_nano_12_p8\ndata: d\nout: o\nhead: {prototype_chunk: 8, out_dim: 64}\n"
    )
    assert read_config(TrainConfig, path).head == Head(out_dim=64)


def test_an_unreadable_file_is_named(tmp_path):
    assert f"{tmp_path}/no.yaml: No such file" in fails(
        TrainConfig, ["--config", f"{tmp_path}/no.yaml"]
    )
    assert "Is a directory" in fails(TrainConfig, ["--config", str(tmp_path)])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in fails(TrainConfig, ["--config", str(tmp_path / "binary.yaml")])
    assert "--config: expected one argument" in fails(TrainConfig, ["--config"])


# Saving


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
awkward = st.sampled_from(
    [
        "1e3",
        "5e-4",
        "0x10",
        "010",
        "true",
        "null",
        "",
        "~",
        "2020-01-01",
        "1_0",
        "a: b",
        "- a",
        "#",
        "1.",
        ".5e1",
        "=",
        "!x",
        "12:30",
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    data=texts | awkward,
    seed=st.integers(0, 2**63 - 1),
    lr=st.floats(1e-300, 1e300),
    min_lr=st.sampled_from([1e-6, 0.04, 0.1, 1e22, 5e-324, 0.0, 1 / 3]) | st.floats(0, 1e300),
    scale=st.tuples(st.floats(1e-9, 0.5), st.floats(0.5, 1)),
    flag=st.booleans(),
)
def test_a_saved_configuration_reads_back_equal_to_the_last_bit(
    tmp_path_factory, data, seed, lr, min_lr, scale, flag
):
    path = tmp_path_factory.mktemp("save") / "config.yaml"
    base = TrainConfig("xcit_nano_12_p8", data, "o", seed)
    original = dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, lr=lr, min_lr=min_lr),
        crops=dataclasses.replace(base.crops, local_crops_scale=scale),
        run=dataclasses.replace(base.run, compile=flag),
    )
    save_config(original, path)
    again = read_config(TrainConfig, path)
    assert again == original
    assert list(options.flat(again)) == list(options.flat(original))
    for name, value in options.flat(again).items():
        assert type(value) is type(options.flat(original)[name])


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    save_config(train_config(), path)
    before = path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
    written_at_rename = []

    def fail(source, target):
        written_at_rename.append(Path(source).read_text())
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="disk gone"):
        save_config(train_config("--seed", "9"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == before
    assert "seed: 9" in written_at_rename[0]  # all of it was there before the rename


def test_a_saved_file_is_plain_nested_yaml(tmp_path):
    save_config(train_config(), tmp_path / "config.yaml")
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert tree["arch"] == "xcit_small_12_p16"
    assert list(tree)[:5] == ["arch", "data", "out", "seed", "crops"]  # in the order of --help
    assert tree["optim"]["min_lr"] == 1e-6
    assert tree["crops"]["local_crops_scale"] == [0.05, 0.4]


# What makes a run another run


def test_differences_name_the_key_and_both_values():
    old = train_config()
    new = train_config(
        "--lr", "1e-3", "--local_crops_scale", "0.1", "0.3", "--norm_last_layer", "0"
    )
    assert config_differences(old, new) == [
        "crops.local_crops_scale: [0.05, 0.4] -> [0.1, 0.3]",
        "head.norm_last_layer: true -> false",
        "optim.lr: 0.0005 -> 0.001",
    ]
    assert config_differences(old, old) == []


def test_crops_in_turn_are_refused_where_the_head_normalises_over_all_views():
    flags = ["--crops_in_turn", "true", "--use_bn_in_head", "true"]
    assert "switch one of them off" in fails(TrainConfig, [*GIVEN, *flags])


def test_only_what_does_not_change_the_science_may_change():
    may = {
        *("out", "optim.batch_size_per_gpu", "optim.accumulation_steps"),
        *("run.device", "run.num_workers", "run.compile", "run.log_every"),
        *("run.activation_checkpointing", "crops.crops_in_turn"),
        *("run.save_every", "run.keep_last", "run.saveckp_freq"),
        *("run.max_bad_steps", "run.stall_timeout", "run.tensorboard", "run.wandb"),
        *(name for name in options.leaves(TrainConfig) if name.startswith("probe.")),
    }
    assert may == RUN_KEYS_THAT_MAY_CHANGE
    values = options.flat(train_config())
    for name, value in values.items():
        changed = dict(values)
        match value:
            case bool():
                changed[name] = not value
            case int():
                changed[name] = value + 1
            case float():
                changed[name] = value / 2 + 0.01
            case tuple():
                changed[name] = tuple(x / 2 + 0.01 for x in value)
            case _:
                kind = options.leaves(TrainConfig)[name]
                others = [c for c in getattr(kind, "__args__", ["x"]) if c != value]
                changed[name] = "xcit_nano_12_p8" if name == "arch" else others[0]
        if name in ("model.in_chans", "probe.every"):  # these two need company
            changed |= {"crops.mean": (0.0,) * 4, "crops.std": (1.0,) * 4} if "in_" in name else {}
            changed |= (
                {"probe.probe_train": "a", "probe.probe_test": "b"} if "every" in name else {}
            )
        other = options.build(TrainConfig, changed)
        listed = [line.partition(":")[0] for line in config_differences(train_config(), other)]
        assert (name in listed) == (name not in may), name


# DINO's args.txt

ARGS = """\
arch: xcit_small_12_p16
batch_size_per_gpu: 32
clip_grad: 0.3
data_path: /some/where/train
dist_backend: nccl
dist_url: file:///some/where/init
drop_path_rate: 0.05
epochs: 300
freeze_last_layer: 1
global_crops_scale: (0.25, 1.0)
gpu: 0
local_crops_number: 10
local_crops_scale: (0.05, 0.25)
local_rank: 0
lr: 0.00025
min_lr: 1e-05
momentum_teacher: 0.998
norm_last_layer: False
num_workers: 10
optimizer: sgd
out_dim: 4096
output_dir: /some/where/%j
patch_size: 8
rank: 0
saveckp_freq: 10
seed: 3
teacher_temp: 0.07
use_bn_in_head: True
use_fp16: False
warmup_epochs: 12
warmup_teacher_temp: 0.05
warmup_teacher_temp_epochs: 30
weight_decay: 0.05
weight_decay_end: 0.5
world_size: 16
comment:
timeout: 2800
"""


def test_a_dino_args_txt_is_a_configuration(tmp_path, capsys):
    path = tmp_path / "args.txt"
    path.write_text(ARGS)
    loaded = load_config(
        TrainConfig, RECIPE, ["--config", str(path), "--data", "d", "--out", "o", "--epochs", "7"]
    )
    expected = {
        **{"arch": "xcit_small_12_p16", "data": "d", "out": "o", "seed": 3},
        **{"optim.batch_size_per_gpu": 32, "optim.clip_grad": 0.3, "model.drop_path_rate": 0.05},
        **{
            "optim.epochs": 7,
            "optim.freeze_last_layer": 1,
            "crops.global_crops_scale": (0.25, 1.0),
        },
        **{"crops.local_crops_number": 10, "crops.local_crops_scale": (0.05, 0.25)},
        **{"optim.lr": 0.00025, "optim.min_lr": 1e-5, "loss.momentum_teacher": 0.998},
        **{"head.norm_last_layer": False, "run.num_workers": 10, "optim.optimizer": "sgd"},
        **{"head.out_dim": 4096, "run.saveckp_freq": 10, "loss.teacher_temp": 0.07},
        **{"head.use_bn_in_head": True, "run.precision": "fp32", "optim.warmup_epochs": 12},
        **{"loss.warmup_teacher_temp": 0.05, "loss.warmup_teacher_temp_epochs": 30},
        **{"optim.weight_decay": 0.05, "optim.weight_decay_end": 0.5},
    }
    plain = options.flat(TrainConfig("xcit_small_12_p16", "d", "o"))
    assert options.flat(loaded) == plain | expected
    (line,) = capsys.readouterr().out.splitlines()
    ignored = line.partition("ignored ")[2].partition(";")[0].split(", ")
    assert ignored == [
        *("data_path", "dist_backend", "dist_url", "gpu", "local_rank", "output_dir"),
        *("patch_size", "rank", "world_size", "comment", "timeout"),
    ]
    assert "use_fp16 False becomes precision fp32" in line


def test_only_the_first_rank_prints_what_an_args_txt_loses(tmp_path, capsys, monkeypatch):
    (tmp_path / "args.txt").write_text("gpu: 0")
    monkeypatch.setenv("RANK", "1")
    train_config("--config", str(tmp_path / "args.txt"))
    assert capsys.readouterr().out == ""


def test_the_patch_size_of_an_args_txt_completes_the_architecture(tmp_path):
    path = tmp_path / "args.txt"
    argv = ["--config", str(path), "--data", "d", "--out", "o"]
    path.write_text("arch: xcit_small_12\npatch_size: 8\nuse_fp16: True\n")
    loaded = load_config(TrainConfig, RECIPE, argv)
    assert (loaded.arch, loaded.run.precision) == ("xcit_small_12_p8", "auto")
    assert loaded.crops.local_crops_number == 6  # of that recipe


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("epoch: 3", "unknown key epoch; nearest: optim.epochs"),
        ("epochs: ten", "optim.epochs: expected an integer, got ten"),
        ("global_crops_scale: (0.1, 0.2, 0.3)", "expected 2 numbers, got (0.1, 0.2, 0.3)"),
        ("seed: 3\nepochs", "line 2: expected 'key: value', got epochs"),
        ("arch: vit_small\npatch_size: 16", "'vit_small_p16'"),
    ],
)
def test_a_wrong_args_txt_is_refused(tmp_path, text, part):
    (tmp_path / "args.txt").write_text(text)
    argv = ["--config", str(tmp_path / "args.txt"), "--data", "d", "--out", "o"]
    assert part in fails(
        TrainConfig, ["--arch", "xcit_nano_12_p8", *argv][2 if "arch" in text else 0 :]
    )


# Recipes


def test_every_architecture_has_a_recipe_and_every_recipe_an_architecture():
    assert {path.stem for path in (CONFIGS / "pretrain").iterdir()} == set(ARCHITECTURES)


def test_the_other_files_load_too():
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert "slurm.yaml" in names
    for name in names:
        assert options.read_file(SubmitConfig, CONFIGS / name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_recipe_holds_only_what_differs_and_names_the_source_of_each_number(arch):
    text = (CONFIGS / f"pretrain/{arch}.yaml").read_text()
    values = options.read_file(TrainConfig, CONFIGS / f"pretrain/{arch}.yaml")
    plain = options.flat(TrainConfig(arch, "", ""))
    same = [name for name, value in values.items() if plain[name] == value]
    assert set(same) <= {"optim.batch_size_per_gpu"}  # said all the same: the header counts with it
    loaded = load_config(TrainConfig, RECIPE, ["--arch", arch, "--data", "d", "--out", "o"])
    assert options.flat(loaded) == plain | values | {"data": "d", "out": "o"}
    for line in text.splitlines():
        if re.match(r"  \w+: ", line):
            assert re.search(r"  # .*(VISSL|DINO|XCiT|chosen|xcit|likewise)", line), line
    gpus, batch, total = re.search(
        r"# (\d+) GPUs x (\d+) images = ([\d,]+) per step", text
    ).groups()
    assert int(gpus) * int(batch) == int(total.replace(",", ""))
    assert int(batch) == loaded.optim.batch_size_per_gpu
    assert f"main_dino.py --arch {arch} " in text
    assert ("Published" in text) == (arch in PUBLISHED)
    assert ("No published" in text) == (arch not in PUBLISHED)


PUBLISHED = {  # k-NN, linear: facebookresearch/dino, README
    "xcit_small_12_p16": ("76.0", "77.8"),
    "xcit_small_12_p8": ("77.1", "79.2"),
    "xcit_medium_24_p16": ("76.4", "78.8"),
    "xcit_medium_24_p8": ("77.9", "80.3"),
}
VISSL = {  # GPUs x batch, peak rate there, drop path, local crops, split of the scales, final rate
    "xcit_small_12_p16": (1024, 0.001, 0.05, 8, 0.3, 4e-5),
    "xcit_medium_24_p16": (1024, 0.001, 0.15, 8, 0.3, 1e-5),
    "xcit_medium_24_p8": (960, 9.375e-4, 0.15, 6, 0.32, 1e-5),
    "xcit_large_24_p16": (1120, 1.09e-3, 0.3, 8, 0.32, 1e-5),
    "xcit_large_24_p8": (512, 5e-4, 0.3, 8, 0.32, 1e-5),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_a_published_recipe_says_the_published_numbers(arch):
    text = (CONFIGS / f"pretrain/{arch}.yaml").read_text()
    knn, linear = PUBLISHED[arch]
    assert f"k-NN {knn}, linear probe {linear}" in text


@pytest.mark.parametrize("arch", VISSL)
def test_recipes_that_cite_vissl_equal_it(arch):
    batch, peak, drop_path, local_crops, split, final = VISSL[arch]
    loaded = load_config(TrainConfig, RECIPE, ["--arch", arch, "--data", "d", "--out", "o"])
    assert math.isclose(loaded.optim.lr * batch / 256, peak, rel_tol=4e-3)
    assert loaded.model.drop_path_rate == drop_path
    assert loaded.crops.local_crops_number == local_crops
    assert loaded.crops.global_crops_scale == (split, 1.0)
    assert loaded.crops.local_crops_scale == (0.05, split)
    assert loaded.optim.min_lr == final
    assert (loaded.loss.teacher_temp, loaded.loss.warmup_teacher_temp_epochs) == (0.07, 30)
    assert loaded.optim.epochs == 300
    assert loaded.head.norm_last_layer is False


# Help


@pytest.mark.parametrize("cls", COMMANDS)
def test_help_lists_every_setting_with_its_text_and_default(cls, capsys):
    with pytest.raises(SystemExit) as ended:
        load_config(cls, argv=["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in options.leaves(cls):
        assert f" --{name} " in shown
    for owner in (
        cls,
        *(f.default_factory for f in dataclasses.fields(cls) if callable(f.default_factory)),
    ):
        documented = options._documentation(owner)
        for item in dataclasses.fields(owner):
            if not callable(item.default_factory):
                assert documented[item.name] in shown
                assert documented[item.name].endswith(".")
    assert shown.count("[required]") == len(options.required(cls))
    assert "-h" in shown


def test_help_shows_the_recipe_of_the_architecture(capsys):
    for flags, rate, lr in (
        ([], "0.1", "0.0005"),
        (["--arch", "xcit_large_24_p8"], "0.3", "0.00025"),
        (["--arch", "xcit_large_24_p8", "--lr", "0.7"], "0.3", "0.7"),
    ):
        with pytest.raises(SystemExit):
            load_config(TrainConfig, RECIPE, [*flags, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"the same rate in every block. [default: {rate}]" in shown
        assert f"scaled linearly with the global batch. [default: {lr}]" in shown


SCRIPTS = ["main_dino.py", "eval/knn.py", "launch/submit.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_imports_no_torch_from_any_folder(script, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time, so that a busy machine does not count; the promise is 2 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "yaml" in imported
    assert not imported & {
        "torch",
        "numpy",
        "submitit",
        "ssl_xcit.dino.train",
        "ssl_xcit.evaluation.knn",
    }
    assert re.search(rf"usage: {Path(script).name} \[?--", done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_one_line_and_exit_status_2(script, tmp_path):
    command = [sys.executable, str(ROOT / script), "--zzzzz", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown option --zzzzz; --help lists them all\n"


# run_command


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A module that notes the configuration it is called with, or raises what CALL says."""
    name = f"target_{os.getpid()}_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("seen = []\ndef call(config):\n    seen.append(config)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_command_calls_its_target_with_the_configuration(target):
    run_command(TrainConfig, f"{target}:call", RECIPE, GIVEN)
    assert sys.modules[target].seen == [train_config(files=RECIPE)]


def test_a_command_reads_the_command_line_by_default(target, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main_dino.py", *GIVEN, "--seed", "4"])
    run_command(TrainConfig, f"{target}:call")
    assert sys.modules[target].seen == [train_config("--seed", "4")]


def test_a_target_is_not_imported_for_a_wrong_configuration(target, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(TrainConfig, f"{target}:call", argv=["--epochs", "x"])
    assert ended.value.code == 2
    assert target not in sys.modules
    assert capsys.readouterr().err == "error: --optim.epochs: expected an integer, got x\n"


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [(UserError("no\n  such beton"), 2, "error: no such beton\n"), (KeyboardInterrupt(), 130, "")],
)
def test_the_ways_a_command_ends(target, capsys, error, code, printed):
    def fail(config):
        raise error

    __import__(target).call = fail
    with pytest.raises(SystemExit) as ended:
        run_command(TrainConfig, f"{target}:call", argv=GIVEN)
    assert ended.value.code == code
    assert capsys.readouterr().err == printed


def test_a_defect_of_ours_keeps_its_traceback(target):
    def fail(config):
        raise ZeroDivisionError

    __import__(target).call = fail
    with pytest.raises(ZeroDivisionError):
        run_command(TrainConfig, f"{target}:call", argv=GIVEN)


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.CONFIGS.is_absolute()
    assert train_config(files=RECIPE).loss.teacher_temp == 0.07
