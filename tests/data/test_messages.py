"""Turns: roles, keys, order and marks, in the words that training and inference share."""

import pytest

from internvl.data.messages import (
    Message,
    check_marks,
    check_order,
    count_marks,
    fill_marks,
    from_official,
    from_openai,
    in_order,
    unescape,
)
from internvl.errors import BadSample


def ask(*texts):
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 3, texts, strict=False)
    ]


@pytest.mark.parametrize(
    ("text", "marks", "plain"),
    [
        (r"<image> and \<image>", 1, "<image> and <image>"),
        (r"\<image>", 0, "<image>"),
        (r"\\<image>", 0, r"\<image>"),  # the word after a backslash
        ("<image><image>", 2, "<image><image>"),
        (r"\n<image>", 1, r"\n<image>"),
        (r"\<video> <image>", 1, "<video> <image>"),
        (r"a \ b \<img> \<Image>", 0, r"a \ b \<img> \<Image>"),
    ],
)
def test_a_backslash_makes_a_mark_a_word(text, marks, plain):
    assert count_marks(text, "<image>") == marks
    assert unescape(text) == plain
    filled = fill_marks(text, "<image>", lambda: "[]")
    assert filled.count("[]") == marks
    assert fill_marks(filled, "<image>", lambda: "no") == filled


def test_every_mark_gets_the_next_filling():
    left = ["a", "b"]
    assert fill_marks(r"<video> \<video> <video>", "<video>", lambda: left.pop(0)) == (
        r"a \<video> b"
    )


def test_marks_are_counted_in_questions_alone():
    messages = [
        Message("system", "<image>"),
        Message("user", "<image>"),
        Message("assistant", "<image>"),
    ]
    check_marks("x", messages, 1)
    with pytest.raises(BadSample) as error:
        check_marks("x line 2", messages, 0)
    assert str(error.value) == (
        "x line 2: 1 <image> mark in the questions, but 0 images; write one mark where each "
        r"image belongs, and \<image> (in JSON \\<image>) where the word is meant"
    )
    with pytest.raises(BadSample, match=r"0 <image> marks .*, but 2 images; [^\\]*belongs$"):
        check_marks("x", [Message("user", r"\<image>")], 2)
    with pytest.raises(BadSample, match=r"1 <video> mark .*, but 0 videos"):
        check_marks("x", [Message("user", "<video>")], 0)


BAD_TURNS = [
    ("Hello", r"`messages` must be a list; it is a str. Write \[{"),
    ({"role": "user", "content": "x"}, "must be a list; it is a dict"),
    (None, "must be a list; it is a NoneType"),
    (Message("user", "x"), "must be a list; it is a Message"),
    (
        [{"role": "human", "content": "x"}],
        "turn 1 is from 'human'; known: system, user, assistant$",
    ),
    ([Message("human", "x")], "turn 1 is from 'human'; known: system, user, assistant$"),
    ([{"role": "User", "content": "x"}], "turn 1 is from 'User'; known: system, user"),
    ([*ask("a", "b"), {"role": "tool", "content": "42"}], "turn 3 is from 'tool'; known:"),
    ([{"role": ["user"], "content": "x"}], r"turn 1 is from \['user'\]; known:"),
    ([{"from": "human", "value": "x"}], "from None; known: .* no key `role`, but from, value"),
    (["Hi"], "turn 1 is from None; .* an object with the key `role`, not str"),
    ([{}], "turn 1 is from None; known: "),
    ([{"role": "user"}], "turn 1 has no text under `content`"),
    ([{"role": "user", "content": None}], "turn 1 has no text under `content`"),
    ([{"role": "user", "content": 5}], "turn 1 has no text under `content`"),
    ([Message("user", 5)], "turn 1 has no text under `content`"),
    ([{"role": "user", "content": "a \ud83d"}], r"turn 1 has half of a character \(\\ud83d\)"),
    ([{"role": "user", "content": ["x"]}], "turn 1 has a part of type None; known: text, image"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "a part of type 'audio'; known"),
    (
        [*ask("a"), {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}],
        "turn 2 is from assistant and has a part of type 'image'; only questions may",
    ),
    (
        [*ask("a"), {"role": "assistant", "content": "b", "weight": 0}],
        r"turn 2 has the key `weight` \(0\), which would not be followed; remove it",
    ),
    ([*ask("a"), {"role": "assistant", "content": "b", "loss": False}], "the key `loss`"),
    ([*ask("a"), {"role": "assistant", "content": None, "tool_calls": [1]}], "key `tool_calls`"),
]


@pytest.mark.parametrize(("turns", "says"), BAD_TURNS)
@pytest.mark.parametrize("strict", [False, True])
def test_turns_that_are_refused(turns, says, strict):
    with pytest.raises(BadSample, match=f"^here: .*{says}"):
        from_openai("here", turns, strict=strict)


def test_keys_that_change_nothing():
    """As libraries hand messages back; a table gives every row every key."""
    nothing = {"refusal": None, "tool_calls": None, "annotations": [], "weight": 1, "loss": True}
    turns = [ask("a")[0], {"role": "assistant", "content": "b", **nothing}]
    messages, _ = from_openai("x", turns, strict=True)
    assert messages == (Message("user", "a"), Message("assistant", "b"))
    named = [{"role": "user", "content": "a", "name": "Ann"}]
    assert from_openai("x", named)[0] == (Message("user", "a"),)
    with pytest.raises(BadSample, match="turn 1 has the key `name`"):
        from_openai("x", named, strict=True)


def test_images_stand_in_the_order_of_their_marks():
    """A part's own image where the part is, the sample's at the other marks."""
    content = [
        {"type": "image", "image": "b.png", "image_url": None},
        {"type": "text", "text": r"<image> and \<image>"},
        {"type": "image_url", "image": None, "image_url": {"url": "d.png", "detail": "high"}},
        {"type": "image"},
        {"type": "image", "image": {"bytes": b"x", "path": None}},
    ]
    turns = [{"role": "system", "content": "<image>"}, {"role": "user", "content": content}]
    turns += [*ask("", "<image>", "<image>")[1:]]
    messages, slots = from_openai("x", turns)
    assert messages[1].content == (
        "<image>\n" + r"<image> and \<image>" + "<image>\n<image>\n<image>\n"
    )
    assert in_order(slots, "<image>", ["a", "c", "e"]) == [
        *("b.png", "a", "d.png", "c"),
        {"bytes": b"x", "path": None},
        "e",
    ]
    assert in_order(slots, "<image>", []) == ["b.png", "d.png", {"bytes": b"x", "path": None}]
    assert in_order([], "<image>", ["a"]) == ["a"]


@pytest.mark.parametrize(
    ("roles", "last", "says"),
    [
        ("", "user", "the conversation is empty"),
        ("s", "user", "the conversation is empty"),
        ("ua", "user", "it ends with an answer; add the question that is to be answered"),
        ("u", "assistant", "it ends with a question; add the answer or remove it"),
        ("suu", "user", "turns 2 and 3 are both from user; questions and answers must alternate"),
        ("usu", "user", "turn 2 is from system; only the first turn may be"),
        ("uas", "user", "turn 3 is from system; only the first turn may be"),
        ("ssu", "user", "turn 2 is from system; only the first turn may be"),
        ("uaau", "user", "turns 2 and 3 are both from assistant"),
    ],
)
def test_order(roles, last, says):
    names = {"s": "system", "u": "user", "a": "assistant"}
    with pytest.raises(BadSample, match=f"^here: {says}"):
        check_order("here", [Message(names[role], "x") for role in roles], last)


def test_official_turns():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u", "markdown": None},
        {"from": "gpt", "value": "a"},
    ]
    roles = [(m.role, m.content) for m in from_official("x", turns)]
    assert roles == [("system", "s"), ("user", "u"), ("assistant", "a")]
    with pytest.raises(BadSample, match="turn 1 is from 'user'; known: human, gpt, system"):
        from_official("x", [{"from": "user", "value": "u"}])
