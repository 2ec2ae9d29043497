"""read_clip: which frames it takes, and what it makes of them."""

import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from video_files import (
    BUNNY,
    COLOURS,
    LOSSLESS,
    corners,
    count,
    indices,
    letter,
    on_screen,
    quadrants,
    refuse,
    rgb,
    set_matrix,
    write_image,
    write_video,
)

from snapvideo_core.video import Clip, VideoError, read_clip


class TestWhichFrames:
    @pytest.mark.parametrize(
        ("framerate", "start", "expected"),
        [
            (25, 0, [0, 1, 2, 3]),
            (12.5, 0, [0, 2, 4, 6]),
            (10, 0, [0, 2, 5, 7]),
            (25, 0.039, [0, 1, 2, 3]),
            (25, 0.04, [1, 2, 3, 4]),
            (12.5, 1.0, [25, 27, 29, 31]),
            (1, 0.5, [12, 37, 62]),
        ],
    )
    def test_by_hand(self, movie, framerate, start, expected):
        clip = read_clip(movie, frames=len(expected), framerate=framerate, start=start)
        assert indices(clip) == expected
        assert clip.framerate == framerate

    def test_24_of_25_leaves_out_one_in_25(self, movie):
        clip = read_clip(movie, frames=50)
        assert indices(clip) == [*range(24), *range(25, 49), 50, 51]
        assert clip.framerate == 24.0

    @pytest.mark.parametrize("framerate", [7.3, 24.0, 25.0])
    @pytest.mark.parametrize("start", [0.02, 0.51, 1.27])
    def test_by_the_definition(self, movie, framerate, start):
        clip = read_clip(movie, frames=8, framerate=framerate, start=start)
        assert indices(clip) == on_screen(25, framerate, start, 8)

    def test_all_frames_of_the_video_can_be_had(self, movie):
        assert indices(read_clip(movie, frames=75, framerate=25)) == list(range(75))
        assert indices(read_clip(movie, frames=1, start=2.999)) == [74]

    @pytest.mark.parametrize(
        ("suffix", "codec", "pix_fmt"),
        [
            (".mkv", "libx264", "yuv420p"),
            (".ts", "libx264", "yuv420p"),
            (".flv", "libx264", "yuv420p"),
            (".h264", "libx264", "yuv420p"),  # carries no times at all
            (".avi", "libx264", "yuv420p"),  # has no times of display
            (".avi", "mpeg4", "yuv420p"),
            (".mpg", "mpeg2video", "yuv420p"),
            (".webm", "libvpx", "yuv420p"),
            (".gif", "gif", "rgb8"),
            (".mov", "mjpeg", "yuvj420p"),
        ],
    )
    def test_any_container(self, tmp_path, suffix, codec, pix_fmt):
        path = write_video(tmp_path / f"v{suffix}", count(40), codec=codec, pix_fmt=pix_fmt)
        expected = on_screen(25, 24, 0.5)
        assert indices(read_clip(path, start=0.5)) == expected

    @pytest.mark.parametrize("rate", [24, Fraction(30000, 1001), Fraction(60000, 1001)])
    def test_rounded_times_repeat_and_skip_no_frame(self, tmp_path, rate):
        """Matroska rounds the times of frames to milliseconds."""
        path = write_video(tmp_path / "v.mkv", count(40), rate=rate, time_base=1 / Fraction(rate))
        clip = read_clip(path, frames=40, framerate=float(rate))
        assert indices(clip) == list(range(40))

    def test_a_hair_above_the_rate_of_the_source(self, tmp_path):
        rate = Fraction(30000, 1001)
        path = write_video(tmp_path / "v.mp4", count(40), rate=rate, time_base=1 / rate)
        clip = read_clip(path, frames=40, framerate=30)
        assert indices(clip) == list(range(40))
        assert clip.framerate == pytest.approx(29.97, abs=0.001)

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    def test_variable_frame_rate(self, tmp_path, suffix):
        """50 frames per second, but the tenth stays for 0.22 s."""
        times = [2 * k if k < 10 else 40 + 2 * (k - 10) for k in range(40)]
        path = write_video(
            tmp_path / f"v{suffix}", count(40), times=times, time_base=Fraction(1, 100)
        )
        clip = read_clip(path, framerate=20)
        assert indices(clip) == [0, 2, 5, 7, 9, 9, 9, 9, 10, 12, 15, 17, 20, 22, 25, 27]

    def test_start_counts_from_the_first_frame(self, tmp_path):
        times = range(100, 140)
        path = write_video(tmp_path / "v.ts", count(40), times=times)
        with av.open(path) as container:
            assert container.streams.video[0].start_time >= 4 * 90000
        assert indices(read_clip(path, frames=4, framerate=25, start=0.4)) == [10, 11, 12, 13]

    @pytest.mark.parametrize("suffix", [".mp4", ".mpg"])
    def test_far_start(self, tmp_path, suffix):
        codec, rate = ("mpeg2video", 25) if suffix == ".mpg" else ("libx264", 10)
        path = write_video(
            tmp_path / f"v{suffix}",
            count(10 * rate, noise=True),
            codec=codec,
            rate=rate,
            gop=15,
            context={"bit_rate": 4_000_000},
        )
        whole = read_clip(path, frames=10 * rate, framerate=rate)
        for start in (4.0, 5.03, 6.15, 7.25, 8.42):
            expected = on_screen(rate, 7.5, start, 8)
            clip = read_clip(path, framerate=7.5, frames=8, start=start)
            assert indices(clip) == expected
            assert torch.equal(clip.video, whole.video[:, expected])


class TestFrames:
    def test_shape_and_type(self, movie):
        clip = read_clip(movie, frames=5, size=(40, 24))
        assert isinstance(clip, Clip)
        assert clip.video.shape == (3, 5, 40, 24)
        assert clip.video.dtype == torch.float32
        assert clip.video.is_contiguous()
        assert clip.source_size == (72, 128)

    @pytest.mark.parametrize(
        ("suffix", "codec", "pix_fmt"),
        [
            (".mp4", "libx264", "yuv420p"),
            (".mov", "mjpeg", "yuvj420p"),
            (".mov", "prores_ks", "yuv422p10le"),
            (".mkv", "ffv1", "yuv420p10le"),
            (".mkv", "ffv1", "gray"),
            (".mkv", "ffv1", "bgra"),
            (".webm", "libvpx-vp9", "yuv420p"),
        ],
    )
    def test_black_grey_and_white(self, tmp_path, suffix, codec, pix_fmt):
        picture = np.zeros((72, 144, 3), np.uint8)
        picture[:, 48:96], picture[:, 96:] = 128, 255
        path = write_video(tmp_path / f"v{suffix}", [picture] * 3, codec=codec, pix_fmt=pix_fmt)
        clip = read_clip(path, frames=1, size=(36, 72))
        values = clip.video[:, 0, 18, [12, 36, 60]]
        expected = torch.tensor([-1, 1 / 255, 1]).expand(3, 3)
        assert torch.allclose(values, expected, atol=3 / 127.5)
        assert clip.video.min() >= -1
        assert clip.video.max() <= 1

    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize(
        ("matrix", "k_red", "k_blue"),
        [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (6, 0.299, 0.114), (9, 0.2627, 0.0593)],
    )
    def test_colour_matrix_and_range(self, tmp_path, matrix, k_red, k_blue, full):
        """BT.709, BT.601 (twice) and BT.2020 write the same colour differently."""
        colour = red, green, blue = 200, 90, 50
        luma = k_red * red + (1 - k_red - k_blue) * green + k_blue * blue
        planes = np.empty((3, 72, 128), np.uint8)
        planes[0] = round(luma if full else 16 + luma * 219 / 255)
        for plane, value, k in ((1, blue, k_blue), (2, red, k_red)):
            chroma = (value - luma) / (2 - 2 * k)
            planes[plane] = round(128 + chroma * (1 if full else 224 / 255))
        path = write_video(
            tmp_path / "v.mkv",
            [planes] * 2,
            source="yuv444p",
            codec="ffv1",
            pix_fmt="yuv444p",
            context={"colorspace": matrix, "color_range": 2 if full else 1},
        )
        assert math.dist(rgb(read_clip(path, frames=1), 18, 32), colour) < 4

    @pytest.mark.parametrize("box", [np.s_[:, 36:164], np.s_[24:96, :]])
    def test_crop_is_central_and_no_more_than_needed(self, tmp_path, box):
        """Blue is what must go; the outermost lines of what must stay are green."""
        height, width = (72, 200) if box[0] == np.s_[:] else (120, 128)
        picture = np.full((height, width, 3), COLOURS["B"], np.uint8)
        inside = picture[box]
        inside[:] = COLOURS["R"]
        inside[[0, -1]] = inside[:, [0, -1]] = COLOURS["G"]
        path = write_video(tmp_path / "v.mkv", [picture], **LOSSLESS)
        clip = read_clip(path, frames=1, size=(72, 128), framerate=25)
        assert clip.source_size == (height, width)
        expected = torch.from_numpy(inside.copy()).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.allclose(clip.video[:, 0], expected, atol=1e-6)

    def test_resize_keeps_the_shape_of_things(self, tmp_path):
        picture = np.zeros((144, 300, 3), np.uint8)
        picture[36:108, 114:186] = 255  # a square in the middle
        path = write_video(tmp_path / "v.mkv", [picture], **LOSSLESS)
        white = read_clip(path, frames=1, framerate=25).video[0, 0] > 0
        assert white.sum(0).max() == white.sum(1).max() == 18
        assert torch.equal(white, white.flip(0))
        assert torch.equal(white, white.flip(1))

    def test_resize_averages_what_it_leaves_out(self, tmp_path):
        picture = np.zeros((288, 512, 3), np.uint8)
        picture[::8] = 255
        path = write_video(tmp_path / "v.mkv", [picture], **LOSSLESS)
        inside = read_clip(path, frames=1, framerate=25).video[:, :, 2:-2]
        assert torch.allclose(inside, torch.full_like(inside, 2 / 8 - 1), atol=0.01)

    def test_upscaling(self, tmp_path):
        path = write_video(tmp_path / "v.mkv", [quadrants(18, 32)], **LOSSLESS)
        clip = read_clip(path, frames=1, size=(288, 512), framerate=25)
        assert clip.video.shape == (3, 1, 288, 512)
        assert corners(clip) == "RGBW"

    def test_pixels_that_are_not_square(self, tmp_path):
        wide = {"sample_aspect_ratio": Fraction(2, 1)}
        path = write_video(tmp_path / "v.mp4", [quadrants(72, 64)] * 2, context=wide)
        clip = read_clip(path, frames=1)
        assert clip.source_size == (72, 128)
        assert corners(clip) == "RGBW"
        narrow = read_clip(path, frames=1, size=(72, 64))
        assert narrow.source_size == (72, 128)
        set_matrix(path, 0, 1, -1, 0)
        assert read_clip(path, frames=1).source_size == (128, 72)

    def test_a_crop_of_wide_pixels(self, tmp_path):
        """40 columns of pixels twice as wide as high make 80: a square needs 36 of them."""
        picture = np.full((72, 40, 3), COLOURS["B"], np.uint8)
        picture[:, 2:38] = COLOURS["R"]
        path = write_video(
            tmp_path / "v.mp4",
            [picture] * 2,
            pix_fmt="yuv444p",
            context={"sample_aspect_ratio": Fraction(2, 1)},
            options={"crf": "1"},
        )
        clip = read_clip(path, frames=1, size=(36, 36))
        assert clip.source_size == (72, 80)
        assert [letter(clip, 18, column) for column in (0, 18, -1)] == ["R", "R", "R"]


class TestUpright:
    # The colours a player shows, row by row, of the picture RG over BW.
    TURNS = (
        ((0, 1, -1, 0), "BRWG"),  # 90 degrees clockwise, as of a phone held upright
        ((-1, 0, 0, -1), "WBGR"),
        ((0, -1, 1, 0), "GWRB"),
        ((-1, 0, 0, 1), "GRWB"),  # mirrored left to right
        ((1, 0, 0, -1), "BWRG"),
        ((0, 1, 1, 0), "RBGW"),
        ((0, -1, -1, 0), "WGBR"),
        ((2, 0, 0, 2), "RGBW"),  # only scaled
    )

    @pytest.fixture
    def path(self, tmp_path):
        return write_video(tmp_path / "turned.mp4", [quadrants()] * 3, movflags="faststart")

    @pytest.mark.parametrize(("matrix", "expected"), TURNS)
    def test_quarter_turns_and_mirrors(self, path, matrix, expected):
        set_matrix(path, *matrix)
        tall = matrix[0] == 0
        clip = read_clip(path, frames=2, size=(32, 16) if tall else (16, 32))
        assert corners(clip) == expected
        assert clip.source_size == ((128, 64) if tall else (64, 128))

    def test_ffmpeg_reads_the_same_turn(self, path):
        """Guards set_matrix: FFmpeg gives the angle counterclockwise."""
        set_matrix(path, *self.TURNS[0][0])
        with av.open(path) as container:
            assert next(container.decode(video=0)).rotation == -90

    def test_the_crop_is_of_the_upright_picture(self, path):
        set_matrix(path, 0, 1, -1, 0)
        clip = read_clip(path, frames=1, size=(32, 32))
        assert corners(clip) == "BRWG"
        wide = read_clip(path, frames=1, size=(16, 64))
        assert corners(wide) == "BRWG"

    @pytest.mark.parametrize("degrees", [45, 30, -135, 5])
    def test_other_angles_are_refused(self, path, degrees):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        set_matrix(path, c, s, -s, c)
        with pytest.raises(VideoError, match=rf"turned\.mp4: .* turned by {degrees} degrees"):
            read_clip(path, frames=1)


class TestImages:
    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt"),
        [
            ("i.png", "png", "rgb24"),
            ("i.jpg", "mjpeg", "yuvj420p"),
            ("i.bmp", "bmp", "bgr24"),
            ("i.tiff", "tiff", "rgb24"),
            ("misnamed.mp4", "png", "rgb24"),
        ],
    )
    def test_equal_frames_of_infinite_framerate(self, tmp_path, name, codec, pix_fmt):
        path = write_image(tmp_path / name, codec, pix_fmt, quadrants(72, 128))
        clip = read_clip(path, framerate=1000, start=1000)
        assert clip.framerate == math.inf
        assert clip.video.shape == (3, 16, 36, 64)
        assert clip.source_size == (72, 128)
        assert corners(clip) == "RGBW"
        assert torch.equal(clip.video, clip.video[:, :1].expand_as(clip.video))

    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt"),
        [
            ("i.webp", "libwebp", "yuv420p"),
            ("i.gif", "gif", "rgb8"),
            ("i.avif", "libsvtav1", "yuv420p"),
        ],
    )
    def test_images_with_a_container(self, tmp_path, name, codec, pix_fmt):
        path = write_video(tmp_path / name, [quadrants(72, 128)], codec=codec, pix_fmt=pix_fmt)
        clip = read_clip(path)
        assert clip.framerate == math.inf
        assert corners(clip) == "RGBW"

    def test_a_title_in_another_encoding(self, tmp_path):
        path = write_video(tmp_path / "v.mkv", count(20), title="Vorspann")
        path.write_bytes(path.read_bytes().replace(b"Vorspann", b"F\xfcr Elise"[:8]))
        assert indices(read_clip(path)) == on_screen(25, 24, 0)

    def test_alpha_is_dropped(self, tmp_path):
        picture = np.zeros((72, 128, 4), np.uint8)
        picture[..., 0] = 255
        path = write_image(tmp_path / "i.png", "png", "rgba", picture, source="rgba")
        assert rgb(read_clip(path, frames=1), 18, 32) == [255, 0, 0]

    def test_a_name_is_no_pattern(self, tmp_path):
        write_image(tmp_path / "shot01.png", "png", "rgb24", np.zeros((72, 128, 3), np.uint8))
        path = write_image(tmp_path / "shot%02d.png", "png", "rgb24", quadrants(72, 128))
        assert corners(read_clip(path)) == "RGBW"

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize(
        ("orientation", "expected"), [(1, "RGBW"), (3, "WBGR"), (6, "BRWG"), (8, "GWRB")]
    )
    def test_exif_orientation(self, tmp_path, order, orientation, expected):
        path = self.photograph(tmp_path, order, orientation)
        clip = read_clip(path, size=(32, 32))
        assert corners(clip) == expected
        assert clip.source_size == ((128, 64) if orientation > 4 else (64, 128))

    @staticmethod
    def photograph(folder, order, orientation):
        path = write_image(folder / "photograph.jpg", "mjpeg", "yuvj420p", quadrants())
        data = path.read_bytes()
        entries = [(0x0100, 4, 1, 128), (0x0112, 3, 1, orientation)]
        exif = b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order]
        exif += struct.pack(f"{order}IH", 8, len(entries))
        for tag, kind, length, value in entries:
            form = "HHIHxx" if kind == 3 else "HHII"
            exif += struct.pack(order + form, tag, kind, length, value)
        exif += bytes(4)
        path.write_bytes(
            data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
        )
        return path


class TestCommittedClip:
    @pytest.mark.parametrize("size", [(36, 64), (288, 512)])
    def test_reads(self, size):
        clip = read_clip(BUNNY, size=size)
        assert clip.video.shape == (3, 16, *size)
        assert clip.framerate == 24.0
        assert clip.source_size == (360, 640)
        assert clip.video.min() < -0.9
        assert clip.video.max() > 0.9
        motion = (clip.video[:, 1:] - clip.video[:, :-1]).abs().mean((0, 2, 3))
        assert motion.min() > 0.005

    def test_is_what_its_readme_says(self):
        data = BUNNY.read_bytes()
        assert len(data) < 500_000
        assert data.index(b"moov") < data.index(b"mdat")
        with av.open(BUNNY) as container:
            assert [stream.type for stream in container.streams] == ["video"]
            assert container.streams.video[0].frames == 64
        assert read_clip(BUNNY, frames=64, framerate=25).framerate == 25
        refuse(BUNNY, "too short", frames=65, framerate=25)
