"""Small video and image files made for the reader's tests, and how their clips are read back."""

import math
import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from snapvideo_core.video import VideoError, read_clip

BUNNY = Path(__file__).parents[2] / "bench" / "clips" / "big_buck_bunny.mp4"
LOSSLESS = {"codec": "ffv1", "pix_fmt": "bgr0"}
COLOURS = {
    "R": (255, 0, 0),
    "G": (0, 255, 0),
    "B": (0, 0, 255),
    "W": (255, 255, 255),
    "K": (0, 0, 0),
}
IDENTITY = (1, 0, 0, 1)


def write_video(
    path,
    pictures,
    *,
    rate=25,
    codec="libx264",
    pix_fmt="yuv420p",
    times=None,
    time_base=None,
    gop=12,
    source="rgb24",
    context=None,
    options=None,
    title="",
    **muxer,
):
    """Encode pictures, (H, W, 3) uint8 unless `source` says else; `times` are in time_base."""
    with av.open(path, "w", options=muxer) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=rate, options=options or {})
        frames = [av.VideoFrame.from_ndarray(p, format=source) for p in pictures]
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        time_base = time_base or Fraction(1, rate)
        stream.codec_context.time_base = time_base
        for name, value in (context or {}).items():
            setattr(stream.codec_context, name, value)
        for k, frame in enumerate(frames):
            frame.pts, frame.time_base = times[k] if times else k, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def barcode(index, *, height=72, noise=False):
    """A picture that says its index: eight stripes of 16 pixels, black or white."""
    bits = [255 * (index >> bit & 1) for bit in range(8)]
    picture = np.repeat(np.array(bits, dtype=np.uint8), 16)[None, :, None]
    picture = np.broadcast_to(picture, (height, 128, 3)).copy()
    if noise:
        shape = (height // 2, 128, 3)
        picture[: height // 2] = np.random.default_rng(index).integers(0, 256, shape)
    return picture


def count(frames, **kwargs):
    return [barcode(index, **kwargs) for index in range(frames)]


def indices(clip):
    """What the barcodes of a (3, T, 36, 64) clip say."""
    stripes = clip.video[:, :, 30, 4::8].mean(0) > 0
    return [sum(bit << k for k, bit in enumerate(row)) for row in stripes.tolist()]


def on_screen(rate, framerate, start, frames=16):
    """The definition, in exact arithmetic."""
    return [
        math.floor((Fraction(start) + Fraction(k) / Fraction(framerate)) * rate)
        for k in range(frames)
    ]


def rgb(clip, row, column):
    return ((clip.video[:, 0, row, column] + 1) * 127.5).round().int().tolist()


def letter(clip, row, column):
    pixel = rgb(clip, row, column)
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], pixel))


def quadrants(height=64, width=128):
    """Top: red, green. Bottom: blue, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    for name, rows, columns in (("R", 0, 0), ("G", 0, 1), ("B", 1, 0), ("W", 1, 1)):
        half = np.s_[
            rows * height // 2 : (rows + 1) * height // 2,
            columns * width // 2 : (columns + 1) * width // 2,
        ]
        picture[half] = COLOURS[name]
    return picture


def corners(clip):
    """The colours at the top left, top right, bottom left and bottom right."""
    return "".join(letter(clip, row, column) for row in (2, -3) for column in (2, -3))


def set_matrix(path, a, b, c, d):
    """Write a display matrix into the track header of an MP4: (x, y) -> (ax + cy, bx + dy)."""
    data = bytearray(path.read_bytes())
    where = data.index(mp4_matrix(*IDENTITY), data.index(b"tkhd"))
    data[where : where + 36] = mp4_matrix(a, b, c, d)
    path.write_bytes(data)


def mp4_matrix(a, b, c, d):
    fixed = [round(65536 * value) for value in (a, b, 0, c, d, 0, 0, 0)]
    return struct.pack(">9i", *fixed, 1 << 30)


def write_image(path, codec, pix_fmt, picture, *, source="rgb24"):
    context = av.CodecContext.create(codec, "w")
    frame = av.VideoFrame.from_ndarray(picture, format=source).reformat(format=pix_fmt)
    context.width, context.height, context.pix_fmt = frame.width, frame.height, pix_fmt
    context.time_base, frame.pts = Fraction(1, 25), 0
    path.write_bytes(b"".join(map(bytes, context.encode(frame) + context.encode(None))))
    return path


def packets(path):
    """The (index in display order, position, size) of each packet of a 25 fps MP4."""
    with av.open(path) as container:
        found = [p for p in container.demux(container.streams.video[0]) if p.size]
    return [(round(p.pts * p.time_base * 25), p.pos, p.size) for p in found]


def refuse(path, reason, **kwargs):
    with pytest.raises(VideoError) as caught:
        read_clip(path, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert re.search(reason, message.removeprefix(f"{path}: ")), message
    return message


def damage(path, frames, source=None):
    """Overwrite the middle of the packets of these frames."""
    data = bytearray((source or path).read_bytes())
    for index, position, size in packets(source or path):
        if index in frames:
            data[position + size // 2 : position + size] = b"\xff" * (size - size // 2)
    path.write_bytes(data)
