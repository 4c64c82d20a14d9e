"""What a scheduler is given starts the ranks that it says, and starts them again when they are lost."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from litchi.cli import main
from litchi.config import BadInput
from litchi.train.launch import Launch, Scheduler, adopt_slurm, arguments, first_host, label, write
from tests.house.sources import ROOT
from tests.parallel.stores import is_free
from tests.train import toy

LAUNCH = Launch("tiny run", arguments("recipes.tiny", ["data.note=it's"], Path("runs/tiny")), Path("runs/tiny"), 2, 8)


# ---- Slurm --------------------------------------------------------------------------------------------------------


def script(tmp_path: Path, launch: Launch = LAUNCH, scheduler: Scheduler = "slurm") -> Path:
    path = tmp_path / "launch"
    path.write_text(write(launch, scheduler))
    return path


def test_the_script_is_bash(tmp_path):
    path = script(tmp_path)
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_the_script_asks_for_what_was_said():
    asked = directives(write(LAUNCH, "slurm"))
    assert asked["nodes"] == "2" and asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["signal"].startswith("TERM@") and "requeue" in asked and asked["open-mode"] == "append"
    assert "gpus-per-node" not in directives(write(Launch("x", (), Path("x"), ranks=2), "slurm"))


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


SBATCH = """#!/bin/bash
# Runs the script here, for as many times as it is queued again.
export SLURM_JOB_NODELIST='localhost,other' SLURM_CPUS_PER_TASK=1 SLURM_RESTART_COUNT=0
export SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0
export NODES=$(sed -n 's/^#SBATCH --nodes=//p' "$1") TASKS=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$1")
while :; do
    rm -f "$STATE/requeue"
    bash "$1"
    code=$?
    [ -e "$STATE/requeue" ] || exit $code
    SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""
SRUN = """#!/bin/bash
# One process a task, as srun starts them; the exit code is the worst.
while [[ "$1" == --* ]]; do shift; done
echo x >> "$STATE/sruns"
pids=(); worst=0
for ((node = 0; node < NODES; node++)); do for ((local = 0; local < TASKS; local++)); do
    SLURM_PROCID=$((node * TASKS + local)) SLURM_LOCALID=$local SLURM_NODEID=$node \\
        SLURM_STEP_NUM_TASKS=$((NODES * TASKS)) SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST "$@" &
    pids+=($!)
done; done
for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) tr , '\\n' <<< "$3" ;;
    requeue) echo "$2" > "$STATE/requeue" ;;
esac
"""


def site(tmp_path: Path, litchi: str) -> dict[str, str]:
    """The environment of a cluster of our own, on which `litchi` is what is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL), ("litchi", litchi)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return kept | {"PATH": f"{folder}:{os.environ['PATH']}", "STATE": str(tmp_path), "SLURM_JOB_ID": free_job()}


def free_job() -> str:
    """A job whose port is free, and none of those that the system gives to connections of others."""
    return next(str(job) for job in random.sample(range(12_000), 200) if is_free(20_000 + job))


def test_two_machines_of_two_ranks_train_together(tmp_path):
    """Real ranks on gloo, each by what Slurm tells it."""
    folder = tmp_path / "toy"
    folder.mkdir()
    litchi = f"""#!/bin/bash
cd "{ROOT}" && exec "{sys.executable}" -m tests.train.toy "{folder}"
"""
    path = script(tmp_path, Launch("toy", ("train", "toy"), folder, nodes=2, ranks=2, restarts=1))
    env = site(tmp_path, litchi)
    answer = subprocess.run(["sbatch", path], env=env, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    step, weights = toy.restore(folder)
    assert (step, weights.tolist()) == (toy.STEPS, toy.expected(4))
    assert (tmp_path / "sruns").read_text() == "x\n"


@pytest.mark.parametrize(
    ("codes", "code", "sruns"),
    [
        ([0], 0, 1),
        ([2], 2, 1),
        ([130, 0], 0, 2),
        ([9, 0], 0, 2),
        ([9, 9, 9, 9, 9], 1, 4),
        ([9, -9, -9, 9, 0], 0, 5),
    ],
    ids=["done", "refused", "interrupted", "lost", "given up", "going on"],
)
def test_the_script_starts_again_what_is_worth_it(tmp_path, codes, code, sruns):
    """Each attempt ends with the next code; a minus says that a new checkpoint was written before."""
    litchi = """#!/bin/bash
[ "$SLURM_PROCID" = 0 ] || exit 0
read -r code rest < "$STATE/codes"
echo "${rest:-9}" > "$STATE/codes"
if [ "$code" -lt 0 ]; then
    n=$(ls "$STATE/run/train" | wc -l)
    mkdir -p "$STATE/run/train/step_$n" && : > "$STATE/run/train/step_$n/meta.json"
fi
exit "${code#-}"
"""
    (tmp_path / "run" / "train").mkdir(parents=True)
    (tmp_path / "codes").write_text(" ".join(map(str, codes)) + "\n")
    path = script(tmp_path, Launch("x", ("train", "x"), tmp_path / "run", nodes=2, ranks=1, restarts=1))
    answer = subprocess.run(["sbatch", path], env=site(tmp_path, litchi), capture_output=True, text=True, timeout=600)
    assert answer.returncode == code, answer.stderr
    assert len((tmp_path / "sruns").read_text().split()) == sruns, answer.stderr


def test_a_task_of_slurm_knows_its_place():
    place = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "40007"}
    adopt_slurm(place := place | {"SLURM_STEP_NODELIST": "gpu[03-05]"})
    assert (place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) == ("5", "1", "8")
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("gpu03", "20007")


def test_a_batch_script_is_no_rank_and_torchrun_goes_first():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    torchrun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "RANK": "3", "WORLD_SIZE": "16"}
    for place in (batch, torchrun):
        before = dict(place)
        adopt_slurm(place)
        assert place == before


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-007,9],login1", "gpu003"),
        ("n1", "n1"),
        ("a-b.c,d", "a-b.c"),
        ("rack[2,4-5]-gpu,z", "rack2-gpu"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


# ---- Kubernetes ---------------------------------------------------------------------------------------------------

SHAPE: dict[str, dict] = {
    "Service": {
        "spec": {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": dict, "ports": list},
    },
    "Job": {
        "spec": {
            "completions": int,
            "parallelism": int,
            "completionMode": str,
            "backoffLimit": int,
            "podFailurePolicy": dict,
            "template": dict,
        },
        "spec.template.spec": {
            "subdomain": str,
            "restartPolicy": str,
            "terminationGracePeriodSeconds": int,
            "containers": list,
            "volumes": list,
        },
        "spec.template.spec.containers.0": {
            "name": str,
            "image": str,
            "workingDir": str,
            "command": list,
            "args": list,
            "env": list,
            "ports": list,
            "resources": dict,
            "volumeMounts": list,
        },
    },
}
"""Fields that we write and their types, as the API reference of Kubernetes 1.31 (batch/v1, core/v1) has them."""


def manifest(launch: Launch = LAUNCH) -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all(write(launch, "kubernetes"))}


def at(document: dict, path: str):
    for key in path.split("."):
        document = document[int(key) if key.isdigit() else key]
    return document


def test_the_manifest_has_the_fields_of_its_kinds():
    documents = manifest()
    assert {kind: d["apiVersion"] for kind, d in documents.items()} == {"Service": "v1", "Job": "batch/v1"}
    for kind, places in SHAPE.items():
        for path, fields in places.items():
            found = at(documents[kind], path)
            assert {name: type(value) for name, value in found.items()} == fields, f"{kind} {path}"
    container = at(documents["Job"], "spec.template.spec.containers.0")
    assert all(type(entry["value"]) is str for entry in container["env"]), "YAML must not read them as numbers"


def test_pods_find_each_other_and_each_holds_its_gpus():
    service, job = manifest()["Service"], manifest()["Job"]
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2 and job["spec"]["completionMode"] == "Indexed"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    [container] = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    port = service["spec"]["ports"][0]["port"]
    assert env["RENDEZVOUS"] == f"{name}-0.{pod['subdomain']}:{port}"
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1", "ranks must find each other after a restart"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["restartPolicy"] == "Never", "a policy for failures of pods allows no other"
    assert "nvidia.com/gpu" not in write(Launch("x", (), Path("x"), ranks=2), "kubernetes")


def test_a_pod_starts_its_ranks_by_torchrun(tmp_path):
    """The command of the container, run with a torchrun that says what it was given."""
    [container] = at(manifest()["Job"], "spec.template.spec.containers")
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    for index, host in (("0", "true"), ("1", "false")):
        env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": index}
        command = [*container["command"], *container["args"]]
        said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
        assert {"--nnodes=2", "--nproc-per-node=8", f"--rdzv-conf=is_host={host}"} <= set(said)
        words = ["train", "recipes.tiny", "--set", "data.note=it's", "--folder", "runs/tiny"]
        assert said[said.index("litchi.cli") + 1 :] == words


def test_names_are_hosts():
    assert label("Tiny_run 2!") == "tiny-run-2" and label("7B") == "run-7b" and len(label("x" * 99)) == 50


# ---- command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
def test_the_command_line_prints_what_starts_the_run(tmp_path, capsys, scheduler):
    folder = str(tmp_path / "run")
    words = ["train", "recipes.tiny", "--launch", scheduler, "--nodes", "3", "--gpus", "4", "--folder", folder]
    assert main([*words, "--set", "train.num_steps=9"]) == 0
    said = capsys.readouterr().out
    assert f"train recipes.tiny --set train.num_steps=9 --folder {folder}" in said
    assert ("--nodes=3" if scheduler == "slurm" else "completions: 3") in said


def test_the_command_line_starts_ranks_with_its_own_words(tmp_path, monkeypatch):
    """The processor is made before, by one process; a rank that a launcher started starts no others."""
    asked = []
    monkeypatch.setattr("litchi.train.supervise.supervise", lambda *words: asked.append(words) or 130)
    monkeypatch.setattr("litchi.cli.make_processor", lambda run, place: asked.append(place.processor))
    monkeypatch.setattr("litchi.cli.make_checkpoint", lambda run, place: "trained here")
    monkeypatch.delenv("RANK", raising=False)
    words = ["train", "recipes.tiny", "--folder", str(tmp_path), "--set", "train.num_steps=9", "--ranks", "2"]
    assert main([*words, "--restarts", "5"]) == 130
    processor, (command, folder, plan) = asked
    assert processor == tmp_path / "processor" and folder == tmp_path / "train"
    assert command[1:] == ["-m", "litchi.cli", *arguments("recipes.tiny", ["train.num_steps=9"], tmp_path)]
    assert (plan.ranks, plan.restarts) == (2, 5)
    monkeypatch.setenv("RANK", "0")
    assert main(words) == 0 and len(asked) == 2


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="at least one machine"):
        write(Launch("x", (), Path("x"), nodes=0), "slurm")
    with pytest.raises(BadInput, match="leave out --ranks"):
        write(Launch("x", (), Path("x"), gpus=2, ranks=3), "slurm")
