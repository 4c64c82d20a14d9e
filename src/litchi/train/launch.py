"""A run on many machines: what a scheduler is given to start it, and how a rank learns its place from one.

A Slurm script starts one task a rank and `litchi train` reads its place from Slurm; a Kubernetes manifest starts one
pod a machine, and torchrun in it starts the ranks. Both begin again by themselves when a rank or a machine is lost.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litchi.config import BadInput

Scheduler = Literal["slurm", "kubernetes"]
PORT = 29500


@dataclass(frozen=True, slots=True)
class Launch:
    """One run and the machines it takes. What a site decides (time, image, volume) is in the file, to be edited."""

    name: str
    arguments: tuple[str, ...]
    """Of `litchi`: ("train", "recipes.tiny", "--set", "train.num_steps=100")."""
    folder: Path
    """Where the run keeps its files, on a disk that all machines share."""
    nodes: int = 1
    gpus: int = 0
    """Of each machine; 0 is ranks on CPUs."""
    ranks: int = 0
    """Of each machine; 0 is one a GPU."""
    restarts: int = 3
    """In a row without a new checkpoint."""
    cores: int = 8
    """Of each rank."""

    @property
    def ranks_per_node(self) -> int:
        return self.ranks or self.gpus or 1


def write(launch: Launch, scheduler: Scheduler) -> str:
    """The file that starts a run. Raises BadInput for numbers of machines or ranks that cannot be."""
    if launch.nodes < 1 or launch.gpus < 0:
        raise BadInput(f"--nodes {launch.nodes} --gpus {launch.gpus}: give at least one machine and no GPU below 0")
    if launch.gpus and launch.ranks_per_node > launch.gpus:
        raise BadInput(f"{launch.ranks} ranks a machine on {launch.gpus} GPUs: leave out --ranks, it is one a GPU")
    match scheduler:
        case "slurm":
            return slurm(launch)
        case "kubernetes":
            return kubernetes(launch)


# ---- Slurm --------------------------------------------------------------------------------------------------------


def slurm(launch: Launch) -> str:
    """A script for `sbatch`. It starts ranks again in place while checkpoints come, then asks for other machines."""
    gpus = f"#SBATCH --gpus-per-node={launch.gpus}\n" if launch.gpus else ""
    folder = shlex.quote(str(launch.folder))
    return f"""#!/usr/bin/env bash
# {launch.name} on {launch.nodes} machines of {launch.ranks_per_node} ranks: add what your site asks for, sbatch FILE
#SBATCH --job-name={label(launch.name)}
#SBATCH --nodes={launch.nodes}
#SBATCH --ntasks-per-node={launch.ranks_per_node}
{gpus}#SBATCH --cpus-per-task={launch.cores}
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Five minutes before the time is up every rank is sent SIGTERM: it saves, ends with 130, and the job is queued again.
set -u

command=(litchi {shlex.join(launch.arguments)})
folder={folder}
restarts={launch.restarts}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS

newest() {{
    local path found=none
    for path in "$folder"/train/step_*; do
        if [ -e "$path/meta.json" ]; then found=$path; fi
    done
    echo "$found"
}}

futile=0
while [ "$futile" -le "$restarts" ]; do
    before=$(newest)
    # The first rank to end leaves the others two minutes to finish a save.
    srun --kill-on-bad-exit=0 --wait=120 "${{command[@]}}"
    code=$?
    case $code in
        0 | 2) exit "$code" ;;
        130 | 143)
            scontrol requeue "$SLURM_JOB_ID"
            exit "$code"
            ;;
    esac
    if [ "$(newest)" = "$before" ]; then futile=$((futile + 1)); else futile=0; fi
    echo "litchi: the ranks ended with $code; from $(newest) again ($futile of $restarts without a new checkpoint)" >&2
done
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt "$restarts" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit 1
"""


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Give a task that srun started the variables that torchrun would have given it; leaves all others as they are.

    A batch script also has SLURM_PROCID and SLURM_NTASKS, and is no rank: only a step has SLURM_STEP_NUM_TASKS.
    """
    place = environment
    if "RANK" in place or "SLURM_PROCID" not in place or int(place.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    place["RANK"], place["WORLD_SIZE"] = place["SLURM_PROCID"], place["SLURM_STEP_NUM_TASKS"]
    place["LOCAL_RANK"] = place.get("SLURM_LOCALID", "0")
    place.setdefault("MASTER_ADDR", first_host(place.get("SLURM_STEP_NODELIST") or place.get("SLURM_JOB_NODELIST", "")))
    place.setdefault("MASTER_PORT", str(20000 + int(place.get("SLURM_JOB_ID", "0")) % 20000))


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: "gpu[003-007,9],login1" begins with gpu003; none is this host."""
    found = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found and nodes else "127.0.0.1"


# ---- Kubernetes ---------------------------------------------------------------------------------------------------


def kubernetes(launch: Launch) -> str:
    """A Service by which pods find each other and an Indexed Job of one pod a machine, for `kubectl apply -f`."""
    name = label(launch.name)
    per_pod = launch.ranks_per_node * launch.cores
    gpus = f'\n              nvidia.com/gpu: "{launch.gpus}"' if launch.gpus else ""
    arguments = shlex.join(launch.arguments)
    return f"""# {launch.name} on {launch.nodes} machines of {launch.ranks_per_node} ranks: \
kubectl apply -f THIS_FILE
# Yours to name: the image, and a claim of a volume that all machines can write (ReadWriteMany), mounted at /workspace.
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: {name}
  ports:
    - name: rendezvous
      port: {PORT}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completions: {launch.nodes}
  parallelism: {launch.nodes}
  completionMode: Indexed
  backoffLimit: {launch.restarts * launch.nodes}
  podFailurePolicy:
    rules:
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
            status: "True"
  template:
    spec:
      subdomain: {name}
      restartPolicy: Never
      terminationGracePeriodSeconds: 300
      containers:
        - name: train
          image: litchi:latest
          workingDir: /workspace
          command: ["bash", "-c"]
          args:
            - |
              set -eu
              if [ "$JOB_COMPLETION_INDEX" = 0 ]; then host=true; else host=false; fi
              exec torchrun --nnodes={launch.nodes} --nproc-per-node={launch.ranks_per_node} \\
                --max-restarts={launch.restarts} --rdzv-backend=c10d --rdzv-id={name} \\
                --rdzv-endpoint="$RENDEZVOUS" --rdzv-conf="is_host=$host" --shutdown-timeout=240 \\
                -m litchi.cli {arguments}
          env:
            - name: RENDEZVOUS
              value: {name}-0.{name}:{PORT}
            - name: OMP_NUM_THREADS
              value: "{launch.cores}"
            # Without it ranks that are started again look for each other at the addresses of the dead (torch 2.13).
            - name: TORCH_DISABLE_SHARE_RDZV_TCP_STORE
              value: "1"
          ports:
            - containerPort: {PORT}
          resources:
            requests:
              cpu: "{per_pod}"
              memory: {16 * launch.ranks_per_node}Gi
            limits:
              memory: {32 * launch.ranks_per_node}Gi{gpus}
          volumeMounts:
            - name: workspace
              mountPath: /workspace
            - name: shm
              mountPath: /dev/shm
      volumes:
        - name: workspace
          persistentVolumeClaim:
            claimName: litchi
        - name: shm
          emptyDir:
            medium: Memory
"""


def label(name: str) -> str:
    """A name as Kubernetes takes it for a Service: a letter, then small letters, digits and hyphens, and not long."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:50].strip("-")


def arguments(recipe: str, settings: Sequence[str], folder: Path) -> tuple[str, ...]:
    """What `litchi` is told to train a recipe as it was asked to here."""
    return ("train", recipe, *(word for setting in settings for word in ("--set", setting)), "--folder", str(folder))
