"""Preference pairs in the forms of the original and of others, and rows that are refused."""

import pytest
from data_files import write_lines
from source_samples import opened, says

from internvl.data.records import Message

QUESTION, CHOSEN, REJECTED = "<image>\nWhat is it?", "A cat.", "A dog."
USER = {"role": "user", "content": QUESTION}
IMAGE = {"images": ["a.jpg"]}


def assistant(text):
    return {"role": "assistant", "content": text}


FORMS = {
    "original": {"image": "a.jpg", "question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED},
    "ms-swift": {
        **IMAGE,
        "messages": [USER, assistant(CHOSEN)],
        "rejected_response": REJECTED,
    },
    "ms-swift, messages": {
        **IMAGE,
        "messages": [USER, assistant(CHOSEN)],
        "rejected_messages": [USER, assistant(REJECTED)],
    },
    "LLaMA-Factory": {
        **IMAGE,
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": CHOSEN},
        "rejected": {"from": "gpt", "value": REJECTED},
    },
    "LLaMA-Factory, alpaca": {
        **IMAGE,
        "instruction": "<image>",
        "input": "What is it?",
        "chosen": CHOSEN,
        "rejected": REJECTED,
    },
    "TRL": {**IMAGE, "prompt": "What is it?", "chosen": CHOSEN, "rejected": REJECTED},
    "TRL, messages": {
        **IMAGE,
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}],
        "chosen": [assistant([{"type": "text", "text": CHOSEN}])],
        "rejected": [assistant([{"type": "text", "text": REJECTED}])],
    },
    "TRL, image parts": {
        **IMAGE,
        "prompt": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
            }
        ],
        "chosen": [assistant(CHOSEN)],
        "rejected": [assistant(REJECTED)],
    },
    "TRL, without a prompt": {
        **IMAGE,
        "chosen": [USER, assistant(CHOSEN)],
        "rejected": [USER, assistant(REJECTED)],
    },
}


@pytest.mark.parametrize("kind", ["preference", "chat"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(tmp_path, form, kind):
    file = write_lines(tmp_path / "x.jsonl", [FORMS[form]])
    (sample,) = opened(file, kind, images=tmp_path).samples([0])
    assert sample.messages == (Message("user", QUESTION), Message("assistant", CHOSEN))
    assert sample.rejected == REJECTED
    assert [path.rpartition("/")[2] for path in map(str, sample.images)] == ["a.jpg"]


def test_earlier_turns_and_a_system_message_come_before_both_answers(tmp_path):
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hi."},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "2 + 3?"},
        ],
        "chosen": {"from": "gpt", "value": "5"},
        "rejected": {"from": "gpt", "value": "6"},
    }
    (sample,) = opened(write_lines(tmp_path / "x.jsonl", [row]), "preference").samples([0])
    roles = [message.role for message in sample.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert (sample.messages[-1].content, sample.rejected) == ("5", "6")


def test_a_conversation_beside_other_keys_stays_one(tmp_path):
    row = {"messages": [USER, assistant(CHOSEN)], "rejected": "by a reviewer", **IMAGE}
    (sample,) = opened(write_lines(tmp_path / "x.jsonl", [row])).samples([0])
    assert sample.rejected is None
    assert sample.extra == {"rejected": "by a reviewer"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Q?", "chosen": "A", "rejected": " A\n"}, "answers are equal"),
        ({"question": "Q?", "chosen": "A", "rejected": ""}, "`rejected` must be a text that is"),
        ({"question": "Q?", "chosen": 5, "rejected": "A"}, "`chosen` must be a text that is"),
        ({"question": " ", "chosen": "A", "rejected": "B"}, "`question` must be a text"),
        ({"chosen": "A", "rejected": "B"}, "`question` must be a text .* keys are chosen, rej"),
        (
            {"messages": [USER, assistant("A")], "chosen": "B", "rejected": "C"},
            "ends with an answer, and `chosen` is another",
        ),
        (
            {"chosen": [USER, assistant("A")], "rejected": [assistant("B")]},
            "differ before the last answer",
        ),
        (
            {"question": "Q?", "chosen": "A", "rejected": "B", "rejected_images": ["b.jpg"]},
            "`rejected_images` would not be followed",
        ),
    ],
)
def test_bad_rows_say_why(tmp_path, row, reason):
    file = write_lines(tmp_path / "x.jsonl", [row])
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(says(opened(file, "preference")))
