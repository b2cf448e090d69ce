"""How a bucket is reached: by whose credentials, with how much patience, and whether without encryption."""

import os
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError

from diki_ray.errors import UserError
from diki_ray.store.storage_errors import brief

# A wrong endpoint or a lost network must become an error a person reads, not obstore's three minutes of silence.
_RETRY_TIMEOUT_S = 30.0


def open_bucket(uri: str, **options: Any) -> Any:
    """Return obstore's client of a bucket, of a folder in one, or of an http(s) server; `options` are obstore's.

    Credentials and endpoints come from the environment (AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, …).
    Raises UserError for what is no such place.
    """
    endpoint = options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    # Plain http only where the user's own endpoint says so (a MinIO beside the cluster, a test server).
    is_http = endpoint.startswith("http://") or uri.startswith("http://")
    ours: Any = {
        "client_options": {"allow_http": True} if is_http else {},
        "retry_config": {"max_retries": 5, "retry_timeout": timedelta(seconds=_RETRY_TIMEOUT_S)},
    }
    try:
        return obstore.store.from_url(uri, **(ours | options))
    except (BaseError, ValueError) as error:
        raise UserError(f"{uri} is no storage: give a local path, s3://, gs:// or az:// ({brief(error)})") from error
