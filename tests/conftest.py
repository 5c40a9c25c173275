"""Eight virtual CPU devices for every test, set before JAX starts; a tiny network."""

import os

import compiling

# What one test compiles, the others find, in this process, in those it starts and in the next run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(os.path.dirname(os.path.dirname(__file__)), ".pytest_cache", "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compiling.flags(8)}"

import gc
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import buckets
from advmoe_jax.evaluation.explanation import Seen
from advmoe_jax.models.layers import BatchNorm, Conv, Linear
from advmoe_jax.models.model import Model
from advmoe_jax.models.moe import conv_factory, number_layers
from advmoe_jax.models.network import functional
from advmoe_jax.models.output import Normalize
from advmoe_jax.models.router import LayerRouters
from advmoe_jax.storage import path_of

# Traced programs are millions of objects that stay: looking through them over and over for garbage
# took a tenth of the time.
gc.set_threshold(50_000, 20, 50)

SERVER = """
import json, os, runpy, signal, sys, tempfile, time, traceback
from advmoe_jax.runs import comparing
import sklearn.datasets
sys.path.append("tests/helpers")
import compiling, one_block
one_block.add()

def child(command, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.environ["XLA_FLAGS"] = compiling.flags(command["devices"])
    sys.argv = [command["module"], *command["arguments"]]
    code = 0
    os.environ.update(command["environment"])
    try:
        with one_block.storage():
            runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def wait(pid, seconds):
    # None: it had to be killed.
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(command, out, err)
        code = wait(pid, command["seconds"])
        out.seek(0), err.seek(0)
        print(json.dumps([code, out.read(), err.read()]), flush=True)
"""


class TinyBackbone(nnx.Module):
    """Stem, one convolution that may be an MoE, head: compiles in a second."""

    def __init__(self, num_experts, classes, rngs):
        self.stem, self.bn1 = Conv(1, 6, 3, 1, 1, rngs=rngs), BatchNorm(6)
        self.conv = conv_factory(num_experts)(6, 8, 3, 2, 1, rngs=rngs)
        self.bn2, self.head = BatchNorm(8), Linear(8, classes, rngs=rngs)
        self.more = ()

    def __call__(self, x, context):
        x = jax.nn.relu(self.bn1(self.stem(x, context), context))
        x = jax.nn.relu(self.bn2(self.conv(x, context), context))
        for name in self.more:
            x = jax.nn.relu(getattr(self, name)(x, context))
        return self.head(jnp.mean(x, axis=(1, 2)))


class TinyRouter(nnx.Module):
    """One convolution and a head."""

    def __init__(self, num_experts, rngs):
        self.stem, self.bn = Conv(1, 4, 3, 2, 1, rngs=rngs), BatchNorm(4)
        self.head = Linear(4, num_experts, rngs=rngs)
        # Spread-out scores: an untrained head would send every image to one expert.
        self.head.kernel[...] = jax.random.normal(jax.random.key(5), (4, num_experts))

    def __call__(self, images, context):
        x = jax.nn.relu(self.bn(self.stem(images, context), context))
        return self.head(jnp.mean(x, axis=(1, 2)))


def layer_routers(backbone, num_experts, rngs):
    """Routers whose scores are spread out, for the same reason."""
    channels = {name: layer.in_features for name, layer in number_layers(backbone).items()}
    routers = LayerRouters(channels, num_experts, width=5, rngs=rngs)
    for i, name in enumerate(channels):
        router = getattr(routers, name)
        for j, layer in enumerate((router.hidden, router.head)):
            layer.kernel[...] = jax.random.normal(jax.random.key(7 * i + j), layer.kernel.shape)
    return routers


@pytest.fixture(scope="session")
def tiny_model():
    """(num_experts, ...) -> Model for 1-channel images, of 4 classes by default."""

    def build(num_experts=2, classes=4, seed=0, scope="global", **settings):
        rngs = nnx.Rngs(seed)
        router = TinyRouter(num_experts, rngs) if num_experts > 1 else None
        backbone = TinyBackbone(num_experts, classes, rngs)
        if scope == "per_layer":  # with a second MoE layer
            backbone.more = ("more0",)
            backbone.more0 = conv_factory(num_experts)(8, 8, 3, 1, 1, rngs=rngs)
            router = layer_routers(backbone, num_experts, rngs)
        settings = {"block_size": 4} | settings
        normalize = Normalize((0.5,), (0.25,))
        return Model(normalize, backbone, router, num_experts=num_experts, **settings)

    return build


@pytest.fixture(scope="session")
def tiny(tiny_model):
    """(num_experts, ...) -> (network, params, stats) for 1-channel images and 4 classes."""
    return lambda *arguments, **settings: functional(tiny_model(*arguments, **settings))


@pytest.fixture
def made_up():
    """What was seen of four images, by two layers of two experts."""
    routes = np.array([[[0], [0]], [[0], [1]], [[1], [1]], [[1], [0]]])
    attacked = np.array([[[0], [1]], [[0], [1]], [[0], [1]], [[1], [0]]])
    return Seen(
        labels=np.array([0, 0, 2, 2]),
        adversarial=np.full((4, 2, 2, 3), 0.5, np.float32),
        clean=np.array([0, 0, 2, 1]),
        attacked=np.array([1, 0, 2, 1]),
        routes=routes,
        attacked_routes=attacked,
        clean_rerouted=np.array([0, 0, 1, 1]),
        attacked_on_route=np.array([0, 0, 2, 1]),
        forced=np.array([[0, 0, 0, 0], [2, 2, 2, 2]]),
        forced_attacked=np.array([[0, 1, 1, 1], [2, 2, 2, 1]]),
    )


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A directory in a bucket; ``gs://`` and ``s3://`` are found in a folder of this machine."""
    (tmp_path / "buckets").mkdir()
    monkeypatch.setenv("ADVMOE_BUCKETS", str(tmp_path / "buckets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with buckets.registered():
        yield path_of(f"gs://{buckets.MADE}/runs")


@pytest.fixture(scope="session")
def part_of_cifar10(tmp_path_factory):
    """An archive of its own of 600 training and 200 test images, as the whole one has them.

    Processes that train on a few images need not each decode 60,000.
    """
    whole = Path(os.environ.get("ADVMOE_DATA", "")) / "cifar10_jpeg.tar.gz"
    if "ADVMOE_DATA" not in os.environ or not whole.exists():
        pytest.skip("ADVMOE_DATA names no folder with cifar10_jpeg.tar.gz")
    archive = tmp_path_factory.mktemp("data") / whole.name
    left = Counter()
    with tarfile.open(whole) as source, tarfile.open(archive, "w:gz") as part:
        for member in source:
            folder = os.path.dirname(member.name)
            left[folder] += member.isfile()
            if member.isfile() and left[folder] <= (60 if "/train/" in member.name else 20):
                part.addfile(member, source.extractfile(member))
    return archive


@pytest.fixture(scope="session")
def environment():
    """Of a command that a test starts."""
    return os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def fork(environment):
    """(module, arguments, devices, seconds, environment) -> (exit code, what was printed, stderr).

    Starting Python and importing JAX takes a second, so commands are forks of one process that has
    imported everything, and in which JAX has not started yet. The code is None if the command had
    to be killed after so many seconds.
    """
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(module, *arguments, devices=1, seconds=600, **environment):
            command = {"module": module, "arguments": arguments, "devices": devices}
            command["environment"] = environment
            server.stdin.write(json.dumps(command | {"seconds": seconds}) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield run
