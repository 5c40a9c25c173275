"""Checkpoints of V-MoE's published code: read, converted, resized; damaged ones refused.

``data/vmoe.index`` and its two data files were written by the published ``save_checkpoint`` (commit
942a78b) from the parameters in ``data/vmoe.npz``, in pieces of at most 512 bytes.
"""

import shutil
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
from flax import nnx

from advmoe_jax.errors import UserError
from advmoe_jax.models import ViT, functional
from advmoe_jax.published.vmoe_checkpoint import read
from advmoe_jax.published.vmoe_model import imported, network_of, resize_positions

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def arrays():
    return read(DATA / "vmoe")


def test_every_array_is_read_to_the_bit(arrays):
    with np.load(DATA / "vmoe.npz") as file:
        expected = {k.removeprefix("params/"): file[k] for k in file.files if "params/" in k}
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_the_network_is_told_by_its_arrays_and_answers_as_published(arrays):
    network = network_of(arrays, top_k=2)
    assert network == ViT(
        network.name,
        num_experts=3,
        top_k=2,
        placement="1,2",
        representation=6,
        image_size=network.image_size,
        patch=4,
        layers=3,
        width=8,
        hidden=12,
        heads=2,
    )
    assert network.size.image == 8
    params, stats, classes = imported(arrays, network)
    assert classes == 4
    model = network.create(in_channels=1, num_classes=4, rngs=nnx.Rngs(1))
    with np.load(DATA / "vmoe.npz") as file, jax.default_matmul_precision("highest"):
        logits = functional(model)[0].apply(params, stats, file["images"])[0].logits
        np.testing.assert_allclose(logits, file["dropless/logits"], rtol=1e-4, atol=1e-4)


def test_a_dense_checkpoint_is_a_vit(arrays):
    # The experts' first values in the place of all.
    dense = {
        name.replace("Moe/Mlp", "Mlp"): array[0] if "Moe/Mlp" in name else array
        for name, array in arrays.items()
        if "Router" not in name
    }
    network = network_of(dense, top_k=2)
    assert (network.num_experts, network.top_k, network.parts) == (1, 1, ("backbone",))
    assert imported(dense, network)[0].keys() == {"backbone"}


def test_positions_are_zoomed_and_the_class_tokens_stays():
    # The published zoom of a grid keeps its corners, and is linear between: so is this grid.
    rows, columns = np.mgrid[:3, :3].astype(np.float32)
    positions = np.concatenate([[[7.0, 7.0]], np.stack([rows, columns], -1).reshape(9, 2)])
    resized = resize_positions(positions, 5, True)
    assert resized.shape == (26, 2)
    np.testing.assert_array_equal(resized[0], [7, 7])
    expected = np.stack(np.mgrid[:5, :5] / 2, axis=-1)
    np.testing.assert_allclose(resized[1:].reshape(5, 5, 2), expected, atol=1e-6)
    np.testing.assert_array_equal(resize_positions(positions, 3, True), positions)


def test_another_resolution_has_resized_positions(arrays):
    network = network_of(arrays, top_k=2, image_size=12)
    params = imported(arrays, network)[0]
    assert params["experts"]["positions"].shape == (10, 8)
    with pytest.raises(UserError, match=r"model\.patch=4 does not divide the images' side, 10"):
        imported(arrays, network_of(arrays, top_k=2, image_size=10))


def test_a_checkpoint_of_another_size_is_refused(arrays):
    network = network_of(arrays, top_k=2)
    with pytest.raises(UserError, match=r"has shape \(3, 12\), the network's \(4, 12\)"):
        imported(arrays, network._replace(num_experts=4))
    with pytest.raises(UserError, match=r"model\.top_k=4 must lie between 1 and num_experts=3"):
        imported(arrays, network_of(arrays, top_k=4))
    for missing, text in (("head/kernel", "has no head"), ("embedding/kernel", "no ViT or V-MoE")):
        rest = {name: array for name, array in arrays.items() if name != missing}
        with pytest.raises(UserError, match=text):
            imported(rest, network_of(rest, top_k=2))
    with pytest.raises(UserError, match="parameters are missing"):
        rest = {k: v for k, v in arrays.items() if k != "Encoder/encoder_norm/bias"}
        imported(rest, network)
    with pytest.raises(UserError, match="parameter more is none of this network's"):
        imported({**arrays, "more": np.zeros(3)}, network)


@pytest.fixture
def copy(tmp_path):
    for file in DATA.glob("vmoe.*"):
        if file.suffix != ".npz":
            shutil.copy(file, tmp_path)
    return tmp_path / "vmoe"


def test_missing_files_are_named(copy):
    with pytest.raises(UserError, match=r"nothing\.index does not exist: give the files' common"):
        read(copy.with_name("nothing"))
    copy.with_name("vmoe.data-00001-of-00002").unlink()
    with pytest.raises(UserError, match=r"vmoe\.data-00001-of-00002 does not exist"):
        read(copy)


def repack(path, change):
    """Writes the file's outermost objects anew; what is inside stays as it is."""
    content = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    path.write_bytes(msgpack.packb(change(content)))


@pytest.mark.parametrize("name", ["vmoe.index", "vmoe.data-00000-of-00002"])
@pytest.mark.parametrize("content", [b"", b"\xc1", b"text", b"\x81\xa1a\x01", b"\x91" * 3000])
def test_damaged_files_are_named(copy, name, content):
    copy.with_name(name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read(copy)


def test_a_torn_file_is_named(copy):
    path = copy.with_name("vmoe.data-00000-of-00002")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="data-00000-of-00002"):
        read(copy)


def leaf(shape, dtype="float32"):
    described = msgpack.packb((shape, dtype, False, {}))
    return msgpack.ExtType(8, msgpack.packb((described, [], [])))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: {**c, "version": "2099"}, "version '2099' is not known"),
        (lambda c: {**c, "shard_count": 10**12}, "shard_count=1000000000000 is no number of files"),
        (lambda c: {**c, "shard_count": -1}, "shard_count=-1"),
        (lambda c: {**c, "index": [1]}, "no tree of arrays"),
        (lambda c: {**c, "index": {"a": 1}}, "something else than arrays"),
        (lambda c: {**c, "index": {"a": msgpack.ExtType(2, b"")}}, "of kind 2"),
        # Sizes that nothing stands behind are never asked of the memory.
        (lambda c: {**c, "index": {"a": leaf([10**9, 10**9])}}, "a is damaged: its pieces"),
        (lambda c: {**c, "index": {"a": leaf([-1])}}, "are no sizes"),
        (lambda c: {**c, "index": {"a": leaf([2], "object")}}, "arrays of 'object' are not read"),
    ],
)
def test_no_size_and_no_kind_is_trusted(copy, change, text):
    repack(copy.with_name("vmoe.index"), change)
    with pytest.raises(UserError, match=text):
        read(copy)


def test_pieces_that_do_not_fit_are_refused(copy):
    def swap(content):
        keys = [key for key in content if key.isdigit()]
        changed = dict(content)
        changed[keys[0]], changed[keys[-1]] = content[keys[-1]], content[keys[0]]
        return changed

    repack(copy.with_name("vmoe.data-00000-of-00002"), swap)
    with pytest.raises(UserError, match="is damaged"):
        read(copy)
