"""cluster/image: what `make image` makes of the rendered manifests, and what it finds wrong with an image.

The image itself is built and run by `make image` alone, which needs root, buildah and Podman."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_overlays import ROOT, pod_templates, ray_cluster, tool

sys.path.insert(0, str(ROOT / "cluster" / "image"))
import build
import manifests
import trial

SECRETS = {"diki-serve/token": "its-token"}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    tool("kubectl", "NOTHING of cluster/image was checked")
    monkeypatch.setattr(manifests, "VOLUMES", tmp_path)
    monkeypatch.setattr(manifests, "_give_to_group", lambda *_: None)


def words(overlay, pod, container=0):
    spec = dict(pod_templates(overlay))[pod]["spec"]
    return manifests.arguments("a-pod", spec, spec["containers"][container], SECRETS)


def test_ray_is_started_as_kuberay_starts_it():
    cluster = ray_cluster("kind")
    assert manifests.ray_start(cluster["headGroupSpec"], None) == (
        "ray start --head --block --dashboard-agent-listen-port=52365 --dashboard-host=0.0.0.0 --memory=4294967296"
        " --metrics-export-port=8080 --no-monitor --num-cpus=0"
    )
    assert manifests.ray_start(cluster["workerGroupSpecs"][0], "head") == (
        "ray start --address=head:6379 --block --dashboard-agent-listen-port=52365 --memory=4294967296"
        " --metrics-export-port=8080 --num-cpus=2"
    )


@pytest.mark.parametrize("overlay", ["kind", "kind-serve"])
def test_every_container_has_the_manifests_confinement_limits_and_environment(overlay):
    for pod, template in pod_templates(overlay):
        for number, container in enumerate(template["spec"]["containers"]):
            told = words(overlay, pod, number)
            confined = {"--user=1000", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"}
            assert confined <= set(told), (pod, container["name"])
            limits = container["resources"]["limits"]
            assert f"--memory={int(manifests.quantity(limits['memory']))}" in told
            assert f"--cpus={manifests.quantity(limits['cpu'])}" in told
            for variable in container["env"]:
                assert f"--env={variable['name']}={variable.get('value', SECRETS['diki-serve/token'])}" in told
            assert told[-1] == f"localhost/{container['image']}"


def test_a_claim_is_one_folder_for_all_pods_and_an_empty_directory_is_its_pods_own(tmp_path):
    for pod in ("head", "workers"):
        told = words("kind", pod)
        assert f"--volume={tmp_path}/diki-storage:/mnt/diki" in told
        assert f"--volume={tmp_path}/a-pod-tmp:/tmp" in told
        assert "--group-add=100" in told


@pytest.mark.parametrize("where", ["pod", "container", "securityContext", "limits"])
def test_a_field_of_the_manifests_that_the_trial_does_not_do_is_an_error(where):
    spec = copy.deepcopy(dict(pod_templates("kind"))["head"]["spec"])
    container = spec["containers"][0]
    places = {"pod": spec, "container": container, "securityContext": spec["securityContext"]}
    places |= {"limits": container["resources"]["limits"]}
    places[where]["somethingNew"] = "1"
    with pytest.raises(SystemExit, match="somethingNew"):
        manifests.arguments("a-pod", spec, container, {})


def test_the_trial_takes_its_places_from_the_manifests(tmp_path):
    assert (trial.STORAGE, trial.RUN, trial.PORT) == ("/mnt/diki/runs", "quickstart", 8000)
    assert manifests.served_by("kind-serve")["applications"][0]["args"]["storage"] == trial.STORAGE
    prepared = manifests.setting_of("kind", "data.root")
    assert manifests.folder_of("kind", prepared) == tmp_path / "diki-storage" / "prepared"


def test_a_registry_that_does_not_answer_is_one_that_cannot_be_reached(monkeypatch):
    asked = []

    def run(*words, **options):
        asked.append(words)
        if words[1] == "pull":
            raise subprocess.TimeoutExpired(words, options["timeout"])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(build, "run", run)
    assert build.make_base().startswith("a stand-in of python:")
    assert [words[:2] for words in asked] == [("buildah", "pull"), ("podman", "image")]


def test_a_privileged_container_is_not_run():
    spec = copy.deepcopy(dict(pod_templates("kind"))["head"]["spec"])
    spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(AssertionError):
        manifests.arguments("a-pod", spec, spec["containers"][0], {})


@pytest.mark.parametrize(("text", "number"), [("2", 2), ("500m", 0.5), ("4Gi", 4 * 2**30), ("512Mi", 2**29)])
def test_quantities_are_kubernetes_own(text, number):
    assert manifests.quantity(text) == number


def test_the_package_index_of_this_machine_is_handed_to_the_build(tmp_path):
    for path in ("index/simple", "wheels"):
        (tmp_path / path).mkdir(parents=True)
    listed = f""":env:.find-links='{tmp_path}/wheels'
global.extra-index-url='https://mirror.example/simple file://{tmp_path}/index/simple'
global.find-links='/somewhere/else'
"""
    settings, mounts = build.pip_settings(listed)
    assert settings.splitlines() == [
        "[global]",
        f"extra-index-url = https://mirror.example/simple file://{tmp_path}/index/simple",
        f"find-links = {tmp_path}/wheels",
    ]
    assert mounts == [tmp_path / "index", tmp_path / "wheels"]


def a_good_image():
    pins = [line.split("==") for line in build.CONSTRAINTS.read_text().splitlines() if "==" in line]
    version = build.IMAGE.partition(":")[2].partition("-")[0]
    packages = [["pypi", name.replace("_", "-").lower(), pinned] for name, pinned in pins]
    packages += [["pypi", "diki-ray", version], ["deb/debian", "libc6", "2.36-9"]]
    return {"Size": 100, "Config": {"Env": ["PATH=/usr/bin"]}}, {"packages": packages, "secrets": [], "left_over": []}


def test_nothing_is_wrong_with_a_good_image():
    assert build.problems(*a_good_image(), user="1000", max_bytes=100) == []


@pytest.mark.parametrize(
    ("user", "max_bytes", "change", "said"),
    [
        ("0", 100, lambda described, found: None, "user 0"),
        ("1000", 99, lambda described, found: None, "100 bytes"),
        ("1000", 100, lambda described, found: found["packages"][0].__setitem__(2, "0.1"), "not 3.14.5 as pinned"),
        ("1000", 100, lambda described, found: found["packages"].clear(), "not installed"),
        ("1000", 100, lambda described, found: described["Config"]["Env"].append("HF_TOKEN=hf_x"), "TOKEN=hf_x"),
        ("1000", 100, lambda described, found: found["secrets"].append("/root/.netrc"), "/root/.netrc"),
        ("1000", 100, lambda described, found: found["left_over"].append("/tmp/x"), "/tmp/x"),
    ],
)
def test_what_is_wrong_with_an_image_is_said(user, max_bytes, change, said):
    described, found = a_good_image()
    change(described, found)
    (problem,) = build.problems(described, found, user=user, max_bytes=max_bytes)
    assert said in problem


def test_an_address_with_a_password_and_names_that_hold_secrets_are_found(tmp_path):
    text = Path(build.__file__).with_name("inside.py").read_text()
    (tmp_path / "auth_token").write_text("x")
    (tmp_path / "pip.conf").write_text("index-url = https://user:pass@mirror.example/simple")
    (tmp_path / "harmless").write_text("https://mirror.example/simple")
    body, _, _ = text.partition("secrets = ")
    inside = {}
    exec(compile(body, "inside.py", "exec"), inside)
    assert inside["KEPT_SECRETS"].fullmatch("auth_token")
    found = {path for path in inside["files"](str(tmp_path)) if inside["holds_a_secret"](path)}
    assert found == {str(tmp_path / "pip.conf")}


def test_the_list_of_packages_is_cyclonedx():
    bill = build.bill_of_materials([("pypi", "ray", "2.60.0"), ("deb/debian", "libc6", "2.36")])
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert [c["purl"] for c in bill["components"]] == ["pkg:pypi/ray@2.60.0", "pkg:deb/debian/libc6@2.36"]
    json.dumps(bill)
