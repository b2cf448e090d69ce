"""Answer images over HTTP with what a run has learnt: python jobs/serve.py --storage runs --run quickstart

Needs the run's storage; reads it and takes no lease, and tasks that are learnt later are served within seconds. The
token is that of DIKI_SERVE_TOKEN or --token-file. The page is at the URL itself, the OpenAPI document at /openapi.json.
"""

import argparse
import sys

from diki_ray.clip.trust import add_backbone_options
from diki_ray.errors import UserError
from diki_ray.serving.server import serving, wait_for_end
from diki_ray.serving.settings import Settings, parse_settings, token_digest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="runs", help="of the run (default: runs)")
    parser.add_argument("--run", required=True, help="its name")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone; 0.0.0.0 for everybody")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token-file", metavar="FILE", help="default: the token is in DIKI_SERVE_TOKEN")
    parser.add_argument("--no-token", action="store_true", help="answer whoever can reach the port")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cpus-per-replica", type=float, default=1.0)
    parser.add_argument("--gpus-per-replica", type=float, default=0.0)
    parser.add_argument("--address", help="of a Ray cluster (default: RAY_ADDRESS, else one started here)")
    add_backbone_options(parser)
    for name, field in Settings.model_fields.items():
        if name not in ("storage", "run", "token_sha256", "backbone", "pretrained", "directory"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    try:
        token = token_digest(arguments.pop("token_file"), arguments.pop("no_token"))
        fields = {name: arguments.pop(name) for name in Settings.model_fields if name in arguments}
        settings = parse_settings(token_sha256=token, **fields)
        with serving(settings, **arguments) as url:
            print(f"serving run {settings.run!r} at {url}", flush=True)
            wait_for_end()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
