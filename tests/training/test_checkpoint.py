"""Checkpoints: what is kept and verified, and what a kill, a full disk or damage leave behind."""

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from advmoe_jax.errors import UserError
from advmoe_jax.training.checkpoint import Checkpointer, OtherState, tree_sha256


class State(NamedTuple):
    params: dict
    statistics: tuple
    step: jax.Array
    key_data: jax.Array
    nothing: None = None


def replicated():
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())


def make_state(seed, size=60):
    """A state of every dtype that occurs, replicated over all devices, its buffers owned by XLA."""
    values = np.random.default_rng(seed).standard_normal((size, 10)).astype(np.float32)

    def build():
        return State(
            params={"router": {"kernel": jnp.asarray(values)}, "experts": {}},
            statistics=(jnp.asarray(values[0], jnp.bfloat16), jnp.asarray(values[:2])),
            step=jnp.int32(seed),
            key_data=jnp.arange(2, dtype=jnp.uint32) + seed,
        )

    return jax.jit(build, out_shardings=replicated())()


def assert_same(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        assert left.sharding.is_equivalent_to(right.sharding, left.ndim)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def assert_restores(restored, step, expected):
    assert restored is not None
    assert restored[0] == step
    assert_same(restored[1], expected)


def steps_on_disk(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def save_all(directory, metrics, keep):
    """Saves `make_state(step)` for every step of `metrics`."""
    with Checkpointer(directory, keep) as checkpointer:
        for step, metric in metrics.items():
            checkpointer.save(step, make_state(step), metric)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A directory with checkpoints 1 (metric 0.2) and 2 (metric 0.3), to be copied and damaged."""
    directory = tmp_path_factory.mktemp("template") / "checkpoints"
    save_all(directory, {1: 0.2, 2: 0.3}, keep=2)
    return directory


@pytest.fixture
def two(template, tmp_path):
    return shutil.copytree(template, tmp_path / "checkpoints")


# What is restored.


def test_restores_nothing_where_nothing_is(tmp_path):
    checkpointer = Checkpointer(tmp_path / "absent", keep=1)
    assert checkpointer.restore_latest(make_state(0)) is None
    assert checkpointer.restore_best(make_state(0)) is None
    checkpointer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_says_whose_it_is(tmp_path):
    assert Checkpointer(tmp_path, 1, "me").saved_owner() is None
    with Checkpointer(tmp_path / "all", 1, "me") as checkpointer:
        checkpointer.save(1, make_state(1), 0.5)
        checkpointer.extract(tmp_path / "parts", lambda name: name.startswith("params"))
    for name in ("all", "parts"):
        assert Checkpointer(tmp_path / name, 1, "another").saved_owner() == "me"


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpointer(tmp_path, keep=0)


def test_restores_in_the_process_that_saves_and_in_the_next(tmp_path):
    state = make_state(7)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(7, state, 0.5)
        assert_restores(checkpointer.restore_latest(make_state(0)), 7, state)
    assert_restores(Checkpointer(tmp_path, keep=1).restore_latest(make_state(0)), 7, state)


def test_restores_like_shapes_with_dtype_and_sharding(two):
    sharding = NamedSharding(replicated().mesh, PartitionSpec("data"))
    saved = make_state(2, size=60)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=replicated()), saved
    )
    kernel = jax.ShapeDtypeStruct((60, 10), jnp.bfloat16)
    like = like._replace(params={"router": {"kernel": kernel}, "experts": {}})
    _, restored = Checkpointer(two, keep=1).restore_latest(like)
    restored_kernel = restored.params["router"]["kernel"]
    assert restored_kernel.dtype == jnp.bfloat16
    assert not restored_kernel.committed
    assert restored.step.dtype == jnp.float32
    assert restored.step == 2
    assert restored.step.sharding == replicated()
    # Sharded, and not replicated: 8 rows over the 8 devices.
    with Checkpointer(two, keep=1) as checkpointer:
        checkpointer.save(3, {"x": jax.device_put(jnp.arange(8.0), replicated())}, None)
        _, restored = checkpointer.restore_latest(
            {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
        )
    assert restored["x"].sharding == sharding
    np.testing.assert_array_equal(restored["x"], np.arange(8.0))


def test_orbax_itself_reads_the_state(two):
    state = make_state(2)
    with ocp.StandardCheckpointer() as orbax:
        restored = orbax.restore(two / "2" / "state")
    assert tree_sha256(restored) == tree_sha256(state)
    assert restored.keys() == {
        "params/router/kernel", "statistics/0", "statistics/1", "step", "key_data"
    }  # fmt: skip


def test_restores_a_part_in_containers_of_another_kind(two):
    saved = make_state(2)
    part = {"params": saved.params, "statistics": [saved.statistics[0]]}
    assert_restores(Checkpointer(two, keep=2).restore_latest(part), 2, part)


def test_any_directory_name_will_do(tmp_path):
    directory = tmp_path / "a b%20c#d?e"
    save_all(directory, {1: 0.5}, keep=1)
    assert_restores(Checkpointer(directory, 1).restore_latest(make_state(0)), 1, make_state(1))


def test_an_uncommitted_state_stays_uncommitted(two):
    state = {"x": jnp.arange(3.0)}
    with Checkpointer(two, keep=1) as checkpointer:
        checkpointer.save(3, state, None)
        _, restored = checkpointer.restore_latest(state)
    assert not restored["x"].committed
    # It may hence join arrays that are spread over all devices.
    assert (restored["x"] + jax.device_put(jnp.ones(3), replicated())).sum() == 6


@jax.jit
def train_step(state):
    return jax.tree.map(lambda x: x * 3 + 1, state)


donating_step = jax.jit(lambda state: train_step(state), donate_argnums=0)


def test_the_state_may_be_donated_right_after_save(tmp_path):
    state, expected = make_state(1, size=20_000), make_state(1, size=20_000)
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        for step in range(4):
            checkpointer.save(step, state, None)
            kernel = state.params["router"]["kernel"]
            state = donating_step(state)
            assert kernel.is_deleted(), "saving must not pin the buffers of the state"
    for step in range(4):
        for later in range(step + 1, 4):  # so that the step is the latest
            shutil.rmtree(tmp_path / str(later), ignore_errors=True)
    assert steps_on_disk(tmp_path) == [0]
    assert_restores(Checkpointer(tmp_path, keep=5).restore_latest(state), 0, expected)


def test_what_was_saved_before_a_donation_is_what_was_there(tmp_path):
    state = make_state(1, size=20_000)
    digests = {}
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        for step in range(4):
            digests[step] = tree_sha256(jax.tree.map(jnp.copy, state))
            checkpointer.save(step, state, None)
            state = donating_step(state)
    assert len(set(digests.values())) == 4
    for step in reversed(range(4)):
        found, restored = Checkpointer(tmp_path, keep=5).restore_latest(state)
        assert found == step
        assert tree_sha256(restored) == digests[step]
        shutil.rmtree(tmp_path / str(step))


def test_restored_arrays_may_be_donated(two):
    _, restored = Checkpointer(two, keep=2).restore_latest(make_state(0))
    for leaf in jax.tree.leaves(restored):
        pointers = {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
        assert len(pointers) == len(jax.devices()), "devices share memory"
    kernel = restored.params["router"]["kernel"]
    stepped = donating_step(restored)
    assert kernel.is_deleted()
    assert_same(stepped, train_step(make_state(2)))


# What is kept.


def test_keeps_the_latest_and_the_best_across_restarts(tmp_path):
    save_all(tmp_path, {1: 0.1, 2: 0.9, 3: 0.3}, keep=2)
    assert steps_on_disk(tmp_path) == [2, 3]
    save_all(tmp_path, {4: 0.4, 5: 0.5}, keep=2)
    assert steps_on_disk(tmp_path) == [2, 4, 5]
    save_all(tmp_path, {6: 0.95}, keep=2)
    assert steps_on_disk(tmp_path) == [5, 6]
    save_all(tmp_path, {7: 0.1, 8: 0.2}, keep=2)
    assert steps_on_disk(tmp_path) == [6, 7, 8]
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert_restores(checkpointer.restore_best(make_state(0)), 6, make_state(6))
    assert_restores(checkpointer.restore_latest(make_state(0)), 8, make_state(8))
    assert {path.name for path in tmp_path.iterdir()} == {"6", "7", "8"}


def test_a_checkpoint_leaves_by_one_rename(two, monkeypatch):
    """A kill while its files are deleted must not leave a checkpoint that looks damaged."""
    files = {path.name for path in (two / "1").rglob("*")}
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    save_all(two, {3: 0.4}, keep=2)
    assert steps_on_disk(two) == [2, 3]
    assert {path.name for path in (two / "deleted" / "1").rglob("*")} == files


def test_of_equal_metrics_the_earlier_is_best(tmp_path):
    save_all(tmp_path, {1: 0.5, 2: 0.5}, keep=1)
    save_all(tmp_path, {3: 0.5}, keep=1)
    assert steps_on_disk(tmp_path) == [1, 3]
    assert Checkpointer(tmp_path, keep=1).restore_best(make_state(0))[0] == 1


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_without_a_metric_only_the_latest_count(tmp_path, missing):
    save_all(tmp_path, {1: missing, 2: missing}, keep=1)
    assert steps_on_disk(tmp_path) == [2]
    assert Checkpointer(tmp_path, keep=1).restore_best(make_state(0)) is None
    save_all(tmp_path, {3: -1.0, 4: missing, 5: missing}, keep=1)
    assert steps_on_disk(tmp_path) == [3, 5]
    assert Checkpointer(tmp_path, keep=1).restore_best(make_state(0))[0] == 3


def test_saving_again_records_the_metric_and_never_loses_one(tmp_path):
    save_all(tmp_path, {1: 0.1, 2: None}, keep=1)
    save_all(tmp_path, {2: 0.7}, keep=1)
    save_all(tmp_path, {2: None, 3: 0.2}, keep=1)
    assert steps_on_disk(tmp_path) == [2, 3]
    assert_restores(Checkpointer(tmp_path, 1).restore_best(make_state(0)), 2, make_state(2))


def test_another_state_at_a_saved_step_is_refused(two):
    with (
        Checkpointer(two, keep=2) as checkpointer,
        pytest.raises(ValueError, match="another state is already saved"),
    ):
        checkpointer.save(2, make_state(5), 0.5)
    assert_restores(Checkpointer(two, keep=2).restore_latest(make_state(0)), 2, make_state(2))


def test_a_step_before_the_latest_is_saved(two):
    shutil.rmtree(two / "1")
    save_all(two, {1: 0.9}, keep=2)
    assert steps_on_disk(two) == [1, 2]


# Damage.


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)


def flip_first(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip, flip_first, truncate, empty, Path.unlink])
def test_any_damaged_file_is_harmless_or_named(template, tmp_path, caplog, damage):
    files = sorted(p.relative_to(template) for p in (template / "2").rglob("*") if p.is_file())
    assert len(files) > 5
    expected, like = {1: make_state(1), 2: make_state(2)}, make_state(0)
    skipped = []
    for number, file in enumerate(files):
        directory = shutil.copytree(template, tmp_path / str(number))
        damage(directory / file)
        caplog.clear()
        step, restored = Checkpointer(directory, keep=2).restore_latest(like)
        assert_same(restored, expected[step])
        if step == 1:
            skipped.append(file.as_posix())
            (message,) = [record.getMessage() for record in caplog.records]
            assert str(directory / "2") in message
            assert "\n" not in message
            assert (directory / "damaged" / "2-1" / file.relative_to("2").parent).is_dir()
        assert steps_on_disk(directory) == ([1] if step == 1 else [1, 2])
    assert "2/record/metadata" in skipped
    assert any(file.startswith("2/state/ocdbt.process_0/d/") for file in skipped)


@pytest.mark.parametrize("item", ["state", "record"])
def test_a_missing_item_is_named(two, caplog, item):
    shutil.rmtree(two / "2" / item)
    assert_restores(Checkpointer(two, keep=2).restore_latest(make_state(0)), 1, make_state(1))
    assert str(two / "2") in caplog.text


@pytest.mark.parametrize("item", ["state", "record"])
def test_an_item_of_another_checkpoint_is_named(two, caplog, item):
    """Each item is intact, but they do not belong together: only the digests can tell."""
    shutil.rmtree(two / "2" / item)
    shutil.copytree(two / "1" / item, two / "2" / item)
    assert_restores(Checkpointer(two, keep=2).restore_latest(make_state(0)), 1, make_state(1))
    assert str(two / "2") in caplog.text


def test_a_checkpoint_under_another_step_is_named(two, caplog):
    shutil.copytree(two / "1", two / "3")
    assert_restores(Checkpointer(two, keep=2).restore_latest(make_state(0)), 2, make_state(2))
    assert str(two / "3") in caplog.text


@pytest.mark.parametrize("content", ["", "[", "[]", '{"init_timestamp_nsecs": "x"}'])
def test_saving_beside_damaged_metadata(two, content):
    """Orbax must not stumble over a file of a checkpoint that nobody asks for."""
    (two / "1" / "_CHECKPOINT_METADATA").write_text(content)
    save_all(two, {3: 0.1}, keep=2)
    assert steps_on_disk(two) == [2, 3]


@pytest.mark.parametrize("key", ["step", "metric", "sha256", "checksum"])
def test_an_altered_record_is_named(two, caplog, key):
    file = two / "2" / "record" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 9}))
    assert_restores(Checkpointer(two, keep=2).restore_best(make_state(0)), 1, make_state(1))
    assert str(two / "2") in caplog.text


@pytest.mark.parametrize("content", ["[]", "3", "{}", "\x00", '{"__class__": "os.system"}'])
def test_a_foreign_record_is_named(two, caplog, content):
    (two / "2" / "record" / "metadata").write_text(content)
    assert Checkpointer(two, keep=2).restore_latest(make_state(0))[0] == 1
    assert str(two / "2") in caplog.text


def test_the_next_best_then_none(two):
    flip(two / "2" / "record" / "metadata")
    checkpointer = Checkpointer(two, keep=2)
    assert_restores(checkpointer.restore_best(make_state(0)), 1, make_state(1))
    shutil.rmtree(two / "1" / "state")
    assert checkpointer.restore_best(make_state(0)) is None
    assert checkpointer.restore_latest(make_state(0)) is None


def test_a_damaged_step_is_saved_again_and_all_damaged_copies_remain(two):
    for number in (1, 2):
        shutil.rmtree(two / "2" / "state")
        with Checkpointer(two, keep=2) as checkpointer:
            assert checkpointer.restore_latest(make_state(0))[0] == 1
            checkpointer.save(2, make_state(2), 0.3)
        assert (two / "damaged" / f"2-{number}" / "record").is_dir()
        assert_restores(Checkpointer(two, keep=2).restore_latest(make_state(0)), 2, make_state(2))


def test_damage_found_between_saves(two):
    """The manager that saves learns that a checkpoint is gone, and that its metric is."""
    with Checkpointer(two, keep=2) as checkpointer:
        checkpointer.save(3, make_state(3), 0.9)
        checkpointer.wait()
        truncate(two / "3" / "record" / "metadata")
        assert checkpointer.restore_best(make_state(0))[0] == 2
        checkpointer.save(3, make_state(3), 0.1)
        checkpointer.save(4, make_state(4), 0.1)
    assert steps_on_disk(two) == [2, 3, 4]


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        (make_state(0, size=61), r"params/router/kernel is \(60, 10\) .* \(61, 10\)"),
        (make_state(0)._replace(nothing=jnp.zeros(3)), r"nothing is missing .* \(3,\)"),
        ({"step": jnp.int32(0), "other": jnp.zeros(())}, r"other is missing .* \(\)"),
    ],
)
def test_another_structure_is_a_mistake_and_not_damage(two, like, difference):
    with pytest.raises(OtherState, match=difference):
        Checkpointer(two, keep=2).restore_latest(like)
    assert steps_on_disk(two) == [1, 2]


def test_unfinished_saves_are_ignored_then_cleared_by_the_one_who_saves(two):
    unfinished = two / "3.orbax-checkpoint-tmp"
    shutil.copytree(two / "2", unfinished)
    dropped = shutil.copytree(two / "1", two / "deleted" / "0")
    with Checkpointer(two, keep=3) as reader:
        assert reader.restore_latest(make_state(0))[0] == 2
    assert unfinished.exists(), "a reader must not disturb a training that runs"
    assert dropped.exists()
    save_all(two, {3: 0.1}, keep=3)
    assert {path.name for path in two.iterdir()} == {"1", "2", "3"}


# Kills.

SAVE_FOR_EVER = """
import sys
import jax.numpy as jnp, numpy as np
from pathlib import Path
from advmoe_jax.training.checkpoint import Checkpointer
values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
checkpointer = Checkpointer(Path(sys.argv[1]), keep=2)
for step in range(1, 1000):
    print(step, flush=True)
    checkpointer.save(step, {"x": jnp.asarray(values) + step, "step": jnp.int32(step)}, step % 7)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_checkpoints_before_it(tmp_path):
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    like = {"x": jnp.asarray(values), "step": jnp.int32(0)}
    for number, delay in enumerate([0.0, 0.013, 0.031]):  # seconds into the save of step 4
        directory = tmp_path / str(number)
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        ) as process:
            while process.stdout.readline().strip() != "4":
                assert process.poll() is None
            time.sleep(delay)
            process.kill()
        with Checkpointer(directory, keep=2) as checkpointer:
            step, restored = checkpointer.restore_latest(like)
            # Step 2 was committed before 3 was begun; how much more was is the machine's affair.
            assert step >= 2
            assert restored["step"] == step
            np.testing.assert_array_equal(restored["x"], jnp.asarray(values) + step)
            assert not (directory / "damaged").exists()
            checkpointer.save(1000, restored, None)
        assert all(path.name.isdecimal() for path in directory.iterdir())


# Full disks and other errors.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, where we may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("filler_size", [0, 9_000_000])
def test_a_full_disk_is_one_line_and_nothing_is_lost(small_disk, caplog, filler_size):
    """Full amid the arrays (too little space for them), or full at once (no space at all)."""
    directory, filler = small_disk / "checkpoints", small_disk / "filler"
    size = 60_000  # 2.4 MB: three of them fit
    checkpointer = Checkpointer(directory, keep=5)
    for step in (1, 2):
        checkpointer.save(step, make_state(step, size), 0.5)
    checkpointer.wait()
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        file.write(bytes(filler_size))
    message = (
        rf"disk full: cannot write checkpoint for step (3|4) in {directory}; "
        "free some space and run the same command again"
    )
    with pytest.raises(UserError, match=message) as error:
        for step in (3, 4):
            checkpointer.save(step, make_state(step, size), 0.9)
        checkpointer.wait()
    assert "\n" not in str(error.value)
    assert not [record for record in caplog.records if record.exc_info]
    latest, restored = checkpointer.restore_latest(make_state(0, size))
    assert latest == (3 if filler_size == 0 else 2)
    assert_same(restored, make_state(latest, size))
    checkpointer.close()
    # The user frees some space.
    filler.unlink()
    shutil.rmtree(directory / "1")
    with Checkpointer(directory, keep=1) as checkpointer:
        checkpointer.save(5, make_state(5, size), 0.1)
        assert_restores(checkpointer.restore_latest(make_state(0, size)), 5, make_state(5, size))
    assert all(path.name.isdecimal() for path in directory.iterdir())


TENSORSTORE_SAYS = (
    'RESOURCE_EXHAUSTED: Error writing "w/0": No space left on device [os_error_code=28]'
)


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ValueError(TENSORSTORE_SAYS),
        ValueError("RESOURCE_EXHAUSTED: Disk quota exceeded"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_a_full_disk_is_recognised(two, monkeypatch, method, error):
    def fail(*args, **kwargs):
        raise error

    checkpointer = Checkpointer(two, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, method, fail)
        with pytest.raises(UserError, match=rf"^disk full: .* for step 3 in {two}; free"):
            checkpointer.save(3, make_state(3), None)
            checkpointer.wait()
    checkpointer.save(4, make_state(4), 0.9)
    assert checkpointer.restore_latest(make_state(0))[0] == 4
    checkpointer.close()


@pytest.mark.parametrize(
    "error", [ValueError("RESOURCE_EXHAUSTED: out of memory"), OSError(errno.EIO, "broken")]
)
def test_other_errors_are_raised_as_they_are(two, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(type(error)) as raised:
        Checkpointer(two, keep=2).save(3, make_state(3), None)
    assert raised.value is error


def test_orbax_does_not_chatter(tmp_path, caplog):
    logger = logging.getLogger("absl")
    with caplog.at_level(logging.INFO, logger="absl"):
        save_all(tmp_path, {1: 0.5}, keep=1)
        Checkpointer(tmp_path, keep=1).restore_latest(make_state(0))
        logger.info("others still may")
    assert [record.getMessage() for record in caplog.records] == ["others still may"]


def test_abandoned_writes_to_a_full_disk_do_not_report(tmp_path, caplog):
    """They do so by chance: asyncio logs when it collects a task whose error nobody took."""
    Checkpointer(tmp_path, keep=1)
    for error in (ValueError(TENSORSTORE_SAYS), ValueError("another")):
        logging.getLogger("asyncio").error("never retrieved", exc_info=error)
    (record,) = caplog.records
    assert str(record.exc_info[1]) == "another"


# The digest.


def test_digest_is_the_same_for_the_same_leaves_and_known():
    tree = {"a": {"b": jnp.arange(3.0), "c": jnp.int32(1)}}
    # Pinned: a digest that changes between versions would make every older checkpoint look damaged.
    assert tree_sha256(tree) == "01f74ae6de1adf52b73b047a2de4054ea74990c374d82851a078f71b346802e4"
    assert tree_sha256(jax.tree.map(np.asarray, tree)) == tree_sha256(tree)
    assert tree_sha256(jax.device_put(tree, replicated())) == tree_sha256(tree)
    assert tree_sha256({"a/c": tree["a"]["c"], "a/b": tree["a"]["b"]}) == tree_sha256(tree)


def test_digest_sees_dtype_shape_path_and_order():
    zeros = np.zeros(4, np.float32)
    digests = [
        tree_sha256({"x": zeros}),
        tree_sha256({"y": zeros}),
        tree_sha256({"x": zeros.view(np.int32)}),
        tree_sha256({"x": zeros.view(np.float64)}),
        tree_sha256({"x": zeros.reshape(2, 2)}),
        tree_sha256({"x": zeros.reshape(4, 1)}),
        tree_sha256({"x": -zeros}),
        tree_sha256({"x": zeros, "y": zeros}),
        tree_sha256({"x": {"x": zeros}}),
        tree_sha256({"x": np.zeros((0, 4), np.float32)}),
        tree_sha256({}),
    ]
    assert len(set(digests)) == len(digests)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    values=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    position=st.integers(0, 39),
    change=st.integers(1, 255),
)
def test_digest_sees_every_byte(values, position, change):
    array = np.array(values, np.uint8)
    other = array.copy()
    other[position % len(values)] ^= change
    assert tree_sha256([array]) != tree_sha256([other])
    assert tree_sha256([array]) == tree_sha256([array.copy()])


def test_digest_is_of_values_and_not_of_memory_layout():
    array = np.arange(6.0).reshape(2, 3)
    assert tree_sha256([np.asfortranarray(array)]) == tree_sha256([array])


def test_equal_paths_are_refused():
    with pytest.raises(ValueError, match="same path"):
        tree_sha256({"a/b": np.zeros(1), "a": {"b": np.zeros(1)}})


# Parts, and pieces.


def test_extracts_parts_of_the_latest_and_the_best(tmp_path):
    save_all(tmp_path / "all", {1: 0.2, 2: 0.9, 3: 0.4}, keep=3)
    for again in range(2):
        directory = tmp_path / f"parts{again}"
        (tmp_path / f"parts{again}.partial").mkdir()  # as a kill leaves it
        with Checkpointer(tmp_path / "all", keep=3) as checkpointer:
            checkpointer.extract(directory, lambda name: name.startswith("params/"))
    assert steps_on_disk(directory) == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "parts0", "parts1"]
    with Checkpointer(directory, keep=1) as parts:
        for step, restore in ((3, parts.restore_latest), (2, parts.restore_best)):
            found, leaves = restore(None)
            expected = make_state(step)._asdict()["params"]
            assert found == step
            assert_same(restore({"params": expected})[1], {"params": expected})
            assert leaves and all(name.startswith("params/") for name in leaves)


def test_extracting_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no intact checkpoint"):
        Checkpointer(tmp_path / "absent", keep=1).extract(tmp_path / "parts", bool)
    assert list(tmp_path.iterdir()) == []


def test_large_arrays_are_stored_in_pieces(tmp_path):
    rng = np.random.default_rng(0)
    state = {"kernel": rng.normal(size=(3, 3, 512, 1024)).astype(np.float32),  # 18 MiB
             "small": {str(i): rng.normal(size=(300, 1000)) for i in range(5)}}  # fmt: skip
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, 0.5)
    sizes = [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()]
    assert sum(sizes) > 20 * 2**20 and max(sizes) < 9 * 2**20
    restored = Checkpointer(tmp_path, keep=1).restore_latest(None)[1]
    np.testing.assert_array_equal(restored["kernel"], state["kernel"])
