"""What is under cluster/: every overlay, rendered and held to the schemas of Kubernetes and KubeRay, to the rules of a
restricted namespace, and to what pyproject.toml and the guide say. What the overlays run is in test_cluster_jobs.py.

No cluster is needed, only kubectl (a client that renders). KubeRay's schemas are in tests/kuberay.
"""

import functools
import json
import lzma
import os
import re
import subprocess

import jsonschema
import kubernetes_validate
import pytest
from cluster_overlays import (
    KUBERAY,
    OVERLAYS,
    RAY_VERSION,
    ROOT,
    cuda_variant,
    of_kind,
    pod_templates,
    ray_cluster,
    render,
    rendered,
)

import diki_ray
from diki_ray import config

KUBERNETES = ("1.31", "1.37")  # the oldest and the newest that the overlays are for


# Schemas


@functools.cache
def kuberay_schemas():
    return json.loads(lzma.decompress((ROOT / "tests" / "kuberay" / "crds.json.xz").read_bytes()))


def closed(schema):
    """A CRD's schema as the API server applies it: no unknown fields, and x-kubernetes-int-or-string is either."""
    schema = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    if "properties" in schema:
        schema["properties"] = {name: closed(child) for name, child in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = closed(schema[key])
    return schema


@functools.cache
def validator(kind):
    return jsonschema.Draft202012Validator(closed(kuberay_schemas()[kind]))


def problems(thing):
    """Everything that the API server would refuse, as `path: what`."""
    if thing["apiVersion"] == "ray.io/v1":
        return [f"{error.json_path}: {error.message}" for error in validator(thing["kind"]).iter_errors(thing)]
    found = []
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{error.json_path} ({version}): {error.message}")
        except kubernetes_validate.SchemaNotFoundError:
            found.append(f"{thing['apiVersion']} {thing['kind']} ({version}): no schema to hold it to")
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_one_that_kubernetes_and_kuberay_accept(overlay):
    things = rendered(overlay)
    assert {thing["kind"] for thing in things} >= {"Namespace", "NetworkPolicy", "PodDisruptionBudget"}
    assert len(of_kind(overlay, "RayCluster", "RayJob", "RayService")) == 1
    assert [problem for thing in things for problem in problems(thing)] == []
    assert {thing["metadata"].get("namespace", "diki") for thing in things} == {"diki"}


def broken(**changes):
    """The smallest RayJob with a cluster, with values put at dotted paths."""
    container = {"name": "ray-head", "image": "diki-ray"}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "diki"},
        "spec": {
            "entrypoint": "true",
            "rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"containers": [container]}}}},
        },
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        functools.reduce(lambda node, key: node[int(key) if key.isdigit() else key], parents, job)[last] = value
    return job


CLUSTER = "spec__rayClusterSpec"
CONTAINER = f"{CLUSTER}__headGroupSpec__template__spec__containers__0"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("spec__entryPoint", "true", "'entryPoint' was unexpected"),
        ("spec__backoffLimit", "3", "'3' is not of type 'integer'"),
        (f"{CLUSTER}__authOptions", {"mode": "password"}, "'password' is not one of"),
        (f"{CLUSTER}__workerGroupSpecs", [{"groupName": "gpu"}], "'template' is a required property"),
        (f"{CONTAINER}__resource", {}, "'resource' was unexpected"),
        (f"{CONTAINER}__resources", {"limits": {"cpu": [2]}}, "[2] is not"),
    ],
)
def test_a_broken_rayjob_is_refused(path, value, expected):
    assert problems(broken()) == []
    assert any(expected in problem for problem in problems(broken(**{path: value})))


def test_an_object_of_a_kind_without_a_schema_is_not_taken_for_good():
    assert problems({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}})


# Security


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_keeps_to_the_restricted_pod_security_standard(overlay):
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, template in pod_templates(overlay):
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        allowed = {"name", "persistentVolumeClaim", "emptyDir", "configMap", "secret"}
        assert all(set(volume) <= allowed for volume in spec.get("volumes", [])), name
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True, name
        assert pod["runAsUser"] > 0, name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert "privileged" not in context, name
            assert set(container["resources"]) == {"requests", "limits"}, name
    autoscaler = ray_cluster(overlay).get("autoscalerOptions")
    if autoscaler is not None:
        assert autoscaler["securityContext"]["allowPrivilegeEscalation"] is False
        assert autoscaler["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_runs_python_may_write_to_tmp_and_has_its_caches_there(overlay):
    autoscaler = ray_cluster(overlay).get("autoscalerOptions")
    containers = [] if autoscaler is None else [autoscaler]
    for name, template in pod_templates(overlay):
        if name != "diki-redis":
            assert {"name": "tmp", "emptyDir": {}} in template["spec"]["volumes"], name
            containers += template["spec"]["containers"]
    for container in containers:
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        assert {"name": "HOME", "value": "/tmp"} in container["env"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_has_no_cpu_to_give_and_the_driver_asks_for_none(overlay):
    assert ray_cluster(overlay)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for job in of_kind(overlay, "RayJob"):
        assert not job["spec"].keys() & {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_reachable_from_outside_and_no_secret_is_in_the_files(overlay):
    cluster = ray_cluster(overlay)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress")
    assert of_kind(overlay, "Ingress", "Secret", "Gateway", "HTTPRoute") == []
    assert all(service["spec"]["type"] == "ClusterIP" for service in of_kind(overlay, "Service"))
    (policy,) = of_kind(overlay, "NetworkPolicy")
    assert policy["spec"]["podSelector"] == {}
    assert "Ingress" in policy["spec"]["policyTypes"]
    own_namespace, *others = policy["spec"]["ingress"]
    assert own_namespace == {"from": [{"podSelector": {}}]}
    for rule in others:
        assert rule["ports"]
        (peer,) = rule["from"]  # a rule without `from`, or a peer without labels, lets everybody in
        assert any(selector.get("matchLabels") for selector in peer.values())
    for name, template in pod_templates(overlay):
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                secret = re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"])
                assert not (secret and "value" in variable), f"{name}: {variable['name']} is written out"


# Surviving


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_is_not_evicted_and_workers_drain_within_their_grace_period(overlay):
    (budget,) = of_kind(overlay, "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"] == {"ray.io/node-type": "head"}
    for name, template in pod_templates(overlay):
        spec = template["spec"]
        environment = {v["name"]: v.get("value") for v in spec["containers"][0].get("env", [])}
        if "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" in environment:
            drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert drain_s + 20 <= spec["terminationGracePeriodSeconds"], name
            assert (drain_s == 0) == (name == "head")
            assert template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(spec["containers"][0]), name
        else:
            assert name in ("submitter", "diki-redis")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_scale_from_none_unless_a_queue_counts_them(overlay):
    cluster = ray_cluster(overlay)
    for group in cluster["workerGroupSpecs"]:
        if cluster["enableInTreeAutoscaling"]:
            assert (group["minReplicas"], group.get("replicas", 0)) == (0, 0)
            assert group["maxReplicas"] >= 1
        else:
            assert overlay == "kueue"
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] >= 1


def test_head_restart_is_for_clusters_that_live_long_and_queues_are_for_jobs():
    assert ray_cluster("redis")["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert [name for name in OVERLAYS if "gcsFaultToleranceOptions" in ray_cluster(name)] == ["redis"]
    assert of_kind("redis", "RayCluster")
    assert of_kind("kueue", "RayJob")[0]["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "diki"}


# The guide


def guide():
    return (ROOT / "docs" / "kubernetes.md").read_text()


def test_every_component_is_used_and_every_overlay_is_in_the_guide():
    used = "".join(path.read_text() for path in (KUBERAY / "overlays").glob("*/kustomization.yaml"))
    assert {c.name for c in (KUBERAY / "components").iterdir() if f"components/{c.name}\n" not in used} == set()
    assert {name for name in OVERLAYS if f"`overlays/{name}`" not in guide()} == set()
    assert set(re.findall(r"diki-ray:([\d.]+)-|IMAGE:([\d.]+)-", guide())) == {
        (diki_ray.__version__, ""),
        ("", diki_ray.__version__),
    }


def test_the_guides_commands_are_shell_and_name_only_what_there_is():
    for block in re.findall(r"```bash\n(.*?)```", guide(), re.DOTALL):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    named = set(re.findall(r"(?<![\w/-])(?:cluster|configs|jobs)/[\w./-]+\w", guide()))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert set(re.findall(r"kuberay-operator --version ([\d.]+)", guide())) == {"1.7.0"}
    # Longer than a new head takes on a new node, on which the image has still to be pulled: no retry covers that.
    waits = re.findall(r"name=RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS' --set-string 'env\[0\].value=(\d+)'", guide())
    assert len(waits) == guide().count("helm install kuberay-operator") == 2
    assert min(map(int, waits)) >= 1200
    assert set(re.findall(r"`ray` must be the cluster's version \(([\d.]+)\)", guide())) == {RAY_VERSION}
    made = {
        thing["metadata"]["name"]
        for overlay in OVERLAYS
        for thing in of_kind(overlay, "RayCluster", "RayJob", "RayService")
    }
    assert set(re.findall(r"(?:rayjob|raycluster|rayservice)[/ ]([\w-]+)", guide())) <= made
    for storage in re.findall(r"run\.storage=\S+ data\.root=\S+", guide()):
        config.load(ROOT / "configs" / "quickstart.yaml", storage.split())


def test_the_guide_makes_the_secrets_that_the_overlays_refer_to():
    made = {
        name: {key.split("=")[0] for key in re.findall(r"--from-literal=(\w+=)", rest)}
        for name, rest in re.findall(r"create secret generic ([\w-]+)((?:\\\n|[^\n`])*)", guide())
    }
    keys, whole = set(), set()
    for overlay in OVERLAYS:
        text = json.dumps(rendered(overlay))
        keys |= {(r["name"], r["key"]) for r in map(json.loads, re.findall(r'"secretKeyRef": ({.*?})', text))}
        whole |= set(re.findall(r'"secretRef": {"name": "(.*?)"}', text))
    assert keys == {(name, key) for name in ("diki-redis", "diki-serve") for key in made[name]}
    assert whole == {"diki-s3"} == set(made) - {name for name, _ in keys}
    assert made["diki-s3"] >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"}


def test_the_overlay_that_the_guide_has_people_write_is_a_good_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(apiVersion: kustomize.*?)```", guide(), re.DOTALL)
    (tmp_path / "kustomization.yaml").write_text(
        text.replace("../cluster", os.path.relpath(ROOT / "cluster", tmp_path))
    )
    things = render(tmp_path)
    assert [problem for thing in things for problem in problems(thing)] == []
    (job,) = [thing for thing in things if thing["kind"] == "RayJob"]
    (account,) = [thing for thing in things if thing["kind"] == "ServiceAccount"]
    assert account["metadata"]["annotations"] == {
        "iam.gke.io/gcp-service-account": "diki@your-project.iam.gserviceaccount.com"
    }
    images = set(re.findall(r"'image': '([^']+)'", str(job)))
    assert images == {f"europe-west4-docker.pkg.dev/your-project/diki/diki-ray:{diki_ray.__version__}-{cuda_variant()}"}
