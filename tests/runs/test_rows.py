"""The rows of a comparison: the run that each one is, and what is said of a wrong table."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import network_cost
from advmoe_jax.runs import build, comparing, gathering, rows

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("compare_*.py"))


def shipped(name):
    if str(CONFIGS) not in sys.path:  # as the command does, for configs that import neighbours
        sys.path.append(str(CONFIGS))
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def of_digits(row_names):
    config = shipped("compare_digits")
    config.rows, config.attacks, config.strong_attacks = row_names, "pgd2", "fgsm"
    config.explained_attack = "pgd2"
    return config


def test_rows_differ_in_what_they_say_and_in_nothing_else(tmp_path):
    config = of_digits(",".join(shipped("compare_digits").table))
    config.run.seed, config.strong_attacks = 7, "router"
    for name, row in rows.table(config).items():
        run = rows.run_config(config, name, 8, 0.375, tmp_path)
        changed = {
            value
            for value in config_lib.flatten(run)
            if config_lib.value(run, value) != config_lib.value(config.run, value)
        }
        ours = {k for k, v in row.changes.items() if v != config_lib.value(config.run, k)}
        hydra = {"model.keep", "pruning.dense_run"} if name == "at_sparse" else set()
        start = {"start.run"} if row.builds_on == "standard_moe" else set()
        assert changed == {"seed", "evaluation.attacks"} | ours | hydra | start
        assert run.seed == 8
        attacks = "pgd2,router" if run.model.num_experts > 1 else "pgd2"
        assert run.evaluation.attacks == attacks
    assert rows.run_config(config, "at_sparse", 8, 0.375, tmp_path).model.keep == 0.375
    start = rows.run_config(config, "robust_router", 8, 0.375, tmp_path).start.run
    assert start == str(tmp_path / "standard_moe" / "seed8")


def test_no_row_comes_before_what_it_builds_on():
    config = of_digits("robust_router,at_dense,standard_moe")
    assert rows.names(config) == ["standard_moe", "robust_router", "at_dense"]


def test_the_sparse_network_costs_what_the_mixture_does():
    config = shipped("compare_digits")
    keep = comparing.keep_of_equal_cost(config, build.load_images(config.run))
    macs = {}
    for name in ("at_sparse", "at_moe"):
        run = rows.run_config(config, name, 0, keep, Path("x"))
        macs[name] = network_cost(build.architecture(run), (8, 8, 1), 10)["macs"]["total"]
    assert 0.97 < macs["at_sparse"] / macs["at_moe"] <= 1


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_comparisons_are_complete(name):
    config = shipped(name)
    rows.check(config)
    assert config.num_seeds >= 1 and config.attacks.startswith("pgd")
    for row in rows.names(config):
        rows.run_config(config, row, 0, 0.5, Path("x"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": "at_dense,at_mow"}, "row 'at_mow' is unknown; choose from advmoe_assignment, "),
        ({"rows": " , "}, "names no row"),
        ({"rows": "at_sparse"}, "starts from the runs of 'at_dense': add it to rows"),
        ({"reference": "dense"}, "config.reference='dense' is no row"),
        ({"num_seeds": 0}, "num_seeds=0 must be at least 1"),
        ({"run": {"seed": 2**32 - 1}}, "seeds end at 4294967295"),
        ({"examples": -1}, "examples=-1 must not be negative"),
        ({"attacks": "pdg50"}, "attack 'pdg50' is unknown"),
        ({"attacks": "clean", "strong_attacks": ""}, "names no attack"),
        ({"explained_attack": "router"}, "is on the part 'router'"),
        ({"run": {"model": {"num_experts": 1}}}, "num_experts=2 or more"),
        ({"run": {"num_epochs": 0}}, "config.run.num_epochs=0 must be at least 1"),
        ({"table": {"at_moe": {"title": ""}}}, ""),
    ],
)
def test_mistakes_are_named(changes, said):
    config = of_digits("at_dense")
    config.update(ConfigDict(changes))
    if not said:  # a title may be empty
        assert rows.check(config) is None
        return
    with pytest.raises(UserError, match=said):
        rows.check(config)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"title": 3}, r"config.table.mine.title must be a str"),
        ({"changes": {"model": {"widht": 3}}}, "did you mean config.model.width?"),
        ({"changes": {"num_epochs": 0}}, "config.run.num_epochs=0 must be at least 1"),
        ({"changes": {"seed": 5}}, "mine.changes names seed, which all rows have in common: set"),
        ({"changes": {"data": {"train_examples": 9}}}, "names data.train_examples, which all rows"),
        ({"changes": {"attack": {"epsilon": 0.1}}}, "names attack.epsilon, which all rows have in"),
        ({"changes": {"evaluation": {"step_size": 0.1}}}, "names evaluation.step_size, which all"),
        ({"changes": (1, 2)}, r"config.table.mine.changes must be a group of values"),
        ({"style": "red"}, r"config.table.mine.style must be a group of values"),
        ({"builds_on": "mine"}, r"config.table.mine.builds_on leads back to 'mine'"),
    ],
)
def test_a_row_of_ones_own_is_checked(row, said):
    config = of_digits("mine")
    whole = {"title": "Mine", "about": "", "builds_on": "", "judged": False, "changes": {}}
    with config.unlocked():
        config.table.mine = ConfigDict(whole | row)
    with pytest.raises(UserError, match=said):
        rows.check(config)


def test_a_row_that_is_no_group():
    config = of_digits("at_dense")
    with config.unlocked():
        config.table.mine = 3
    with pytest.raises(UserError, match=r"config.table.mine must be a group of values, not 3"):
        rows.check(config)


def test_a_row_may_change_how_images_are_augmented():
    config = of_digits("at_dense")
    config.table.at_dense.changes = ConfigDict({"data": {"cutmix": 0.5}})
    assert rows.check(config) is None


def test_chains_of_rows_run_from_their_beginning():
    config = of_digits("at_moe,at_sparse,at_dense,standard_moe")
    for name, start in (("at_moe", "at_sparse"), ("at_dense", "standard_moe")):
        config.table[name].builds_on = start  # beside: at_sparse builds on at_dense
    assert rows.names(config) == ["standard_moe", "at_dense", "at_sparse", "at_moe"]
    config.table.standard_moe.builds_on = "at_moe"
    with pytest.raises(UserError, match="builds_on leads back to"):
        rows.names(config)


def test_what_a_run_is_asked_for_follows_from_all_that_it_builds_on():
    config = of_digits("at_dense,at_sparse,at_moe")
    names = ("at_dense", "at_sparse", "at_moe")
    before = {name: rows.asked(config, name, 0) for name in names}
    config.remark = "another"
    assert before == {name: rows.asked(config, name, 0) for name in names}
    config.table.at_dense.changes.loss = ConfigDict({"beta": 1.0})
    changed = [name for name in names if rows.asked(config, name, 0) != before[name]]
    assert changed == ["at_dense", "at_sparse"]


def looked_at(workdir, explained="best", attack="pgd2", images=360, **attacks):
    attacks = {"clean": 360, "fgsm": 32, "pgd2": 360} | attacks
    files = {
        "results.json": {
            "evaluated": {"checkpoint": "best", "params_sha256": "a"},
            "attacks": {name: {"examples": count} for name, count in attacks.items()},
        },
        gathering.EXPLANATION: {
            "evaluated": {"checkpoint": explained, "params_sha256": explained},
            "attack": {"name": attack},
            "examples": images,
        },
    }
    for name, content in files.items():
        (workdir / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes",
    [{"explained": "last"}, {"attack": "fgsm"}, {"images": 4}, {"fgsm": 360}, {"pgd2": 4}],
)
def test_a_run_that_was_looked_at_in_another_way_since_is_not_finished(tmp_path, changes):
    """However many images were asked for, of however many there are."""
    config = of_digits("at_dense")
    config.explained_examples, config.strong_examples = 1000, 32
    workdir = rows.run_directory(tmp_path, "at_dense", 0)
    workdir.mkdir(parents=True)
    asked = rows.asked(config, "at_dense", 0) | {"remark": "older files have one"}
    looked_at(workdir)
    found = gathering.looked_at(config, workdir, "at_dense")
    assert found["examples"] == {"clean": 360, "pgd2": 360, "fgsm": 32}
    for said in ({"asked": asked}, {"asked": asked, "found": found}):
        (workdir / gathering.FINISHED).write_text(json.dumps(said))
        assert gathering.is_finished(config, "at_dense", 0, tmp_path)
    looked_at(workdir, **changes)
    assert not gathering.is_finished(config, "at_dense", 0, tmp_path)
    looked_at(workdir, **{"fgsm@32": 32, "fgsm": 360})  # measured again, beside the other
    assert gathering.is_finished(config, "at_dense", 0, tmp_path)


def test_rows_of_transformers_cost_what_they_are_compared_with():
    config = shipped("compare_vmoe_digits")

    def macs(name):
        run = rows.run_config(config, name, 0, None, Path("x"))
        return network_cost(build.architecture(run), (8, 8, 1), 10)["macs"]["total"]

    # Scores alone are more: 4 of 16 experts, and 1%, at this size.
    assert macs("vit") < macs("e4_k1") < 1.01 * macs("vit")
    assert macs("vit_wide") < macs("e4_k2") < 1.01 * macs("vit_wide")
    assert not rows.is_sparse(config, "vit") and "predictions" in str(gathering.columns(config))


def test_a_finished_row_without_exits_is_found_again(tmp_path):
    """Its change is an empty tuple, which JSON gives back as a list."""
    config = shipped("compare_rdi_digits")
    workdir = rows.run_directory(tmp_path, "dense_at", 0)
    workdir.mkdir(parents=True)
    asked = rows.asked(config, "dense_at", 0)
    (workdir / gathering.FINISHED).write_text(json.dumps({"asked": asked}))
    assert gathering.is_finished(config, "dense_at", 0, tmp_path)
    assert not gathering.is_finished(config, "rdi_main", 0, tmp_path)
