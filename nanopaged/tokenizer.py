"""Text to ids, ids to text.

GPT-2's ids are tiktoken's `gpt2` encoding; copycat's are bytes, as an encoding built on the spot. A
character may be spread over several ids, so text is shown only up to the last whole character.
"""

from __future__ import annotations

import codecs

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


def tokenizer_for(vocab_size: int, download: bool) -> Tokenizer | None:
    """The tokenizer that a model's vocabulary tells of; None where it tells of none."""
    if vocab_size == 257:
        return Tokenizer(byte_encoding())
    return Tokenizer(gpt2_encoding()) if vocab_size == 50257 and download else None


class Tokenizer:
    """A tiktoken encoding, with streaming."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eos_token_id = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """The ids of a text; what looks like a special token is text. ValueError for a lone surrogate."""
        return self._encoding.encode_ordinary(require_text("the text", text))

    def stream(self, pending: bytes, token_id: int) -> tuple[str, bytes]:
        """One more token: the whole characters there are, and the beginning of the next.

        `pending` is what the token before left, b"" at first. Nothing is stored here, so a token
        that is streamed twice gives the same answer twice.
        """
        known = pending + self._encoding.decode_single_token_bytes(token_id)
        try:
            return known.decode(), b""  # whole characters, as nearly always
        except UnicodeDecodeError:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            return decoder.decode(known), decoder.getstate()[0]

    def end_stream(self, pending: bytes) -> str:  # half a character at the end is shown as the replacement character
        return pending.decode(errors="replace")
