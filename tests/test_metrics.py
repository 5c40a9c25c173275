"""The epochs of a run that was killed, resumed or damaged."""

from advmoe_jax.files import read_json_lines
from advmoe_jax.metrics import METRICS, read_metrics


def test_the_last_line_of_an_epoch_counts_and_epochs_are_in_order(tmp_path):
    path = tmp_path / METRICS
    path.write_text(
        '{"epoch": 1, "step": 4, "loss": 3}\n{"epoch": 2, "step": 8, "loss": 2}\n'
        '{"epoch": 1, "step": 4, "loss": 1}\n{"note": "no epoch"}\n[]\n\n{"epoch": 3, "st'
    )
    assert [(entry["epoch"], entry["loss"]) for entry in read_metrics(path)] == [(1, 1), (2, 2)]
    entries, damaged = read_json_lines(path)
    assert len(entries) == 4 and damaged == 1
    assert read_metrics(tmp_path / "none.jsonl") == []
