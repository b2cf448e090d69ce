"""What build.py asks an image, as root, from inside: its packages, and files that it should not have. Prints JSON."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import distributions

KEPT_SECRETS = re.compile(r"\.netrc|\.git|\.env|\.npmrc|\.pypirc|auth_token|id_(rsa|ed25519|ecdsa)|.*\.kubeconfig")
"""Names of files that people keep secrets in."""
SECRET = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s:@]+@")
"""A private key, or an address with a password."""
SEARCHED = ("/etc", "/home", "/root", "/opt", "/mnt", "/usr/local/etc", "/tmp", "/var/tmp")
"""Folders whose files are read; the others are packages' own."""
EMPTY = ("/root/.cache", "/home/ray/.cache", "/tmp", "/var/tmp", "/var/cache/apt/archives", "/var/lib/apt/lists")
"""Folders that are empty or not there, but for the locks of apt."""


def files(top: str) -> Iterator[str]:
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in ("/proc", "/sys", "/dev")]
        yield from (os.path.join(folder, name) for name in (*folders, *names))


def packages() -> Iterator[tuple[str, str, str]]:
    for distribution in distributions():
        yield "pypi", re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower(), distribution.version
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${Version}\n"], capture_output=True, text=True, check=True
    )
    for line in listed.stdout.splitlines():
        name, version = line.split()
        yield "deb/debian", name, version


def holds_a_secret(path: str) -> bool:
    if not os.path.isfile(path) or os.path.islink(path) or os.path.getsize(path) > 1_000_000:
        return False
    with open(path, "rb") as file:
        return SECRET.search(file.read()) is not None


secrets = {path for path in files("/") if KEPT_SECRETS.fullmatch(os.path.basename(path))}
secrets |= {path for top in SEARCHED for path in files(top) if holds_a_secret(path)}
left_over = {path for top in EMPTY for path in files(top) if os.path.basename(path) not in ("lock", "partial")}
left_over |= {path for path in files("/home/ray") if re.search(r"/(__pycache__|build|[^/]+\.egg-info)$", path)}
print(json.dumps({"packages": sorted(set(packages())), "secrets": sorted(secrets), "left_over": sorted(left_over)}))
