"""The text of an answer while its tokens come: pieces which, joined, are its final text."""

from collections.abc import Sequence

from internvl.data.chat import ChatEncoder
from internvl.data.tokenizers import decode


class AnswerText:
    """Turns the tokens of one answer into text, up to its first stop string.

    With `skip_special_tokens` false, tokens such as `<box>` that a tokenizer calls special stay.
    """

    def __init__(
        self, encoder: ChatEncoder, stop: Sequence[str], skip_special_tokens: bool = True
    ) -> None:
        self.encoder = encoder
        self.stop = stop
        self.skip = skip_special_tokens
        self.sent = ""
        self.num_tokens = 0
        """Tokens that the text so far is made of."""
        self.stopped = False
        """True after a stop string."""
        self._settled = 0
        self._settled_text = ""

    def after(self, ids: Sequence[int]) -> str:
        """Returns what the answer's tokens so far add; empty while that may still change."""
        if self.stopped:
            return ""
        text = self._visible(self._decode(ids))
        if self._cut(ids, text):
            return self._rest(self._before_stop(text))
        # A character of several tokens decodes to U+FFFD until its last byte is there.
        stable = text.rstrip("\ufffd").rstrip()
        for word in (*self.stop, self.encoder.template.end):
            stable = _without_begun(stable, word)
        self.num_tokens = len(ids)
        return self._rest(stable) if stable.startswith(self.sent) else ""

    def end(self, ids: Sequence[int]) -> str:
        """Returns what is left of the answer that these tokens are."""
        if self.stopped:
            return ""
        # Decoded whole, once: what the window above may have missed is put right by the end.
        text = self._visible(decode(self.encoder.tokenizer, ids, skip_special_tokens=self._skips))
        if self._cut(ids, text):
            return self._rest(self._before_stop(text))
        self.num_tokens = len(ids)
        return self._rest(text)

    @property
    def _skips(self) -> bool:
        # A lead is made of special tokens, so they must stay in the text for it to be located.
        return self.skip and not self.encoder.template.lead

    def _decode(self, ids: Sequence[int]) -> str:
        """Decodes the tokens so far, at a cost that does not grow with them."""
        tokenizer, skip = self.encoder.tokenizer, self._skips
        if self._settled:
            # A few tokens before, since a token's text depends on those next to it.
            first = self._settled - _CONTEXT
            before = decode(tokenizer, ids[first : self._settled], skip_special_tokens=skip)
            window = decode(tokenizer, ids[first:], skip_special_tokens=skip)
            fits = window.startswith(before)
            text = self._settled_text + window[len(before) :] if fits else ""
        if not self._settled or not fits:
            text = decode(tokenizer, ids, skip_special_tokens=skip)
        if len(ids) - self._settled >= _WINDOW and not text.endswith("\ufffd"):
            self._settled, self._settled_text = len(ids), text
        return text

    def _visible(self, text: str) -> str:
        """Returns the text between the template's lead and its end, without outer white space."""
        template = self.encoder.template
        text = text.split(template.end)[0]
        if template.lead:
            _, lead, text = text.rpartition(template.lead)
            if not lead:
                return ""
        return text.strip()

    def _cut(self, ids: Sequence[int], text: str) -> bool:
        """True if a stop string is in the text; counts the tokens up to its end."""
        if not any(word in text for word in self.stop):
            return False
        self.stopped = True
        # Several tokens may have come since the last call: the fewest that hold the stop string.
        for count in range(self.num_tokens + 1, len(ids) + 1):
            shorter = decode(self.encoder.tokenizer, ids[:count], skip_special_tokens=self._skips)
            if any(word in self._visible(shorter) for word in self.stop):
                self.num_tokens = count
                return True
        self.num_tokens = len(ids)
        return True

    def _before_stop(self, text: str) -> str:
        return text[: min(text.find(word) for word in self.stop if word in text)]

    def _rest(self, text: str) -> str:
        piece = text[len(self.sent) :]
        if piece:
            self.sent = text
        return piece


_CONTEXT, _WINDOW = 8, 32
"""Tokens decoded again before new ones, and tokens after which text is settled."""


def _without_begun(text: str, word: str) -> str:
    """Returns a text without the longest beginning of a word that it ends with."""
    for length in range(len(word) - 1, 0, -1):
        if text.endswith(word[:length]):
            return text[:-length].rstrip()
    return text
