"""The tables "From the original's quick start" of the guides: every line of ours runs."""

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_folders import prompt_folder
from dual_folders import dual_folder, small_tokenizer
from PIL import Image

import internvl
from internvl.errors import UserError
from internvl.inference.generate import Settings

DOCS = Path(__file__).parent.parent / "docs"
HEADING = "From the original's quick start"


def lines_of(page: str) -> list[tuple[str, list[str]]]:
    """(calls of the original, lines of ours) of every row of the table of a guide."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"# {HEADING}\n")[1]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", section.split("\n#")[0], re.MULTILINE)
    return [(theirs, re.findall(r"`([^`]+)`", ours)) for theirs, ours in rows[1:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the files that the lines name; answers are cut to 6 tokens."""
    monkeypatch.chdir(tmp_path)
    colors = np.random.default_rng(0)
    for number in (1, 2):
        pixels = colors.integers(0, 256, (90, 100 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"image{number}.jpg")
    whole = Settings.generation_config

    def cut(self, *ids):
        return whole(replace(self, max_new_tokens=min(6, self.max_new_tokens)), *ids)

    # Untrained models do not end, and every line would take 1,024 tokens.
    monkeypatch.setattr(Settings, "generation_config", cut)
    return tmp_path


def write_video(file: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for shade in range(20):
            image = np.full((64, 96, 3), 10 * shade, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_every_line_for_a_chat_model_runs(folder):
    prompt_folder("internlm2.internlm2-chat", folder / "pretrained" / "InternVL2-2B")
    write_video(folder / "red-panda.mp4")
    names = {"internvl": internvl, "torch": torch}
    ran = []
    for theirs, ours in lines_of("models.md"):
        assert ours, theirs
        for line in ours:
            # bitsandbytes rounds on a CPU too; without it the line is refused by name.
            if "quantize=" in line and find_spec("bitsandbytes") is None:
                with pytest.raises(UserError):
                    exec(line, names)
                continue
            exec(line, names)
            ran.append(line)
            for name in ("response", "responses", "pieces"):
                texts = names.get(name, "")
                assert isinstance("".join(texts), str), line
    assert len(ran) > 30
    assert len(names["history"]) == 1
    assert names["talk"].history[1][0] == "What is the woman doing?"
    assert len(names["responses"]) == 2


def test_the_example_of_answers_runs(folder, capsys):
    prompt_folder("internlm2.internlm2-chat", folder / "pretrained" / "InternVL2-2B")
    write_video(folder / "walk.mp4")
    for number, name in ((1, "cat.jpg"), (2, "dog.jpg")):
        (folder / f"image{number}.jpg").rename(name)
    section = (DOCS / "models.md").read_text(encoding="utf-8").split("\n## Answers\n")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    names = {}
    exec(code, names)
    assert len(names["talk"].history) == 3
    assert capsys.readouterr().out.strip() == names["talk"].history[1][1]


def test_every_line_for_internvl_14b_runs(folder):
    small_tokenizer(dual_folder(folder / "pretrained" / "InternVL-14B-224px"))
    names = {"internvl": internvl, "torch": torch}
    for theirs, ours in lines_of("retrieval.md"):
        assert ours, theirs
        for line in ours:
            exec(line, names)
    torch.testing.assert_close(names["probs"].sum(-1), torch.ones(2))
    assert names["logits_per_image"].shape == (2, 2)
    assert isinstance(names["caption"], str)


def test_the_table_has_every_call_of_the_original():
    theirs = "\n".join(
        calls for page in ("models.md", "retrieval.md") for calls, _ in lines_of(page)
    )
    for call in (
        *("AutoModel.from_pretrained", "AutoTokenizer", "load_in_8bit", "load_in_4bit"),
        *("split_model", "device_map", "load_image", "generation_config", "do_sample=True"),
        *("model.chat(tokenizer, None", "history=history, return_history=True", "torch.cat"),
        *("num_patches_list=", "model.batch_chat", "load_video", "bound=", "TextIteratorStreamer"),
        *("pipe(", "pipe.chat", "session=sess", 'mode="InternVL-C"', 'mode="InternVL-G"'),
        "model.generate(pixel_values",
    ):
        assert call in theirs
