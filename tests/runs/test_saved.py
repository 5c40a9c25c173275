"""A run as one file: read back bit for bit, and nothing in it is trusted."""

import io
import json
import zipfile

import jax
import numpy as np
import pytest

from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.files import read_npz, write_npz
from advmoe_jax.runs import Run, build, load

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def network(request):
    """Built once: to draw parameters takes a moment."""
    return {}


@pytest.fixture
def run(config, network):
    config.data.path = "/somewhere/else/digits.tar.gz"
    if not network:
        images = build.load_images(config)
        network["built"] = images.kind, *build.create_network(config, images)
    kind, *of_network = network["built"]
    results = {"standard_accuracy": 0.5, "robust_accuracy": {}, "config": {"seed": 0}}
    sample = Split(IMAGES, np.array([1, 2, 3], np.int32))
    return Run("here", config, kind, *of_network, results, sample)


def test_read_back_bit_for_bit(run, tmp_path):
    # Weights that float16 holds are kept in it, others are not rounded.
    halves = jax.tree.map(lambda x: x.astype("float16").astype(x.dtype), run.params["backbone"])
    run.params = {"backbone": halves}
    path = run.save(tmp_path / "run.npz")
    again = load(path)
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    jax.tree.map(np.testing.assert_array_equal, again.stats, run.stats)
    assert again.network == run.network and again.kind == run.kind
    np.testing.assert_array_equal(again.sample.images, IMAGES)
    assert again.results == {"standard_accuracy": 0.5, "robust_accuracy": {}}
    assert again.config.data.path == "digits.tar.gz"  # not where it lay on this machine
    kinds = {name: x.dtype for name, x in read_npz(path).items() if name.startswith("params")}
    assert set(kinds.values()) == {np.dtype("float16")}


def test_what_float16_would_round_is_kept_whole(run, tmp_path):
    again = load(run.save(tmp_path / "run.npz"))
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)


def test_values_that_came_later_have_their_defaults(run, tmp_path):
    def forget(arrays):
        content = json.loads(arrays["about"].tobytes())
        del content["config"]["evaluation"]["show_every"], content["config"]["exits"]
        arrays["about"] = np.frombuffer(json.dumps(content).encode(), np.uint8)

    again = load(damaged(run.save(tmp_path / "run.npz"), forget))
    assert again.config.evaluation.show_every == 0 and again.config.exits.objective == "halves"
    assert again.config.attack.to_dict() == run.config.attack.to_dict()


def damaged(path, change):
    """The file with its arrays changed."""
    arrays = read_npz(path)
    change(arrays)
    return write_npz(path, arrays)


def about(**changes):
    def change(arrays):
        content = json.loads(arrays["about"].tobytes()) | changes
        arrays["about"] = np.frombuffer(json.dumps(content).encode(), np.uint8)

    return change


def set_to(name, array):
    return lambda arrays: arrays.__setitem__(name, array)


HEAD = "params/backbone/head/bias"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda arrays: arrays.pop("about"), "is no saved run"),
        (set_to("about", np.frombuffer(b"[" * 9999, np.uint8)), "is no saved run"),
        (about(images={"name": "x", "shape": [8, 8], "class_names": ["a", "b"]}), "is damaged"),
        (about(results=[]), "is no saved run"),
        (about(config={}), "no value for family"),
        (lambda arrays: arrays.pop(HEAD), f"{HEAD} is missing or of another shape"),
        (set_to(HEAD, np.zeros(11, np.float32)), f"{HEAD} is missing or of another shape"),
        (set_to(HEAD, np.zeros(10, np.int32)), f"{HEAD} is missing or of another shape"),
        (set_to(HEAD, np.full(10, np.nan, np.float32)), f"{HEAD} is not finite"),
        (set_to("more", np.zeros(1)), "holds more, which the network does not have"),
        (set_to("sample/labels", np.full(3, 10, np.int32)), "its sample is not of its images"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(run, tmp_path, change, told):
    path = damaged(run.save(tmp_path / "run.npz"), change)
    with pytest.raises(UserError, match=told):
        load(path)


def npz(path, name, content, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr(name, content)
    return path


def npy(header, values=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + values


FLOATS = {"descr": "<f4", "fortran_order": False}


@pytest.mark.parametrize(
    "content",
    [
        b"no npy",
        npy(FLOATS | {"shape": (2**40,)}, b"1234"),  # would be 4 TiB
        npy(FLOATS | {"shape": (-1,)}, b""),
        npy(FLOATS | {"shape": (1,), "descr": "|O"}, b"\x80\x04N."),
    ],
    ids=["no array", "larger than it is", "of negative size", "pickled"],
)
def test_arrays_of_strangers(tmp_path, content):
    with pytest.raises(UserError, match="is damaged, or no npz of this package"):
        read_npz(npz(tmp_path / "x.npz", "about.npy", content))


def test_compressed_files_are_refused(tmp_path):
    small = npz(tmp_path / "x.npz", "about.npy", bytes(10**7), zipfile.ZIP_DEFLATED)
    assert small.stat().st_size < 20_000
    with pytest.raises(UserError, match="is damaged, or no npz"):
        read_npz(small)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: .* holds no run"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"'first' is no checkpoint: choose 'best' or 'last'"):
        load(tmp_path, "first")
    (tmp_path / "text").write_text("no run")
    with pytest.raises(UserError, match="is damaged, or no npz"):
        load(tmp_path / "text")
