"""metrics.jsonl, TensorBoard events and the terminal, as a run writes them."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from advmoe_jax.training.log import METRICS, RunLog, Shown, read_metrics

WARNING = "expert 1 got 0.50% of the images in epoch 2"


def entry(epoch, **changes):
    routing = {"load": [0.25, 0.75], "entropy": 0.5, "agreement": 0.875}
    accuracies = {"standard_accuracy": 0.5, "robust_accuracy": 0.25}
    found = {
        "epoch": epoch,
        "step": 10 * epoch,
        "seconds": 1.5,
        "images_per_second": 640.0,
        "train": {"loss": 2.125, "router_loss": 1.5, **accuracies, "routing": routing},
        "validation": {**accuracies, "routing": routing},
        "warnings": [],
    }
    return found | changes


def run_log(workdir, step=0, **settings):
    console = Console(file=io.StringIO(), width=400)
    return RunLog(workdir, step, console, **settings), console.file


def lines(workdir):
    return (workdir / METRICS).read_text().splitlines()


def events(workdir):
    """(step, tag, value) of every scalar in the event files, in the order of TensorBoard."""
    found = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # records: length (8 bytes), its checksum (4), content, its checksum (4)
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def test_histograms_and_pictures(tmp_path):
    picture = np.zeros((4, 6, 3), np.uint8)
    shown = Shown({"scores": np.arange(5.0)}, {"images": picture})
    log, _ = run_log(tmp_path)
    log.show(shown, 7)
    log.close()
    assert [(step, tag) for step, tag, _ in events(tmp_path)] == [(7, "scores"), (7, "images")]
    silent, _ = run_log(tmp_path / "silent", enabled=False)
    silent.show(shown, 7)
    assert not (tmp_path / "silent").exists()


def test_one_line_an_epoch(tmp_path):
    log, terminal = run_log(tmp_path)
    log.epoch(entry(1), 3)
    log.epoch(entry(2, warnings=[WARNING]), 3)
    log.close()
    assert [json.loads(line) for line in lines(tmp_path)] == read_metrics(tmp_path / METRICS)
    assert read_metrics(tmp_path / METRICS) == [entry(1), entry(2, warnings=[WARNING])]
    said = terminal.getvalue().splitlines()
    assert len(said) == 3
    assert said[0] == (
        "epoch   1/3  loss 2.125  router 1.500  train SA 50.0 RA 25.0  validation SA 50.0 RA 25.0  "
        "load 25/75% entropy 0.50  routes kept 88%  640 images/s"
    )
    assert said[2] == f"warning: {WARNING}"


def test_a_dense_network_has_no_routing_to_tell(tmp_path):
    log, terminal = run_log(tmp_path)
    plain = {"loss": 1.0, "standard_accuracy": 0.5}
    validation = {"standard_accuracy": 0.5, "robust_accuracy": 0.0, "routing": None}
    log.epoch(entry(1, train=plain, validation=validation), 1)
    log.close()
    said = terminal.getvalue()
    assert "train SA 50.0  validation SA 50.0 RA 0.0  640" in said
    assert not {"load", "router", "routes", "RA 25"} & set(said.split())


def test_every_number_becomes_an_event(tmp_path):
    log, _ = run_log(tmp_path)
    log.epoch(entry(1), 1)
    log.close()
    found = {tag: (step, value) for step, tag, value in events(tmp_path)}
    assert found["train/loss"] == (10, 2.125)
    assert found["validation/robust_accuracy"] == (10, 0.25)
    assert found["train/routing/load/expert_1"] == (10, 0.75)
    assert found["validation/routing/agreement"] == (10, 0.875)
    assert not any("warning" in tag for tag in found)


def test_going_on_drops_later_lines_and_torn_ones(tmp_path):
    log, _ = run_log(tmp_path)
    for epoch in (1, 2, 3):
        log.epoch(entry(epoch), 4)
    log.close()
    (events_file,) = (tmp_path / "tensorboard").iterdir()
    events_file.rename(f"{events_file}.1")  # whose name is the second in which it was made
    text = (tmp_path / METRICS).read_text()
    (tmp_path / METRICS).write_text(text + text[:40])
    log, _ = run_log(tmp_path, step=25)
    assert read_metrics(tmp_path / METRICS) == [entry(1), entry(2)]
    log.epoch(entry(3, seconds=9.0), 4)
    log.close()
    assert [json.loads(line) for line in lines(tmp_path)] == [
        entry(1),
        entry(2),
        entry(3, seconds=9.0),
    ]
    found = sorted(step for step, tag, _ in events(tmp_path) if tag == "train/loss")
    assert found == [10, 20, 30, 30]


def test_going_on_where_nothing_is_later_changes_no_byte(tmp_path):
    log, _ = run_log(tmp_path)
    log.epoch(entry(1, seconds=1 / 3), 1)
    log.close()
    before = (tmp_path / METRICS).read_bytes()
    run_log(tmp_path, step=10)[0].close()
    assert (tmp_path / METRICS).read_bytes() == before


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"\0" * 50, b"[1]\n", b'{"step": "x"}\n'])
def test_a_damaged_line_is_left_out(tmp_path, damage):
    good = json.dumps(entry(1)).encode() + b"\n"
    (tmp_path / METRICS).write_bytes(good + damage)
    assert read_metrics(tmp_path / METRICS) == [entry(1)]


def test_no_file_has_no_epochs(tmp_path):
    assert read_metrics(tmp_path / METRICS) == []


def test_a_log_that_is_not_enabled_writes_and_says_nothing(tmp_path):
    log, terminal = run_log(tmp_path, enabled=False)
    log.epoch(entry(1), 1)
    log.say("x")
    log.warn("x")
    log.close()
    assert list(tmp_path.iterdir()) == [] and terminal.getvalue() == ""


def test_what_is_said_is_not_markup(tmp_path):
    log, terminal = run_log(tmp_path)
    log.say("a [bold] name")
    log.warn("b [red] name")
    log.close()
    assert terminal.getvalue() == "a [bold] name\nwarning: b [red] name\n"


def test_a_full_disk_is_an_error_and_keeps_the_lines_before(tmp_path):
    log, _ = run_log(tmp_path)
    log.epoch(entry(1), 2)
    log.close()
    partial = (tmp_path / METRICS).with_suffix(".jsonl.partial")
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        run_log(tmp_path, step=10)
    partial.unlink()
    assert read_metrics(tmp_path / METRICS) == [entry(1)]
    assert math.isclose(read_metrics(tmp_path / METRICS)[0]["train"]["loss"], 2.125)


def test_in_a_bucket_all_is_written_whole(bucket):
    for first in (1, 2):
        log, _ = run_log(bucket, step=10 * (first - 1))
        log.epoch(entry(first), 3)
        log.show(Shown({"scores": np.arange(3.0)}, {}), 10 * first)
        assert read_metrics(bucket / METRICS) == [entry(n) for n in range(1, first + 1)]
        log.close()
        events = [path.read_bytes() for path in (bucket / "tensorboard").iterdir()]
        assert any(b"scores" in content for content in events)
