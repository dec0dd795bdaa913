"""Captions as the retrieval models were trained on them.

Original: `process_single_caption` of `internvl_g/internvl/train/dataset.py`, used by CLIP_benchmark
for `flickr30k` and `mscoco_captions` too.
"""

import re

MAX_WORDS = 50

_MARKS = re.compile(r'[.!"()*#:;~]')
_GAPS = re.compile(r"\s{2,}")


def clean_caption(text: str) -> str:
    """Lower case, without `. ! " ( ) * # : ; ~`, at most MAX_WORDS words; other marks stay.

    >>> clean_caption('A man in a blue shirt (standing) on a ladder; cleaning a window!!')
    'a man in a blue shirt standing on a ladder cleaning a window'
    """
    spaced = _GAPS.sub(" ", _MARKS.sub(" ", text.lower()))
    words = spaced.rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:MAX_WORDS])
