"""Does text survive the way to ids and back, and is a stream whole characters that end before a stop string?"""

from __future__ import annotations

import random

import pytest
import tiktoken

from nanopaged.models import tokenizer
from nanopaged.models.tokenizer import TextStream, Tokenizer, byte_encoding, gpt2_encoding, tokenizer_for

EDGES = "a\n\t\0\x7f\x80é߿ࠀ€\ud7ff\ue000�\uffff𐀀😀\U0010ffff"  # first and last characters of each length in UTF-8
# Tokens that end inside a character, begin inside one, or hold the end of one and more after it.
MERGES = [b"th", b"the", b" t", b" the", "é".encode(), b"\xf0\x9f", b"\x98\x80", b"\x98\x80t", b"\xe2\x82", b"\xaca",
          b".\xe2"]
SEEDS = range(20)


def bpe_encoding(special_tokens: tuple[str, ...] = ("<|endoftext|>",)) -> tiktoken.Encoding:
    """A small byte pair encoding whose words may be any run of characters."""
    ranks = {bytes([byte]): 255 - byte for byte in range(256)}  # here a byte is not its own id, as in GPT-2
    ranks |= {merge: 256 + i for i, merge in enumerate(MERGES)}
    return tiktoken.Encoding("small", pat_str=r"(?s:.)+", mergeable_ranks=ranks,
                             special_tokens={name: len(ranks) + i for i, name in enumerate(special_tokens)})


def encoding_of_bytes(special_tokens: dict[str, int], last_byte: int = 255) -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(255)} | {b"\xff": last_byte}
    return tiktoken.Encoding("special", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special_tokens)


BYTES = Tokenizer(byte_encoding())
BPE = Tokenizer(bpe_encoding())


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


def streams(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...] = ()) -> list[TextStream]:
    """The stream after each token; none after the one that ends it."""
    result: list[TextStream] = []
    for token_id in token_ids:
        result.append((result[-1] if result else TextStream(tokenizer, stop)).extended(token_id))
        if result[-1].stopped:
            break
    return result


def bytes_as_ids(pieces: list[bytes]) -> list[int]:
    """Ids of the small encoding; each piece must be one of its tokens."""
    return [256 + MERGES.index(piece) if piece in MERGES else 255 - piece[0] for piece in pieces]


def test_bytes_are_their_own_ids_and_one_more_ends_the_text() -> None:
    encoding = byte_encoding()
    assert [encoding.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert (Tokenizer(encoding).vocab_size, Tokenizer(encoding).eos_token_id) == (257, 256)


@pytest.mark.parametrize(("encoding", "words"), [
    (encoding_of_bytes({"<|endoftext|>": 300}), r"one of its 301 ids \(.* 256\)"),  # as in cl100k_base
    (encoding_of_bytes({"<|endoftext|>": 257, "<|other|>": 259}), r"one of its 260 ids \(.* 256\)"),
    (encoding_of_bytes({"<|endoftext|>": 256}, last_byte=300), r"one of its 301 ids \(.* 255\)"),
], ids=["one gap", "two gaps", "gap among the bytes"])
def test_an_encoding_with_gaps_in_its_ids_is_refused_and_names_the_first(
    encoding: tiktoken.Encoding, words: str
) -> None:
    with pytest.raises(ValueError, match=f"'special' has no text for {words}.*leave the tokenizer out"):
        Tokenizer(encoding)


def test_each_id_of_a_vocabulary_has_a_text(any_tokenizer: Tokenizer) -> None:
    assert all(any_tokenizer.bytes_of(token_id) for token_id in range(any_tokenizer.vocab_size))


@pytest.mark.parametrize("special_tokens", [{}, {"<|other|>": 256}])
def test_an_encoding_may_have_no_end_of_text(special_tokens: dict[str, int]) -> None:
    tokenizer = Tokenizer(encoding_of_bytes(special_tokens))
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (256 + len(special_tokens), None)
    assert streams(tokenizer, tokenizer.encode(EDGES))[-1].text == EDGES


def test_the_longest_token_is_counted_in_bytes() -> None:
    assert Tokenizer(encoding_of_bytes({})).longest_token == 1
    assert Tokenizer(encoding_of_bytes({"<|€|>": 256})).longest_token == 1, "no text is encoded as a special token"
    assert BYTES.longest_token == 1 and BPE.longest_token == len(b" the")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_text_of_more_characters_than_n_longest_tokens_has_more_than_n_tokens(seed: int) -> None:
    tokenizer = Tokenizer(bpe_encoding(()))
    text = random_text(random.Random(seed)) + " the" * seed
    assert len(text) <= len(tokenizer.encode(text)) * tokenizer.longest_token, f"seed {seed}"
    assert len(tokenizer.encode(" the" * 10)) * tokenizer.longest_token == 40  # no smaller length would do


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ids_of_a_text_are_its_bytes(seed: int) -> None:
    text = random_text(random.Random(seed)) + EDGES
    assert BYTES.encode(text) == list(text.encode())


def test_the_empty_text_has_no_ids(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("") == []


def test_the_end_of_text_is_plain_text_if_a_user_writes_it(any_tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    token_ids = any_tokenizer.encode(text)
    assert any_tokenizer.eos_token_id not in token_ids
    assert streams(any_tokenizer, token_ids)[-1].text == text


def test_the_small_encoding_does_cut_characters() -> None:
    assert BPE.encode("😀t the€a") == bytes_as_ids([b"\xf0\x9f", b"\x98\x80t", b" the", b"\xe2\x82", b"\xaca"])
    assert b"".join(map(BPE.bytes_of, BPE.encode("😀t the€a"))) == "😀t the€a".encode()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_shows_each_character_when_it_is_whole_and_not_before(any_tokenizer: Tokenizer, seed: int) -> None:
    text = random_text(random.Random(seed))
    stream, data = TextStream(any_tokenizer), b""
    for token_id in any_tokenizer.encode(text):
        stream = stream.extended(token_id)
        data += any_tokenizer.bytes_of(token_id)
        whole = data.decode(errors="ignore")  # without half a character
        assert stream.shown(False) == stream.text == whole, f"seed {seed}"
        assert stream.text.encode() + stream.pending == data, f"seed {seed}"
    assert (stream.text, stream.pending, stream.stopped) == (text, b"", False), f"seed {seed}"
    assert stream.shown(True) == text, f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_of_any_ids_is_the_decoding_of_all_their_bytes(
    encoding: tiktoken.Encoding, any_tokenizer: Tokenizer, seed: int
) -> None:
    rng = random.Random(seed)
    broken = random_text(rng).encode() + bytes(rng.choices((0x80, 0xC3, 0xE2, 0xED, 0xF0, 0x9F, 0xFF, 0x61), k=30))
    data = bytes(rng.choices(broken, k=200))
    token_ids = [encoding.encode_single_token(bytes([byte])) for byte in data]
    assert streams(any_tokenizer, token_ids)[-1].shown(True) == data.decode(errors="replace"), f"seed {seed}"


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"a\xff", ["a", "a�"]),
        (b"\x80b", ["�", "�b"]),
        (b"\xc3a", ["", "�a"]),
        (b"\xf0\x9f\x98a", ["", "", "", "�a"]),
    ],
)
def test_bytes_that_are_no_character_become_the_replacement_character(data: bytes, texts: list[str]) -> None:
    steps = streams(BYTES, list(data))
    assert [stream.text for stream in steps] == texts
    assert steps[-1].pending == b""


def test_half_a_character_at_the_end_becomes_the_replacement_character_once_nothing_follows() -> None:
    stream = streams(BYTES, list("a😀".encode()[:-1]))[-1]
    assert stream.shown(finished=False) == "a"
    assert stream.shown(finished=True) == "a�"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_token_that_is_streamed_again_gives_the_same_answer(any_tokenizer: Tokenizer, seed: int) -> None:
    stream = TextStream(any_tokenizer, ("zzz",))
    for token_id in any_tokenizer.encode(random_text(random.Random(seed))):
        before = TextStream(*stream)
        answer = stream.extended(token_id)
        TextStream(any_tokenizer, pending=b"\xf0\x9f").extended(0)  # another request's, in between
        assert stream == before and stream.extended(token_id) == answer, f"seed {seed}"
        stream = answer


def test_a_stream_without_a_tokenizer_has_no_text() -> None:
    stream = TextStream(None).extended(7).extended(50256)
    assert (stream.shown(False), stream.shown(True), stream.stopped) == ("", "", False)


@pytest.mark.parametrize("data, stop, text", [
    (b"one, two", (",",), "one"),
    (b"one, two", (", two",), "one"),  # the last byte ends it
    (b"one, two", ("two", ","), "one"),  # the order of the stop strings does not matter
    (b"one, two", ("w", "one"), ""),
    (b"aaab", ("ab",), "aa"),
    (b"aabaac", ("aac",), "aab"),  # a beginning of it came before
    (b"ab", ("abc",), None),
    (b"", ("a",), None),
    ("né€".encode(), ("é",), "n"),
    ("né€".encode(), ("€",), "né"),
    ("né".encode()[:-1], ("é",), None),  # half of it
    (b"a\xff.", ("�.",), "a"),
], ids=str)
def test_the_text_ends_before_the_first_stop_string(data: bytes, stop: tuple[str, ...], text: str | None) -> None:
    steps = streams(BYTES, list(data), stop)
    assert any(stream.stopped for stream in steps) == (text is not None)
    if text is not None:
        assert steps[-1].shown(True) == text and steps[-1].pending == b""
        assert not any(stream.stopped for stream in steps[:-1])


@pytest.mark.parametrize("pieces, stop, text", [
    ([b" the", b" the"], ("e t",), " th"),  # across the border of two tokens
    ([b" t", b"h", b"e", b" the"], ("the t",), " "),  # over four
    ([b"the"], ("h",), "t"),  # within one
    ([b"the"], ("e", "h"), "t"),  # both are in this token: the first counts
    ([b"\xf0\x9f", b"\x98\x80t"], ("😀",), ""),  # a character that two tokens share
    ([b"a", b"\xe2\x82", b"\xaca"], ("€a",), "a"),
    ([b"a", b"\xe2\x82", b"\xaca"], ("a€",), ""),
    ([b"a", b".\xe2"], (".",), "a"),  # the beginning of a character behind it
], ids=str)
def test_a_stop_string_is_found_across_the_borders_of_tokens(
    pieces: list[bytes], stop: tuple[str, ...], text: str
) -> None:
    steps = streams(BPE, bytes_as_ids(pieces), stop)
    assert len(steps) == len(pieces) and [stream.stopped for stream in steps] == [False] * (len(pieces) - 1) + [True]
    assert steps[-1].shown(True) == text


def test_what_may_begin_a_stop_string_is_held_back_until_the_text_has_finished() -> None:
    steps = streams(BYTES, list(b"abcdef"), ("xyz", "q"))  # the longest has three characters, so the last two are held
    assert [stream.shown(finished=False) for stream in steps] == ["", "", "a", "ab", "abc", "abcd"]
    assert [stream.shown(finished=True) for stream in steps] == ["a", "ab", "abc", "abcd", "abcde", "abcdef"]


@pytest.mark.parametrize("seed", range(100))
def test_random_stop_strings_end_random_texts_where_a_search_of_the_whole_text_finds_them(
    any_tokenizer: Tokenizer, seed: int
) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(["a", "b", "é", "😀", "th", " the"], k=rng.randint(1, 30)))
    stop = tuple("".join(rng.choices(["a", "b", "é", "😀", "h", " t"], k=rng.randint(1, 3)))
                 for _ in range(rng.randint(1, 3)))
    stream, data, shown = TextStream(any_tokenizer, stop), b"", ""
    for token_id in any_tokenizer.encode(text):
        stream, data = stream.extended(token_id), data + any_tokenizer.bytes_of(token_id)
        whole = data.decode(errors="ignore")
        ends = [whole.find(one) for one in stop if one in whole]
        assert stream.stopped == bool(ends), f"seed {seed}: {stop} in {whole!r}"
        if stream.stopped:
            assert stream.text == whole[: min(ends)], f"seed {seed}: {stop} in {whole!r}"
            break
        assert stream.text == whole and stream.shown(False).startswith(shown), f"seed {seed}: {stop} in {whole!r}"
        shown = stream.shown(False)
    assert stream.shown(True).startswith(shown), f"seed {seed}: {shown!r} was shown, and taken back"


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


def test_the_vocabulary_size_decides_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "gpt2_encoding", bpe_encoding)
    for download in (True, False):
        assert tokenizer_for(257, None, download).encode("é") == [0xC3, 0xA9]
        assert tokenizer_for(101, None, download) is None
    assert tokenizer_for(50257, None, download=True).vocab_size == 268
    assert tokenizer_for(50257, None, download=False) is None


def test_a_tokenizer_that_was_given_is_used_if_it_has_the_models_vocabulary() -> None:
    assert tokenizer_for(257, BYTES, download=False) is BYTES
    assert tokenizer_for(268, BPE, download=True) is BPE
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, the model 61"):
        tokenizer_for(61, BYTES, download=False)
