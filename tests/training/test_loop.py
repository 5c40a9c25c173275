"""The loop with a method of its own, a noisy linear regression: stopping anywhere costs no bit."""

import dataclasses
import errno
import io
import os
import signal
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from advmoe_jax.data.batch import BatchRecipe
from advmoe_jax.data.pipeline import Resident
from advmoe_jax.data.sources import Split
from advmoe_jax.data.stream import Stream
from advmoe_jax.errors import UserError
from advmoe_jax.parallel import DATA_AXIS, data_mesh
from advmoe_jax.training import log, loop
from advmoe_jax.training.checkpoint import Checkpointer, tree_sha256
from advmoe_jax.training.log import METRICS, RunLog, read_metrics
from advmoe_jax.training.state import create_state, update, update_average

IMAGES, BATCH, EPOCHS = 165, 16, 4
STEPS = 10  # per epoch; five images sit out
OPTIMIZERS = {"router": optax.sgd(0.1), "experts": optax.sgd(0.01, momentum=0.9)}


def terminate(step):
    if step == Regression.signal_at:
        os.kill(os.getpid(), signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Regression:
    """A step that minimises (images w - labels)^2 on noisy images; equal ones compile once.

    Attributes:
        poison: (name of a metric or ``parameter``, step, value): what goes wrong, and when.
        ema_decay: of an average of the weights; 0: none.
        signal_at: the step during which SIGTERM comes, of whatever run trains now.
    """

    poison: tuple | None = None
    ema_decay: float = 0.0
    signal_at: ClassVar[int | None] = None

    def __call__(self, state, images, labels, keys):
        jax.debug.callback(terminate, state.step + 1)
        noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys)
        flat = (images + 0.1 * noise).reshape(len(labels), -1)

        def loss_fn(w):
            return jnp.mean(jnp.square(flat @ w - labels))

        loss, grads = jax.value_and_grad(loss_fn)(state.params["experts"]["w"])
        grads = {"experts": {"w": jax.lax.pmean(grads, DATA_AXIS)}, "router": {}}
        state = update(state, grads, OPTIMIZERS)._replace(step=state.step + 1)
        if self.ema_decay:
            state = update_average(state, self.ema_decay)
        metrics = {
            "loss": loss,
            "router_loss": jnp.float32(0),
            "standard_accuracy": jnp.mean(labels < 2),
            "routing": {"load": jnp.array([0.004, 0.996]), "entropy": jnp.float32(0)},
        }
        if self.poison is not None:
            name, when, value = self.poison
            value = jnp.where(state.step == when, value, 0.0)
            if name == "parameter":
                w = state.params["experts"]["w"] + value
                state = state._replace(params={"experts": {"w": w}, "router": {}})
            else:
                metrics[name] = metrics[name] + value
        return state, jax.lax.pmean(metrics, DATA_AXIS)


def initial_state(averaged=False):
    params = {"router": {}, "experts": {"w": jnp.zeros(16)}}
    return create_state(params, {"router": {}, "experts": {}}, OPTIMIZERS, averaged)


class Run:
    """A run in a directory, as often as wanted."""

    def __init__(
        self, workdir, *, devices=1, keep=10, accuracies=(0.25, 0.75, 0.5, 0.5), streamed=False
    ):
        workdir.mkdir(exist_ok=True)
        self.workdir, self.mesh, self.keep = workdir, data_mesh(devices), keep
        rng = np.random.default_rng(0)
        split = Split(
            rng.integers(256, size=(IMAGES, 4, 4, 1), dtype=np.uint8),
            rng.integers(4, size=IMAGES).astype(np.int32),
        )
        self.feed = (Stream if streamed else Resident)(split, self.mesh, BatchRecipe(BATCH))
        self.labels, self.accuracies = split.labels, accuracies
        self.on_validation = lambda epoch: None
        self.said = ""

    def train(self, patience=0, signal_at=None, **settings):
        """Trains on; ``signal_at`` is the step during which SIGTERM comes."""
        Regression.signal_at = signal_at

        def validate(params, stats, epoch):
            self.on_validation(epoch)
            return {
                "standard_accuracy": float(jnp.sum(params["experts"]["w"])),
                "robust_accuracy": self.accuracies[epoch],
                "routing": None,
            }

        task = loop.Task(
            step=Regression(**settings),
            feed=self.feed,
            validate=validate,
            selected_by="robust_accuracy",
            num_epochs=EPOCHS,
            order_key=jax.random.key(1),
            step_key=jax.random.key(2),
            patience=patience,
        )
        console = Console(file=io.StringIO(), width=400)
        try:
            with Checkpointer(self.workdir / "checkpoints", self.keep) as checkpointer:
                return loop.train(
                    task,
                    initial_state(averaged="ema_decay" in settings),
                    self.mesh,
                    checkpointer,
                    lambda step: RunLog(self.workdir, step, console),
                )
        finally:
            self.said = console.file.getvalue()

    def saved(self):
        steps = (p.name for p in (self.workdir / "checkpoints").iterdir() if p.name.isdigit())
        return sorted(map(int, steps))

    def restored(self, which="latest"):
        like = {"state": {"params": {"experts": {"w": jnp.zeros(16)}}}}
        with Checkpointer(self.workdir / "checkpoints", self.keep) as checkpointer:
            step, tree = getattr(checkpointer, f"restore_{which}")(like)
        return step, tree["state"]["params"]["experts"]["w"]

    def logged(self):
        """What does not depend on the clock."""
        timed = ("seconds", "compile_seconds", "images_per_second")
        entries = read_metrics(self.workdir / METRICS)
        return [{k: v for k, v in entry.items() if k not in timed} for entry in entries]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run, final state) of a run that was never stopped."""
    run = Run(tmp_path_factory.mktemp("whole"))
    return run, run.train()


def same(run, state, whole):
    expected, final = whole
    assert tree_sha256(state) == tree_sha256(final)
    assert run.logged() == expected.logged()


def test_a_whole_run(whole):
    run, state = whole
    assert int(state.step) == EPOCHS * STEPS and run.saved() == [10, 20, 30, 40]
    losses = [entry["train"]["loss"] for entry in run.logged()]
    assert [entry["step"] for entry in run.logged()] == [10, 20, 30, 40]
    assert losses[3] < 0.8 * losses[0] and len(set(losses)) == 4
    assert [entry["epoch"] for entry in run.logged()] == [1, 2, 3, 4]
    assert run.restored("best")[0] == 20
    step, w = run.restored()
    assert step == 40 and np.array_equal(w, state.params["experts"]["w"])
    assert "going on" not in run.said and "trained already" not in run.said


def test_averages_are_over_the_epoch(whole):
    run, _ = whole
    # Of 165 labels the mean over a full pass; five images sit out, other ones each epoch.
    shares = [entry["train"]["standard_accuracy"] for entry in run.logged()]
    labels = run.labels
    assert all(abs(share - np.mean(labels < 2)) < 5 / 160 for share in shares)
    assert all((share * 160) == pytest.approx(round(share * 160), abs=1e-3) for share in shares)


def test_a_collapsed_router_is_told(whole):
    run, _ = whole
    for i, entry in enumerate(run.logged()):
        (warning,) = entry["warnings"]
        assert warning.startswith(f"expert 0 got 0.40% of the images in epoch {i + 1}:")
        assert (f"warning: {warning}" in run.said) == (i == 0)  # people are told once


def test_the_same_again_changes_nothing(whole, tmp_path):
    run = Run(tmp_path)
    same(run, run.train(), whole)
    lines = (tmp_path / METRICS).read_bytes()
    same(run, run.train(), whole)
    assert "trained already, 40 steps" in run.said and "epoch" not in run.said
    assert (tmp_path / METRICS).read_bytes() == lines


def test_other_devices_compute_the_same(whole, tmp_path):
    run = Run(tmp_path, devices=8)
    state = run.train()
    w = whole[1].params["experts"]["w"]
    np.testing.assert_allclose(state.params["experts"]["w"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [1, 33])
def test_sigterm_amid_an_epoch_saves_first_and_costs_no_bit(whole, tmp_path, step):
    run = Run(tmp_path)
    with pytest.raises(loop.Stopped):
        run.train(signal_at=step)
    last = run.saved()[-1]
    assert step <= last < step + 5 and last % STEPS
    assert len(run.logged()) == last // STEPS
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    same(run, run.train(), whole)
    assert f"going on from step {last}, epoch {last // STEPS + 1}" in run.said


def test_sigterm_in_the_last_step_of_an_epoch_stops_after_its_validation(whole, tmp_path):
    run = Run(tmp_path)
    with pytest.raises(loop.Stopped):
        run.train(signal_at=2 * STEPS)
    assert run.saved() == [10, 20] and len(run.logged()) == 2
    same(run, run.train(), whole)
    assert run.restored("best")[0] == 20


@pytest.mark.parametrize("epoch", [0, EPOCHS - 1])
def test_sigterm_during_validation(whole, tmp_path, epoch):
    run = Run(tmp_path)
    run.on_validation = lambda e: e == epoch and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(loop.Stopped):
        run.train()
    assert run.saved()[-1] == (epoch + 1) * STEPS and len(run.logged()) == epoch + 1
    run.on_validation = lambda e: None
    same(run, run.train(), whole)
    assert run.restored("best")[0] == 20


def test_ctrl_c_saves_too(whole, tmp_path):
    run = Run(tmp_path)
    run.on_validation = lambda e: e == 0 and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(loop.Stopped, match="stopped by SIGINT; saved") as stopped:
        run.train()
    assert stopped.value.by == signal.SIGINT and run.saved() == [STEPS]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run.on_validation = lambda e: None
    same(run, run.train(), whole)


def test_sigterm_again_and_again(whole, tmp_path):
    run = Run(tmp_path, keep=1)
    for step in (3, 14, 17, 38):
        with pytest.raises(loop.Stopped):
            run.train(signal_at=step)
    same(run, run.train(), whole)
    assert run.saved() == [20, 40]


class Killed(BaseException):
    """Stands for SIGKILL: what was not saved is gone."""


def test_cut_off_between_a_line_and_its_checkpoint(whole, tmp_path):
    run = Run(tmp_path)

    def kill(epoch):
        if epoch == 2:
            raise Killed

    run.on_validation = kill
    with pytest.raises(Killed):
        run.train()
    first = (tmp_path / METRICS).read_text()
    line = first.splitlines()[-1].replace('"step": 20', '"step": 30')
    line = line.replace('"epoch": 2', '"epoch": 3')
    (tmp_path / METRICS).write_text(first + line + "\n" + line[:50])
    run.on_validation = lambda e: None
    same(run, run.train(), whole)


def test_a_disk_without_room_for_a_line(whole, tmp_path):
    run = Run(tmp_path)

    def refuse(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.MonkeyPatch.context() as patch:
        run.on_validation = lambda epoch: patch.setattr(log, "write_text", refuse)
        with pytest.raises(OSError, match="No space left"):
            run.train()
    assert not (tmp_path / "checkpoints").exists()
    run.on_validation = lambda epoch: None
    same(run, run.train(), whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, caplog):
    run = Run(tmp_path)
    run.train()
    for file in (tmp_path / "checkpoints" / "40" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-5])
    same(run, run.train(), whole)
    assert "going on from step 30, epoch 4" in run.said
    assert f"checkpoint {tmp_path / 'checkpoints' / '40'} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "part"), [("loss", np.inf, "experts"), ("router_loss", np.nan, "router")]
)
def test_a_loss_that_is_not_finite_is_named(tmp_path, name, value, part):
    run = Run(tmp_path)
    expected = (
        rf"^{name} \({value}\) is not finite at step 24: training has diverged; the checkpoint of "
        rf"step 20 is intact. Try a lower optimizer.{part}.learning_rate"
    )
    with pytest.raises(UserError, match=expected):
        run.train(poison=(name, 24, value))
    assert run.saved() == [10, 20] and run.restored()[0] == 20
    with pytest.raises(UserError, match=expected):  # and again, from the checkpoint
        run.train(poison=(name, 24, value))
    assert run.saved() == [10, 20]


def test_a_parameter_that_is_not_finite_is_not_saved(tmp_path):
    run = Run(tmp_path)
    poison = ("parameter", 20, np.nan)  # at the epoch's last step: no later loss can tell
    with pytest.raises(
        UserError, match=r"^a parameter is not finite at step 20: .* step 10 is int"
    ):
        run.train(poison=poison)
    step, w = run.restored()
    assert step == 10 and np.all(np.isfinite(w))


def test_diverging_before_anything_was_saved(tmp_path):
    with pytest.raises(UserError, match=r"not finite at step 2: .* nothing was saved yet"):
        Run(tmp_path).train(poison=("loss", 2, np.nan))
    assert not (tmp_path / "checkpoints").exists()


def test_the_best_is_kept_besides_the_last(tmp_path):
    run = Run(tmp_path, keep=1, accuracies=(0.75, 0.25, 0.75, 0.5))
    run.train()
    assert run.saved() == [10, 40] and run.restored("best")[0] == 10


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_ends_when_its_patience_does(tmp_path, interrupted):
    run = Run(tmp_path, accuracies=(0.75, 0.5, 0.75, 1.0))  # as good again is not better
    if interrupted:
        for step in (5, 17, 20, 25):
            with pytest.raises(loop.Stopped):
                run.train(patience=2, signal_at=step)
    state = run.train(patience=2)
    assert int(state.step) == 3 * STEPS and run.saved()[-1] == 30
    assert len(run.logged()) == 3 and run.restored("best")[0] == 10
    said = "stopped early: no better validation robust_accuracy than 0.750 for 2 epochs"
    assert said in run.said
    again = run.train(patience=2)
    assert tree_sha256(again) == tree_sha256(state) and len(run.logged()) == 3
    assert "trained already, 30 steps" in run.said and "epoch" not in run.said


def test_patience_that_lasts_changes_no_bit(whole, tmp_path):
    run = Run(tmp_path, accuracies=whole[0].accuracies)  # the best is epoch 2 of 4
    same(run, run.train(patience=2), whole)
    assert "stopped early" not in run.said


def test_the_average_is_validated_and_goes_on_bit_for_bit(whole, tmp_path):
    run, interrupted = Run(tmp_path / "whole"), Run(tmp_path / "interrupted")
    state = run.train(ema_decay=0.8)
    for step in (4, 17, 30):
        with pytest.raises(loop.Stopped):
            interrupted.train(ema_decay=0.8, signal_at=step)
    same(interrupted, interrupted.train(ema_decay=0.8), (run, state))
    # It changes no bit of the training, and is what the validation saw.
    assert tree_sha256(state.params) == tree_sha256(whole[1].params)
    average = float(jnp.sum(state.average["params"]["experts"]["w"]))
    assert run.logged()[-1]["validation"]["standard_accuracy"] == average
    assert average != float(jnp.sum(state.params["experts"]["w"]))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_streamed_run_stopped_and_resumed_ends_in_the_bits_of_a_resident_one(
    tmp_path, whole, devices
):
    run = Run(tmp_path / "run", devices=devices, streamed=True)
    with pytest.raises(loop.Stopped):
        run.train(signal_at=13)
    found = run.train().params["experts"]["w"]
    expected = whole[1].params["experts"]["w"]
    if devices == 1:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
