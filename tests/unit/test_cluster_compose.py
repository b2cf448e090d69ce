"""cluster/compose: what Docker would start, the commands as this Ray reads them, and the page that tells of it."""

import re
import shlex
import shutil
import subprocess
import warnings

import jsonschema
import pytest
import yaml
from cluster_overlays import RAY_VERSION, ROOT, cuda_variant, ray_cluster
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.autoscaler._private import util
from ray.scripts.scripts import start, symmetric_run

import diki_ray
from diki_ray import config

COMPOSE = ROOT / "cluster" / "compose"
GIVEN = {"HEAD": "192.0.2.1", "RAY_AUTH_TOKEN": "a-token"}


def composed(given=GIVEN, files=("compose.yaml",)):
    """What `docker compose config` makes of the files, run without an engine and without this process's environment."""
    command = compose_command()
    options = [word for file in files for word in ("--file", file)]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", **given}
    return subprocess.run([*command, *options, "config"], cwd=COMPOSE, env=environment, capture_output=True, text=True)


def compose_command():
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    reason = "no docker compose is installed: cluster/compose was NOT read as Docker reads it (Debian: docker-compose)"
    warnings.warn(reason, stacklevel=2)
    pytest.skip(reason)


@pytest.fixture
def services():
    done = composed()
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def words(command):
    return shlex.split(command) if isinstance(command, str) else command


def written(name):
    return yaml.safe_load((COMPOSE / name).read_text())["services"]


def test_podman_compose_can_split_the_commands():
    """It splits a command that is text at its blanks before it puts values in; Docker after."""
    for service in written("compose.yaml").values():
        if isinstance(command := service.get("command", ""), str):
            assert not re.search(r"\$\{[^}]*\s", command)


def test_head_and_workers_are_one_image_of_this_version_and_confined(services):
    nodes = [services["head"], services["worker"]]
    assert {node["image"] for node in nodes} == {f"diki-ray:{diki_ray.__version__}-cpu"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for node in nodes:
        assert (node["environment"]["RAY_AUTH_MODE"], node["environment"]["HOME"]) == ("token", "/tmp")
        assert node["environment"]["RAY_AUTH_TOKEN"] == GIVEN["RAY_AUTH_TOKEN"]


def test_this_ray_takes_the_commands_and_workers_join_the_head(services):
    head, worker = (
        start.make_context("start", words(services[name]["command"])[2:]).params for name in ("head", "worker")
    )
    assert head["head"]
    assert head["block"]
    assert worker["block"]
    assert worker["address"] == f"{GIVEN['HEAD']}:{head['port']}" == f"{head['node_ip_address']}:6379"
    assert head["dashboard_host"] == "127.0.0.1"
    drain = services["worker"]["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    manifest = ray_cluster("kind")["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": drain} in manifest
    assert int(re.match(r"\d+", written("compose.yaml")["worker"]["stop_grace_period"])[0]) >= int(drain) + 20


@pytest.mark.parametrize("missing", GIVEN)
def test_without_an_address_or_a_token_nothing_is_started(missing):
    done = composed({name: value for name, value in GIVEN.items() if name != missing})
    assert done.returncode != 0
    assert f"write {missing} into .env" in done.stderr


def test_storage_is_a_volume_here_or_a_folder_of_all_machines():
    for given, source in (({}, "storage"), ({"STORAGE": "/nfs/diki"}, "/nfs/diki")):
        for node in ("head", "worker"):
            assert f"{source}" in str(yaml.safe_load(composed(GIVEN | given).stdout)["services"][node]["volumes"])


def test_prometheus_finds_the_nodes_where_the_head_lists_them_and_the_jobs_own_metrics():
    mounts = written("compose.yaml")
    assert "session:/tmp" in mounts["head"]["volumes"]
    assert "session:/session:ro" in mounts["prometheus"]["volumes"]
    jobs = {j["job_name"]: j for j in yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"]}
    (listed,) = jobs["ray"]["file_sd_configs"][0]["files"]
    assert listed == f"/session/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    assert jobs["diki"]["static_configs"] == [{"targets": ["127.0.0.1:9464"]}]
    assert "telemetry.port=9464" in page()


def test_with_gpus_the_same_services_are_the_cuda_image():
    done = composed(files=("compose.yaml", "gpu.yaml"))
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    images = {services[name]["image"] for name in ("head", "worker")}
    assert images == {f"diki-ray:{diki_ray.__version__}-{cuda_variant()}"}
    assert "gpu" in str(services["head"]["deploy"])


# The page


def page():
    return (ROOT / "docs" / "clusters.md").read_text()


def test_the_pages_commands_are_shell_with_valid_configurations_for_this_ray():
    blocks = re.findall(r"```bash\n(.*?)```", page(), re.DOTALL)
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    started = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("ray start")]
    assert [bool(start.make_context("start", words).params["head"]) for words in started] == [True, False]
    for line in lines:
        overrides = [word for word in line.replace('"$SLURM_NNODES"', "2").split() if re.match(r"[a-z]+\.\w+=", word)]
        if overrides:
            config.load(ROOT / "configs" / "quickstart.yaml", overrides)
    (slurm,) = [line for line in lines if line.startswith("srun --kill")]
    words = shlex.split(slurm)
    given = [word.replace("$SLURM_NNODES", "2") for word in words[words.index("symmetric-run") + 1 :]]
    parsed = symmetric_run.make_context("_", given).params
    assert (parsed["address"], parsed["min_nodes"]) == ("$address:6379", 2)
    # What it does not know it hands on, before the command.
    assert parsed["ray_args_and_entrypoint"][:2] == ("diki-ray", "continual")
    assert set(re.findall(r"Ray \((2[\d.]+)\)", page())) == {RAY_VERSION}


def test_rays_own_schema_and_commands_take_the_pages_cluster_for_ray_up():
    (text,) = re.findall(r"```yaml\n(.*?)```", page(), re.DOTALL)
    cluster = util.prepare_config(yaml.safe_load(text))
    util.validate_config(cluster)
    with pytest.raises(jsonschema.ValidationError, match="head_commands"):
        util.validate_config(cluster | {"head_commands": []})
    assert list(cluster["file_mounts"]) == ["~/.ray/auth_token"]
    for name in ("head", "worker"):
        stop, line = cluster[f"{name}_start_ray_commands"]
        mode, *words = line.split()
        assert (stop, mode, words[:2]) == ("ray stop", "RAY_AUTH_MODE=token", ["ray", "start"])
        params = start.make_context("start", words[2:]).params
        assert params["head"] == (name == "head")
        assert params["address"] == (None if params["head"] else "$RAY_HEAD_IP:6379")
