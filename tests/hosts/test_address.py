"""Where the flags and a cluster's environment say that a process belongs."""

import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.hosts.address import Place, located


def test_flags():
    assert located("", None, None) is None
    place = located("10.0.0.1:1234", 2, 1)
    assert place == Place("10.0.0.1", 1234, 2, 1) and str(place) == "10.0.0.1:1234"
    assert located("[::1]:80", 1, 0).host == "::1"


def test_slurm(monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[03,07-08]",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "3",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert located("auto", None, None) == Place("node03", 61441, 3, 2)


def test_no_cluster():
    with pytest.raises(UserError, match="no SLURM job and no other cluster that JAX knows"):
        located("auto", None, None)
