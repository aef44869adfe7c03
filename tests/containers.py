"""Containers of images for tests."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from weighmatch.data.containers import decode_members, walk_members
from weighmatch.data.files import Rejected, RejectedFileError

SHAPE = (1, 8, 8)


def picture(seed):
    """An image of 8 x 8 pixels, and the bytes of its PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return pixels, content.getvalue()


def write_tar(path, contents, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in contents:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def write_structs(path, contents, names, **options):
    """As Hugging Face's data sets store images."""
    rows = [{"bytes": content, "path": name} for content, name in zip(contents, names, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": list(range(len(rows)))})
    pq.write_table(table, path, **options)


def found_in(root):
    """The images by their paths, and the reasons of what is none."""
    images, reasons = {}, {}
    listed = []
    for one in walk_members(root):
        if isinstance(one, Rejected):
            reasons[one.path] = one.reason
        else:
            listed.append(one)
    listed.sort(key=lambda member: (member.file, member.first))
    answers = decode_members(root, listed, SHAPE, "crop", "white")
    for member, found in zip(listed, answers, strict=True):
        if isinstance(found, RejectedFileError):
            reasons[member.path] = found.reason
        else:
            images[member.path] = found[0]
    return images, reasons
