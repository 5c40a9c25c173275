"""A run's directory: whose it is, and what is restored from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError
from advmoe_jax.runs import directory


def test_a_directory_belongs_to_its_config(config, tmp_path):
    directory.claim(tmp_path, config)
    before = (tmp_path / "config.json").read_bytes()
    (tmp_path / "checkpoints").mkdir()
    directory.claim(tmp_path, config)
    other = config_lib.load(tmp_path / "config.json")
    other.model.width = 3
    other.seed = 5
    with pytest.raises(UserError, match=r"seed=0, this command has 5: use another --workdir"):
        directory.claim(tmp_path, other)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_may_be_moved_and_find_its_data_elsewhere(config, tmp_path):
    config.data.path, config.pruning.dense_run = "/here/images.zip", "runs/dense"
    directory.claim(tmp_path, config)
    (tmp_path / "checkpoints").mkdir()
    config.data.path, config.pruning.dense_run = "/there/images.zip", "elsewhere/dense"
    directory.claim(tmp_path, config)
    assert config_lib.load(tmp_path / "config.json").data.path == "/there/images.zip"
    config.evaluation.attacks = "clean"  # another evaluation is the same run
    directory.claim(tmp_path, config)
    config.data.path = "/there/others.zip"
    with pytest.raises(UserError, match=r"data\.path='/there/images\.zip', this command has"):
        directory.claim(tmp_path, config)


def test_a_mistyped_first_try_binds_no_one(config, tmp_path):
    directory.claim(tmp_path, config)
    config.seed = 5
    directory.claim(tmp_path, config)
    assert config_lib.load(tmp_path / "config.json").seed == 5
    (tmp_path / "config.json").write_text("{")
    directory.claim(tmp_path, config)
    assert config_lib.load(tmp_path / "config.json").seed == 5


def save(config, workdir):
    weights = {"params": {"w": jnp.ones(2)}, "stats": {"m": jnp.ones(3)}}
    with directory.open_checkpoints(config, workdir) as checkpointer:
        checkpointer.save(1, {"state": weights}, 0.5)


def test_checkpoints_know_their_config_when_its_file_is_gone(config, tmp_path):
    directory.claim(tmp_path, config)
    save(config, tmp_path)
    (tmp_path / "config.json").unlink()
    config.attack.epsilon = 0.1
    with pytest.raises(UserError, match=r"checkpoints of another config .* use another --workdir"):
        directory.claim(tmp_path, config)
    assert not (tmp_path / "config.json").exists()
    config.attack.epsilon = 0.2
    directory.claim(tmp_path, config)  # the one that they are of
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    config.seed = 1
    with pytest.raises(UserError, match="of another config"):
        directory.claim(tmp_path, config)


def test_a_directory_is_of_a_run_or_of_a_comparison(config, tmp_path):
    run, comparison = tmp_path / "run", tmp_path / "comparison"
    directory.claim(run, config)
    directory.claim_for_comparison(comparison, config)
    directory.claim_for_comparison(comparison, config)
    with pytest.raises(UserError, match="holds a comparison, and no run"):
        directory.claim(comparison, config)
    with pytest.raises(UserError, match="holds a run, and no comparison"):
        directory.claim_for_comparison(run, config)
    save(config, run)
    (run / "config.json").unlink()
    with pytest.raises(UserError, match="holds a run, and no comparison"):
        directory.claim_for_comparison(run, config)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_average_is_restored_if_there_is_one(config, tmp_path, ema_decay):
    config.ema_decay = ema_decay
    weights = {"params": {"w": jnp.ones(2)}, "stats": {"m": jnp.ones(3)}}
    average = jax.tree.map(lambda x: x + 1, weights) if ema_decay else None
    with directory.open_checkpoints(config, tmp_path) as checkpointer:
        checkpointer.save(1, {"state": {**weights, "average": average}}, 0.5)
    like = (weights["params"], weights["stats"])
    for found in directory.restore(config, tmp_path, "best", like):
        expected = 2.0 if ema_decay else 1.0
        np.testing.assert_array_equal(found.params["w"], np.full(2, expected))
        np.testing.assert_array_equal(found.stats["m"], np.full(3, expected))


def test_a_directory_in_a_bucket(config, bucket):
    workdir = directory.create(f"{bucket}/run")
    directory.claim(workdir, config)
    assert not directory.is_closed(workdir) and directory.read_kind(workdir) is None
    save(config, workdir)
    config.seed = 5
    with pytest.raises(UserError, match=r"gs://bucket/runs/run holds a run with seed=0, this"):
        directory.claim(workdir, config)
    config.seed = 0
    directory.close(config, workdir)
    assert directory.is_closed(workdir) and not (workdir / "checkpoints").exists()
    like = {"w": jnp.zeros(2)}, {"m": jnp.zeros(3)}
    last, best = directory.restore(config, workdir, "best", like)
    assert last.step == best.step == 1 and last.sha256 == best.sha256
    with pytest.raises(UserError, match="holds a run or a comparison"):
        directory.create_beside(str(workdir))
    with pytest.raises(UserError, match=r"--workdir=gs://bucket/a.b: the path .* takes for a patt"):
        directory.create("gs://bucket/a*b")
