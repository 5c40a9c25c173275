"""The curves of a run: what each panel shows, and epochs that lack this or that."""

import pytest
from matplotlib.figure import Figure

from advmoe_jax.reports.curves import curves, draw_curves


def epoch(number, moe=True, validated=True):
    """An epoch of a made-up run."""

    def routing(load):
        return {"load": load, "entropy": 0.6, "agreement": 0.9} if moe else None

    train = {"loss": 1.2 / number, "standard_accuracy": 0.61, "robust_accuracy": 0.3}
    train["routing"] = routing([0.7, 0.295, 0.005])
    validation = {"standard_accuracy": 0.6, "robust_accuracy": 0.4}
    validation["routing"] = routing([0.5, 0.3, 0.2])
    return {
        "epoch": number,
        "train": train | ({"router_loss": 0.9} if moe else {}),
        "validation": validation if validated else None,
    }


def panels(epochs):
    figure = Figure()
    draw_curves(figure, epochs)
    return figure.axes


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_panels_of_a_mixture():
    loss, accuracy, routing, entropy = panels([epoch(number) for number in (1, 2, 3)])
    assert labels(loss) == ["loss, training", "router loss, training"]
    assert list(loss.lines[0].get_ydata()) == [1.2, 0.6, pytest.approx(0.4)]
    assert labels(accuracy) == ["SA, validation", "SA, training", "RA, validation", "RA, training"]
    assert labels(routing) == ["expert 0", "expert 1", "expert 2", "agreement", "1% warning"]
    assert "(%)" in accuracy.get_ylabel()
    assert "(nats)" in loss.get_ylabel()
    assert labels(entropy) == ["entropy", "ln 3, no preference"]
    assert "(nats)" in entropy.get_ylabel() and entropy.get_xlabel() == "epoch"
    by_label = dict(zip(labels(routing), routing.lines, strict=True))
    assert list(by_label["expert 0"].get_ydata()) == [50.0] * 3  # validation's load, not training's


def test_a_dense_network_has_no_routing_panel():
    assert len(panels([epoch(1, moe=False)])) == 2


def test_epochs_without_validation():
    drawn = panels([epoch(number, validated=number % 2 == 0) for number in range(1, 6)])
    assert list(drawn[1].lines[0].get_xdata()) == [2, 4]
    drawn = panels([epoch(number, validated=False) for number in (1, 2)])
    assert labels(drawn[1]) == ["SA, training", "RA, training"]
    assert drawn[2].lines[0].get_ydata()[0] == pytest.approx(70)  # training's load


def test_many_experts_share_one_label():
    drawn = panels([{"epoch": 1, "train": {"routing": {"load": [1 / 32] * 32}}}])
    assert labels(drawn[2]) == ["each of 32 experts", "1% warning"]


@pytest.mark.parametrize(
    "epoch",
    [
        {"epoch": 1},
        {"epoch": 1, "train": None, "validation": None},
        {"epoch": 1, "train": {"loss": float("nan"), "routing": {"load": [None, 0.5]}}},
        {"epoch": 1, "train": {"loss": "high", "routing": {"load": 3, "agreement": None}}},
    ],
)
def test_incomplete_epochs(epoch):
    assert curves([epoch]).startswith(b"\x89PNG\r\n\x1a\n")
