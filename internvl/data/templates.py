"""Conversation templates as data (original: `internvl_chat/internvl/conversation.py`).

A prompt is the concatenation of segments, one per turn. Every template of the released models fits
a few strings; the encoder in chat.py reads them and knows no template by name.
"""

import json
from dataclasses import dataclass

from internvl.errors import UserError

_SHUSHENG = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_WANXIANG = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)
_GPT_OSS = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
    "# Valid channels: final. Channel must be included for every message."
)


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become text. Supervised of an answer are `lead`, its text, and what closes it."""

    name: str
    system_message: str
    """Used where the conversation and the checkpoint give none."""
    system: tuple[str, str]
    """Text before and after the system message."""
    user: tuple[str, str]
    """Text before and after a question."""
    assistant: str
    """Text before an answer, in training."""
    open: str
    """Text before an answer that is still to be generated."""
    end: str
    """Closes an answer; generation stops at it."""
    after: str = ""
    """Follows `end`, not supervised."""
    lead: str = ""
    """Opens an answer; the model writes it itself, and a user does not see it."""
    end_before_more: str = ""
    """Closes an answer that another turn follows, where that is not `end`."""
    strip: bool = False
    """Messages are stripped of surrounding white space (original: `preprocess_internlm`)."""
    leading_answer: bool = False
    """A conversation may open with an answer, which is supervised; elsewhere it is dropped."""


def _chatml(
    name: str,
    system_message: str,
    *,
    after: str = "",
    strip: bool = False,
    leading_answer: bool = False,
) -> Template:
    close = "<|im_end|>" + after
    return Template(
        name=name,
        system_message=system_message,
        system=("<|im_start|>system\n", close),
        user=("<|im_start|>user\n", close),
        assistant="<|im_start|>assistant\n",
        open="<|im_start|>assistant\n",
        end="<|im_end|>",
        after=after,
        strip=strip,
        leading_answer=leading_answer,
    )


TEMPLATES = {
    template.name: template
    for template in (
        _chatml("Hermes-2", _SHUSHENG),
        _chatml("internlm2-chat", _SHUSHENG, strip=True),
        _chatml("internvl2_5", _WANXIANG, after="\n", leading_answer=True),
        Template(
            name="phi3-chat",
            system_message=_SHUSHENG,
            system=("<|system|>\n", "<|end|>"),
            user=("<|user|>\n", "<|end|>"),
            assistant="<|assistant|>\n",
            open="<|assistant|>\n",
            end="<|end|>",
        ),
        Template(
            name="internvl_zh",
            system_message="",
            system=("", " "),
            user=("<human>: ", " "),
            assistant="<bot>:",
            open="<bot>:",
            # SentencePiece joins the space with the first word, so it counts as the answer's.
            lead=" ",
            end="</s>",
        ),
        Template(
            name="vicuna_v1.1",
            system_message="A chat between a curious user and an artificial intelligence "
            "assistant. The assistant gives helpful, detailed, and polite answers to the user's "
            "questions.",
            system=("", " "),
            user=("USER: ", " "),
            assistant="ASSISTANT:",
            open="ASSISTANT:",
            lead=" ",
            end="</s>",
        ),
        Template(
            name="internvl3_5_gpt_oss",
            system_message=_GPT_OSS,
            system=("<|start|>system<|message|>", "<|end|>"),
            user=("<|start|>user<|message|>", "<|end|>"),
            assistant="<|start|>assistant",
            open="<|start|>assistant",
            lead="<|channel|>final<|message|>",
            end="<|return|>",
            end_before_more="<|end|>",
        ),
    )
}


def template(name: str) -> Template:
    """The template called `name`. Raises UserError naming the known ones."""
    if name not in TEMPLATES:
        raise UserError(f"unknown conversation template {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def jinja(template: Template, system_message: str | None) -> str:
    """A Jinja template that renders what our encoder renders.

    Image parts become the placeholder and a newline, which the processor expands.
    """
    system = template.system_message if system_message is None else system_message

    def text(value: str) -> str:
        return json.dumps(value, ensure_ascii=False)

    strip = " | trim" if template.strip else ""
    inner = template.end_before_more or template.end
    return (
        "{%- macro body(message) -%}"
        "{%- if message.content is string -%}{{ message.content" + strip + " }}"
        "{%- else -%}{%- for part in message.content -%}"
        '{%- if part.type == "image" -%}{{ "<IMG_CONTEXT>\\n" }}'
        '{%- elif part.type == "video" -%}{{ "<video>\\n" }}'
        '{%- elif part.type == "text" -%}{{ part.text' + strip + " }}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        '{%- if messages[0].role != "system" -%}'
        f"{{{{ {text(template.system[0] + system + template.system[1])} }}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        '{%- if message.role == "system" -%}'
        f"{{{{ {text(template.system[0])} + body(message) + {text(template.system[1])} }}}}"
        '{%- elif message.role == "user" -%}'
        f"{{{{ {text(template.user[0])} + body(message) + {text(template.user[1])} }}}}"
        "{%- else -%}"
        f"{{{{ {text(template.assistant + template.lead)} + body(message) + "
        f"({text(template.end)} if loop.last else {text(inner)}) + {text(template.after)} }}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {text(template.open)} }}}}{{%- endif -%}}"
    )
