"""read_clip: every file and argument it must refuse, and how it says so."""

import math
import os
import sys

import av
import numpy as np
import pytest
import torch
from video_files import (
    barcode,
    count,
    damage,
    indices,
    on_screen,
    packets,
    quadrants,
    refuse,
    write_image,
    write_video,
)

from snapvideo_core.video import VideoError, read_clip


class TestRefusals:
    def test_missing_file(self, tmp_path):
        refuse(tmp_path / "none.mp4", "No such file")

    def test_directory(self, tmp_path):
        refuse(tmp_path, "directory")

    def test_empty_file(self, tmp_path):
        path = tmp_path / "v.mp4"
        path.touch()
        refuse(path, "empty")

    @pytest.mark.parametrize("name", ["notes.mp4", "notes.txt", "notes.png", "notes"])
    def test_text(self, tmp_path, name):
        """FFmpeg by itself plays notes.txt as a film of its letters."""
        path = tmp_path / name
        path.write_text("Not a film, only words.\n" * 200)
        refuse(path, "not a video or image")

    @pytest.mark.parametrize(
        ("name", "codec"), [("sound.wav", "pcm_s16le"), ("sound.mp4", "aac"), ("s.mp3", "mp3")]
    )
    def test_audio_only(self, tmp_path, name, codec):
        path = tmp_path / name
        self.write_sound(path, codec)
        refuse(path, "no video or image among its streams: audio")

    def test_audio_with_a_cover(self, tmp_path):
        path, cover = tmp_path / "sound.m4a", tmp_path / "cover.png"
        write_image(cover, "png", "rgb24", quadrants())
        self.write_sound(path, "aac", cover=cover.read_bytes())
        refuse(path, "no video or image among its streams: audio, cover")

    @staticmethod
    def write_sound(path, codec, cover=None):
        with av.open(path, "w", format="mp4" if path.suffix == ".m4a" else None) as container:
            stream = container.add_stream(codec, rate=44100)
            stream.layout = "mono"
            if cover:
                picture = container.add_stream("png", rate=1)
                picture.width, picture.height, picture.pix_fmt = 128, 64, "rgb24"
                picture.disposition = av.stream.Disposition.attached_pic.value
                packet = av.Packet(cover)
                packet.stream, packet.pts, packet.dts = picture, 0, 0
                container.mux(packet)
            form = {"pcm_s16le": "s16", "mp3": "s16p", "aac": "fltp"}[codec]
            samples = np.zeros((1, 1024), {"s16": "i2", "s16p": "i2", "fltp": "f4"}[form])
            for k in range(40):
                frame = av.AudioFrame.from_ndarray(samples, format=form, layout="mono")
                frame.sample_rate, frame.pts = 44100, 1024 * k
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

    def test_no_frames(self, tmp_path):
        path = tmp_path / "v.mp4"
        with av.open(path, "w", options={"movflags": "empty_moov"}) as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 128, 72, "yuv420p"
            container.start_encoding()
        refuse(path, "no frame that can be decoded")

    def test_unknown_codec(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", count(20))
        data = path.read_bytes()
        where = data.index(b"avc1", data.index(b"stsd"))
        path.write_bytes(data[:where] + b"zzzz" + data[where + 4 :])
        refuse(path, "no decoder")

    def test_too_short(self, movie):
        message = refuse(movie, r"too short: lasts 75 frames \(3\.000 s\)", frames=75)
        assert "75 frames at 24 fps from 0 s on need 3.08333 s" in message
        refuse(movie, r"too short.*from 2\.5 s on need 3\.125 s", start=2.5)
        refuse(movie, "too short", frames=1, start=3.0)

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
    @pytest.mark.parametrize("start", [7, 9, 1e6, 1e300])
    def test_start_near_or_past_the_end(self, tmp_path, suffix, start):
        path = write_video(tmp_path / f"v{suffix}", count(75), rate=10)
        refuse(path, r"too short: lasts .*7\.500 s", framerate=10, start=start)

    def test_framerate_above_the_source(self, movie):
        refuse(movie, "25 frames per second, fewer than the 25.3 asked for", framerate=25.3)
        refuse(movie, "25 frames per second, fewer than the 30 asked for", framerate=30)
        assert read_clip(movie, framerate=25.2).framerate == 25

    def test_index_cut_off(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", count(50))
        data = path.read_bytes()
        assert data.index(b"moov") > data.index(b"mdat")
        path.write_bytes(data[: data.index(b"moov") - 4])
        refuse(path, "not a video or image, or its header is damaged or cut off")

    @pytest.mark.parametrize("within", [0.0, 0.5])
    def test_data_cut_off(self, movie, tmp_path, within):
        """Before or within the packet of a frame: what comes before can still be had."""
        path = tmp_path / "v.mp4"
        position, size = next((pos, size) for index, pos, size in packets(movie) if index == 48)
        path.write_bytes(movie.read_bytes()[: position + int(size * within)])
        assert indices(read_clip(path, framerate=25, start=1)) == list(range(25, 41))
        assert indices(read_clip(path, frames=48, framerate=25)) == list(range(48))
        refuse(path, r"truncated or damaged after 48 frames \(1\.920 s\)", frames=60)
        refuse(path, "truncated", frames=1, start=1.95)
        refuse(path, r"truncated or damaged|too short", start=5)

    @pytest.mark.parametrize("within", [0.0, 0.7])
    def test_data_cut_off_near_the_end(self, tmp_path, within):
        """No frame stands in for another that is lost, in whatever order they are stored."""
        path, cut = tmp_path / "v.mp4", tmp_path / "cut.mp4"
        write_video(path, count(30, noise=True), movflags="faststart")
        whole = read_clip(path, frames=30, framerate=25)
        for _, position, size in packets(path)[-4:]:
            cut.write_bytes(path.read_bytes()[: position + int(size * within)])
            with pytest.raises(VideoError, match="truncated"):
                read_clip(cut, frames=30, framerate=25)
            had = 0
            for index in range(20, 30):
                try:
                    clip = read_clip(cut, frames=1, start=index / 25)
                except VideoError:
                    continue
                assert torch.equal(clip.video, whole.video[:, [index]])
                had += 1
            assert had >= 4

    def test_matroska_cut_off(self, tmp_path):
        path = write_video(tmp_path / "v.mkv", count(75, noise=True))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert indices(read_clip(path)) == on_screen(25, 24, 0)
        refuse(path, r"truncated or damaged after \d+ frames .*: 3\.000 s are declared", frames=70)

    def test_avi_cut_off(self, tmp_path):
        """AVI has no times of display: what follows a cut among reordered frames is not trusted."""
        path, cut = tmp_path / "v.avi", tmp_path / "cut.avi"
        write_video(path, count(60, noise=True))
        whole = read_clip(path, frames=60, framerate=25)
        data, refused = path.read_bytes(), 0
        for kept in range(55, 95, 4):
            cut.write_bytes(data[: len(data) * kept // 100])
            for index in range(30, 60, 3):
                try:
                    clip = read_clip(cut, frames=1, start=index / 25)
                except VideoError:
                    refused += 1
                    continue
                assert torch.equal(clip.video, whole.video[:, [index]])
        assert 0 < refused < 100

    @pytest.mark.parametrize("slices", [1, 4])
    def test_damaged_data(self, tmp_path, slices):
        options = {"x264-params": f"slices={slices}", "crf": "30"}
        path = write_video(tmp_path / "v.mp4", count(50, noise=True), options=options)
        damage(path, range(24, 25))
        assert indices(read_clip(path)) == on_screen(25, 24, 0)
        refuse(path, r"truncated or damaged after 2\d frames", frames=40)

    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt"),
        [("i.png", "png", "rgb24"), ("i.jpg", "mjpeg", "yuvj420p"), ("i.bmp", "bmp", "bgr24")],
    )
    def test_image_cut_off(self, tmp_path, name, codec, pix_fmt):
        path = write_image(tmp_path / name, codec, pix_fmt, barcode(3, noise=True))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refuse(path, "truncated or damaged")

    @pytest.mark.parametrize("frames", [1, 20])
    def test_gif_cut_off(self, tmp_path, frames):
        """FFmpeg shows what there is of a cut GIF's last frame and says nothing."""
        path = write_video(tmp_path / "i.gif", count(frames), codec="gif", pix_fmt="rgb8")
        whole = path.read_bytes()
        path.write_bytes(whole + bytes(3))
        read_clip(path, frames=frames, framerate=25)
        for kept in (30, 90):
            path.write_bytes(whole[: len(whole) * kept // 100])
            refuse(path, "truncated: the GIF lacks its trailer")

    def test_nothing_is_printed(self, movie, tmp_path, capfd):
        path = tmp_path / "v.mp4"
        path.write_bytes(movie.read_bytes()[: movie.stat().st_size // 2])
        refuse(path, "truncated", frames=70)
        damage(movie_copy := tmp_path / "w.mp4", range(5), movie)
        refuse(movie_copy, "damaged")
        path.write_text("words")
        refuse(path, "not a video")
        assert capfd.readouterr() == ("", "")

    def test_no_file_stays_open(self, movie, tmp_path):
        path = tmp_path / "v.mp4"
        path.write_bytes(movie.read_bytes()[: movie.stat().st_size // 2])
        text = tmp_path / "notes.txt"
        text.write_text("words")
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            read_clip(movie)
            refuse(path, "truncated", frames=70)
            refuse(movie, "frames per second", framerate=30)
            refuse(text, "not a video")
        assert len(os.listdir("/proc/self/fd")) == len(before)


class TestArguments:
    @pytest.mark.parametrize(
        ("argument", "value", "allowed"),
        [
            ("frames", 0, "positive integer"),
            ("frames", -3, "positive integer"),
            ("frames", 2.5, "positive integer"),
            ("size", (0, 64), "two positive integers"),
            ("size", (36, -64), "two positive integers"),
            ("size", (36.0, 64), "two positive integers"),
            ("size", (36, 64, 3), "two positive integers"),
            ("size", 36, "two positive integers"),
            ("framerate", 0, "positive"),
            ("framerate", -24.0, "positive"),
            ("framerate", math.inf, "finite"),
            ("framerate", math.nan, "finite"),
            ("start", -0.1, "at least 0"),
            ("start", math.inf, "finite"),
            ("start", math.nan, "finite"),
        ],
    )
    def test_out_of_range(self, tmp_path, argument, value, allowed):
        """Arguments are judged first: the file need not exist."""
        with pytest.raises(ValueError, match=f"^{argument} must be .*{allowed}") as caught:
            read_clip(tmp_path / "none.mp4", **{argument: value})
        assert not isinstance(caught.value, VideoError)
        assert str(caught.value).endswith(f"got {value!r}")

    def test_path_as_text(self, movie):
        assert torch.equal(read_clip(str(movie)).video, read_clip(movie).video)

    def test_without_pyav(self, movie, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match=r'pip install "snapkernels\[video\]"'):
            read_clip(movie)
