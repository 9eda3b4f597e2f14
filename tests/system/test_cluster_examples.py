"""The files of examples/clusters work: they run a complete recipe, with stand-ins for the programs of the clusters."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lsmix.pipeline.config.recipe import read_recipe
from lsmix.pipeline.workspace.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "clusters"

# Runs each job immediately: the tasks of an array in parallel, with SLURM's variables, and requeued tasks again.
# Records options and exit codes. Jobs that depend on a failed job do not run.
SBATCH = r"""
import json, os, re, subprocess, sys
from pathlib import Path
state = Path(os.environ["STATE"])
split = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
options = dict(word.partition("=")[::2] for word in sys.argv[1:split])
job = 101 + len(list(state.glob("job-*")))
before = options.get("--dependency", "").removeprefix("afterok:")
codes = {}
if not before or not any(json.loads((state / f"job-{before}").read_text())["codes"].values()):
    first, last = map(int, re.fullmatch(r"(\d+)-(\d+)", options.get("--array", "0-0")).groups())
    waiting = {task: 0 for task in range(first, last + 1)}
    while waiting:
        running = {}
        for task, restarts in waiting.items():
            facts = {"SLURM_JOB_ID": f"{job}{task:02d}", "SLURM_CPUS_PER_TASK": "1", "SLURM_RESTART_COUNT": str(restarts)}
            facts |= {"SLURM_ARRAY_TASK_ID": str(task)} if "--array" in options else {}
            words = ["bash", *sys.argv[split:]]
            running[task] = subprocess.Popen(words, env={**os.environ, **facts}, stdout=sys.stderr)
        again = {}
        for task, process in running.items():
            codes[task] = process.wait()
            asked = state / f"requeue-{job}{task:02d}"
            if asked.exists():
                asked.unlink()
                again[task] = waiting[task] + 1
        waiting = again
(state / f"job-{job}").write_text(json.dumps({"options": options, "words": sys.argv[split + 1:], "codes": codes}))
print(f"{job};cluster")
"""
SCONTROL = """
import os, sys
from pathlib import Path
assert sys.argv[1] == "requeue"
Path(os.environ["STATE"], f"requeue-{sys.argv[2]}").touch()
"""
# Runs the containers of the applied Jobs, all pods of a Job in parallel, with the volumes as folders in STATE.
KUBECTL = r"""
import os, subprocess, sys, yaml
from pathlib import Path
state, words = Path(os.environ["STATE"]), sys.argv[1:]
assert words.pop(0) == "--namespace=mine"
if words[0] == "get":
    assert words[1] == "job" and words[3:] == ["--output", 'jsonpath={.status.conditions[?(@.status=="True")].type}']
    print((state / words[2]).read_text(), end="")
    sys.exit()
assert (words[0], words[1], words[3]) == ("apply", "--filename", "--selector")
wanted = dict([words[4].split("=")])
for item in yaml.safe_load_all(Path(words[2]).read_text()):
    if item["kind"] != "Job" or not wanted.items() <= item["metadata"]["labels"].items():
        continue
    (container,) = item["spec"]["template"]["spec"]["containers"]
    pods = []
    for index in range(item["spec"].get("completions", 1)):
        env = {entry["name"]: entry["value"] for entry in container["env"]} | {"OMP_NUM_THREADS": "1"}
        env |= {"JOB_COMPLETION_INDEX": str(index)} if item["spec"].get("completionMode") == "Indexed" else {}
        there = [word.replace("/recipe/", f"{state}/recipe/").replace("/runs", f"{state}/runs")
                 for word in [*container["command"], *container["args"]]]
        pods.append(subprocess.Popen(there, env={**os.environ, **env}))
    failed = sum(pod.wait() != 0 for pod in pods)
    (state / item["metadata"]["name"]).write_text("FailureTarget Failed" if failed else "SuccessCriteriaMet Complete")
"""
# The part of dask-jobqueue that slurm_dask.py uses, with the same signature; jobs are processes of this machine.
DASK_JOBQUEUE = """
from distributed import LocalCluster
class SLURMCluster(LocalCluster):
    def __init__(self, *, cores, memory, processes, job_cpu, job_script_prologue, walltime, worker_extra_args,
                 job_extra_directives, interface, scheduler_options):
        assert (cores, processes, job_cpu, job_extra_directives) == (1, 1, 1, ["--gres=gpu:1"])
        assert scheduler_options == {"dashboard_address": "127.0.0.1:8787"} and interface is None
        super().__init__(n_workers=0, threads_per_worker=cores, host="127.0.0.1", dashboard_address="127.0.0.1:0")
    def scale(self, jobs):
        super().scale(jobs)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a folder whose ``bin`` comes first on PATH and contains the stand-ins and lsmix."""
    programs = {"sbatch": SBATCH, "scontrol": SCONTROL, "kubectl": KUBECTL}
    for name, code in programs.items():
        write_program(tmp_path, name, f"#!{sys.executable}\n{code}")
    write_program(tmp_path, "lsmix", f'#!/bin/sh\nexec {sys.executable} -m lsmix "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path))
    return tmp_path


def write_program(folder, name, text):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def bare(workspace):
    """Remove the artifacts that the cluster has to build."""
    for stage in ("encode", "mix"):
        shutil.rmtree(workspace / stage)
    return workspace


def digests(workspace):
    return {
        manifest.name: manifest.content_digest
        for stage in ("encode", "mix", "train")
        for _, manifest in Workspace(workspace).manifests(stage)
    }


def made(*words, **options):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=300, **options)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(path):
    assert os.access(path, os.X_OK)
    assert made("bash", "-n", path).returncode == 0


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_file_is_documented(path):
    for page in ("examples/README.md", "docs/clusters.md"):
        assert path.name in (ROOT / page).read_text(encoding="utf-8")


# SLURM


@pytest.mark.slow
def test_slurm_makes_the_same_bytes(place, tiny_recipe, tiny_workspace, finished_workspace):
    bare(tiny_workspace)
    script = EXAMPLES / "slurm-submit.sh"
    done = made(script, tiny_recipe, tiny_workspace, 2, "--partition=some", env={**os.environ, "GPU": "--gres=gpu:a:1"})
    assert done.returncode == 0, done.stderr
    jobs = [json.loads((place / f"job-{job}").read_text()) for job in range(101, 107)]
    steps = [job["words"][0] for job in jobs]
    assert steps == ["train-glow", "encode", "finalize", "mix", "finalize", "run"]
    assert done.stdout.splitlines() == [f"{step}: job {job}" for job, step in enumerate(steps, 101)]
    two, one = {"0": 0, "1": 0}, {"0": 0}
    assert [job["codes"] for job in jobs] == [two if step in ("encode", "mix") else one for step in steps]
    before = [job["options"].get("--dependency", "") for job in jobs]
    assert before == ["", *(f"afterok:{job}" for job in range(101, 106))]
    assert all(job["options"]["--partition"] == "some" for job in jobs)
    assert ["--gres" in job["options"] for job in jobs] == [step != "finalize" for step in steps]
    assert digests(tiny_workspace) == digests(finished_workspace)
    assert not list(tiny_workspace.glob("*/*/work"))


def test_slurm_runs_no_step_after_a_failed_one(place, tiny_recipe):
    write_program(place, "lsmix", '#!/bin/sh\n[ "$1" != encode ] || [ "${7}" = 0 ] || exit 1\n')
    done = made(EXAMPLES / "slurm-submit.sh", tiny_recipe, place / "runs", 3)
    assert done.returncode == 0, done.stderr
    codes = [json.loads((place / f"job-{job}").read_text())["codes"] for job in range(101, 107)]
    assert codes[:2] == [{"0": 0}, {"0": 0, "1": 1, "2": 1}]
    assert codes[2] == {}


STUBBORN = """#!/bin/sh
trap 'exit 130' TERM
touch "$STATE/started"
i=0; while [ $i -lt 600 ]; do sleep 0.05; i=$((i + 1)); done
"""


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_job_is_requeued_at_its_time_limit_but_not_when_cancelled(place, number, requeued):
    write_program(place, "lsmix", STUBBORN)
    script = EXAMPLES / "slurm-array.sh"
    facts = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    job = subprocess.Popen(["bash", script, "mix", "my.toml", "runs", "4"], env=facts)
    deadline = time.monotonic() + 30
    while not (place / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(number)  # to the batch script only, like --signal=B:
    assert job.wait(timeout=30) == 130
    assert (place / "requeue-7").exists() is requeued


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(0, 0, 0), (1, 0, 0), (2, 0, 0), (4, 0, 1), (6, 2, 1), (6, 3, 0), (130, 0, 0)]
)
def test_jobs_with_retryable_exit_codes_are_requeued_up_to_three_times(place, code, restarts, requeued):
    write_program(place, "lsmix", f'#!/bin/sh\necho "$@" > "$STATE/words"\nexit {code}\n')
    facts = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": str(restarts)}
    done = made("bash", EXAMPLES / "slurm-array.sh", "mix", "my.toml", "runs", 4, env=facts)
    assert done.returncode == code
    assert (place / "requeue-7").exists() == bool(requeued)
    assert (place / "words").read_text() == "mix my.toml --workspace runs --quiet --array-index 2 --array-size 4\n"


# distributed leaves sockets that are garbage-collected late.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_dask_workers_as_slurm_jobs_make_the_same_bytes(place, tiny_recipe, tiny_workspace, finished_workspace):
    bare(tiny_workspace)
    (place / "dask_jobqueue.py").write_text(DASK_JOBQUEUE, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    words = (tiny_recipe, "--workspace", tiny_workspace, "--jobs", 2, "--cores", 1, "--sbatch=--gres=gpu:1")
    done = made(sys.executable, EXAMPLES / "slurm_dask.py", *words, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"report: {tiny_workspace}")
    assert digests(tiny_workspace) == digests(finished_workspace)


# Kubernetes


@pytest.fixture(scope="module")
def resources():
    return list(yaml.safe_load_all((EXAMPLES / "kubernetes-job.yaml").read_text(encoding="utf-8")))


def test_the_kubernetes_resources_follow_the_api(resources):
    kinds = {"ConfigMap": "v1", "PersistentVolumeClaim": "v1", "Job": "batch/v1"}
    assert all(kinds[item["kind"]] == item["apiVersion"] for item in resources)
    jobs = [item for item in resources if item["kind"] == "Job"]
    assert len({(item["kind"], item["metadata"]["name"]) for item in resources}) == len(resources)
    for item in jobs:
        spec, pod = item["spec"], item["spec"]["template"]["spec"]
        assert item["metadata"]["name"] == f"lsmix-{item['metadata']['labels']['step']}"
        assert pod["restartPolicy"] == "Never"  # required by podFailurePolicy
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"]["memory"]
        assert all(isinstance(entry["value"], str) for entry in container["env"])
        disturbed, hopeless = spec["podFailurePolicy"]["rules"]
        conditions = [{"type": "DisruptionTarget", "status": "True"}]
        assert disturbed == {"action": "Ignore", "onPodConditions": conditions}
        assert hopeless["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 5]}
        indexed = spec.get("completionMode") == "Indexed"
        assert ("backoffLimitPerIndex" in spec, "backoffLimit" in spec) == (indexed, not indexed)
        assert ("--array-index" in container["args"][0]) == indexed
        if indexed:
            parts = {entry["name"]: entry["value"] for entry in container["env"]}["TASKS"]
            assert spec["completions"] == spec["parallelism"] == int(parts)
    (claim,) = (item for item in resources if item["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_recipe_of_the_config_map_is_valid(resources, tmp_path):
    (configured,) = (item for item in resources if item["kind"] == "ConfigMap")
    for name, text in configured["data"].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_recipe(tmp_path / name).name == "digits"


@pytest.fixture
def kubernetes(place, tiny_recipe):
    """Return a function that runs the submit script with resources for two array tasks instead of eight."""
    text = (EXAMPLES / "kubernetes-job.yaml").read_text(encoding="utf-8")
    for field in ("completions: ", "parallelism: ", 'TASKS, value: "'):
        assert text.count(f"{field}8") == 2
        text = text.replace(f"{field}8", f"{field}2")
    (place / "kubernetes-job.yaml").write_text(text, encoding="utf-8")
    (place / "recipe").mkdir()
    shutil.copy(tiny_recipe, place / "recipe" / "recipe.toml")
    script = shutil.copy(EXAMPLES / "kubernetes-submit.sh", place)
    return lambda: made(script, "--namespace=mine", env={**os.environ, "PAUSE": "0"})


@pytest.mark.slow
def test_kubernetes_makes_the_same_bytes(kubernetes, place, tiny_workspace, finished_workspace):
    assert bare(tiny_workspace) == place / "runs"
    done = kubernetes()
    assert done.returncode == 0, done.stderr
    assert digests(tiny_workspace) == digests(finished_workspace)
    assert not list(tiny_workspace.glob("*/*/work"))


def test_kubernetes_runs_no_step_after_a_failed_one(kubernetes, place):
    write_program(place, "lsmix", '#!/bin/sh\necho "$@" >> "$STATE/calls"\n[ "$1" != encode ] || exit 6\n')
    done = kubernetes()
    assert done.returncode == 1
    assert done.stderr.startswith(
        "Step encode failed. Read 'kubectl logs --selector step=encode', run 'kubectl delete job "
    )
    calls = (place / "calls").read_text().splitlines()
    usual = f"{place}/recipe/recipe.toml --workspace {place}/runs --quiet"
    assert calls[0] == f"train-glow {usual}"
    assert sorted(calls[1:]) == [f"encode {usual} --array-index {part} --array-size 2" for part in (0, 1)]


def test_the_image_is_built_from_existing_files():
    lines = (EXAMPLES / "Containerfile").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("#")] == ["FROM", "COPY", "RUN", "USER", "WORKDIR"]
    assert "--constraint /src/requirements.lock /src" in "\n".join(lines)
    assert (ROOT / "requirements.lock").is_file()
