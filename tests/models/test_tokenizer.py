"""Does text survive the way to ids and back, and does a stream never show half a character?"""

from __future__ import annotations

import random

import pytest
import tiktoken

from nanopaged import tokenizer
from nanopaged.models.tokenizer import Tokenizer, byte_encoding, gpt2_encoding, tokenizer_for

EDGES = "a\n\t\0\x7f\x80é߿ࠀ€\ud7ff\ue000�\uffff𐀀😀\U0010ffff"  # first and last characters of each length in UTF-8
# Tokens that end inside a character, begin inside one, or hold the end of one and more after it.
MERGES = [b"th", b"the", b" t", b" the", "é".encode(), b"\xf0\x9f", b"\x98\x80", b"\x98\x80t", b"\xe2\x82", b"\xaca"]
SEEDS = range(20)


def bpe_encoding() -> tiktoken.Encoding:
    """A small byte pair encoding whose words may be any run of characters."""
    ranks = {bytes([byte]): 255 - byte for byte in range(256)}  # here a byte is not its own id, as in GPT-2
    ranks |= {merge: 256 + i for i, merge in enumerate(MERGES)}
    return tiktoken.Encoding("small", pat_str=r"(?s:.)+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})


@pytest.fixture(params=[byte_encoding, bpe_encoding], ids=["bytes", "bpe"])
def encoding(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return request.param()


@pytest.fixture
def any_tokenizer(encoding: tiktoken.Encoding) -> Tokenizer:
    return Tokenizer(encoding)


def random_text(rng: random.Random) -> str:
    """Characters of all lengths, and pieces that the small encoding merges."""

    def character() -> str:
        code = rng.randrange(rng.choice((0x80, 0x800, 0x10000, 0x110000)))
        return chr(code) if not 0xD800 <= code < 0xE000 else rng.choice(EDGES)

    return "".join(rng.choice((character(), rng.choice(EDGES), " the", "😀t", "€a", "é"))
                   for _ in range(rng.randrange(40)))


def streamed(tokenizer: Tokenizer, token_ids: list[int]) -> tuple[list[str], bytes]:
    """The piece that each id adds, and what is pending after the last."""
    pieces, pending = [], b""
    for token_id in token_ids:
        piece, pending = tokenizer.stream(pending, token_id)
        pieces.append(piece)
    return pieces, pending


def test_bytes_are_their_own_ids_and_one_more_ends_the_text() -> None:
    encoding = byte_encoding()
    assert [encoding.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert (Tokenizer(encoding).vocab_size, Tokenizer(encoding).eos_token_id) == (257, 256)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ids_of_a_text_are_its_bytes(seed: int) -> None:
    text = random_text(random.Random(seed)) + EDGES
    assert Tokenizer(byte_encoding()).encode(text) == list(text.encode())


def test_no_text_has_no_ids(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("") == []


def test_the_end_of_text_is_plain_text_when_a_user_writes_it(any_tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    token_ids = any_tokenizer.encode(text)
    assert any_tokenizer.eos_token_id not in token_ids
    assert "".join(streamed(any_tokenizer, token_ids)[0]) == text


def test_the_small_encoding_does_cut_characters() -> None:
    assert Tokenizer(bpe_encoding()).encode("😀t the€a") == [256 + MERGES.index(merge) for merge in (
        b"\xf0\x9f", b"\x98\x80t", b" the", b"\xe2\x82", b"\xaca")]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_shows_each_character_when_it_is_whole_and_not_before(
    encoding: tiktoken.Encoding, any_tokenizer: Tokenizer, seed: int
) -> None:
    text = random_text(random.Random(seed))
    shown, pending, data = "", b"", b""
    for token_id in any_tokenizer.encode(text):
        piece, pending = any_tokenizer.stream(pending, token_id)
        shown += piece
        data += encoding.decode_single_token_bytes(token_id)
        assert shown == data.decode(errors="ignore"), f"seed {seed}"  # all but the last, unfinished character
        assert shown.encode() + pending == data, f"seed {seed}"
    assert (shown, pending) == (text, b""), f"seed {seed}"
    assert any_tokenizer.end_stream(pending) == ""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_of_any_ids_is_the_decoding_of_all_their_bytes(
    encoding: tiktoken.Encoding, any_tokenizer: Tokenizer, seed: int
) -> None:
    rng = random.Random(seed)
    broken = random_text(rng).encode() + bytes(rng.choices((0x80, 0xC3, 0xE2, 0xED, 0xF0, 0x9F, 0xFF, 0x61), k=30))
    data = bytes(rng.choices(broken, k=200))
    token_ids = [encoding.encode_single_token(bytes([byte])) for byte in data]
    pieces, pending = streamed(any_tokenizer, token_ids)
    assert "".join(pieces) + any_tokenizer.end_stream(pending) == data.decode(errors="replace"), f"seed {seed}"


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"a\xff", ["a", "�"]),
        (b"\x80b", ["�", "b"]),
        (b"\xc3a", ["", "�a"]),
        (b"\xf0\x9f\x98a", ["", "", "", "�a"]),
    ],
)
def test_bytes_that_are_no_character_become_the_replacement_character(data: bytes, pieces: list[str]) -> None:
    assert streamed(Tokenizer(byte_encoding()), list(data)) == (pieces, b"")


def test_half_a_character_at_the_end_becomes_the_replacement_character() -> None:
    tokens = Tokenizer(byte_encoding())
    pieces, pending = streamed(tokens, list("a😀".encode()[:-1]))
    assert "".join(pieces) == "a"
    assert tokens.end_stream(pending) == "�"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_token_streamed_twice_gives_the_same_answer(any_tokenizer: Tokenizer, seed: int) -> None:
    pending = b""
    for token_id in any_tokenizer.encode(random_text(random.Random(seed))):
        answer = any_tokenizer.stream(pending, token_id)
        any_tokenizer.stream(b"\xf0\x9f", 0)  # another request's, in between
        assert any_tokenizer.stream(pending, token_id) == answer, f"seed {seed}"
        pending = answer[1]


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("abc\udfff", 3), ("😀\ud83d.", 1)])
def test_half_a_surrogate_pair_is_refused_with_its_position(
    any_tokenizer: Tokenizer, text: str, position: int
) -> None:
    with pytest.raises(ValueError, match=f"lone surrogate .* at position {position}"):
        any_tokenizer.encode(text)


class NoNetwork(Exception):
    """What an HTTP library raises: nothing that the standard library knows."""


def _get_no_encoding(name: str) -> tiktoken.Encoding:
    raise NoNetwork(f"cannot resolve the host of {name}")


def test_without_a_network_the_gpt2_encoding_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", _get_no_encoding)
    with pytest.raises(RuntimeError, match="TIKTOKEN_CACHE_DIR") as caught:
        gpt2_encoding()
    assert "cannot resolve the host of gpt2" in str(caught.value)
    assert isinstance(caught.value.__cause__, NoNetwork)


def test_the_vocabulary_size_tells_which_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "gpt2_encoding", bpe_encoding)
    for download in (True, False):
        assert tokenizer_for(257, download).encode("é") == [0xC3, 0xA9]
        assert tokenizer_for(101, download) is None
    assert tokenizer_for(50257, download=True).vocab_size == 301
    assert tokenizer_for(50257, download=False) is None
