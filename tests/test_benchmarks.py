"""What the benchmarks read out of a compiled program's text, and what they refuse."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import flax.nnx as nnx
import jax
import numpy as np
import pytest

from advmoe_jax.models import CNN, functional
from benchmarks import foreign_networks, hlo

# The TPU's compiler does not know all flags of the CPU's.
OTHER_COMPILER = {"XLA_FLAGS": ""}
TEXT = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

FileNames
1 "/somewhere/f.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=17 end_line=17 column=2 end_column=58}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%fused (p.0: bf16[4,8]) -> bf16[4,8] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %tanh.1 = bf16[4,8]{1,0} tanh(%p.0), backend_config={"estimated_cycles":"999"}
}

%body.1 (arg.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %copy.1 = bf16[4,8]{1,0} copy(%arg.1), backend_config={"estimated_cycles":"10"}
  %fusion.1 = bf16[4,8]{1,0} fusion(%copy.1), kind=kLoop, calls=%fused, \
metadata={op_name="jit(f)/while/body/tanh" stack_frame_id=1}, \
backend_config={"window":["4"],"estimated_cycles":"100"}
  %all-reduce.2 = bf16[4,8]{1,0} all-reduce(%fusion.1), channel_id=1, to_apply=%fused
  ROOT %tuple.1 = (s32[], bf16[4,8]{1,0}) tuple(%arg.1, %all-reduce.2)
}

%condition.1 (arg.2: (s32[], bf16[4,8])) -> pred[] {
  %zero = s32[]{:T(128)} constant(0)
  %bound = s32[]{:T(128)} constant(7)
  %arg.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%undecided (arg.3: (s32[], bf16[4,8])) -> pred[] {
  %arg.3 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  ROOT %more = pred[]{:T(512)} get-tuple-element(%arg.3), index=0
}

%cheap (x.1: bf16[4,8]) -> bf16[4,8] {
  ROOT %x.1 = bf16[4,8]{1,0} parameter(0)
}

%dear (x.2: bf16[4,8]) -> bf16[4,8] {
  %x.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %copy.3 = bf16[4,8]{1,0} copy(%x.2), backend_config={"estimated_cycles":"5000"}
}

ENTRY %main.1 (x: bf16[4,8]) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0} parameter(0), metadata={op_name="x (y) = copy(z)"}
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%x), condition=%condition.1, body=%body.1
  %choice = bf16[4,8]{1,0} conditional(%x, %x, %x), branch_computations={%cheap, %dear}
  %gather = (f32[16]{0}, u32[2]{0}) all-gather-start(%choice), dimensions={0}
  ROOT %while.2 = (s32[], bf16[4,8]{1,0}) while(%while.1), condition=%undecided, body=%body.1
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.parse(TEXT)


def test_loops_are_multiplied_out_and_the_dearest_branch_counts(program):
    assert program.entry == "main.1"
    assert hlo.cycles(program, "body.1") == 110  # the fusion as one, not what it is made of
    assert hlo.cycles(program) == 7 * 110 + 5000 + 110  # a loop of unknown length counts once
    assert hlo.unknown_loops(program) == 1


def test_where_the_cycles_go(program):
    (copy, *_), (fusion, times, total), *_ = hlo.dearest(program)
    assert (copy.name, fusion.name, times, total) == ("copy.3", "fusion.1", 7, 700)
    assert fusion.operation == "jit(f)/while/body/tanh"
    assert program.lines[fusion.frame] == "/somewhere/f.py:17"
    assert [total for _, _, total in hlo.dearest(program, 2)] == [5000, 700]


def test_collectives_with_their_bytes(program):
    assert hlo.collectives(program) == {
        "all-reduce": (8, 8 * 4 * 8 * 2),
        "all-gather": (1, 16 * 4 + 2 * 4),
    }


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[]{:T(128)}", 4), ("(bf16[2,3]{1,0}, s8[5], pred[7])", 12 + 5 + 7), ("token[]", 0)],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.bytes_of(shape) == size


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--programs=dense,mow", "--programs=mow is unknown; choose from dense, pathway, moe"),
        ("--batch_size=0", "--batch_size=0 must be positive"),
        ("--image_size=-1", "--image_size=-1 must be positive"),
    ],
)
def test_bad_flags(fork, flag, said):
    code, _out, err = fork("benchmarks.tpu", flag)
    assert code == 2 and err.startswith("error: ") and said in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--blocks=8,none"], "--blocks=8,none: give positive numbers"),
        (["--blocks=8,64", "--batch_size=100"], "give at least 128"),
    ],
)
def test_row_costs_refuses(fork, flags, said):
    code, _out, err = fork("benchmarks.row_costs", *flags)
    assert code == 2 and err.startswith("error: ") and said in err


@pytest.mark.slow
def test_row_costs_are_written_where_they_are_to_be(fork, tmp_path):
    small = ["--network=resnet10_cifar", "--blocks=4", "--batch_size=8", "--repeats=3"]
    code, out, _err = fork("benchmarks.row_costs", *small, "--write", f"--to={tmp_path}/t.json")
    table = json.loads((tmp_path / "t.json").read_text())["cpu"]
    assert code == 0 and json.loads(out)["cpu"]["image"] == table["image"]
    assert table["image"].keys() == table["image in training"].keys() == {"4", "every"}
    assert table["image"]["4"] == table["image in training"]["4"] == 1
    assert "measured on one" in table["found"] and "token" in table


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--official is missing"),
        (["--official=nowhere", "--workdir=run"], "--official=nowhere holds no folder autoattack"),
        (["--versions=apgd"], "--versions=apgd is unknown; choose from apgd-ce, standard"),
        (["--written=flax"], "--written=flax is unknown; choose from plain, plain_nchw, linen, eq"),
        (["--examples=0"], "--examples=0 must be positive"),
    ],
)
def test_official_autoattack_refuses(fork, flags, said):
    code, _out, err = fork("benchmarks.official_autoattack", *flags)
    assert code == 2 and err.startswith("error: ") and said in err


def test_a_network_written_anew_gives_the_same_logits():
    pytest.importorskip("equinox")
    torch = pytest.importorskip("torch")
    model = CNN("resnet10_cifar", width=4, mean=(0.4,) * 3, std=(0.3,) * 3)
    network, *given = functional(model.create(in_channels=3, num_classes=5, rngs=nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    params, stats = jax.tree.map(
        lambda x: x + 0.3 * jax.random.uniform(next(keys), x.shape), tuple(given)
    )
    images = jax.random.uniform(jax.random.key(2), (3, 16, 16, 3))
    expected = network.apply(params, stats, images)[0].logits
    weights = foreign_networks.fold(params, stats, model.mean, model.std)
    for write in foreign_networks.WRITINGS.values():
        np.testing.assert_allclose(write(weights)(images), expected, rtol=1e-4, atol=1e-4)
    channels_first = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))
    with torch.inference_mode():
        found = foreign_networks.torch_network(weights)(channels_first)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_gpu_script_measures_then_runs_the_benchmarks(tmp_path):
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    recorder.chmod(0o755)
    script = Path(__file__).parents[1] / "launch" / "gpu_dispatch.sh"
    environment = os.environ | {"PYTHON": str(recorder), "JSON": "found.json"}
    subprocess.run([script, "--dtype=float32"], env=environment, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "-m benchmarks.row_costs --write --dtype=float32",
        "-m benchmarks.run --suite=dispatch,inference --json=found.json",
    ]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="it is installed")
def test_the_compiler_is_asked_for_by_name(fork):
    code, _out, err = fork("benchmarks.tpu")
    assert code == 2 and "pip install -e '.[tpu_aot]'" in err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler")
def test_a_program_is_estimated(fork, tmp_path):
    flags = ["--network=resnet10_cifar", "--programs=dense,pathway", "--batch_size=8"]
    code, out, _err = fork("benchmarks.tpu", *flags, f"--cache={tmp_path}", **OTHER_COMPILER)
    assert code == 0 and "pathway over dense" in out
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler")
def test_collectives_are_as_many_as_counted(fork):
    code, out, _err = fork("benchmarks.collectives", **OTHER_COMPILER)
    assert code == 0 and "expected of gradients: all-reduces of 551,440 and 1,054,720 bytes" in out
