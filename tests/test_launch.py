"""The scripts of `launch/`, run with the cluster's commands replaced by one that notes them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from absl import flags

from advmoe_jax.hosts.address import located

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = ["local.sh", "slurm.sbatch", "tpu_pod.sh", "gpu_dispatch.sh", "gpu_claim.sh"]
# Notes its words and ends as the test says: `$CODES` are those of its calls, the last one goes on.
RECORDER = f"""#!{sys.executable}
import fcntl, json, os, sys
with open(os.environ["RECORD"], "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    before = len(file.readlines())
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
codes = [int(code) for code in os.environ.get("CODES", "0").split()]
sys.exit(codes[min(before, len(codes) - 1)])
"""
OWN = ["--config=configs/digits.py", "--workdir=/runs/a b", "--config.seed=1"]


@pytest.fixture
def launch(tmp_path):
    """(script, words, environment) -> (exit code, what was called, stderr)."""
    names = ("srun", "scontrol", "gcloud", "python", "python3", ".venv/bin/python")
    for name in names:
        path = tmp_path / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORDER)
        path.chmod(0o755)
    record = tmp_path / "record"

    def run(command, **environment):
        record.unlink(missing_ok=True)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", *command],
            env={**os.environ, "PATH": path, "RECORD": str(record), **environment},
            cwd=tmp_path / "bin",
            capture_output=True,
            text=True,
            timeout=100,
        )
        called = record.read_text().splitlines() if record.exists() else []
        return done.returncode, [json.loads(line) for line in called], done.stderr

    return run


def script(name):
    return str(LAUNCH / name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_sound(name):
    tool = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    done = subprocess.run([*tool, script(name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def parsed(words):
    """What `train` is given, as it reads it."""
    assert words[:2] == ["-m", "advmoe_jax.train"]
    values = flags.FlagValues()
    flags.DEFINE_string("coordinator", "", "", flag_values=values)
    for name in ("num_processes", "process_id"):
        flags.DEFINE_integer(name, None, "", flag_values=values)
    rest = values(["train", *words[2:]], known_only=True)[1:]
    return rest, values.coordinator, values.num_processes, values.process_id


def test_local_starts_every_process(launch):
    code, called, err = launch([script("local.sh"), "3", *OWN], PORT="4321")
    assert (code, err) == (0, "")
    found = [parsed(words[1:]) for words in called]
    assert all(rest == OWN for rest, *_ in found)
    places = [located(*where) for _, *where in found]
    assert sorted(place.index for place in places) == [0, 1, 2]
    assert {(*place[:3],) for place in places} == {("localhost", 4321, 3)}


def test_local_starts_all_again_when_one_is_lost(launch):
    words = [script("local.sh"), "2", "--restarts=2", *OWN]
    code, called, err = launch(words, CODES="75 0 75 75 0")
    assert (code, len(called)) == (0, 6)
    assert err.count("a process has ended with code 75: start ") == 2
    assert all(parsed(words[1:])[0] == OWN for words in called)
    code, called, _ = launch(words, CODES="75")
    assert (code, len(called)) == (75, 6)
    code, called, _ = launch(words, CODES="2 75")
    assert (code, len(called)) == (2, 2)


def test_local_ends_a_process_that_hangs(tmp_path):
    path = tmp_path / "python"
    path.write_text('#!/usr/bin/env bash\n[[ "$*" == *process_id=0* ]] && exit 75\nexec sleep 99\n')
    path.chmod(0o755)
    began = time.monotonic()
    done = subprocess.run(
        ["bash", script("local.sh"), "2", "--workdir=x"],
        env=os.environ | {"PYTHON": str(path), "GRACE": "1"},
        capture_output=True,
        timeout=90,
    )
    assert done.returncode != 0 and time.monotonic() - began < 90


def test_slurm(launch):
    slurm = {"SLURM_JOB_ID": "7"}
    code, called, _ = launch([script("slurm.sbatch"), *OWN], **slurm)
    ((srun, *words),) = called
    at = words.index("-m")
    assert (code, srun, words[at - 1]) == (0, "srun", ".venv/bin/python")
    assert words[: at - 1] == ["--kill-on-bad-exit=0", "--wait=60"]
    assert parsed(words[at:]) == (OWN, "auto", None, None)
    requeue = ["scontrol", "requeue", "7"]
    code, called, _ = launch([script("slurm.sbatch"), *OWN], CODES="75 0", **slurm)
    assert code == 75 and called[1:] == [requeue]
    for codes, count in (("2", "0"), ("75", "3")):
        command = [script("slurm.sbatch"), *OWN]
        called = launch(command, CODES=codes, SLURM_RESTART_COUNT=count, **slurm)[1]
        assert len(called) == 1


def test_tpu_pod(launch):
    code, called, _ = launch([script("tpu_pod.sh"), *OWN], TPU="pod", ZONE="zone")
    ((*words, command),) = called
    assert code == 0
    assert words == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "pod",
        "--zone=zone",
        "--worker=all",
    ]
    # As a host's shell reads it.
    remote = command.removeprefix("--command=cd advmoe_jax && ")
    assert remote != command
    ((python, *words),) = launch(["-c", remote])[1]
    assert python == "python3" and parsed(words) == (OWN, "auto", None, None)
    assert "name of the TPU slice" in launch([script("tpu_pod.sh"), *OWN])[2]


def jobsets():
    return list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))


@pytest.mark.parametrize("pool", ["tpu", "gpu"])
def test_jobset(launch, pool, tmp_path):
    (jobset,) = [one for one in jobsets() if one["metadata"]["labels"]["pool"] == pool]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert [volume["name"] for volume in pod["volumes"]] == ["runs"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    environment["WORKDIR"] = str(tmp_path)
    command = [*container["command"], *container["args"]]
    assert command[0] == "bash"
    last = job["completions"] - 1

    def start(**more):
        return launch(command[1:], JOB_COMPLETION_INDEX=str(last), **environment, **more)

    code, called, err = start()
    assert (code, err) == (75, "")  # stopped before the end: JobSet starts all again
    ((_, *words),) = called
    rest, *where = parsed(words)
    assert rest == ["--config=configs/cifar10_resnet18.py", f"--workdir={tmp_path}"]
    if pool == "tpu":
        assert where == ["auto", None, None]
    else:
        # JobSet's name for the first pod: jobset-replicated-job-pod.jobset.
        name = jobset["metadata"]["name"]
        first = f"{name}-{replicated['name']}-0-0.{name}"
        assert located(*where) == (first, 1234, job["completions"], last)
    (tmp_path / "results.json").write_text("{}")
    assert start()[0] == 0
    assert start(CODES="2")[0] == 2
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_a_pod_that_is_told_to_stop_tells_the_training(tmp_path):
    container = jobsets()[0]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    python = tmp_path / "python"
    said = tmp_path / "said"
    python.write_text(
        f"#!/usr/bin/env bash\ntrap 'echo saved >> {said}; exit 0' TERM\necho began > {said}\n"
        "while :; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    pod = subprocess.Popen(
        [*container["command"], *container["args"]],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORKDIR": str(tmp_path)},
    )
    while not (said.exists() and "began" in said.read_text()):
        assert pod.poll() is None
        time.sleep(0.05)
    pod.terminate()
    assert pod.wait(timeout=60) == 75
    assert said.read_text() == "began\nsaved\n"


def test_every_file_says_how_it_is_used():
    for path in LAUNCH.iterdir():
        used = re.findall(rf"^# .*launch/{re.escape(path.name)}", path.read_text(), re.MULTILINE)
        assert used, path.name


def test_the_claims_script_compares_then_measures(launch, tmp_path):
    environment = {"WORKDIR": str(tmp_path), "SUITE": "dispatch,attack"}
    code, called, err = launch([script("gpu_claim.sh"), "--config.run.num_epochs=2"], **environment)
    assert (code, err) == (0, "")
    assert [words[2] for words in called] == ["advmoe_jax.compare", *["benchmarks.run"] * 2]
    assert called[0][3:5] == ["--config=configs/compare_cifar10.py", f"--workdir={tmp_path}"]
    assert called[0][-1] == "--config.run.num_epochs=2"
    (tmp_path / "benchmarks_dispatch.json").write_text("{}")  # measured in an earlier piece
    _, called, _ = launch([script("gpu_claim.sh")], **environment)
    assert [words[-1] for words in called[1:]] == [f"--json={tmp_path}/benchmarks_attack.json"]


@pytest.mark.parametrize(("code", "expected"), [(124, 75), (137, 75), (2, 2)])
def test_the_claims_script_says_whether_there_is_more_to_do(launch, code, expected):
    found, called, err = launch([script("gpu_claim.sh")], CODES=str(code))
    assert found == expected and len(called) == 1
    assert ("give the same command again" in err) == (expected == 75)
    assert launch([script("gpu_claim.sh")], LIMIT="0")[:2] == (75, [])


TOY = """
import sys
sys.path.append({configs!r})
import compare_digits

def get_config():
    config = compare_digits.get_config()
    config.update({{"examples": 32, "attacks": "pgd2", "strong_attacks": "fgsm"}})
    config.update({{"strong_examples": 16, "explained_attack": "pgd2", "explained_examples": 16}})
    config.run.update({{"num_epochs": 1, "batch_size": 32}})
    config.run.data.train_examples = 64
    config.run.model.width = 4
    config.run.attack.num_steps = 1
    config.run.evaluation.update({{"validation_steps": 1, "batch_size": 32}})
    return config
"""


@pytest.mark.slow
def test_the_claims_script_goes_on_piece_by_piece(tmp_path):
    """On a toy: a piece that is too short for all of it ends in 75, and the next goes on."""
    config = tmp_path / "compare_toy.py"
    config.write_text(TOY.format(configs=str(LAUNCH.parent / "configs")))
    environment = os.environ | {
        "PYTHON": sys.executable,
        "CONFIG": str(config),
        "WORKDIR": str(tmp_path / "claim"),
        "SUITE": "none",
        "GRACE": "60",
    }
    command = ["bash", script("gpu_claim.sh"), "--config.rows=at_dense,advmoe_assignment"]

    def piece(limit):
        told = environment | {"LIMIT": limit}
        return subprocess.run(command, env=told, capture_output=True, text=True)

    first = piece("12")
    assert first.returncode == 75 and "give the same command again" in first.stderr
    assert (tmp_path / "claim").is_dir()
    second = piece("3000")
    # The comparison is whole; then a suite is asked for that does not exist.
    assert second.returncode == 2 and "--suite=none is unknown" in second.stderr
    table = (tmp_path / "claim" / "table.md").read_text()
    assert "AT (Dense)" in table and "AdvMoE, assignment" in table
