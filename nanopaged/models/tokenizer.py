"""Text to ids, ids to text.

GPT-2's ids are tiktoken's `gpt2` encoding; copycat's are bytes, as an encoding built on the spot. A
character may be spread over several ids, so text is shown only up to the last whole character.
"""

from __future__ import annotations

import codecs
from typing import NamedTuple

import tiktoken

from nanopaged.validation import require_text


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's 50,257 ids; tiktoken downloads the vocabulary once. RuntimeError if it is not to be had."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets its HTTP library's own exceptions through
        raise RuntimeError(
            "tiktoken could not load the gpt2 vocabulary (vocab.bpe and encoder.json), which it downloads once: "
            f"{type(error).__name__}: {error}. Without a network, set TIKTOKEN_CACHE_DIR to a folder in which "
            "tiktoken has cached it on another machine"
        ) from error


def byte_encoding() -> tiktoken.Encoding:
    """257 ids: a byte is its own id, and 256 ends the text. Needs no download."""
    ranks = {bytes([byte]): byte for byte in range(256)}  # no merges, so each byte is a token
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})


def tokenizer_for(vocab_size: int, given: Tokenizer | None, download: bool) -> Tokenizer | None:
    """The tokenizer that was given, or that the size of a model's vocabulary identifies; None if there is none.

    Raises ValueError if the given one has another vocabulary.
    """
    if given is not None and given.vocab_size != vocab_size:
        raise ValueError(f"the tokenizer has {given.vocab_size} ids, the model {vocab_size}: they do not belong "
                         "together")
    if given is not None:
        return given
    if vocab_size == 257:
        return Tokenizer(byte_encoding())
    return Tokenizer(gpt2_encoding()) if vocab_size == 50257 and download else None


class Tokenizer:
    """A tiktoken encoding; `TextStream` has what comes out of it token by token.

    Attributes:
        vocab_size: how many ids there are: from 0 up, each with a text.
        eos_token_id: the id of `<|endoftext|>`; None for an encoding without it.
        longest_token: the bytes of its longest token, special ones aside: a text of more than
            n * longest_token characters has more than n tokens.

    Raises ValueError for an encoding with gaps in its ids, as cl100k_base has: a model may draw any id.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.vocab_size: int = encoding.n_vocab
        self.eos_token_id: int | None = encoding.eot_token if "<|endoftext|>" in encoding.special_tokens_set else None
        self.longest_token: int = max(map(len, encoding.token_byte_values()))
        try:
            encoding.decode_bytes(range(self.vocab_size))  # in one call: several times as fast as one by one
        except KeyError as error:  # of the first id without a text
            raise ValueError(f"the encoding {encoding.name!r} has no text for one of its {self.vocab_size} ids "
                             f"({error.args[0]}): use an encoding whose ids have no gaps, or leave the tokenizer out "
                             "and give prompts as token ids") from error

    def encode(self, text: str) -> list[int]:
        """The ids of a text; what looks like a special token is text. ValueError for a lone surrogate."""
        return self._encoding.encode_ordinary(require_text("the text", text))

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one id in range(vocab_size); they may begin or end inside a character."""
        return self._encoding.decode_single_token_bytes(token_id)


class TextStream(NamedTuple):
    """The text of one continuation, up to the first stop string.

    Nothing is changed by a token: `extended` returns another stream. So a step that is repeated after a
    fault streams its tokens again, from where they were. Without stop strings nobody needs the text before it is
    read: then `caught_up` decodes what has come since it was read last.
    """

    tokenizer: Tokenizer | None  # None: there is no text
    stop: tuple[str, ...] = ()
    text: str = ""  # up to the last whole character
    pending: bytes = b""  # the beginning of the next
    stopped: bool = False  # a stop string was reached
    num_tokens: int = 0  # that were decoded

    def extended(self, token_id: int) -> TextStream:
        """With one more token."""
        if self.tokenizer is None:
            return self
        num_tokens = self.num_tokens + 1
        data = self.pending + self.tokenizer.bytes_of(token_id)
        try:
            piece, pending = data.decode(), b""  # whole characters, as nearly always
        except UnicodeDecodeError:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            piece, pending = decoder.decode(data), decoder.getstate()[0]
        text = self.text + piece
        if self.stop:
            ends = [text.find(stop, max(0, len(self.text) - len(stop) + 1)) for stop in self.stop]
            ends = [end for end in ends if end >= 0]
            if ends:
                return TextStream(self.tokenizer, self.stop, text[: min(ends)], b"", True, num_tokens)
        return TextStream(self.tokenizer, self.stop, text, pending, False, num_tokens)

    def caught_up(self, token_ids: list[int]) -> TextStream:
        """With all of a continuation's tokens: those that are missing are decoded; a stream with more starts over."""
        stream = self if self.num_tokens <= len(token_ids) else TextStream(self.tokenizer, self.stop)
        for token_id in token_ids[stream.num_tokens :]:
            stream = stream.extended(token_id)
        return stream

    def shown(self, finished: bool) -> str:
        """The text for a user. Half a character at the very end is shown as the replacement character."""
        if finished:
            return self.text + self.pending.decode(errors="replace")
        # What may turn out to begin a stop string is held back: text that was shown is never taken back.
        longest = max(map(len, self.stop), default=1)
        return self.text[: max(0, len(self.text) - longest + 1)]
