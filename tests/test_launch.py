"""The Kubernetes manifests of tools/launch: their command exists, its flags load, and hosts, chips and mesh agree."""

import importlib.util
import math
from pathlib import Path

import pytest
import yaml

from tools.planner import topology
from xpo_jax.config import loader as configs
from xpo_jax.config import settings

LAUNCH = Path(__file__).parents[1] / "tools" / "launch"


def manifest(name):
    (document,) = yaml.safe_load_all((LAUNCH / name).read_text())
    return document


def tpu_job():
    (job,) = manifest("jobset.yaml")["spec"]["replicatedJobs"]
    return job["template"]["spec"]


JOBS = {"jobset.yaml": tpu_job, "gpu_job.yaml": lambda: manifest("gpu_job.yaml")["spec"]}


def container(job):
    (only,) = job["template"]["spec"]["containers"]
    return only


def config_of(job):
    arguments = configs.split_argv(container(job)["args"])
    return configs.load(arguments.spec, arguments.overrides)


@pytest.mark.parametrize("name", JOBS)
def test_manifest_runs_a_command_whose_flags_load(name):
    job = JOBS[name]()
    command = container(job)["command"]
    assert command[:2] == ["python", "-m"] and importlib.util.find_spec(command[2])
    config = config_of(job)
    mounted = [mount["mountPath"] for mount in container(job)["volumeMounts"]]
    assert any(config.run_dir.startswith(f"{path}/") for path in mounted)
    assert any(config.model.path.startswith(f"{path}/") for path in mounted)
    top = configs.build(settings.Experiment, config, "config")
    assert top.batch_size % (config.mesh.data * config.mesh.fsdp) == 0


@pytest.mark.parametrize("name", JOBS)
def test_manifest_restarts_after_any_status_but_invalid_input(name):
    job = JOBS[name]()
    pod = job["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container(job)["name"], "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    assert pod["restartPolicy"] == "Never"  # which a pod failure policy requires
    assert pod["terminationGracePeriodSeconds"] >= 120
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container(job)["volumeMounts"]} == volumes


def test_jobset_ends_where_its_job_was_failed_and_restarts_otherwise():
    jobset = manifest("jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert tpu_job()["backoffLimit"] == 0


def test_jobset_has_the_hosts_and_chips_of_its_slice():
    job = tpu_job()
    pod = job["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    resources = container(job)["resources"]
    a_host = resources["limits"]["google.com/tpu"]
    assert resources["requests"] == resources["limits"]
    assert job["completions"] == job["parallelism"] == chips // a_host
    config = config_of(job)
    assert config.mesh.data * config.mesh.fsdp * config.mesh.tensor == chips
    assert config.distributed.mode == "on" and topology.parse(f"v5e-{chips}").count == chips


def test_gpu_job_has_the_gpus_of_its_mesh():
    job = JOBS["gpu_job.yaml"]()
    config = config_of(job)
    assert config.mesh.data * config.mesh.fsdp == container(job)["resources"]["limits"]["nvidia.com/gpu"]
    assert config.distributed.mode == "off"


def test_table_of_slices_agrees_with_the_topologies_of_the_planner():
    rows = [
        line.split("|")[1:-1]
        for line in (LAUNCH / "kubernetes.md").read_text().splitlines()
        if "x" in line and line.startswith("| v")
    ]
    assert len(rows) == 5
    for name, _, axes, hosts, a_host, fsdp in ([cell.strip() for cell in row] for row in rows):
        known = topology.parse(name.split()[0])
        assert known.arguments["topology_name"].endswith(f":{axes}")
        assert known.count == int(hosts) * int(a_host) == int(fsdp)
