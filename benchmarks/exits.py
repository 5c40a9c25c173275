"""Leaving early: the packed dynamic network against the static one, which has no side exits."""

from collections.abc import Iterator

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.evaluation import dynamic
from advmoe_jax.evaluation.exit_costs import exit_costs
from advmoe_jax.evaluation.thresholds import by_macs, exits_taken
from advmoe_jax.evaluation.timing import alternate, ratio
from advmoe_jax.models import CNN, functional
from advmoe_jax.models.trunk import entropy, with_thresholds
from benchmarks.figures import Figure
from benchmarks.programs import compiled

SUITE, BAR, SHARE, CLASSES = "exits", 0.85, 0.7, 10
# Name -> exits, shape of an image.
NETWORKS = {
    "small_cnn": ((1, 3), (28, 28, 1)),
    "resnet38_cifar": ((2, 5, 8, 11, 14, 17), (32, 32, 3)),
}


def figures(batch: int) -> Iterator[Figure]:
    """Three rows for each network: random weights, thresholds by MACs on the batch itself."""
    for name in NETWORKS:
        yield from _of_network(name, batch)


def _of_network(name: str, batch: int) -> Iterator[Figure]:
    exits, shape = NETWORKS[name]
    cnn = CNN(name, exits=exits, mean=(0.0,), std=(1.0,))
    create = {"in_channels": shape[-1], "num_classes": CLASSES}
    network, params, stats = functional(cnn.create(**create, rngs=nnx.Rngs(0)))
    static, static_params, static_stats = functional(cnn.dense().create(**create, rngs=nnx.Rngs(0)))
    images = jax.random.uniform(jax.random.key(0), (batch, *shape))
    answers = jax.jit(network.apply)(params, stats, images)[0].exits
    entropies = np.asarray(entropy(jnp.stack(answers[:-1], axis=1)))
    costs = exit_costs(cnn, shape, CLASSES)
    thresholds = by_macs(entropies, costs.every, SHARE * costs.own[-1] / costs.every[-1])
    taken = exits_taken(entropies, thresholds)
    macs = np.array(costs.every)[taken].mean() / costs.own[-1]
    nobody = np.full(len(exits), -1.0)  # no entropy is below it
    programs = {
        **{
            key: compiled(
                lambda p, s, x: dynamic.classify(network, p, s, x),
                params,
                with_thresholds(stats, levels),
                images,
            )
            for key, levels in (("dynamic", thresholds), ("blocks", nobody))
        },
        "static": compiled(
            lambda p, s, x: jnp.argmax(static.apply(p, s, x)[0].logits, axis=-1),
            static_params,
            static_stats,
            images,
        ),
        "every": compiled(lambda p, s, x: network.apply(p, s, x)[0].exits, params, stats, images),
    }
    times = alternate({key: program.call for key, program in programs.items()})
    where = f"{name}, batch {batch}"
    yield Figure(
        SUITE,
        f"{where}: images leave early (in blocks of {dynamic.BLOCK}) over no side exits",
        ratio(times["dynamic"], times["static"]),
        BAR,
        macs=macs,
        memory=programs["dynamic"].mebibytes,
    )
    yield Figure(
        SUITE,
        f"{where}: the same program, but no image leaves, over no side exits",
        ratio(times["blocks"], times["static"]),
        macs=costs.every[-1] / costs.own[-1],
    )
    yield Figure(
        SUITE,
        f"{where}: every exit answers over no side exits",
        ratio(times["every"], times["static"]),
        macs=costs.every[-1] / costs.own[-1],
    )
