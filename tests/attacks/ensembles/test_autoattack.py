"""AutoAttack: an ensemble no part beats, packed, resumable, and careful of what it is given."""

import warnings
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from advmoe_jax.attacks import apgd, autoattack, l1, l2, linf, pgd
from advmoe_jax.attacks.apgd import apgd_steps
from advmoe_jax.attacks.fab import fab_steps
from advmoe_jax.attacks.gate import gate_steps
from advmoe_jax.attacks.square import square_steps
from advmoe_jax.files import StateFile
from advmoe_jax.parallel import EXPERT_AXIS, data_mesh

THREAT = linf(0.1)
QUICK = {"num_steps": 15, "num_queries": 60, "num_targets": 3}
MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5)), jnp.float32)
IMAGES = np.random.default_rng(1).uniform(size=(30, 4, 4, 1)).astype(np.float32)


def linear_map(matrix, images):
    return images.reshape(len(images), -1) @ matrix


# Its matrix is an argument of what is compiled, which serves all tests that use it.
linear = partial(linear_map, MATRIX)
KEY = jax.random.key(0)
LABELS = np.asarray(jnp.argmax(linear(IMAGES), axis=1))


ensemble = lru_cache(autoattack)


def attack(function=linear, images=IMAGES, labels=LABELS, threat=THREAT, key=KEY, **settings):
    """AutoAttack in a small way; settings of the call and of the ensemble together."""
    calls = ("batch_size", "state_file", "individual", "mesh", "progress", "pause")
    call = {"batch_size": 8, "progress": False} | {
        k: settings.pop(k) for k in calls if k in settings
    }
    settings = {k: tuple(v) if k == "attacks" else v for k, v in (QUICK | settings).items()}
    return ensemble(threat, **settings)(function, images, labels, key, **call)


def assert_same(one, other):
    np.testing.assert_array_equal(one.robust, other.robust)
    np.testing.assert_array_equal(one.fooled_by, other.fooled_by)
    np.testing.assert_allclose(one.adversarial, other.adversarial, atol=1e-6)
    assert {k: r.accuracy for k, r in one.attacks.items()} == {
        k: r.accuracy for k, r in other.attacks.items()
    }


@pytest.mark.slow
def test_never_above_a_part_and_as_strong_as_pgd_200_times_10(networks, assert_valid):
    network = networks["robust"]
    images, labels = network.images, network.labels
    run = autoattack(THREAT, num_queries=500)
    result = run(network.function, images, labels, jax.random.key(0), individual=True)
    assert result.attacks.keys() == {"apgd-ce", "apgd-t", "fab-t", "square"}
    alone = [report.alone for report in result.attacks.values()]
    assert result.robust_accuracy <= min(alone)
    # Looked at again by a plain forward pass outside of jit.
    assert_valid(THREAT, result.adversarial, np.asarray(images))
    with jax.disable_jit():
        logits = np.asarray(network.function(jnp.asarray(result.adversarial)))
    np.testing.assert_array_equal(np.argmax(logits, axis=1) == labels, result.robust)
    strongest = pgd(THREAT, num_steps=200, step_size=0.01, restarts=10)
    found = jax.jit(partial(strongest, network.function))(images, labels, jax.random.key(1))
    assert result.robust_accuracy <= network.accuracy(found) + 0.01
    cascade = run(network.function, images, labels, jax.random.key(0), progress=False)
    np.testing.assert_array_equal(cascade.robust, result.robust)
    assert cascade.attacks["square"].calls <= result.attacks["square"].calls


def test_what_it_reports():
    labels = LABELS.copy()
    labels[:3] = (labels[:3] + 1) % 5
    result = attack(labels=labels)
    assert result.clean_accuracy == pytest.approx(0.9)
    np.testing.assert_array_equal(result.fooled_by[:3], "clean")
    assert result.robust_accuracy == result.robust.mean()
    np.testing.assert_array_equal(result.fooled_by == "", result.robust)
    np.testing.assert_array_equal(result.adversarial[result.robust], IMAGES[result.robust])
    accuracy, tried = 0.9, 27
    for name, report in result.attacks.items():
        assert report.tried == tried and report.fooled == np.sum(result.fooled_by == name)
        accuracy, tried = accuracy - report.fooled / 30, tried - report.fooled
        assert report.accuracy == pytest.approx(accuracy) and report.alone is None
    assert result.robust_accuracy == pytest.approx(accuracy)


def test_packing_changes_nothing():
    """Whatever the batch an image is in, and however often images leave it."""
    keys = jax.random.split(KEY, 30)
    whole = attack(key=keys)
    assert 0 < whole.robust_accuracy < 1
    mixed = np.random.default_rng(0).permutation(30)
    again = attack(images=IMAGES[mixed], labels=LABELS[mixed], key=keys[mixed])
    np.testing.assert_array_equal(again.fooled_by, whole.fooled_by[mixed])
    np.testing.assert_array_equal(again.adversarial, whole.adversarial[mixed])
    # The packed APGD-CE fools the images that the whole attack fools, in batches of any size.
    adversarial = jax.jit(partial(apgd(THREAT, num_steps=15), linear))
    plain = np.argmax(linear(adversarial(IMAGES, LABELS, KEY)), axis=1) != LABELS
    for batch_size in (8, 7, 30):
        result = attack(version="custom", attacks=["apgd-ce"], batch_size=batch_size)
        assert result.attacks["apgd-ce"].fooled > 0
        assert abs(plain.sum() - result.attacks["apgd-ce"].fooled) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [7, 30])
def test_batches_of_any_size(batch_size):
    assert_same(attack(batch_size=batch_size), attack())


def test_fooled_images_cost_nothing_more():
    easy = attack(threat=linf(0.9), version="custom", attacks=["apgd-t"])
    hard = attack(threat=linf(1e-4), version="custom", attacks=["apgd-t"])
    assert easy.robust_accuracy == 0 and hard.robust_accuracy == 1
    assert easy.attacks["apgd-t"].calls <= 6  # 30 images by 8: hardly any needs a second call
    # 3 targets of 16 steps, 2 a call, for 30 images by 8 slots
    assert hard.attacks["apgd-t"].calls == 3 * 8 * 4


@pytest.mark.parametrize("after", [1, 7, 20])
def test_killed_and_resumed(tmp_path, after, monkeypatch):
    file, saves, real = tmp_path / "state.npz", [], StateFile.save

    def save(self, arrays):
        real(self, arrays)
        saves.append(1)
        if len(saves) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFile, "is_due", True)
    monkeypatch.setattr(StateFile, "save", save)
    with pytest.raises(KeyboardInterrupt):
        attack(state_file=file)
    resumed, calls = attack(state_file=file), len(saves) - after
    assert_same(resumed, attack())
    assert calls > 10
    # A finished one is read back without an attack: with the seconds that it took then.
    again = attack(state_file=file)
    assert_same(again, resumed)
    assert again.attacks == resumed.attacks and len(saves) == after + calls


def test_told_to_stop_it_saves_first(tmp_path, monkeypatch):
    file, before = tmp_path / "state.npz", []

    def stop():
        before.append(1)
        if len(before) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFile, "is_due", False)
    with pytest.raises(KeyboardInterrupt):
        attack(state_file=file, pause=stop)
    after = []
    resumed = attack(state_file=file, pause=lambda: after.append(1))
    assert_same(resumed, attack())
    whole = []
    attack(pause=lambda: whole.append(1))
    assert len(before) + len(after) == len(whole)


def test_damaged_and_foreign_state(tmp_path):
    file = tmp_path / "state.npz"
    settings = {"version": "custom", "attacks": ["apgd-ce"], "state_file": file}
    attack(**settings)
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not an archive"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state.npz is damaged .*: delete it") as caught:
            attack(**settings)
        assert "\n" not in str(caught.value)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"state.npz is of another evaluation"):
        attack(images=1 - IMAGES, **settings)
    with pytest.raises(ValueError, match=r"of another function \(its clean logits differ\)"):
        attack(lambda x: 2 * linear(x), **settings)
    attack(**settings)


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (apgd_steps, {}, {"loss": "margin"}),
        (fab_steps, {}, {"eta": 1.1}),
        (square_steps, {"num_queries": 10}, {"num_queries": 10, "p": 0.5}),
        (gate_steps, {}, {"noise": 0.5}),
        (gate_steps, {}, {"eot_samples": 1}),
    ],
)
def test_the_state_of_the_same_attack_with_other_settings(make, one, other):
    identities = [
        (steps.num_steps, steps.eot_samples, steps.identity)
        for steps in (make(THREAT, **settings) for settings in (one, one, other))
    ]
    assert identities[0] == identities[1] != identities[2]


def test_a_state_is_not_gone_on_from_with_another_loss(tmp_path):
    def run(loss):
        parts = {"mine": apgd_steps(THREAT, loss=loss, num_steps=3)}
        return autoattack(THREAT, "custom", attacks=parts)(
            linear, IMAGES, LABELS, KEY, state_file=tmp_path / "state.npz", progress=False
        )

    run("cross_entropy")
    with pytest.raises(ValueError, match="is of another evaluation"):
        run("margin")


def test_in_l1_the_balls_shrink():
    parts = autoattack(l1(0.4)).plan(5)
    assert parts["apgd-ce"].num_steps == parts["apgd-t"].num_steps == 103
    assert autoattack(linf(0.1)).plan(5)["apgd-ce"].num_steps == 101


def test_what_is_not_confirmed_is_tried_by_the_next_attack():
    label = int(LABELS[0])

    def function(images):  # what is compiled can be fooled, the function itself never
        if isinstance(images, jax.core.Tracer):
            return linear(images)
        return jnp.broadcast_to(jnp.eye(5)[label], (len(images), 5))

    correct = int(np.sum(label == LABELS))
    settings = {"version": "custom", "attacks": ["apgd-ce", "apgd-t"], "threat": linf(0.5)}
    with pytest.warns(UserWarning, match=f"{correct} adversarial images of apgd-ce did not fool"):
        result = attack(function, labels=np.full(30, label), **settings)
    told = [(r.tried, r.fooled, r.accuracy) for r in result.attacks.values()]
    assert correct > 1 and told == [(correct, 0, correct / 30)] * 2
    assert result.robust_accuracy == correct / 30


def test_masked_classes_are_not_taken_for_noise():
    def masked(images):
        return jnp.concatenate([linear(images), jnp.full((len(images), 2), -jnp.inf)], axis=1)

    settings = {"version": "custom", "attacks": ["apgd-ce"]}
    assert warned(masked, **settings) == ""
    assert_same(attack(masked, **settings), attack(**settings))


@pytest.mark.parametrize("norm", [l2(0.2), pytest.param(l1(0.4), marks=pytest.mark.slow)])
def test_other_norms(norm, assert_valid):
    result = attack(threat=norm, version="custom", attacks=["apgd-ce", "fab-t"])
    assert 0 < result.robust_accuracy < 1
    assert_valid(norm, result.adversarial, IMAGES)


@pytest.mark.slow
def test_plus():
    plus = attack(version="plus", num_steps=3, num_queries=5, restarts=2)
    assert list(plus.attacks) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"version": "custom", "attacks": ["apgd-ce"]}, ["apgd-ce"]),
        pytest.param({"version": "rand"}, ["apgd-ce", "apgd-dlr"], marks=pytest.mark.slow),
    ],
)
def test_a_randomised_function(settings, names):
    def noisy(images, keys):
        noise = jax.vmap(lambda k: jax.random.normal(k, (5,)))(keys)
        return linear(images) + 0.1 * noise

    rand = attack(noisy, num_steps=3, eot_samples=3, **settings)
    assert list(rand.attacks) == names and rand.warnings == ()


def test_on_eight_devices():
    settings = {"version": "custom", "attacks": ["apgd-ce"]}
    assert_same(attack(mesh=data_mesh(8), **settings), attack(**settings))


def shared_map(matrix, images):
    """``linear_map``; of a part of the matrix, all devices along an axis have to call it."""
    if len(matrix) < len(MATRIX):
        matrix = jax.lax.all_gather(matrix, EXPERT_AXIS, tiled=True)
    return linear_map(matrix, images)


def test_devices_that_share_a_function_take_their_steps_together():
    mesh, settings = data_mesh(8, 4), {"version": "custom", "attacks": ["apgd-ce"]}
    spread = NamedSharding(mesh, PartitionSpec(EXPERT_AXIS))
    shared = partial(shared_map, jax.device_put(MATRIX, spread))
    assert_same(attack(shared, mesh=mesh, **settings), attack(**settings))


@pytest.mark.slow
def test_every_attack_on_eight_devices():
    assert_same(attack(mesh=data_mesh(8)), attack())


@pytest.mark.parametrize("name", ["apgd-ce", pytest.param("fab-t", marks=pytest.mark.slow)])
def test_any_function(name):
    """A closure over a matrix of flat images, arrays as arguments, an Equinox model: one call."""
    flat = IMAGES.reshape(30, -1)
    settings = {"version": "custom", "attacks": [name]}
    closure = attack(lambda x: x @ MATRIX, flat, **settings)
    argument = attack(jax.tree_util.Partial(lambda m, x: x @ m, MATRIX), flat, **settings)
    assert_same(closure, argument)
    assert closure.adversarial.shape == (30, 16)


@pytest.mark.slow
def test_an_equinox_model():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(16, 5, 8, 1, key=jax.random.key(0))
    labels = np.asarray(jnp.argmax(jax.vmap(model)(IMAGES.reshape(30, -1)), axis=1))
    settings = {"version": "custom", "attacks": ["apgd-ce"], "num_steps": 3}
    result = attack(lambda x: jax.vmap(model)(x.reshape(len(x), -1)), labels=labels, **settings)
    assert result.clean_accuracy == 1


def warned(function, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = attack(function, **({"version": "custom", "attacks": ["apgd-ce"]} | settings))
    told = [str(w.message) for w in caught]
    assert all(w in told for w in result.warnings)
    return " ".join(result.warnings)


def test_warnings():
    assert "seems to return probabilities" in warned(lambda x: jax.nn.softmax(linear(x)))
    random = np.random.default_rng(0)
    assert "the function is randomised" in warned(lambda x: linear(x) + random.normal(size=5))

    def rounded(x):
        return linear(jnp.round(x * 8) / 8)

    labels = np.asarray(jnp.argmax(rounded(IMAGES), axis=1))
    told = warned(rounded, labels=labels, attacks=["apgd-ce", "square"], num_queries=300)
    assert "30 of 30 images have no gradient in apgd-ce" in told
    assert "Square lowered the robust accuracy" in told and "masks its gradients" in told
    assert warned(linear) == ""


def test_an_outcome_that_is_not_confirmed_counts_as_robust():
    def fickle(images):
        traced = isinstance(images, jax.core.Tracer)
        return (
            linear(images) * (1 if traced else 0)
            + 10 * (0 if traced else 1) * jnp.eye(5)[jnp.argmax(linear(IMAGES[:1]))]
        )

    labels = np.full(30, int(jnp.argmax(linear(IMAGES[:1]))))
    told = warned(fickle, labels=labels, threat=linf(0.3))
    assert "did not fool the function when called again" in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple of 1"),
        ({"labels": LABELS + 5}, "labels reach from .* to .*, but the function has 5 classes"),
        ({"labels": LABELS - 5}, "labels reach from -"),
        ({"labels": LABELS[:5]}, "do not match"),
        ({"labels": LABELS.astype(float)}, "labels are float64: give integers"),
        ({"images": 255 * IMAGES}, r"pixels reach .* outside the range \[0, 1\]: scale them"),
        ({"images": np.full_like(IMAGES, np.nan)}, "outside the range"),
        ({"images": (255 * IMAGES).astype(np.uint8)}, "images are uint8: convert them"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "at least one image"),
        ({"function": lambda x: linear(x) * jnp.nan}, "logits of 30 of 30 images are not a number"),
        ({"function": lambda x: linear(x)[:, 0]}, r"must return logits \[30, classes\]"),
        ({"num_targets": 5}, "num_targets=5, but 5 classes leave 4 wrong ones"),
        ({"function": lambda x: (linear(x), 0)}, "returns a tuple: .* lambda x: function"),
        (
            {
                "function": lambda x: linear(x[:, :, :4, :4]),
                "images": np.pad(IMAGES.transpose(0, 3, 1, 2), ((0, 0), (0, 0), (0, 1), (0, 1))),
            },
            "look like .B, C, H, W.*: attack lambda",
        ),
        ({"threat": THREAT._replace(epsilon=0.0)}, "epsilon=0.0 must be positive"),
        ({"version": "best"}, "version 'best' is unknown"),
        ({"version": "custom"}, "needs attacks"),
        ({"version": "custom", "attacks": ["apgd"]}, "attack 'apgd' is unknown"),
        ({"attacks": ["square"]}, "has its own attacks"),
        ({"eot_samples": 2}, "attacked by apgd-ce, apgd-dlr and apgd-t alone"),
        (
            {"batch_size": 12, "mesh": data_mesh(8)},
            "batch_size=12 must be a positive multiple of 8",
        ),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        attack(**change)
    assert "\n" not in str(caught.value)


def test_a_closure_is_traced_anew_at_every_call():
    """Its arrays are constants of what is compiled, and may be others by the next call."""
    weights = {"matrix": MATRIX}

    def closure(images):
        return images.reshape(len(images), -1) @ weights["matrix"]

    settings = {"version": "custom", "attacks": ["apgd-ce"]}
    found = {}
    for sign in (1, -1):
        weights["matrix"] = sign * MATRIX
        labels = np.asarray(jnp.argmax(closure(IMAGES), axis=1))
        found[sign] = attack(closure, labels=labels, **settings)
        of_arguments = partial(linear_map, sign * MATRIX)
        assert_same(found[sign], attack(of_arguments, labels=labels, **settings))
        assert found[sign].clean_accuracy == 1
    assert np.any(found[1].robust != found[-1].robust)


def test_other_arrays_of_a_partial_are_not_compiled_for(caplog):
    settings = {"version": "custom", "attacks": ["apgd-ce"]}
    attack(linear, **settings)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        attack(partial(linear_map, 2 * MATRIX), **settings)
    assert not [r for r in caplog.records if "Compiling jit(_on_device)" in r.getMessage()]


def test_a_bar_is_shown(capsys):
    attack(version="custom", attacks=["apgd-ce"], progress=True)
    assert "apgd-ce (1/1), robust" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_few_classes(classes, version):
    """Of linear functions the truth is known: a logit's lead over epsilon x the L1 norm."""
    function = partial(lambda matrix, x: linear_map(matrix, x - 0.5), MATRIX[:, :classes])
    logits = np.asarray(function(IMAGES))
    labels = logits.argmax(axis=1)
    threat = linf(0.05, lower=-1.0, upper=2.0)  # no pixel is held by the range
    lengths = np.abs(np.asarray(MATRIX[:, :classes, None] - MATRIX[:, None, :classes])).sum(0)
    leads = logits[np.arange(30), labels][:, None] - logits
    safe = (leads > 0.05 * lengths[labels]) | (np.arange(classes) == labels[:, None])
    assert 5 < safe.all(axis=1).sum() < 25
    settings = {"version": version, "num_targets": None, "restarts": 1}
    result = attack(function, labels=labels, threat=threat, **settings)
    np.testing.assert_array_equal(result.robust, safe.all(axis=1))


def test_a_seed_is_a_key():
    assert_same(
        attack(key=3, version="custom", attacks=["apgd-ce"]),
        attack(key=jax.random.key(3), version="custom", attacks=["apgd-ce"]),
    )
