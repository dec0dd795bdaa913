"""Frames of videos: the original's rules, the files, and what is wrong with them."""

import numpy as np
import pytest
from data_files import SHARED, picture
from PIL import Image

from internvl.config import VideoConfig
from internvl.data import video
from internvl.data.images import BadImage
from internvl.data.records import Message, Sample, Video

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
