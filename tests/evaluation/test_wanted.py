"""Lists of attacks and other threat models, as a user writes them."""

import pytest

from advmoe_jax.attacks import l2, linf
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.records import Protocol
from advmoe_jax.evaluation.wanted import applicable, number, other_threat, parse_attacks

EPSILON = 0.1
MIXTURE, DENSE = ("experts", "router"), ("backbone",)
PROTOCOL = Protocol(linf(EPSILON), 0.02, 2)


def test_clean_comes_first_and_nothing_twice():
    for names, expected in {
        "": ["clean"],
        "clean": ["clean"],
        "pgd3,clean": ["clean", "pgd3"],
        " pgd20 , fgsm,,pgd20,": ["clean", "pgd20", "fgsm"],
        "router,router_kl": ["clean", "router", "router_kl"],
    }.items():
        assert [attack.name for attack in parse_attacks(names, PROTOCOL, MIXTURE)] == expected


def test_what_a_network_cannot_have_is_left_out_where_nobody_typed_it():
    assert applicable("clean, pgd3,router,moe", DENSE) == "clean,pgd3"
    assert applicable("clean,pgd3,router,moe", MIXTURE) == "clean,pgd3,router,moe"
    assert applicable("", MIXTURE) == ""
    with pytest.raises(UserError, match="'pdg3' is unknown"):
        applicable("pdg3", DENSE)


def test_another_threat_model():
    assert other_threat("", "", PROTOCOL.threat) is None
    assert other_threat("", "0.1", PROTOCOL.threat) == linf(0.1)
    for text, value in {
        "8/255": 8 / 255,
        "0.031": 0.031,
        ".5": 0.5,
        "1e-2": 0.01,
        "2": 2.0,
    }.items():
        assert other_threat("l2", text, PROTOCOL.threat) == l2(value)
    for text in ("", "abc", "8/0", "1/2/3", "-1", "nan", "inf", "8/"):
        with pytest.raises(UserError) as caught:
            other_threat("l2", text, PROTOCOL.threat)
        assert "\n" not in str(caught.value)
    (clean, same, other) = (
        *parse_attacks("pgd3", PROTOCOL, MIXTURE, linf(EPSILON)),
        parse_attacks("pgd3", PROTOCOL, MIXTURE, l2(8 / 255))[1],
    )
    assert (clean.name, same.name, other.name) == ("clean", "pgd3", "pgd3@l2-0.0313725")
    assert other.settings["step_size"] == pytest.approx(0.02 * 8 / 255 / EPSILON)
    assert same.settings["step_size"] == 0.02


@pytest.mark.parametrize("name", ["router", "router_kl", "moe", "route", "autoattack_rand"])
def test_a_dense_network_has_no_router_to_attack(name):
    with pytest.raises(
        UserError, match=f"'{name}' is on the part 'router'; the network has backbone"
    ):
        parse_attacks(name, PROTOCOL, DENSE)


@pytest.mark.parametrize(
    "name", ["pgd", "pgd0", "pgd-1", "pgd1.5", "PGD20", "pgd 20", "fgsm2", "autoatack"]
)
def test_an_unknown_name(name):
    with pytest.raises(UserError, match=f"^attack '{name}' is unknown; choose from clean, fgsm"):
        parse_attacks(f"clean,{name}", PROTOCOL, MIXTURE)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("0.5", 0.5), (".5e-1", 0.05), ("1/0", None), ("-1", None),
     ("1e999", None), ("8/", None), ("nan", None), ("", None)],
)  # fmt: skip
def test_numbers_and_fractions(text, value):
    assert number(text) == value
