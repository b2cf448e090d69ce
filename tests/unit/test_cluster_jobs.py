"""What the overlays under cluster/kuberay run: jobs and services of this repository, with configurations that are valid
and find room.

No cluster is needed, only kubectl (a client that renders).
"""

import importlib

import pytest
import yaml
from cluster_overlays import (
    JOB_OVERLAYS,
    ROOT,
    SERVE_OVERLAYS,
    command_of,
    configuration_of,
    of_kind,
    pod_templates,
    ray_cluster,
)
from ray.serve.schema import ServeDeploySchema

from diki_ray.config.sweep import load_sweep
from diki_ray.serving.deployment import Answering
from diki_ray.serving.settings import TOKEN_VARIABLE, Limits, Settings

MOUNT = "/mnt/diki"


# Jobs


@pytest.mark.parametrize("overlay", JOB_OVERLAYS)
def test_a_job_runs_a_command_of_this_repository_with_a_valid_configuration(overlay):
    script, path, _ = command_of(overlay)
    assert script.is_file()
    assert path.is_file()
    wanted, _ = configuration_of(overlay)
    templates = [template["spec"] for name, template in pod_templates(overlay) if name != "submitter"]
    mounts = [[m["mountPath"] for m in spec["containers"][0].get("volumeMounts", [])] for spec in templates]
    for place in (wanted.run.storage, wanted.data.root):
        assert place.startswith((f"{MOUNT}/", "s3://", "gs://")), "a pod's own disk goes with the pod"
        assert mounts == [["/tmp", MOUNT] if place.startswith(MOUNT) else ["/tmp"]] * 2


@pytest.mark.parametrize("overlay", JOB_OVERLAYS)
def test_a_retry_is_the_same_run_under_an_id_that_cannot_be_submitted_twice(overlay):
    (job,) = of_kind(overlay, "RayJob")
    assert job["spec"]["backoffLimit"] >= 1
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["jobId"] == job["metadata"]["name"] != "diki"
    first, again = configuration_of(overlay)[0], configuration_of(overlay)[0]
    assert first.run.name == again.run.name  # from the file: a name drawn anew would be another run


def amount(quantity):
    """A CPU or GPU quantity as a number."""
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


@pytest.mark.parametrize("overlay", JOB_OVERLAYS)
def test_the_workers_that_a_job_asks_for_find_room(overlay):
    wanted, side_by_side = configuration_of(overlay)
    (group,) = ray_cluster(overlay)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = amount(limits.get("nvidia.com/gpu", 0))
    assert wanted.train.device == ("cuda" if gpus else "auto"), "the head, which decides, has no GPU to ask"
    for part in (wanted.train, wanted.evaluate):
        a_pod = amount(limits["cpu"]) // part.cpus_per_worker
        a_pod = min(a_pod, gpus) if gpus else a_pod
        assert a_pod * group["maxReplicas"] >= part.num_workers * side_by_side
    script, path, overrides = command_of(overlay)
    if script.name == "sweep.py" and gpus:  # each trial evaluates, and with one worker trains, in its own process
        sweep, _ = load_sweep(path, overrides)
        assert sweep.gpus_per_trial >= 1, "a trial that asks for none is placed on the head, and no GPU is asked for"
        assert gpus * group["maxReplicas"] >= sweep.gpus_per_trial * side_by_side


# Services


@pytest.mark.parametrize("overlay", SERVE_OVERLAYS)
def test_a_service_serves_an_application_of_this_package_with_valid_arguments(overlay):
    (service,) = of_kind(overlay, "RayService")
    served = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (app,) = served.applications
    module, _, builder = app.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    settings = Settings(**app.args)
    assert settings.storage.startswith((f"{MOUNT}/", "s3://", "gs://"))
    assert served.http_options.request_timeout_s > settings.request_timeout_s
    (deployment,) = app.deployments
    assert deployment.name == Answering.name
    (group,) = ray_cluster(overlay)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    for resource, limit in (("num_cpus", "cpu"), ("num_gpus", "nvidia.com/gpu")):
        wanted = amount(getattr(deployment.ray_actor_options, resource) or 0)
        assert wanted <= amount(limits.get(limit, 0))
    assert deployment.num_replicas <= group["maxReplicas"]


@pytest.mark.parametrize("overlay", SERVE_OVERLAYS)
def test_a_front_stands_before_ray_serves_proxy_which_listens_within_the_pod_alone(overlay):
    (service,) = of_kind(overlay, "RayService")
    options = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).http_options
    assert options.host == "127.0.0.1"
    (group,) = ray_cluster(overlay)["workerGroupSpecs"]
    worker, front = group["template"]["spec"]["containers"]
    assert front["image"] == worker["image"]
    assert {e["name"] for e in front["env"]} == {TOKEN_VARIABLE, "HOME"}
    python, job, *arguments = front["command"]
    assert (python, (ROOT / job).is_file()) == ("python", True)
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given == {"--host": "0.0.0.0", "--port": "8000", "--upstream": f"http://127.0.0.1:{options.port}"}
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}  # through the front
    assert front["resources"]["limits"]["memory"] == "1Gi"
    assert 2 * Limits().max_buffered_bytes <= 2**29  # in half of it: bodies, each joined from its parts


@pytest.mark.parametrize("overlay", SERVE_OVERLAYS)
def test_a_service_asks_for_a_token_from_a_secret_and_only_named_clients_reach_it(overlay):
    (service,) = of_kind(overlay, "RayService")
    assert "no_token" not in service["spec"]["serveConfigV2"]
    for name, template in pod_templates(overlay):
        container = template["spec"]["containers"][0]
        (token,) = [v for v in container["env"] if v["name"] == TOKEN_VARIABLE]
        assert token["valueFrom"] == {"secretKeyRef": {"name": "diki-serve", "key": "token"}}
        assert {"name": "serve", "containerPort": 8000} in container["ports"], name
    (policy,) = of_kind(overlay, "NetworkPolicy")
    who = [rule["from"] for rule in policy["spec"]["ingress"] if {"port": 8000} in rule.get("ports", [])]
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert who.count([monitoring]) == 1  # Prometheus, with the token
    labels = [peer["podSelector"]["matchLabels"] for (peer,) in who if peer != monitoring]
    assert labels == [{"diki-client": "true"}, {"app.kubernetes.io/name": "kuberay-operator"}]
