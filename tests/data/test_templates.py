"""Templates by name, and prompts spelt out."""

import pytest

from internvl.data.templates import TEMPLATES, template

SPELT = {
    "Hermes-2": "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\nYes<|im_end|>",
    "internvl2_5": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
    "phi3-chat": "<|user|>\nHi<|end|><|assistant|>\nYes<|end|>",
    "internvl_zh": "<human>: Hi <bot>: Yes</s>",
    "vicuna_v1.1": "USER: Hi ASSISTANT: Yes</s>",
}


@pytest.mark.parametrize("name", SPELT)
def test_a_turn(name):
    t = template(name)
    question = t.user[0] + "Hi" + t.user[1]
    assert question + t.assistant + t.lead + "Yes" + t.end + t.after == SPELT[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_opens_as_training_does(name):
    assert template(name).open == template(name).assistant


def test_an_unknown_name():
    with pytest.raises(ValueError, match="unknown conversation template 'chatml'; known: Hermes-2"):
        template("chatml")
