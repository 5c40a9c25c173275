"""The devices of a run, where they are not those that its config names."""

import jax

from advmoe_jax import defaults
from advmoe_jax.runs.devices import measuring_mesh, training_mesh


def test_a_run_is_measured_on_the_devices_there_are(monkeypatch):
    config = defaults.vit()
    config.expert_shards = 4
    assert training_mesh(config).shape == {"data": 2, "expert": 4}
    assert measuring_mesh(config).shape == {"data": 2, "expert": 4}
    devices = jax.devices()
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    monkeypatch.setattr(jax, "devices", lambda: devices[:6])
    config.num_devices = 8
    assert measuring_mesh(config).shape == {"data": 3, "expert": 2}
