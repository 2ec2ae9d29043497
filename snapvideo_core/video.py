"""Read a clip for the models from a video or image file, through PyAV."""

from __future__ import annotations

import math
import operator
import os
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

RATE_SLACK = 1.01  # lets 30 frames per second be asked of 29.97
DECLARED_SLACK = 0.25  # seconds that a container may declare beyond its last frame


class VideoError(ValueError):
    """A file that cannot give the clip asked for; the message names the file and the reason."""


@dataclass(frozen=True)
class Clip:
    """Frames of one source, ready for the models.

    Attributes:
        video: (3, T, H, W), float32, RGB in [-1, 1].
        framerate: frames per second of the clip, `math.inf` for an image.
        source_size: (H, W) of the source as a player shows it, upright and in square pixels,
            before the crop.
    """

    video: torch.Tensor
    framerate: float
    source_size: tuple[int, int]


def read_clip(
    path: str | os.PathLike[str],
    *,
    frames: int = 16,
    size: tuple[int, int] = (36, 64),
    framerate: float = 24.0,
    start: float = 0.0,
) -> Clip:
    """Read `frames` frames of a video, or an image `frames` times over (section 3.3).

    Frame k is what a player shows start + k / framerate seconds after the first frame: turned
    upright, cropped about its centre to the aspect ratio of `size`, then resized with
    antialiasing. Alpha is dropped, not blended. An animated GIF is a video. Decoding starts at the
    first frame and stops at the last one needed.

    Args:
        path: the file; its content, not its name, tells what it is.
        frames: T, at least 1.
        size: (H, W) of the clip in pixels.
        framerate: frames per second, at most the source's. Up to 1 % more is read at the
            source's rate, which the clip then reports. An image has none: ignored.
        start: seconds from the first frame of the video; ignored for an image.

    Raises:
        VideoError: the file is missing, not a video or image, too short for the clip, slower
            than `framerate`, truncated, damaged, or turned by other than quarter turns.
        ValueError: an argument is out of range.
        ImportError: PyAV is not installed.
    """
    request = _Request(
        _positive_int("frames", frames),
        _size(size),
        _finite("framerate", framerate, framerate > 0, "positive"),
        _finite("start", start, start >= 0, "at least 0"),
    )
    av = _import_av()
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            return _read(av, file, name, request)
    except OSError as error:
        raise VideoError(f"{name}: cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Request:
    frames: int
    size: tuple[int, int]
    framerate: float
    start: float

    @property
    def times(self) -> list[float]:
        return [self.start + k / self.framerate for k in range(self.frames)]

    def __str__(self) -> str:
        return (
            f"{self.frames} frames at {self.framerate:g} fps from {self.start:g} s on "
            f"need {self.times[-1]:.6g} s of it"
        )


def _positive_int(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def _size(size: Any) -> tuple[int, int]:
    try:
        height, width = size
        return _positive_int("height", height), _positive_int("width", width)
    except (TypeError, ValueError):
        raise ValueError(f"size must be two positive integers (H, W), got {size!r}") from None


def _finite(name: str, value: float, in_range: bool, allowed: str) -> float:
    if not (in_range and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number, {allowed}, got {value!r}")
    return float(value)


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError('reading a video needs PyAV: pip install "snapkernels[video]"') from error
    return av


class _DamageError(Exception):
    """The demuxer or the decoder marked its own output as incomplete."""


def _read(av: ModuleType, file: BinaryIO, name: str, request: _Request) -> Clip:
    if not os.fstat(file.fileno()).st_size:
        raise VideoError(f"{name}: the file is empty")
    if file.read(4) == b"GIF8" and not _ends_in(file, b";"):
        raise VideoError(f"{name}: truncated: the GIF lacks its trailer")
    file.seek(0)
    # Without a name FFmpeg goes by content; a name may read as a pattern for a series of images,
    # and .txt as an ANSI film.
    content = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    # PyAV 18 refuses a title that is not UTF-8 unless told otherwise; 19 has no such argument.
    lenient = {"metadata_errors": "replace"} if av.__version__.startswith("18.") else {}
    try:
        container = av.open(content, **lenient)
    except av.FFmpegError as error:
        raise VideoError(
            f"{name}: not a video or image, or its header is damaged or cut off: {error.strerror}"
        ) from error
    with container:
        film = _Film(name, container)
        try:
            return _still(film, request) if film.is_still else _clip(film, film.paced(request))
        except (av.FFmpegError, _DamageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VideoError(
                f"{name}: truncated or damaged after {film.extent}: {reason}"
            ) from error


def _ends_in(file: BinaryIO, trailer: bytes) -> bool:
    file.seek(-min(64, os.fstat(file.fileno()).st_size), os.SEEK_END)
    return file.read().rstrip(b"\0").endswith(trailer)


def _still(film: _Film, request: _Request) -> Clip:
    _, frame = next(film.timed())
    if frame is None:
        raise VideoError(f"{film.name}: holds no frame that can be decoded")
    picture, source_size = film.picture(frame, request.size)
    return Clip(picture[:, None].repeat(1, request.frames, 1, 1), math.inf, source_size)


def _clip(film: _Film, request: _Request) -> Clip:
    pictures: list[torch.Tensor] = []
    last = None
    for frame in _on_screen(film, request.times):
        if frame is not last:
            picture, source_size = film.picture(frame, request.size)
            last = frame
        pictures.append(picture)
    if len(pictures) < request.frames:
        short = f"too short: lasts {film.extent}; {request}"
        nothing = "holds no frame that can be decoded"
        raise VideoError(f"{film.name}: {short if film.count else nothing}")
    return Clip(torch.stack(pictures, dim=1), request.framerate, source_size)


def _on_screen(film: _Film, times: list[float]) -> Iterator[VideoFrame]:
    """Yield the frame on screen at each of `times`, as far as the film lasts."""
    due = deque(times)
    shown: VideoFrame | None = None
    for begins, frame in film.timed():
        while due and shown is not None and due[0] < begins - film.slack:
            yield shown
            due.popleft()
        while due and frame is not None and due[0] <= begins + film.slack:
            yield frame
            due.popleft()
        if not due:
            return
        shown = frame


class _Film:
    """The video stream of an open file. Times are seconds from its first frame."""

    def __init__(self, name: str, container: InputContainer):
        self.name = name
        self.container = container
        self.stream = self._find_stream()
        self.is_still = self._find_still()
        self.tick = float(self.stream.time_base or 0)
        self.rate = float(self.stream.average_rate or 0)
        # Matroska rounds times to milliseconds: a frame late by less than that is on time.
        self.slack = min(1e-3, self.tick, 0.2 / self.rate if self.rate else math.inf)
        # AVI has times of decoding only; its frames follow each other without gaps.
        self.has_times = container.format.name != "avi"
        self.count = 0
        self.ends = 0.0
        self._origin: float | None = None
        self._trouble: Exception | None = None
        # Threads lose errors: slice threads, the default, all that H.264 has, frame threads some,
        # and not the same ones each time.
        self.stream.thread_type = "NONE"
        if self.is_still and self.stream.codec_context.name == "mjpeg":
            # Otherwise a JPEG that is cut off passes for whole.
            self.stream.codec_context.options = {"err_detect": "explode"}

    def _find_stream(self) -> VideoStream:
        from av.stream import Disposition

        # Covers, chapter thumbnails and the tiles of a large HEIF picture are no film.
        aside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
        for stream in self.container.streams.video:
            if not stream.disposition & aside:
                if stream.codec_context is None:
                    raise VideoError(f"{self.name}: no decoder for the codec of its video")
                return stream
        kinds = {"cover" if s.type == "video" else s.type for s in self.container.streams}
        found = ", ".join(sorted(kinds)) or "none"
        raise VideoError(f"{self.name}: no video or image among its streams: {found}")

    def _find_still(self) -> bool:
        form = self.container.format.name
        return (
            form.endswith("_pipe")  # FFmpeg's own name for an image file, as in png_pipe
            or (form == "gif" and self.stream.frames == 1)
            or self.container.metadata.get("major_brand") in ("avif", "heic", "heix", "mif1")
        )

    @property
    def extent(self) -> str:
        """How much was decoded, for messages."""
        return f"{self.count} frames ({self.ends:.3f} s)"

    def paced(self, request: _Request) -> _Request:
        """The request at the source's rate if it asks for hardly more, else as it is."""
        if not self.rate or request.framerate <= self.rate:
            return request
        if request.framerate > self.rate * RATE_SLACK:
            raise VideoError(
                f"{self.name}: has {self.rate:g} frames per second, fewer than the "
                f"{request.framerate:g} asked for: frames would repeat"
            )
        return replace(request, framerate=self.rate)

    def timed(self) -> Iterator[tuple[float, VideoFrame | None]]:
        """Yield each frame with the time it comes on screen, then the end with None.

        Raises what broke the data off only after all the frames before that point.
        """
        for packet in self._packets():
            for frame in self.stream.decode(packet):
                if frame.is_corrupt:
                    raise _DamageError("a frame is incomplete")
                begins = self.ends
                if self.has_times and frame.pts is not None:
                    if self._origin is None:
                        self._origin = frame.pts * self.tick
                    begins = frame.pts * self.tick - self._origin
                # Frames are not stored in order: after a gap in time, some are among the lost.
                gap = begins > self.ends + self.slack or not self.has_times
                if self._trouble and self.count and gap:
                    break
                yield begins, frame
                lasts = frame.duration * self.tick or (1 / self.rate if self.rate else 0.0)
                self.ends = begins + lasts
                self.count += 1
        yield self.ends, None
        if self._trouble:
            raise self._trouble

    def _packets(self) -> Iterator[Packet[VideoStream] | None]:
        """Yield the packets that are whole, then None, which empties the decoder."""
        from av import FFmpegError

        count, reached = 0, 0
        try:
            for packet in self.container.demux(self.stream):
                if packet.is_corrupt:
                    raise _DamageError("a packet is incomplete")
                if packet.size:
                    yield packet
                    count += 1
                    reached = max(reached, (packet.pts or 0) + (packet.duration or 0))
            if count < self.stream.frames:
                raise _DamageError(f"{self.stream.frames} frames are declared")
            lasts = (self.stream.duration or 0) * self.tick
            lasts = lasts or (self.container.duration or 0) / 1e6
            if lasts > reached * self.tick - (self._origin or 0.0) + DECLARED_SLACK:
                raise _DamageError(f"{lasts:.3f} s are declared")
        except (FFmpegError, _DamageError) as error:
            self._trouble = error
        yield None

    def picture(
        self, frame: VideoFrame, size: tuple[int, int]
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """The frame as (3, H, W) float32 in [-1, 1], and the (H, W) a player shows it at."""
        # The conversion follows the colour matrix and range that the frame declares.
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        height, width = frame.height, round(frame.width * (self.stream.sample_aspect_ratio or 1))
        a, b, c, d = _display_matrix(frame)
        # A pixel (x, y) is shown at (a x + c y, b x + d y).
        near = 1e-3 * max(map(abs, (a, b, c, d)))
        if abs(b) <= near and abs(c) <= near:
            mirrored = d < 0, a < 0
        elif abs(a) <= near and abs(d) <= near:
            pixels, height, width = pixels.mT, width, height
            mirrored = b < 0, c < 0
        else:
            raise VideoError(
                f"{self.name}: is to be shown turned by {math.degrees(math.atan2(b, a)):.0f} "
                "degrees; only quarter turns can be read"
            )
        pixels = pixels.flip([axis for axis, flip in enumerate(mirrored, 1) if flip])
        return _fit(pixels, (height, width), size), (height, width)


def _display_matrix(frame: VideoFrame) -> tuple[float, float, float, float]:
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV has no name for some of the frame's side data, such as EXIF.
        turn = math.radians(-frame.rotation)
        return math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    return a, b, c, d


def _fit(pixels: torch.Tensor, shown: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Crop (3, H, W) uint8 pixels, shown at (H, W) `shown`, to the aspect of `size`; resize."""
    rows, columns = pixels.shape[1:]
    # Cross products compare the aspects, whatever the shape of the pixels.
    tall, wide = shown[0] * size[1], shown[1] * size[0]
    height = max(1, round(rows * min(1.0, wide / tall)))
    width = max(1, round(columns * min(1.0, tall / wide)))
    top, left = (rows - height) // 2, (columns - width) // 2
    middle = pixels[None, :, top : top + height, left : left + width].float()
    resized = functional.interpolate(middle, size, mode="bilinear", antialias=True)
    return (resized[0] / 127.5 - 1).clamp(-1, 1)
