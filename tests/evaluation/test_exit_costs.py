"""What leaving at each exit costs: the table of RDI-Nets, every row, by name."""

import pytest

from advmoe_jax.evaluation.cost import network_cost
from advmoe_jax.evaluation.exit_costs import exit_costs
from advmoe_jax.models.cnn import CNN, RouterSettings

# Own parameters, own MACs, all MACs, "MFLOPs" as published (cut off after the digits given).
TABLE = {
    ("small_cnn", (1, 3), (28, 28, 1)): [
        (162_554, 1_015_440, 1_015_440, "0.818"),
        (390_474, 7_708_304, 8_529_056, "7.00"),
        (312_202, 9_952_400, 11_135_152, "9.25"),
    ],
    ("resnet38_cifar", (2, 5, 8, 11, 14, 17), (32, 32, 3)): [
        (54_362, 17_613_120, 17_613_120, "16.79"),
        (68_378, 31_768_896, 39_502_464, "30.29"),
        (80_474, 38_322_496, 53_789_632, "36.54"),
        (136_154, 52_478_272, 69_125_376, "50.04"),
        (268_186, 64_406_144, 82_233_216, "61.42"),
        (490_138, 78_561_920, 96_389_632, "74.92"),
        (564_122, 83_280_512, 101_108_864, "79.42"),
    ],
    ("mobilenet_v2", (1, 4, 7, 9, 12, 15), (32, 32, 3)): [
        (31_274, 8_327_808, 8_327_808, "7.94"),
        (43_034, 24_019_264, 29_070_272, "22.90"),
        (79_258, 31_588_992, 38_716_992, "30.12"),
        (187_802, 38_322_816, 45_451_456, "36.54"),
        (433_626, 53_646_272, 60_775_552, "51.16"),
        (1_027_802, 71_206_464, 78_336_704, "67.90"),
        (2_296_922, 91_154_944, 98_286_784, "86.91"),
    ],
}


@pytest.mark.parametrize("network", TABLE, ids=lambda key: key[0])
def test_every_row_of_the_published_table(network):
    name, exits, shape = network
    architecture = CNN(name, exits=exits, mean=(0.0,), std=(1.0,))
    costs = exit_costs(architecture, shape, 10)
    rows = list(zip(costs.params, costs.own, costs.every, strict=True))
    assert rows == [row[:3] for row in TABLE[network]]
    for found, (*_, published) in zip(costs.published, TABLE[network], strict=True):
        digits = len(published.split(".")[1])
        assert int(found * 10**digits) == round(float(published) * 10**digits)
    # The whole network runs every head; without side exits it is the last row's trunk.
    assert network_cost(architecture, shape, 10)["macs"]["total"] == costs.every[-1]
    dense = network_cost(architecture.dense(), shape, 10)
    assert (dense["params"]["total"], dense["macs"]["total"]) == rows[-1][:2]


def test_the_router_of_a_mixture_is_paid_at_every_exit():
    sizes = {"num_experts": 2, "ratio": 0.5, "width": 8}
    small, large = (
        exit_costs(
            CNN("resnet10_cifar", exits=(1, 2), **sizes, router=RouterSettings(width=w, blocks=1)),
            (16, 16, 3),
            4,
        )
        for w in (4, 8)
    )
    more = {large.every[i] - small.every[i] for i in range(3)}
    assert more == {large.own[i] - small.own[i] for i in range(3)} and len(more) == 1
    assert small.published == large.published and min(more) > 0
