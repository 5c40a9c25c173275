"""The platform that programs are traced for."""

import jax
import pytest

from advmoe_jax import target


def test_it_is_where_programs_run_unless_told_otherwise():
    assert target.platform() == jax.default_backend()
    with target.traced_for("tpu"):
        assert target.platform() == "tpu"
        with target.traced_for("gpu"):
            assert target.platform() == "gpu"
        assert target.platform() == "tpu"
    assert target.platform() == jax.default_backend()


def test_it_is_forgotten_after_an_error():
    with pytest.raises(ZeroDivisionError), target.traced_for("tpu"):
        raise ZeroDivisionError
    assert target.platform() == jax.default_backend()
