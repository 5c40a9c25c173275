"""Steps of the training methods, against gradients written out by hand in NumPy."""

from functools import partial
from types import SimpleNamespace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmoe_jax.attacks import linf, pgd
from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import CNN
from advmoe_jax.models.network import functional
from advmoe_jax.models.output import Output
from advmoe_jax.models.router import LinearRouter
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.routing.choice import choose
from advmoe_jax.training.balance import Balance, with_equal_experts
from advmoe_jax.training.methods import (
    METHODS,
    AttackSettings,
    Settings,
    create_step,
    routing_metrics,
)
from advmoe_jax.training.methods.advmoe import ROUTER_OBJECTIVES, expert_targets
from advmoe_jax.training.methods.step import Setup
from advmoe_jax.training.state import create_state

PIXELS, CLASSES, EXPERTS, BATCH = 6, 4, 3, 12
BETA, ALPHA, EPSILON, STEP_SIZE = 6.0, 5.0, 0.1, 0.06
# Those whose steps are built of the others' parts are compiled among the slow tests.
OF_EXPERTS = [
    pytest.param(method, marks=[pytest.mark.slow] if method in ("trades", "joint") else [])
    for method in METHODS
    if method != "hydra"
]
RATES = {"experts": 0.05, "router": 0.03}


def tiny_network():
    """Linear experts behind a linear router: logits = w x E[c], scores = x R, c = argmax."""

    def route(params, stats, images, *, train=False, noise=None, axis_name=None):
        return choose((images @ params["router"]["R"])[:, None], surrogate=train), stats

    def apply(
        params, stats, images, *, train=False, train_router=None, surrogate=None, routing=None,
        noise=None, keys=None, axis_name=None,
    ):  # fmt: skip
        if routing is None:
            surrogate = train if train_router is None else train_router
            routing = choose((images @ params["router"]["R"])[:, None], surrogate=surrogate)
        chosen = params["experts"]["E"][routing.indices[:, 0, 0]]
        logits = routing.weights[:, 0] * jnp.einsum("bd,bdc->bc", images, chosen)
        return Output(logits, routing), stats

    return SimpleNamespace(
        apply=apply,
        route=route,
        num_experts=EXPERTS,
        num_routers=1,
        has_route_bounds=True,
        capacity=Capacity(),
        gate="straight_through",
        is_stochastic=False,
        score_shape=(1, EXPERTS),
        parts=("experts", "router"),
        stacked={"experts": {"E": True}, "router": {"R": False}},
        is_moe=True,
    )


def tiny_problem():
    rng = np.random.default_rng(0)
    params = {
        "experts": {"E": rng.normal(size=(EXPERTS, PIXELS, CLASSES))},
        "router": {"R": rng.normal(size=(PIXELS, EXPERTS))},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    images = rng.uniform(0.2, 0.8, size=(BATCH, PIXELS)).astype(np.float32)
    labels = rng.integers(CLASSES, size=BATCH)
    return params, images, labels


def tiny_optimizers():
    return {name: optax.sgd(rate) for name, rate in RATES.items()}


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl_gradients(z, z_attacked):
    """d KL(p || q) / d z and / d z', for p = softmax(z), q = softmax(z')."""
    p, q = softmax(z), softmax(z_attacked)
    log_ratio = np.log(p) - np.log(q)
    return p * (log_ratio - (p * log_ratio).sum(-1, keepdims=True)), q - p


def forward(params, x):
    E, R = np.asarray(params["experts"]["E"], float), np.asarray(params["router"]["R"], float)
    scores = x @ R
    route = scores.argmax(-1)
    return np.einsum("bd,bdc->bc", x, E[route]), scores, route


def numpy_attack(params, clean, start, attacked="joint"):
    """Two sign steps up KL(f(x) || f(x')) + KL(r(x) || r(x')); no gradient through the gate."""
    E, R = np.asarray(params["experts"]["E"], float), np.asarray(params["router"]["R"], float)
    logits, scores, _ = forward(params, clean)
    x = start
    for _ in range(2):
        z, s, route = forward(params, x)
        g = kl_gradients(logits, z)[1]
        of_answers = np.einsum("bc,bdc->bd", g, E[route])
        of_scores = kl_gradients(scores, s)[1] @ R.T
        gradient = {"joint": of_answers + of_scores, "answers": of_answers, "scores": of_scores}
        gradient = gradient[attacked]
        x = np.clip(x + STEP_SIZE * np.sign(gradient), clean - EPSILON, clean + EPSILON)
        x = np.clip(x, 0, 1)
    return x


def trades_gradients(z, z_attacked, labels):
    """Gradients of mean CE + beta mean KL to the clean and the attacked logits."""
    to_clean, to_attacked = kl_gradients(z, z_attacked)
    to_clean = softmax(z) - np.eye(z.shape[-1])[labels] + BETA * to_clean
    return to_clean / len(z), BETA * to_attacked / len(z)


def numpy_experts_gradient(params, x, x_attacked, labels):
    z, _, route = forward(params, x)
    z_attacked, _, route_attacked = forward(params, x_attacked)
    gradient = np.zeros((EXPERTS, PIXELS, CLASSES))
    pieces = zip(
        (x, x_attacked),
        trades_gradients(z, z_attacked, labels),
        (route, route_attacked),
        strict=True,
    )
    for images, g, routes in pieces:
        for image, gi, expert in zip(images, g, routes, strict=True):
            gradient[expert] += np.outer(image, gi)
    return gradient


def numpy_router_gradient(params, x, x_attacked, labels, objective):
    z, scores, route = forward(params, x)
    z_attacked, scores_attacked, route_attacked = forward(params, x_attacked)
    if objective == "assignment":
        to_clean, to_attacked = kl_gradients(scores, scores_attacked)
        cross_entropy = softmax(scores) - np.eye(EXPERTS)[labels % EXPERTS]
        to_clean = (ALPHA * cross_entropy + BETA * to_clean) / len(x)
        return x.T @ to_clean + x_attacked.T @ (BETA * to_attacked / len(x))
    gradient = np.zeros((PIXELS, EXPERTS))
    pieces = zip(
        (x, x_attacked),
        trades_gradients(z, z_attacked, labels),
        (z, z_attacked),
        (route, route_attacked),
        strict=True,
    )
    for images, g, logits, routes in pieces:
        for image, gi, zi, expert in zip(images, g, logits, routes, strict=True):
            gradient[:, expert] += image * (gi @ zi)  # dz/dw = z at w = 1; dw/ds_c = 1
    return gradient


@pytest.mark.parametrize(
    ("objective", "microbatches", "attacked"),
    [
        ("pathway", 1, "joint"),
        ("pathway", 3, "answers"),
        ("assignment", 1, "scores"),
        ("assignment", 3, "joint"),
    ],
)
def test_one_advmoe_step_equals_gradients_written_out(objective, microbatches, attacked):
    params, images, labels = tiny_problem()
    optimizers = tiny_optimizers()
    attack = pgd(
        linf(EPSILON),
        num_steps=2,
        step_size=STEP_SIZE,
        loss="kl",
        start="gaussian",
        start_scale=1e-3,
    )
    step = create_step(
        "advmoe",
        tiny_network(),
        optimizers,
        attack,
        Settings(beta=BETA, alpha=ALPHA, router_objective=objective, router_attack=attacked),
        microbatches=microbatches,
    )
    keys = jax.random.split(jax.random.key(3), BATCH)
    stats = {"router": {}, "experts": {}}
    new, metrics = jax.jit(step)(create_state(params, stats, optimizers), images, labels, keys)

    def start(phase):
        def noise(key):
            key = jax.random.fold_in(jax.random.fold_in(key, phase), 0)  # restart 0
            return jax.random.normal(key, (PIXELS,))

        return images + 1e-3 * np.asarray(jax.vmap(noise)(keys))

    expected = jax.tree.map(np.asarray, params)
    first = numpy_attack(expected, images, start(0))
    gradient = numpy_experts_gradient(expected, images, first, labels)
    expected["experts"]["E"] = expected["experts"]["E"] - RATES["experts"] * gradient
    second = numpy_attack(expected, images, start(1), attacked)
    gradient = numpy_router_gradient(expected, images, second, labels, objective)
    expected["router"]["R"] = expected["router"]["R"] - RATES["router"] * gradient

    np.testing.assert_allclose(new.params["experts"]["E"], expected["experts"]["E"], atol=2e-5)
    np.testing.assert_allclose(new.params["router"]["R"], expected["router"]["R"], atol=2e-5)
    assert np.abs(np.asarray(new.params["router"]["R"] - params["router"]["R"])).max() > 1e-3
    assert int(new.step) == 1
    _, _, route = forward(params, images)
    _, _, attacked_route = forward(params, first)
    assert metrics["routing"]["agreement"] == pytest.approx(np.mean(route == attacked_route))
    assert metrics["standard_accuracy"] == pytest.approx(
        np.mean(forward(params, images)[0].argmax(-1) == labels)
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_at_with_smoothed_labels_and_awp_equals_gradients_written_out(soft, warm):
    params, images, labels = tiny_problem()
    smoothing, gamma = 0.2, 0.5
    targets = np.eye(CLASSES)[labels]
    if soft:  # as CutMix makes them
        targets = 0.7 * targets + 0.3 * targets[::-1]
    settings = Settings(label_smoothing=smoothing, awp=gamma, awp_warmup_steps=0 if warm else 1)
    attack = lambda function, images, labels, keys, clean: images  # noqa: E731
    step = create_step("at", tiny_network(), tiny_optimizers(), attack, settings)
    given = jnp.asarray(targets, jnp.float32) if soft else labels
    state = create_state(params, {"router": {}, "experts": {}}, tiny_optimizers())
    new, metrics = jax.jit(step)(state, images, given, jax.random.split(jax.random.key(0), BATCH))

    wanted = (1 - smoothing) * targets + smoothing / CLASSES

    def loss_and_gradient(E):
        z, _, route = forward({**params, "experts": {"E": E}}, images)
        g = (softmax(z) - wanted) / BATCH
        gradient = np.zeros(E.shape)
        for image, gi, expert in zip(images, g, route, strict=True):
            gradient[expert] += np.outer(image, gi)
        return -(wanted * np.log(softmax(z))).sum(-1).mean(), gradient

    E = np.asarray(params["experts"]["E"], float)
    gradient = loss_and_gradient(E)[1]
    # Every expert is a layer of its own.
    norms = [np.linalg.norm(x, axis=(1, 2), keepdims=True) for x in (E, gradient)]
    away = gamma * norms[0] * gradient / np.maximum(norms[1], 1e-30)
    loss, gradient = loss_and_gradient(E + away if warm else E)
    expected = E - RATES["experts"] * gradient  # from the weights, not from the perturbed ones
    np.testing.assert_allclose(new.params["experts"]["E"], expected, atol=2e-6)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    right = forward(params, images)[0].argmax(-1) == targets.argmax(-1)
    assert metrics["standard_accuracy"] == pytest.approx(right.mean())


def test_the_assignment_of_mixed_labels_mixes_experts():
    labels = np.array([0, 1, 4, 2])
    np.testing.assert_array_equal(expert_targets(labels, 3), [0, 1, 1, 2])
    mixed = 0.75 * np.eye(5)[labels] + 0.25 * np.eye(5)[labels[::-1]]
    expected = 0.75 * np.eye(3)[labels % 3] + 0.25 * np.eye(3)[labels[::-1] % 3]
    np.testing.assert_allclose(expert_targets(jnp.asarray(mixed), 3), expected, rtol=1e-6)


def test_classes_go_to_the_experts_that_are_named():
    labels, of_class = np.array([0, 1, 4, 2]), (2, 2, 0, 1, 0)
    np.testing.assert_array_equal(expert_targets(labels, 3, of_class), [2, 2, 0, 0])
    certain = jnp.eye(5)[labels]
    np.testing.assert_array_equal(
        expert_targets(certain, 3, of_class), np.eye(3)[np.array(of_class)[labels]]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_experts": (0, 2)}, r"names expert 2; there are 0 to 1$"),
        ({"router_attack": "score"}, r"'score' is unknown; choose one of joint, answers, scores$"),
        ({"class_experts": (0, 0.5)}, r"names expert 0\.5; there are"),
        ({"class_experts": (0.0, 1.0)}, r"names expert 0\.0; there are"),
        ({"class_experts": (False, True)}, r"names expert False; there are"),
        (
            {"class_experts": (0, 1), "router_objective": "pathway"},
            r"not 'pathway': leave it empty",
        ),
    ],
)
def test_what_advmoe_cannot_do_is_refused(tiny, settings, message):
    settings = Settings(**{"router_objective": "assignment", **settings})
    with pytest.raises(UserError, match=rf"^loss\.(class_experts|router_attack).*{message}"):
        create_step("advmoe", tiny()[0], {}, None, settings)


def test_the_certified_objective_is_the_cross_entropy_of_the_worst_scores(tiny_model, batch):
    """On a linear router, whose worst scores a NumPy loop finds, expert by expert."""
    model = tiny_model(3)
    model.router = LinearRouter(1, 3, resolution=4, rngs=nnx.Rngs(2))
    network, params, stats = functional(model)
    settings = Settings(router_objective="certified", threat=linf(0.3))
    setup = Setup(network, {}, None, settings, None, 1)
    images, labels, _ = batch
    loss = ROUTER_OBJECTIVES["certified"].loss(setup)
    found = loss(params, stats, (images, images, labels, None))[0]

    kernel, bias = (np.asarray(params["router"]["head"][name]) for name in ("kernel", "bias"))
    assert len(kernel) == 16  # means of 2 x 2 pixels
    tiles = images.reshape(8, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(8, 16)
    low, high = (
        np.clip(images + shift, 0, 1).reshape(8, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(8, 16)
        for shift in (-0.3, 0.3)
    )
    tiles, low, high = ((x - 0.5) / 0.25 for x in (tiles, low, high))
    scores = tiles @ kernel + bias
    losses = []
    stands_out = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    assert (stands_out.argmax(axis=-1) != scores.argmax(axis=-1)).any()
    for i, expert in enumerate(stands_out.argmax(axis=-1)):
        worst = []
        for other in range(3):
            apart = kernel[:, other] - kernel[:, expert]
            pixels = np.where(apart > 0, high[i], low[i])
            worst.append(pixels @ apart + bias[other] - bias[expert])
        losses.append(np.log(np.exp(worst).sum()))
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-4)


def test_scores_do_not_steer_the_attack_where_routes_are_certified(tiny_model, batch):
    """Where the router is attacked they do; routes and weights are the same for all scales."""
    model = tiny_model(2)
    model.router = LinearRouter(1, 2, resolution=8, rngs=nnx.Rngs(2))
    network, params, stats = functional(model)
    optimizers, losses = momentum_optimizers(router=0.0, experts=0.0), {}
    for objective in ("certified", "assignment"):
        settings = {"router_objective": objective, "threat": linf(0.1)}
        for scale in (0.01, 3.0):
            router = jax.tree.map(lambda x, scale=scale: scale * x, params["router"])
            scaled = {**params, "router": router}
            _, metrics = run_step(network, batch, "advmoe", optimizers, scaled, stats, **settings)
            losses[objective, scale] = float(metrics["loss"])
    assert losses["certified", 3.0] == pytest.approx(losses["certified", 0.01], rel=1e-6)
    assert losses["assignment", 3.0] != pytest.approx(losses["assignment", 0.01], rel=1e-5)


def test_the_certified_objective_is_of_one_router(tiny):
    by_layer = tiny(scope="per_layer")[0]
    certified = Settings(router_objective="certified", threat=linf(0.1))
    with pytest.raises(UserError, match=r"set model\.router\.scope='global', or choose another"):
        create_step("advmoe", by_layer, {}, None, certified)


def test_consistency_is_advmoes():
    with pytest.raises(UserError, match=r"loss\.consistency=1\.0 is of method='advmoe', not 'at'"):
        create_step("at", tiny_network(), tiny_optimizers(), None, Settings(consistency=1.0))


@pytest.mark.slow
def test_where_experts_are_equal_consistency_weighs_what_trades_weighs(moe, batch):
    """KL(f(x) || g(x')) is KL(f(x) || f(x')) if the other pathway g computes what f does."""
    network, params, stats = moe
    params, losses = with_equal_experts(params, network.stacked), {}
    optimizers = momentum_optimizers(router=0.0, experts=0.0)
    for beta, consistency in ((4.0, 0.0), (3.0, 1.0), (3.0, 0.0)):
        settings = {"beta": beta, "consistency": consistency}
        _, metrics = run_step(network, batch, "advmoe", optimizers, params, stats, **settings)
        losses[beta, consistency] = float(metrics["loss"])
    assert losses[3.0, 1.0] == pytest.approx(losses[4.0, 0.0], rel=1e-5)
    assert losses[3.0, 0.0] < losses[4.0, 0.0]


@pytest.mark.parametrize("share", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_equal_experts_grow_apart_unless_every_step_is_shared(moe, batch, share):
    network, params, stats = moe
    params = with_equal_experts(params, network.stacked)
    optimizers = momentum_optimizers(router=0.1, experts=0.1)
    settings = {"balance": Balance(shared_steps=share)}
    state, _ = run_step(network, batch, "advmoe", optimizers, params, stats, **settings)
    flags = jax.tree.leaves(network.stacked["experts"])
    kernels = [x for x, f in zip(jax.tree.leaves(state.params["experts"]), flags, strict=True) if f]
    before = [x for x, f in zip(jax.tree.leaves(params["experts"]), flags, strict=True) if f]
    spread = [float(jnp.abs(x - x[:1]).max()) for x in kernels]
    moved = [float(jnp.abs(x - y).max()) for x, y in zip(kernels, before, strict=True)]
    assert min(moved) > 1e-4
    assert max(spread) == pytest.approx(0, abs=1e-7) if share == 1 else min(spread) > 1e-5


@pytest.mark.slow
def test_random_routes_are_those_of_every_pass_of_a_step(moe, batch):
    """Under the attack too: so no route changes, and images go everywhere."""
    network, params, stats = moe
    optimizers = momentum_optimizers(router=0.1, experts=0.1)
    params = {**params, "router": {**params["router"]}}
    params["router"]["head"] = {**params["router"]["head"], "bias": jnp.asarray([50.0, 0.0])}
    settings = {"balance": Balance(warmup_steps=1)}
    _, metrics = run_step(network, batch, "advmoe", optimizers, params, stats, **settings)
    assert float(metrics["routing"]["agreement"]) == 1
    assert metrics["routing"]["load"].min() > 0
    assert not network.route(params, stats, batch[0])[0].indices.any()  # the router's own choice


@pytest.fixture(scope="module")
def moe(tiny):
    return tiny()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    images = rng.uniform(size=(8, 8, 8, 1)).astype(np.float32)
    return images, rng.integers(4, size=8), jax.random.split(jax.random.key(0), 8)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def momentum_optimizers(**rates):
    return {
        name: optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
        for name, rate in rates.items()
    }


def run_step(network, batch, method, optimizers, params, stats, microbatches=1, **settings):
    loss = METHODS[method].attack_loss if method in METHODS else "kl"
    attack = pgd(linf(0.1), num_steps=1, step_size=0.1, loss=loss, start="gaussian")
    settings = Settings(**settings)
    if method in METHODS and METHODS[method].own_attack:
        attack = METHODS[method].attack(AttackSettings(linf(0.1), 1, 0.1), settings)
    step = create_step(method, network, optimizers, attack, settings, microbatches=microbatches)
    state = create_state(params, stats, optimizers, averaged=settings.ema_decay > 0)
    return jax.jit(step)(state, *batch)


@pytest.mark.parametrize(
    "objective", ["pathway", pytest.param("assignment", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_each_update_of_advmoe_leaves_the_other_subtree_bit_identical(moe, batch, objective):
    network, params, stats = moe
    settings = {"router_objective": objective}
    for frozen, moving in (("router", "experts"), ("experts", "router")):
        # With a learning rate of zero one half of the alternation moves nothing of its own; the
        # other half must then leave that subtree alone.
        optimizers = momentum_optimizers(**{frozen: 0.0, moving: 0.1})
        new, _ = run_step(network, batch, "advmoe", optimizers, params, stats, **settings)
        assert equal(new.params[frozen], params[frozen])
        assert not equal(new.params[moving], params[moving])


@pytest.mark.parametrize(("frozen", "moving"), [("router", "experts"), ("experts", "router")])
def test_a_frozen_half_keeps_parameters_and_statistics(moe, batch, frozen, moving):
    network, params, stats = moe
    optimizers = momentum_optimizers(router=0.1, experts=0.1)
    new, metrics = run_step(network, batch, "advmoe", optimizers, params, stats, frozen=frozen)
    assert equal(new.params[frozen], params[frozen])
    assert equal(new.stats[frozen], stats[frozen])
    assert not equal(new.params[moving], params[moving])
    assert not equal(new.stats[moving], stats[moving])
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(metrics))
    # What is frozen costs no attack and no update, and leaves no loss of its own.
    assert ("router_loss" in metrics) == (moving == "router")
    if moving == "router":
        assert metrics["loss"] == metrics["router_loss"]
        return
    idle = momentum_optimizers(router=0.0, experts=0.1)
    whole, of_whole = run_step(network, batch, "advmoe", idle, params, stats)
    for name in ("loss", "standard_accuracy", "robust_accuracy"):
        np.testing.assert_allclose(metrics[name], of_whole[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        new.params["experts"],
        whole.params["experts"],
    )


@pytest.mark.slow
def test_descend_changes_only_the_named_subtree(moe, batch):
    network, params, stats = moe
    optimizers = momentum_optimizers(router=0.1, experts=0.1)
    setup = Setup(network, optimizers, None, Settings(), None, 1)
    state = create_state(params, stats, optimizers)

    def loss_fn(params, stats, images):
        output, stats = network.apply(params, stats, images, train=True)
        return jnp.mean(output.logits**2), (stats, None)

    for moving, frozen in (("experts", "router"), ("router", "experts")):
        new, _, _ = setup.descend(state, loss_fn, [moving], batch[0])
        assert equal(new.params[frozen], params[frozen])
        assert equal(new.opt_state[frozen], state.opt_state[frozen])
        assert not equal(new.params[moving], params[moving])


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("joint", marks=pytest.mark.slow),
        *("dense trades", "balanced joint"),
    ],
)
def test_microbatches_that_are_alike_change_nothing(tiny, batch, method):
    """Every part has the statistics of the whole, so BatchNorm makes no difference either.

    AdvMoE's second attack sees the running statistics, which have moved twice.
    """
    settings = {}
    if "balanced" in method:
        weights = Balance(importance=1.0, load=1.0, noise=0.5)
        settings = {"balance": weights, "awp": 0.01, "label_smoothing": 0.1, "ema_decay": 0.5}
    method, experts = method.split()[-1], 1 if "dense" in method else 2
    network, params, stats = tiny(num_experts=experts)
    twice = jax.tree.map(lambda x: jnp.concatenate([x[:4], x[:4]]), batch)
    optimizers = momentum_optimizers(**dict.fromkeys(network.parts, 0.1))
    whole, parts = (
        run_step(network, twice, method, optimizers, params, stats, microbatches=m, **settings)
        for m in (1, 2)
    )
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, parts[0].params, whole[0].params)
    jax.tree.map(close, parts[1], whole[1])


@pytest.mark.parametrize("method", OF_EXPERTS)
def test_every_method_trains_both_subtrees_and_reports(moe, batch, method):
    network, params, stats = moe
    optimizers = momentum_optimizers(router=0.1, experts=0.1)
    new, metrics = run_step(network, batch, method, optimizers, params, stats)
    for name in ("router", "experts"):
        assert not equal(new.params[name], params[name])
        assert not equal(new.stats[name], stats[name])
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((new, metrics)))
    assert ("robust_accuracy" in metrics) == (method != "standard")
    assert ("router_loss" in metrics) == (method == "advmoe")
    assert float(metrics["routing"]["load"].sum()) == pytest.approx(1)
    assert int(new.step) == 1


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("advmoe", "pathway"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("trades", "pathway"), ("joint", "pathway"), ("advmoe", "assignment"))
        ),
    ],
)
def test_routers_per_layer_are_trained(tiny, batch, method, objective):
    network, params, stats = tiny(2, scope="per_layer")
    optimizers = momentum_optimizers(router=0.1, experts=0.1)
    settings = {"router_objective": objective}
    new, metrics = run_step(network, batch, method, optimizers, params, stats, **settings)
    for name in ("conv", "more0"):
        assert not equal(new.params["router"][name], params["router"][name])
    assert not equal(new.params["experts"], params["experts"])
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((new, metrics)))
    layers = metrics["routing"]["layers"]
    assert layers["load"].shape == (2, 2)
    np.testing.assert_allclose(layers["load"].mean(0), metrics["routing"]["load"], rtol=1e-6)


@pytest.mark.slow
def test_hydra_learns_scores_first_and_then_kernels():
    sparse = CNN("resnet10_cifar", width=4, keep=0.5)
    rngs = nnx.Rngs(0)
    network, params, stats = functional(sparse.create(in_channels=1, num_classes=4, rngs=rngs))
    optimizers = momentum_optimizers(scores=0.1, backbone=0.1)
    attack = pgd(linf(0.1), num_steps=1, step_size=0.1, loss="kl", start="gaussian")
    settings = Settings(pruning_steps=1)
    step = jax.jit(create_step("hydra", network, optimizers, attack, settings))
    images = jax.random.uniform(jax.random.key(0), (8, 8, 8, 1))
    keys = jax.random.split(jax.random.key(1), 8)
    first = create_state(params, stats, optimizers)
    second, _ = step(first, images, jnp.arange(8) % 4, keys)
    third, metrics = step(second, images, jnp.arange(8) % 4, keys)
    assert not equal(second.params["scores"], first.params["scores"])
    assert equal(second.params["backbone"], first.params["backbone"])
    assert equal(third.params["scores"], second.params["scores"])
    assert not equal(third.params["backbone"], second.params["backbone"])
    assert all(bool(jnp.isfinite(x)) for x in metrics.values())


def test_a_dense_network_has_no_router_to_train(tiny, batch):
    network, params, stats = tiny(num_experts=1)
    optimizers = momentum_optimizers(backbone=0.1)
    new, metrics = run_step(network, batch, "trades", optimizers, params, stats)
    assert set(new.params) == {"backbone"}
    assert "routing" not in metrics
    assert not equal(new.params["backbone"], params["backbone"])


def test_joint_differs_from_trades_by_its_attack(moe, batch):
    network, params, stats = moe
    optimizers = momentum_optimizers(router=0.1, experts=0.1)
    seen = {}
    for method in ("trades", "joint"):
        outputs = []

        def attack(function, images, labels, keys, clean, outputs=outputs):
            outputs.append(jax.tree.structure(function(images)).num_leaves)
            return images

        step = create_step(method, network, optimizers, attack, Settings())
        jax.eval_shape(step, create_state(params, stats, optimizers), *batch)
        seen[method] = outputs
    assert seen == {"trades": [1], "joint": [2]}


def test_routing_metrics_by_hand():
    clean = choose(jnp.asarray([[0.0, 0.0], [0.0, 100.0], [100.0, 0.0], [1.0, 2.0]])[:, None])
    attacked = choose(jnp.asarray([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[:, None])
    routing = routing_metrics(clean, attacked)["routing"]
    np.testing.assert_allclose(routing["load"], [0.5, 0.5])
    p = 1 / (1 + np.e)
    last = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(routing["entropy"], (np.log(2) + last) / 4, rtol=1e-5)
    assert float(routing["agreement"]) == 0.75
    assert routing_metrics(None) == {}


def test_mistakes_are_named(tiny, moe):
    dense = tiny(num_experts=1)[0]
    optimizers = tiny_optimizers()
    for network, method, settings, message in (
        (moe[0], "advmeo", Settings(), "advmeo"),
        (moe[0], "advmoe", Settings(router_objective="path"), "path"),
        (dense, "advmoe", Settings(), "num_experts"),
        (dense, "joint", Settings(), "num_experts"),
        (dense, "hydra", Settings(), "model.keep=1.0"),
        (dense, "standard", Settings(awp=0.01), "loss.awp"),
        (moe[0], "at", Settings(balance=Balance(load=0.1)), "balance.load"),
        (moe[0], "advmoe", Settings(frozen="head"), "start.frozen='head'"),
        (moe[0], "joint", Settings(frozen="router"), "not 'joint'"),
    ):
        with pytest.raises(UserError, match=message):
            create_step(method, network, optimizers, None, settings)
