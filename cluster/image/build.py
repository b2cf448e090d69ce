"""The image of cluster/docker built and looked over, without a registry and without a daemon: `make image`, first half.

For Debian, as root, with buildah, podman, runc and kubectl; debootstrap too where the base image cannot be pulled. Then
a stand-in of the base is made: Debian of the same release with its own Python, which the shipped Dockerfile cannot tell
from it, and which is not the base that users get. The package index's settings of this machine (`pip config list`) are
mounted into the build and are not in the image.

What is found goes into build/image: `image.json`, and `sbom.json`, every package with its version, in CycloneDX 1.5.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from commands import OUTPUT, ROOT, run, say, ulimits
from manifests import cluster_of

DOCKERFILE = ROOT / "cluster" / "docker" / "Dockerfile"
CONSTRAINTS = DOCKERFILE.with_name("constraints.txt")
IMAGE = cluster_of("kind")["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
OTHER_INDEX = "https://pypi.org/simple"
MAX_BYTES = {"cpu": 2.5e9, "with CUDA": 7.5e9}
"""Of an image with torch's CPU wheel, and of one with PyPI's wheel, which brings CUDA's libraries."""


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    base = make_base()
    kind = build(base)
    look_over(kind, base)


def make_base() -> str:
    """Make the Dockerfile's base image be here; a sentence that says what it is."""
    (name,) = re.findall(r"^FROM (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    if _is_pulled(name):
        return f"{name} of Docker Hub"
    release = name.rpartition("-")[2]
    stand_in = f"a stand-in of {name}: Debian {release} with its own Python"
    say(f"{name} CANNOT BE PULLED here. The image is built on {stand_in}.")
    if run("podman", "image", "exists", f"localhost/{name}", check=False).returncode != 0:
        container = run("buildah", "from", "scratch").stdout.strip()
        try:
            _install_debian(Path(run("buildah", "mount", container).stdout.strip()), release)
            run("buildah", "config", "--env", "LANG=C.UTF-8", "--cmd", "python3", container)
            run("buildah", "commit", "--quiet", container, f"localhost/{name}")
        finally:
            run("buildah", "rm", container)
    return stand_in


def _is_pulled(name: str) -> bool:
    try:
        return run("buildah", "pull", "--quiet", f"docker.io/library/{name}", check=False, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:  # as where packets to the registry are dropped
        return False


def _install_debian(root: Path, release: str) -> None:
    wanted = "ca-certificates,python3,python3-pip,python-is-python3"
    run("debootstrap", "--variant=minbase", f"--include={wanted}", release, str(root))
    # As in the official image: pip installs into the system's Python, and nothing is left of the installation.
    for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    for folder in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()


def build(base: str) -> str:
    """Build the Dockerfile as it is; "cpu" or "with CUDA", which says what torch it could get."""
    arguments, kind = [], "cpu"
    index = torch_index()
    if not _answers(f"{index}/torch/"):
        arguments, kind = ["--build-arg", f"TORCH_INDEX={OTHER_INDEX}"], "with CUDA"
        say(f"{index} CANNOT BE REACHED: torch comes from {OTHER_INDEX}, with CUDA's libraries, as TORCH_INDEX allows.")
    settings, mounts = pip_settings(run(sys.executable, "-m", "pip", "config", "list").stdout)
    (OUTPUT / "pip.conf").write_text(settings)
    volumes = [f"{OUTPUT / 'pip.conf'}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in mounts)]
    say(f"building {IMAGE} {kind}")
    with (OUTPUT / "build.log").open("w") as log:
        done = subprocess.run(
            [
                *("buildah", "build", "--layers", "--pull-never", "--network", "host", "--file", str(DOCKERFILE)),
                *("--ignorefile", f"{DOCKERFILE}.dockerignore", "--tag", f"localhost/{IMAGE}", *arguments),
                *(word for volume in volumes for word in ("--volume", volume)),
                str(ROOT),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        last = "\n".join((OUTPUT / "build.log").read_text().splitlines()[-30:])
        sys.exit(f"{last}\nThe image was not built; the whole log is in {OUTPUT / 'build.log'}.")
    return kind


def torch_index() -> str:
    """The index that torch comes from unless another is named."""
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE))
    return arguments["TORCH_INDEX"].replace("${PLATFORM}", arguments["PLATFORM"])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20):
            return True
    except OSError:
        return False


def pip_settings(listed: str) -> tuple[str, list[Path]]:
    """(a pip.conf, the paths that it names) of what `pip config list` said; the environment's settings win."""
    lines = [line.partition("=") for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:"))]
    settings = {key.rpartition(".")[2]: str(ast.literal_eval(value)) for key, _, value in lines}
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    paths = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    # The pages of an index on disk lead to files beside its folder.
    mounts = sorted({path.parent if path.name == "simple" else path for path in paths})
    text = "".join(f"{name} = {' '.join(value.split())}\n" for name, value in sorted(settings.items()))
    return f"[global]\n{text}", mounts


def look_over(kind: str, base: str) -> None:
    """Check the image and write down what is in it; exit with a sentence for each thing that is wrong."""
    (described,) = json.loads(run("podman", "image", "inspect", IMAGE).stdout)
    inside = Path(__file__).with_name("inside.py").read_text()
    as_root = ["podman", "run", "--rm", "--interactive", "--network=none", "--user=0", *ulimits(), IMAGE, "python", "-"]
    found = json.loads(run(*as_root, input=inside).stdout)
    user = run("podman", "run", "--rm", "--network=none", *ulimits(), IMAGE, "id", "-u").stdout.strip()
    wrong = problems(described, found, user, MAX_BYTES[kind])
    (OUTPUT / "sbom.json").write_text(json.dumps(bill_of_materials(found["packages"]), indent=1))
    python = {name: version for ecosystem, name, version in found["packages"] if ecosystem == "pypi"}
    report = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "image": IMAGE,
        "base": base,
        "torch": f"{python['torch']} {kind}",
        "GB": round(described["Size"] / 1e9, 2),
        "user": user,
        "packages": len(found["packages"]),
        "problems": wrong,
    }
    (OUTPUT / "image.json").write_text(json.dumps(report, indent=1))
    say(", ".join(f"{name} {value}" for name, value in report.items()))
    if wrong:
        sys.exit("\n".join(["The image is not as it should be:", *wrong]))


def problems(described: dict[str, Any], found: dict[str, Any], user: str, max_bytes: float) -> list[str]:
    """A sentence for everything that is wrong with an image.

    Args:
        described: What `podman image inspect` says of it.
        found: What inside.py prints in it.
        user: The number of the user that its processes have.
        max_bytes: The size that it may have.
    """
    python = {name: version for ecosystem, name, version in found["packages"] if ecosystem == "pypi"}
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))
    pins["diki-ray"] = IMAGE.partition(":")[2].rpartition("-")[0]
    recorded = json.dumps([described["Config"], described.get("History")])
    return [
        *([] if user == "1000" else [f"It runs as user {user}, not as 1000."]),
        *([] if described["Size"] <= max_bytes else [f"It has {described['Size']:,} bytes, over {max_bytes:,.0f}."]),
        *(
            f"{name} is {python[normal]}, not {version} as pinned."
            for name, version in pins.items()
            if (normal := re.sub(r"[-_.]+", "-", name).lower()) in python
            and python[normal].partition("+")[0] != version
        ),
        *([] if "ray" in python and "diki-ray" in python else ["Ray or this package is not installed."]),
        *(f"Its configuration holds {word}." for word in re.findall(r"(?i)(?:token|password|secret)=\S+", recorded)),
        *(f"It holds what looks like a secret: {path}" for path in found["secrets"]),
        *(f"It holds what was left over: {path}" for path in found["left_over"]),
    ]


def bill_of_materials(packages: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Packages of (ecosystem, name, version) as CycloneDX, which scanners of vulnerabilities read."""
    components = [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:{ecosystem}/{name}@{version}"}
        for ecosystem, name, version in packages
    ]
    about = {"component": {"type": "container", "name": IMAGE}}
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": about, "components": components}


if __name__ == "__main__":
    main()
