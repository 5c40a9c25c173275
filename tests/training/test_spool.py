"""Checkpoints in a bucket: the same as on a disk, whole or not there."""

import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax import storage
from advmoe_jax.errors import UserError
from advmoe_jax.storage import path_of
from advmoe_jax.training.checkpoint import Checkpointer


def state(value):
    return {"params": {"w": jnp.full((3, 4), value)}, "step": jnp.int32(value)}


def save(directory, values, keep=2):
    with Checkpointer(directory, keep, "ours") as checkpointer:
        for step, metric in values.items():
            checkpointer.save(step, state(step), metric)


def steps(directory):
    return {name.split("/")[0] for name in storage.files_in(directory)}


def test_saves_keeps_and_restores_as_on_a_disk(bucket, tmp_path):
    values = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2, 5: None}
    for directory in (bucket, tmp_path / "disk"):
        save(directory, values)
        with Checkpointer(directory, 2) as checkpointer:
            assert checkpointer.saved_owner() == "ours"
            step, found = checkpointer.restore_latest(state(0))
            assert step == 5 and found["params"]["w"][0, 0] == 5
            assert checkpointer.restore_best(None)[0] == 2
    assert steps(bucket) == {"2", "4", "5"}
    here = {x.relative_to(tmp_path / "disk").as_posix() for x in (tmp_path / "disk").rglob("*")}
    assert {name for name in storage.files_in(bucket) if "/d/" not in name} <= here


def test_a_metric_is_recorded_later(bucket):
    save(bucket, {1: 0.5, 2: None})
    save(bucket, {2: 0.9})
    with Checkpointer(bucket, 2) as checkpointer:
        assert checkpointer.restore_best(None)[0] == 2


def test_nothing_is_left_on_this_machine(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    save(bucket, {1: 0.5})
    with Checkpointer(bucket, 2) as checkpointer:
        assert checkpointer.restore_latest(None)[0] == 1
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_checkpoint_without_its_record_is_none(bucket):
    save(bucket, {1: 0.5, 2: 0.4})
    (bucket / "2/record/metadata").unlink()
    with Checkpointer(bucket, 2) as checkpointer:
        assert checkpointer.restore_latest(None)[0] == 1
    save(bucket, {3: 0.3})
    assert steps(bucket) == {"1", "3"}


def test_a_damaged_one_is_moved_aside_and_skipped(bucket, caplog):
    save(bucket, {1: 0.5, 2: 0.4})
    for name in storage.files_in(bucket / "2/state"):
        (bucket / "2/state" / name).write_bytes(b"damaged")
    (bucket / "1/record/metadata").write_text("{")
    save(bucket, {3: 0.3})
    with Checkpointer(bucket, 3) as checkpointer:
        (bucket / "3/record/metadata").unlink()
        assert checkpointer.restore_latest(None) is None
    assert steps(bucket) - {"3"} == {"damaged"}
    assert {name.split("/")[1] for name in storage.files_in(bucket) if "damaged" in name} == {
        "1-1",
        "2-1",
    }


def test_one_that_vanishes_while_it_is_read_is_no_damage(bucket, monkeypatch):
    save(bucket, {1: 0.5, 2: 0.4})
    get = storage.get

    def vanishing(source, file):
        if "2/state" in str(source):
            raise FileNotFoundError
        get(source, file)

    monkeypatch.setattr(storage, "get", vanishing)
    with Checkpointer(bucket, 2) as checkpointer:
        assert checkpointer.restore_latest(None)[0] == 1
    assert steps(bucket) == {"1", "2"}


def test_a_bucket_that_fails_loses_nothing(bucket, monkeypatch):
    save(bucket, {1: 0.5})
    put = storage.put

    def failing(file, target):
        if target.name == "manifest.ocdbt":
            raise UserError(f"{target} cannot be written")
        put(file, target)

    monkeypatch.setattr(storage, "put", failing)
    checkpointer = Checkpointer(bucket, 2)
    checkpointer.save(2, state(2), 0.6)
    with pytest.raises(UserError, match="cannot be written"):
        checkpointer.wait()
    monkeypatch.setattr(storage, "put", put)
    checkpointer.save(3, state(3), 0.4)
    checkpointer.close()
    assert steps(bucket) == {"1", "3"}


def test_extracts_whole(bucket):
    save(bucket / "all", {1: 0.5, 2: 0.4})
    with Checkpointer(bucket / "all", 2) as checkpointer:
        checkpointer.extract(bucket / "weights", lambda name: name.startswith("params"))
    assert storage.is_whole(bucket / "weights")
    with Checkpointer(bucket / "weights", 2) as checkpointer:
        step, found = checkpointer.restore_best(None)
    assert step == 1 and list(found) == ["params/w"]
    np.testing.assert_array_equal(found["params/w"], np.ones((3, 4)))
    (bucket / "weights" / "whole").unlink()
    assert not storage.is_whole(bucket / "weights")


def test_both_kinds_of_buckets(bucket):
    save(path_of("s3://bucket/runs"), {1: 0.5})
    assert steps(bucket) == {"1"}
