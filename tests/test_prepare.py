"""Preparing as a command, and training on what it wrote: one command each."""

import json

import numpy as np
import pytest
from PIL import Image

CLASSES, SIZE = ("n01", "n02", "n03"), 64


@pytest.fixture
def tree(tmp_path):
    """Tiny-ImageNet's layout with 16 images of each of three classes, and 4 to measure on."""
    root = tmp_path / "tiny-imagenet-3"
    draw = np.random.default_rng(0)

    def write(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (SIZE // 8, SIZE // 8, 3), np.uint8)
        Image.fromarray(pixels).resize((SIZE, SIZE)).save(file, "JPEG")

    for name in CLASSES:
        for i in range(16):
            write(root / "train" / name / "images" / f"{name}_{i}.JPEG")
    for i in range(12):
        write(root / "val" / "images" / f"val_{i}.JPEG")
    lines = (f"val_{i}.JPEG\t{CLASSES[i % 3]}\t0\t0\t9\t9\n" for i in range(12))
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def prepare(fork, tree, data_dir, **flags):
    flags = {"dataset": "tiny_imagenet", "source": tree, "data_dir": data_dir, **flags}
    return fork("advmoe_jax.prepare", *(f"--{name}={value}" for name, value in flags.items()))


def files(directory):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file()}


def test_a_damaged_file_is_named_and_the_same_command_goes_on(fork, tree, tmp_path):
    broken = tree / "train" / "n02" / "images" / "n02_7.JPEG"
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    code, out, err = prepare(fork, tree, tmp_path / "data")
    assert code == 2 and "Traceback" not in err
    named, told = err.strip().splitlines()
    assert named.startswith(f"{tree}: train/n02/images/n02_7.JPEG cannot be decoded")
    assert told.startswith("error: 1 of 60 files cannot be decoded, see above: ")
    broken.write_bytes(content)
    code, out, err = prepare(fork, tree, tmp_path / "data")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "tiny_imagenet: 3 classes, 48 files of train, 12 files of val",
        f"prepared in {tmp_path}/data/tiny_imagenet/1.0.0",
    ]
    before = files(tmp_path / "data")
    code, out, err = prepare(fork, tree, tmp_path / "data")
    assert (
        code == 0 and out.endswith("nothing was changed\n") and files(tmp_path / "data") == before
    )


def test_mistakes_of_the_command_line(fork, tree, tmp_path):
    code, _, err = prepare(fork, tmp_path / "nowhere", tmp_path / "data")
    assert code == 2 and err == (
        f"error: {tmp_path}/nowhere does not exist: give the directory or the archive of images\n"
    )
    code, _, err = prepare(fork, tree, tmp_path / "data", dataset="Tiny-ImageNet")
    assert code == 2 and err.startswith("error: --dataset=Tiny-ImageNet is no name")
    code, _, err = fork("advmoe_jax.prepare", "--dataset=tiny")
    assert code == 2 and err == "error: --source is missing; see --help\n"
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_prepared_streamed_and_trained_by_one_command_each(fork, tree, tmp_path):
    assert prepare(fork, tree, tmp_path / "data")[0] == 0
    values = {
        "method": "standard",
        "num_epochs": 1,
        "batch_size": 8,
        "model.name": "resnet10_cifar",
        "model.num_experts": 1,
        "model.ratio": 1.0,
        "model.width": 2,
        "data.source": "tfds:tiny_imagenet",
        "data.path": tmp_path / "data",
        "data.stream": True,
        "data.image_size": SIZE,
        "data.crop_padding": 0,
        "data.crop_area": 0.25,
        "data.crop_whole": True,
        "evaluation.attacks": "clean",
        "evaluation.validation_steps": 1,
    }
    code, out, err = fork(
        "advmoe_jax.train",
        "--config=configs/tiny_imagenet_resnet18.py",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    )
    assert code == 0, err
    told = "tiny_imagenet: 43 training, 5 validation, 12 test images of 64x64x3, 3 classes"
    assert told in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 5 and results["attacks"]["clean"]["examples"] == 12
