"""Files of data sets as people have them, for the tests of sources."""

import io
from pathlib import Path

from PIL import Image

from diki_ray.data.sources import RawDataset


def jpeg(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 10), (shade % 256, 90, 30)).save(out, "JPEG")
    return out.getvalue()


def put(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sizes(raw: RawDataset) -> dict[str, int]:
    return {split: len(items) for split, items in raw.splits.items()}


def all_read(raw: RawDataset) -> None:
    """Every listed image can be read as the image it is listed as."""
    for items in raw.splits.values():
        for item in items:
            data, extension = raw.reader.read(item.ref)
            with Image.open(io.BytesIO(data)) as image:
                assert image.format == {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}[extension]
