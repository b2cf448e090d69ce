"""The front of a RayService's pods, which jobs/serve.py has of its own: python jobs/serve_front.py --host 0.0.0.0

It bounds connections, heads and bodies, asks for the token (of DIKI_SERVE_TOKEN or --token-file), answers /healthz for
Ray Serve's proxy beside it, and passes the rest on to it. Needs no Ray. Ends at SIGTERM.
"""

import argparse
import sys

from diki_ray.errors import UserError
from diki_ray.serving.front import listen, server_of
from diki_ray.serving.settings import Limits, parse_limits, token_digest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone; 0.0.0.0 for everybody")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--upstream", default="http://127.0.0.1:8001", help="Ray Serve's proxy (default: %(default)s)")
    parser.add_argument("--token-file", metavar="FILE", help="default: the token is in DIKI_SERVE_TOKEN")
    parser.add_argument("--no-token", action="store_true", help="answer whoever can reach the port")
    for name, field in Limits.model_fields.items():
        if name != "token_sha256":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    try:
        token = token_digest(arguments["token_file"], arguments["no_token"])
        fields = {name: arguments[name] for name in Limits.model_fields if name in arguments}
        limits = parse_limits(token_sha256=token, **fields)
        with listen(arguments["host"], arguments["port"]) as listener:
            server_of(arguments["upstream"], limits).run([listener])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
