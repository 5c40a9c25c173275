"""Compiled programs are dropped when a process has little room for more, and not before."""

import jax
import jax.numpy as jnp
import pytest

from advmoe_jax.runs import mappings


@pytest.mark.parametrize(("used", "dropped"), [(49, False), (50, True), (120, True)])
def test_programs_are_dropped_at_half_of_the_mappings(monkeypatch, tmp_path, used, dropped):
    (tmp_path / "limit").write_text("100\n")
    (tmp_path / "maps").write_text("7f00-7f01 r--p\n" * used)
    monkeypatch.setattr(mappings, "MAPPINGS", tmp_path / "maps")
    monkeypatch.setattr(mappings, "LIMIT", tmp_path / "limit")
    traced = []

    @jax.jit
    def function(x):
        traced.append(None)
        return x + 1

    function(jnp.zeros(3))
    assert mappings.make_room() is dropped
    function(jnp.zeros(3))
    assert len(traced) == 1 + dropped


def test_a_system_without_such_a_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(mappings, "LIMIT", tmp_path / "missing")
    assert not mappings.make_room()
