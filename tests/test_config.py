"""What a config must hold, what is said when it does not, and that the shipped ones are right."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from advmoe_jax import config as config_lib
from advmoe_jax import defaults
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import AFFORDABLE, network_cost
from advmoe_jax.runs import build, rows

CONFIGS = Path(__file__).parents[1] / "configs"
CNN = config_lib.family_schema("cnn")
NAMES = list(config_lib.names(CNN))


def shipped(name):
    if str(CONFIGS) not in sys.path:  # as the commands do, for configs that import neighbours
        sys.path.append(str(CONFIGS))
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.fixture
def config():
    return shipped("digits")


def set_value(config, name, value):
    *path, last = name.split(".")
    for part in path:
        config = config[part]
    with config.ignore_type():
        config[last] = value


RUNS = sorted(
    file.stem
    for file in CONFIGS.glob("*.py")
    if not file.stem.startswith("compare_") and not file.stem.endswith("_rows")
)
COMPARISONS = sorted(file.stem for file in CONFIGS.glob("compare_*.py"))
RECIPES = [name for name in RUNS if name.endswith("_certified")]  # ours, beyond the papers'


@pytest.mark.parametrize("name", RUNS)
def test_shipped_configs_have_every_name_of_the_schema_and_no_other(name):
    config = shipped(name)
    config_lib.check(config)
    names = sorted(config_lib.names(config_lib.family_schema(config.family)))
    assert sorted(config_lib.flatten(config)) == names and len(names) > 40


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("cifar10_resnet18", 32),
        ("cifar10_densenet", 32),
        ("tiny_imagenet_resnet18", 64),
        ("imagenet_resnet18", 224),
    ],
)
def test_the_router_of_a_shipped_config_stays_small(name, image_size):
    shape = (image_size, image_size, 3)
    macs = network_cost(build.architecture(shipped(name)), shape, 10)["macs"]
    assert macs["total"] <= AFFORDABLE * macs["dense"]


def test_the_cifar_config_is_the_published_setting():
    config = shipped("cifar10_resnet18")
    published = {
        "method": "advmoe",
        "num_epochs": 100,
        "batch_size": 128,
        "model.name": "resnet18_cifar",
        "model.num_experts": 2,
        "model.ratio": 0.5,
        "model.width": 0,
        "model.top_k": 1,
        "model.router.width": 16,
        "model.router.blocks": 3,
        "data.crop_padding": 4,
        "data.flip": True,
        "attack.norm": "linf",
        "attack.epsilon": 8 / 255,
        "attack.num_steps": 2,
        "attack.step_size": 5 / 255,
        "loss.beta": 6.0,
        "loss.alpha": 6.0,
        "evaluation.step_size": 2 / 255,
    }
    for part in ("experts", "router"):
        published |= {
            f"optimizer.{part}.name": "sgd",
            f"optimizer.{part}.learning_rate": 0.1,
            f"optimizer.{part}.momentum": 0.9,
            f"optimizer.{part}.weight_decay": 5e-4,
            f"optimizer.{part}.schedule": "cosine",
            f"optimizer.{part}.warmup_epochs": 0.0,
        }
    assert {name: config_lib.value(config, name) for name in published} == published
    assert {"pgd10", "pgd50"} <= set(config.evaluation.attacks.split(","))
    assert len(config.model.mean) == len(config.model.std) == 3


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("model.widht", "model.width"),
        ("modle.width", "model.width"),
        ("num_epoch", "num_epochs"),
        ("epsilon", "attack.epsilon"),
        ("optimizer.experts.lerning_rate", "optimizer.experts.learning_rate"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(config, name, nearest):
    expected = f"^config.{name} does not exist; did you mean config.{nearest}\\?$"
    with pytest.raises(UserError, match=expected):
        config_lib.check_name(name, CNN)
    with config.unlocked():
        config.update(ConfigDict(json.loads(nested(name))))
    with pytest.raises(UserError, match=expected):
        config_lib.check(config)


def nested(name):
    first, _, rest = name.partition(".")
    return f'{{"{first}": {nested(rest) if rest else 3}}}'


def test_a_group_is_not_a_value():
    with pytest.raises(UserError, match=r"config.model.router is a group.*model.router.blocks"):
        config_lib.check_name("model.router", CNN)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "family"])
def test_every_value_is_needed(config, name):
    *path, last = name.split(".")
    group = config
    for part in path:
        group = group[part]
    with config.unlocked():
        del group[last]
    with pytest.raises(UserError, match=f"no value for {name};"):
        config_lib.check(config)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "family"])
def test_every_value_has_its_type(config, name):
    set_value(config, name, None)
    with pytest.raises(UserError, match=f"config.{name}=None must be of type .*, not NoneType"):
        config_lib.check(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_epochs", 0, "at least 1"),
        ("num_epochs", True, "of type int, not bool"),
        ("data.flip", 1, "of type bool, not int"),
        ("model.width", 2.5, "of type int, not float"),
        ("attack.num_steps", 0, "at least 1"),
        ("evaluation.restarts", 0, "at least 1"),
        ("evaluation.validation_steps", 0, "at least 1"),
        ("evaluation.batch_size", -1, "at least 1"),
        ("checkpoint.keep", 0, "at least 1"),
        ("seed", -1, "lie in 0 to"),
        ("num_devices", -1, "not be negative"),
        ("data.crop_padding", -1, "not be negative"),
        ("loss.beta", float("nan"), "finite"),
        ("attack.epsilon", float("inf"), "finite"),
        ("model.mean", (0.5, "x"), "finite numbers"),
        ("model.std", [float("nan")], "finite numbers"),
        ("patience", -1, "not be negative"),
        ("balance.switch", -0.1, "not be negative"),
        ("loss.awp", -0.1, "not be negative"),
        ("loss.beta", -1.0, "not be negative"),
        ("loss.alpha", -1.0, "not be negative"),
        ("optimizer.router.momentum", 2.0, r"in \[0, 1\)"),
        ("attack.epsilon", 8.0, "wider than the pixels' range"),
        ("optimizer.router.warmup_epochs", 33.0, "longer than the run"),
        ("start.frozen", "router", "set start.run"),
        ("ema_decay", 1.0, r"in \[0, 1\)"),
        ("loss.label_smoothing", -0.1, r"in \[0, 1\)"),
        ("data.extra_share", 1, r"in \[0, 1\)"),
        ("data.cutmix", 1.1, r"in \[0, 1\]"),
        ("data.cutmix_alpha", 0.0, "positive"),
    ],
)
def test_a_value_that_cannot_be_is_named(config, name, value, message):
    set_value(config, name, value)
    with pytest.raises(UserError, match=f"^config.{name}=.*{message}"):
        config_lib.check(config)


def test_an_integer_will_do_for_a_float_and_a_list_for_a_tuple(config):
    set_value(config, "loss.beta", 6)
    set_value(config, "model.mean", [0.5])
    assert config_lib.check(config) is None


def test_json_there_and_back(config, tmp_path):
    path = tmp_path / "config.json"
    config_lib.save(config, path)
    loaded = config_lib.load(path)
    assert config_lib.difference(config, loaded) is None
    assert json.loads(path.read_text())["model"]["router"]["width"] == 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json"]


def test_a_save_that_fails_leaves_what_was_there(config, tmp_path):
    path = tmp_path / "config.json"
    config_lib.save(config, path)
    before = path.read_text()
    (tmp_path / "config.json.partial").symlink_to("/dev/full")
    config.seed = 1
    with pytest.raises(OSError, match="No space left"):
        config_lib.save(config, path)
    assert path.read_text() == before


def test_the_family_says_which_values_there_are(config):
    config.family = "cnm"
    with pytest.raises(UserError, match=r"config\.family='cnm' is unknown; choose one of cnn"):
        config_lib.check(config)
    for name in RUNS:
        assert shipped(name).family in defaults.FAMILIES


def test_a_config_says_only_what_differs():
    """Its file names no value that the defaults have already."""
    usual = config_lib.flatten(defaults.cnn())
    text = (CONFIGS / "digits.py").read_text()
    found = config_lib.flatten(shipped("digits"))
    changed = [name for name, value in found.items() if value != usual[name]]
    assert text.count("    config.") == len(changed)


@pytest.mark.parametrize("name", COMPARISONS)
def test_shipped_comparisons_are_valid(name):
    assert rows.check(shipped(name)) is None


@pytest.mark.parametrize("name", sorted({*RUNS, *COMPARISONS} - set(RECIPES)))
def test_nothing_beyond_the_papers_recipe_is_on_in_a_shipped_config(name):
    config = shipped(name)
    config = config.get("run", config)  # of a comparison
    usual = config_lib.flatten(defaults.FAMILIES[config.family]())
    beyond = ("ema_decay", "patience", "start.", "data.cutmix", "data.mixup", "data.extra")
    if config.family != "vit":  # balancing losses belong to V-MoE's recipe
        beyond += ("balance.",)
    off = [
        x
        for x in NAMES
        if x.startswith((*beyond, "loss.awp", "loss.consistency", "loss.label_smoothing"))
    ]
    assert len(off) == (14 if config.family == "vit" else 22)
    assert not any(usual[x] for x in off if x != "data.cutmix_alpha")
    assert {x: config_lib.value(config, x) for x in off} == {x: usual[x] for x in off}


@pytest.mark.parametrize(
    ("name", "base", "comparison", "shape"),
    [
        ("cifar10_certified", "cifar10_resnet18", "compare_claim_cifar10", (32, 32, 3)),
        ("digits_certified", "digits", "compare_recipes_digits", (8, 8, 1)),
    ],
)
def test_a_recipe_is_the_run_of_its_row_and_costs_half_of_the_dense_network(
    name, base, comparison, shape
):
    assert name in RECIPES
    config, changes = shipped(name), shipped(comparison).table["certified_shared"].changes
    changed = config_lib.flatten(changes)
    assert {x: config_lib.value(config, x) for x in changed} == changed
    others = set(config_lib.flatten(config)) - set(changed)
    assert all(config_lib.value(config, x) == config_lib.value(shipped(base), x) for x in others)
    macs = network_cost(build.architecture(config), shape, 10)["macs"]
    assert macs["total"] <= 0.5 * macs["dense"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '"x"', "\x00"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} is damaged"):
        config_lib.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=f"^{path} is damaged"):
        config_lib.load(path)


def test_a_loaded_config_is_checked(config, tmp_path):
    config.num_epochs = 0
    config_lib.save(config, tmp_path / "config.json")
    with pytest.raises(UserError, match="num_epochs=0"):
        config_lib.load(tmp_path / "config.json")


def test_a_missing_file_is_no_run(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory" / "config.json").mkdir(parents=True)
    for name in ("nothing", "file"):
        with pytest.raises(UserError, match=f"{tmp_path / name} holds no run"):
            config_lib.load(tmp_path / name / "config.json")
    with pytest.raises(UserError, match="is no file"):
        config_lib.load(tmp_path / "directory" / "config.json")


def test_difference_names_the_first_in_the_order_of_the_config(config):
    other = shipped("digits")
    assert config_lib.difference(config, other) is None
    other.model.mean = (0.25,)
    other.optimizer.router.learning_rate = 0.5
    assert config_lib.difference(config, other) == "model.mean"
    assert config_lib.value(other, "model.mean") == (0.25,)
    other.method = "trades"
    assert config_lib.difference(config, other) == "method"
