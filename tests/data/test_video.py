"""Frames of videos: the original's rules, the files, and what is wrong with them."""

import os
import struct
from fractions import Fraction

import fsspec
import numpy as np
import pytest
from data_files import SHARED, picture
from PIL import Image

from internvl.config import VideoConfig
from internvl.data import video
from internvl.data.records import Message, Sample, Video
from internvl.errors import BadImage

av = pytest.importorskip("av")


def draw(seed=0):
    return np.random.default_rng(seed)


def exactly(count, sampling="rand"):
    return VideoConfig(min_frames=count, max_frames=count, sampling=sampling)


def test_rand_draws_one_frame_of_each_part_but_never_its_last():
    for seed in range(50):
        found = video.choose_frames(100, 10, exactly(8), draw(seed))
        bounds = np.linspace(0, 100, 9).astype(int)
        assert ((found >= bounds[:-1]) & (found < bounds[1:] - 1)).all()


def test_rand_falls_back_where_a_part_is_too_short():
    found = video.choose_frames(12, 10, exactly(8), draw())
    assert len(set(found.tolist())) == 8
    assert (np.diff(found) > 0).all()


def test_middle_is_uniform():
    found = video.choose_frames(100, 10, exactly(4, "middle"), draw())
    assert found.tolist() == [12, 37, 62, 87]


def test_a_short_video_repeats_its_last_frame():
    found = video.choose_frames(3, 10, exactly(5, "middle"), draw())
    assert found.tolist() == [0, 1, 2, 2, 2]


def test_frames_a_second():
    config = VideoConfig(max_frames=32, sampling="fps2")
    # Times 0.25, 0.75, … of a 3-second video at 10 frames a second; halves round to even.
    assert video.choose_frames(30, 10, config, draw()).tolist() == [2, 8, 12, 18, 22, 28]
    assert len(video.choose_frames(3000, 10, config, draw())) == 32


def test_their_number_is_drawn():
    counts = {len(video.choose_frames(500, 10, VideoConfig(), draw(s))) for s in range(300)}
    assert counts == set(range(8, 33))


def clip(path, num_frames=20, rate=10, size=(32, 24)):
    """A video whose frame i has the gray level 10 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            image = Image.new("RGB", size, (10 * number,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return str(path)


def levels(frames):
    return [round(np.asarray(frame).mean() / 10) for frame in frames]


def test_the_frames_asked_for_are_decoded(tmp_path):
    path = clip(tmp_path / "x.mp4")
    found = video.read_frames(Video(path), exactly(4, "middle"), draw())
    assert levels(found) == [2, 7, 12, 17]
    found = video.read_frames(Video(path, 0.5, 1.5), exactly(2, "middle"), draw())
    assert levels(found) == [7, 12]
    again = video.read_frames(Video("file://" + path), exactly(4, "middle"), draw())
    assert levels(again) == [2, 7, 12, 17]


def test_gifs_and_folders_of_frames(tmp_path):
    frames = [Image.new("RGB", (16, 16), (10 * i,) * 3) for i in range(12)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=100)
    found = video.read_frames(Video(str(tmp_path / "x.gif")), exactly(3, "middle"), draw())
    assert levels(found) == [1, 5, 9]
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"frame_{number}.png")
    found = video.read_frames(Video(f"{folder}/"), exactly(3, "middle"), draw())
    assert levels(found) == [1, 5, 9]
    assert len(video.read_frames(Video(f"{folder}/"), exactly(20), draw())) == 12


def test_what_cannot_be_read(tmp_path):
    path = clip(tmp_path / "x.mp4")
    (tmp_path / "half.mp4").write_bytes((tmp_path / "x.mp4").read_bytes()[:400])
    picture(tmp_path / "frames" / "no-number.jpg")
    for wrong, says in (
        (Video(str(tmp_path / "none.mp4")), "there is no video"),
        (Video(str(tmp_path / "none.gif")), "there is no video"),
        (Video(str(tmp_path / "half.mp4")), "cannot be decoded"),
        (Video(str(tmp_path / "frames") + "/"), "holds no frame named like"),
        (Video(str(tmp_path / "none") + "/"), "cannot be read"),
        (Video(path, 1.0, 9.0), "`clip` is 1 to 9 s, but the video lasts 2.00 s"),
    ):
        with pytest.raises(BadImage, match=says):
            video.read_frames(wrong, exactly(4), draw())


def sample(*questions, videos=1):
    messages = [m for q in questions for m in (Message("user", q), Message("assistant", "x"))]
    return Sample("here", tuple(messages), (), (Video("x.mp4"),) * videos)


def test_a_mark_becomes_a_line_per_frame():
    label = VideoConfig().label
    found = video.with_frames(sample("<video>\nWhat?"), [3], label)
    text = "Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>\nWhat?"
    assert found.messages[0].content == text
    two = video.with_frames(sample("<video>\nA?", "<video>\nB?", videos=2), [1, 2], "F{}: <image>")
    assert two.messages[2].content == "F1: <image>\nF2: <image>\nB?"
    for wrong, counts in ((sample("No mark"), [3]), (sample("<video><image>"), [3])):
        with pytest.raises(BadImage, match="write one mark where each video belongs"):
            video.with_frames(wrong, counts, label)
    words = video.with_frames(sample(r"<video>\<image> \<video>"), [1], label)
    assert words.messages[0].content == r"Frame-1: <image>\<image> \<video>"


CLIPS = SHARED / "data" / "video"


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no clips here")
@pytest.mark.parametrize(
    ("name", "size", "num_frames", "fps"),
    [
        ("cockatoo.mp4", (1280, 720), 280, 20),
        ("llamafactory_1.mp4", (640, 360), 243, 25),
        ("llamafactory_3.mp4", (640, 360), 146, 24000 / 1001),
        ("realshort.mp4", (320, 240), 36, 30.020013342228154),
    ],
)
def test_real_clips(name, size, num_frames, fps):
    path = str(CLIPS / name)
    wanted = video.choose_frames(num_frames, fps, exactly(6, "middle"), draw())
    with av.open(path) as container:
        every = [frame.to_image() for frame in container.decode(video=0)]
    assert len(every) == num_frames
    found = video.read_frames(Video(path), exactly(6, "middle"), draw())
    assert [frame.size for frame in found] == [size] * 6
    for frame, number in zip(found, wanted.tolist(), strict=True):
        assert np.array_equal(frame, every[number])


def seen(frames):
    """Numbers of frames, by their gray level."""
    return [round(np.asarray(frame).mean() / 6) for frame in frames]


def numbered(path, num_frames=40, codec="mpeg4", times_ms=None, container=None, **options):
    """A video whose frame i has the gray level 6 i, shown at i / 10 s or at `times_ms`."""
    with av.open(str(path), "w", container_options=container or {}) as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 4_000_000
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (6 * number,) * 3))
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def box(data, *names):
    """(start, end) of a box of an mp4 file, by the names of those that it is in."""
    start, end = 0, len(data)
    for name in names:
        while data[start + 4 : start + 8] != name:
            start += int.from_bytes(data[start : start + 4], "big")
        end = start + int.from_bytes(data[start : start + 4], "big")
        start += 8
    return start - 8, end


def with_edits(path, edits):
    """The mp4 file with another edit list: (duration, first) of each in ms, first -1 for nothing.

    Its moov lies last, so that no offset changes.
    """
    data = bytearray(path.read_bytes())
    media = box(data, b"moov", b"trak", b"mdia", b"mdhd")[0]
    scale = int.from_bytes(data[media + 20 : media + 24], "big")
    movie = int.from_bytes(data[box(data, b"moov", b"mvhd")[0] + 20 :][:4], "big")
    # With B-frames, what is decoded first is shown later than at 0.
    old = box(data, b"moov", b"trak", b"edts", b"elst")[0] + 20
    zero = int.from_bytes(data[old : old + 4], "big")
    entries = b"".join(
        struct.pack(
            ">IiI",
            length * movie // 1000,
            first if first < 0 else zero + first * scale // 1000,
            1 << 16,
        )
        for length, first in edits
    )
    table = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    new = struct.pack(">I4s", 8 + len(table), b"edts") + table
    start, end = box(data, b"moov", b"trak", b"edts")
    data[start:end] = new
    for names in ((b"moov",), (b"moov", b"trak")):
        at = box(data, *names)[0]
        size = int.from_bytes(data[at : at + 4], "big") + len(new) - (end - start)
        data[at : at + 4] = size.to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("options", [{}, {"bf": "2", "g": "9"}])
@pytest.mark.parametrize(
    ("edits", "shown"),
    [
        ([(3000, 1000)], range(10, 40)),  # the beginning hidden
        ([(1000, 1000)], range(10, 20)),  # and the end
        ([(500, -1), (4000, 0)], range(40)),  # shown half a second late
        ([(1000, 2000), (500, 500)], [*range(20, 30), *range(5, 10)]),  # put in another order
    ],
)
def test_an_edit_list_says_what_is_shown(tmp_path, edits, shown, options):
    path = with_edits(numbered(tmp_path / "x.mp4", **options), edits)
    found = seen(video.read_frames(Video(str(path)), exactly(8, "middle"), draw()))
    shown = list(shown)
    wanted = video.choose_frames(len(shown), 10, exactly(8, "middle"), draw())
    assert found == [shown[i] for i in wanted.tolist()]


UNIT = 1 << 16
MATRICES = {
    # a, b, c, d, and what numpy makes of the stored pixels
    "90": ((0, 1, -1, 0), lambda p: p.swapaxes(0, 1)[:, ::-1]),
    "180": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "270": ((0, -1, 1, 0), lambda p: p.swapaxes(0, 1)[::-1]),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), lambda p: p[::-1, ::-1].swapaxes(0, 1)),
    "as stored": ((1, 0, 0, 1), lambda p: p),
    "askew": ((0.7, 0.7, -0.7, 0.7), lambda p: p),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_turns_the_frames(tmp_path, name):
    path = tmp_path / "x.mp4"
    colors = np.random.default_rng(1).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((64, 48))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    (stored,) = video.read_frames(Video(str(path)), exactly(1), draw())
    (a, b, c, d), turn = MATRICES[name]
    data = bytearray(path.read_bytes())
    header = box(data, b"moov", b"trak", b"tkhd")[0]
    matrix = [int(v * UNIT) for v in (a, b, 0, c, d, 0, 0, 0)]
    data[header + 48 : header + 84] = struct.pack(">9i", *matrix, 1 << 30)
    path.write_bytes(data)
    (shown,) = video.read_frames(Video(str(path)), exactly(1), draw())
    assert np.array_equal(np.asarray(shown), turn(np.asarray(stored)))


# Frames 0 to 9 a second apart, then 10 to 29 ten a second.
UNEVEN_MS = [1000 * n for n in range(10)] + [10000 + 100 * n for n in range(20)]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_clip_is_in_seconds_where_frames_are_not_even(tmp_path, ending):
    path = str(numbered(tmp_path / f"x.{ending}", 30, times_ms=UNEVEN_MS))
    for start, end, shown in (
        (2.0, 5.0, [2, 3, 4]),
        (2.5, 4.5, [2, 3, 4]),  # what is on the screen then
        (3.2, 3.4, [3]),
        (10.0, 11.0, range(10, 20)),
        (9.5, 10.25, [9, 10, 11, 12]),
    ):
        found = video.read_frames(Video(path, start, end), exactly(len(shown), "middle"), draw())
        assert seen(found) == list(shown), (start, end)
    # Without `clip`, frames are counted, as in the original.
    found = video.read_frames(Video(path), exactly(3, "middle"), draw())
    assert seen(found) == [4, 14, 24]
    with pytest.raises(BadImage, match=r"`clip` is 5 to 20 s, but the video lasts 1\d\.\d+ s"):
        video.read_frames(Video(path, 5.0, 20.0), exactly(3), draw())


def test_clip_of_an_animation_follows_its_durations(tmp_path):
    frames = [Image.new("RGB", (16, 16), (6 * i,) * 3) for i in range(6)]
    times = [100, 100, 100, 2000, 100, 100]
    for ending in ("gif", "GIF", "webp", "png"):
        path = tmp_path / f"x.{ending}"
        more = {"lossless": True} if ending == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, **more)
        for start, end, shown in ((0.0, 0.3, [0, 1, 2]), (1.0, 2.0, [3]), (2.2, 2.5, [3, 4, 5])):
            config = exactly(len(shown), "middle")
            assert seen(video.read_frames(Video(str(path), start, end), config, draw())) == shown
        assert len(video.read_frames(Video(str(path)), exactly(4, "middle"), draw())) == 4


def test_a_video_shorter_than_a_step_is_its_middle_frame():
    config = VideoConfig(max_frames=4, sampling="fps1")
    assert video.choose_frames(3, 10, config, draw()).tolist() == [1]
    # A header that says years costs nothing.
    assert video.choose_frames(10, 1e-9, config, draw()).tolist() == [0] * 4


def test_clip_of_a_part_or_beyond_all_measure(tmp_path):
    path = clip(tmp_path / "x.mp4")
    assert levels(video.read_frames(Video(path, 0.32, 0.36), exactly(1), draw())) == [3]
    for end in (1e9, 1e300):
        with pytest.raises(BadImage, match="but the video lasts 2.00 s"):
            video.read_frames(Video(path, 0.0, end), exactly(1), draw())


def test_a_cover_is_not_the_video(tmp_path):
    path, cover = tmp_path / "x.mp4", tmp_path / "c.mp4"
    numbered(path, 10)
    Image.new("RGB", (320, 240), "red").save(tmp_path / "cover.jpg")
    with (
        av.open(str(path)) as moving,
        av.open(str(tmp_path / "cover.jpg")) as still,
        av.open(str(cover), "w") as out,
    ):
        streams = [out.add_stream_from_template(c.streams.video[0]) for c in (still, moving)]
        streams[0].disposition = av.stream.Disposition.attached_pic
        for container, stream in zip((still, moving), streams, strict=True):
            for packet in container.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    found = video.read_frames(Video(str(cover)), exactly(5, "middle"), draw())
    assert [frame.size for frame in found] == [(64, 48)] * 5
    assert seen(found) == seen(video.read_frames(Video(str(path)), exactly(5, "middle"), draw()))


def test_files_that_are_no_video_or_end_early(tmp_path):
    path = numbered(tmp_path / "x.mkv", num_frames=40)
    data = path.read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    with av.open(str(tmp_path / "sound.mka"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    (tmp_path / "text.gif").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "page.mp4").write_bytes(b"<!DOCTYPE html><html>Login</html>")
    (tmp_path / "xl.mp4").write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64))
    whole = numbered(tmp_path / "whole.mp4").read_bytes()  # its index is the end
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (64, 48)).save(tmp_path / "still.mp4", "TIFF")
    for name, says in (
        ("half.mkv", "ends earlier than its header says; the file is truncated"),
        ("sound.mka", "has no video stream"),
        ("pipe.mp4", "is a pipe or a device"),
        ("empty.mp4", r"empty \(0 bytes\): the download did not finish, download it again$"),
        ("text.mp4", "a Git LFS pointer instead of the file: run `git lfs pull` in its folder$"),
        ("text.gif", "a Git LFS pointer instead of the file: run `git lfs pull` in its folder$"),
        ("page.mp4", "a web page, such as a login or an error: download it again$"),
        ("xl.mp4", "a JPEG XL image: convert it to JPEG or PNG$"),
        ("cut.mp4", "the video cannot be decoded .*; replace the file$"),
        ("still.mp4", r"an image \(TIFF\), not a video: name it under `image`$"),
        ("x\0.mp4", "cannot be read"),
    ):
        with pytest.raises(BadImage, match=says) as caught:
            video.read_frames(Video(str(tmp_path / name)), exactly(3), draw())
        assert str(caught.value).count(name) == 1


@pytest.mark.parametrize("percent", [70, 95, 97, 99])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_matroska_file_of_fewer_bytes_than_it_says(tmp_path, codec, percent):
    """Frames that others refer to may be lost without a gap at the end of their times."""
    path = numbered(tmp_path / "x.mkv", num_frames=20, codec=codec)
    data = path.read_bytes()
    cut = data[: len(data) * percent // 100]
    (tmp_path / "cut.mkv").write_bytes(cut)
    for name in ("cut.mkv", "memory://cut.mkv"):
        if "://" in name:
            fsspec.filesystem("memory").pipe("/cut.mkv", cut)
        given = name if "://" in name else str(tmp_path / name)
        with pytest.raises(BadImage, match="cut.mkv ends earlier than its header says; .* again$"):
            video.read_frames(Video(given), exactly(20, "middle"), draw())


def test_a_matroska_stream_that_does_not_say_its_size(tmp_path):
    """Written without going back, it is measured by its times alone; more behind it is no harm."""
    wanted = seen(video.read_frames(Video(str(numbered(tmp_path / "x.mkv"))), exactly(9), draw()))
    live = numbered(tmp_path / "live.mkv", container={"live": "1"})
    (tmp_path / "more.mkv").write_bytes((tmp_path / "x.mkv").read_bytes() + bytes(99))
    for path in (live, tmp_path / "more.mkv"):
        assert seen(video.read_frames(Video(str(path)), exactly(9), draw())) == wanted


def test_streams_that_cannot_go_back(tmp_path):
    """MPEG-TS and bare MPEG-4: no index, no count of frames."""
    for ending in ("ts", "m4v", "avi", "mkv"):
        path = numbered(tmp_path / f"x.{ending}")
        found = video.read_frames(Video(str(path)), exactly(4, "middle"), draw())
        assert seen(found) == [4, 14, 24, 34], ending


def test_damaged_videos_are_read_or_named(tmp_path):
    random, sentences, num_read = np.random.default_rng(4), [], 0
    for ending in ("mp4", "mkv", "ts", "gif", "avi"):
        path = tmp_path / f"x.{ending}"
        if ending == "gif":
            frames = [Image.new("RGB", (16, 16), (6 * i,) * 3) for i in range(6)]
            frames[0].save(path, save_all=True, append_images=frames[1:])
        else:
            numbered(path, 12)
        whole = path.read_bytes()
        for number in range(25):
            data = bytearray(whole)
            for _ in range(int(random.integers(1, 5))):
                at = int(random.integers(len(data)))
                data[at : at + 4] = (b"\xff" * 4, b"\0" * 4, random.bytes(4))[random.integers(3)]
            path.write_bytes(data if number % 3 else data[: int(random.integers(1, len(data)))])
            config = exactly(3, ("middle", "rand", "fps2")[number % 3])
            part = (0.2, 0.6) if number % 2 else ()
            try:
                num_read += len(video.read_frames(Video(str(path), *part), config, draw())) > 0
            except BadImage as error:
                sentences.append(str(error))
    assert min(num_read, len(sentences)) > 20
    assert all(str(tmp_path) in sentence for sentence in sentences)


def test_a_mistake_of_our_own_is_seen(tmp_path, monkeypatch):
    path = clip(tmp_path / "x.mp4")

    def planted(*args):
        raise KeyError("planted")

    for name in ("_choose_indices", "_orient", "_clip_range", "choose_frames", "check_file"):
        with monkeypatch.context() as patch:
            patch.setattr(video, name, planted)
            with pytest.raises(KeyError, match="planted"):
                video.read_frames(Video(path, 0.1, 0.5), exactly(2), draw())


SHOWN = SHARED / "cases"


@pytest.mark.skipif(not SHOWN.is_dir(), reason="no turned or cut clips here")
def test_turned_and_cut_clips():
    path = str(SHOWN / "rotated-video" / "rot90.mp4")
    (frame,) = video.read_frames(Video(path), exactly(1, "middle"), draw())
    pixels = np.asarray(frame).astype(int)
    assert pixels.shape == (64, 48, 3)
    assert pixels[32, -2, 1] > 200 > 60 > pixels[32, -2, 0]  # green at the right
    assert pixels[1, 24, 2] > 200 > 60 > pixels[1, 24, 0]  # blue on top
    path = str(SHOWN / "trimmed-video" / "trim.mp4")
    with av.open(path) as container:
        every = [frame.to_image() for frame in container.decode(video=0)]
    found = video.read_frames(Video(path), exactly(4, "middle"), draw())
    assert len(every) == 34
    for frame, number in zip(found, (3, 12, 20, 29), strict=True):
        assert np.array_equal(frame, every[number])
