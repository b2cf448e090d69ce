"""Make types.json.xz: pip install cloudcoil.models.prometheus_operator==0.80.1.0, then run this file.

Keeps what a PodMonitor and a PrometheusRule may hold, without titles; unknown fields are refused, as none is served.
"""

import json
import lzma
from pathlib import Path
from typing import Any

from cloudcoil.models.prometheus_operator import v1


def closed(node: Any) -> Any:
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {k: closed(v) for k, v in node.items() if not (k in ("title", "description") and isinstance(v, str))}
    if isinstance(kept.get("properties"), dict) and kept.get("type") == "object":
        kept["additionalProperties"] = False
    return kept


if __name__ == "__main__":
    kinds = (v1.PodMonitor, v1.PrometheusRule)
    schemas = {kind.__name__: closed(kind.model_json_schema(by_alias=True)) for kind in kinds}
    compact = json.dumps(schemas, separators=(",", ":"), sort_keys=True).encode()
    Path(__file__).with_name("types.json.xz").write_bytes(lzma.compress(compact, preset=9))
