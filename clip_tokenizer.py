"""CLIP's tokenizer (CaBins, Sec. 3.1): byte-pair ids of a text, and ids of a number directly.

    >>> encode("a photo of a cat.")
    [320, 1125, 539, 320, 2368, 269]

A text goes through four steps:

1. clean     Repair broken Unicode, unescape HTML, collapse white space, lower the case.
2. split     Cut into words, *single* digits, and runs of anything else.
3. bytes     Write a word as its UTF-8 bytes, and each byte as one printable character. Any text can
             be written in this way, so none is out of vocabulary.
4. merge     Join neighbouring pieces of a word in the vocabulary's order of merges, until no merge
             applies. Each remaining piece is a token.

The vocabulary has 256 bytes, the same bytes at the end of a word ("</w>"), 48,894 merges, and two
special tokens. OpenAI published it with CLIP (MIT licence, see LICENSE).
"""

import functools
import gzip
import html
import itertools
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
N_MERGES = 48_894
SOT, EOT = 49_406, 49_407  # the start and the end of a text
DIGIT_0, POINT = 271, 269  # the digits 0 to 9 are 271 to 280
DECIMALS = 4
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
# special tokens, English contractions, words, single digits, runs of anything else
WORDS = r"<\|(?:start|end)oftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@functools.cache
def byte_characters() -> dict[int, str]:
    """The printable character for each byte, in the vocabulary's order.

    A printable Latin-1 byte is written as itself. The other 68 get the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """The id of each token, and the rank of each merge. Merges of a lower rank come first."""
    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + N_MERGES]  # the first line is a version
    merges = [tuple(line.split()) for line in lines]
    tokens = list(byte_characters().values())
    tokens += [token + "</w>" for token in tokens]
    tokens += ["".join(pair) for pair in merges]
    tokens += SPECIAL
    ids = {token: i for i, token in enumerate(tokens)}
    return ids, {pair: rank for rank, pair in enumerate(merges)}


@functools.lru_cache(maxsize=65_536)
def merge(word: str) -> tuple[str, ...]:
    """Join the pieces of one word, given as byte characters, into the vocabulary's tokens.

    >>> merge("farthest")
    ('far', 'thest</w>')
    """
    _, ranks = vocabulary()
    if word in SPECIAL:
        return (word,)
    pieces = [*word[:-1], word[-1] + "</w>"]
    while pairs := list(itertools.pairwise(pieces)):
        rank, i = min((ranks.get(pair, N_MERGES), i) for i, pair in enumerate(pairs))
        if rank == N_MERGES:  # no merge applies
            break
        pieces[i : i + 2] = ["".join(pairs[i])]
    return tuple(pieces)


def encode(text: str) -> list[int]:
    """The ids of a text, without the start and the end token."""
    import ftfy
    import regex  # unlike re, it knows the Unicode classes \p{L} (letters) and \p{N} (numbers)

    ids, _ = vocabulary()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice, as CLIP does
    words = regex.findall(WORDS, " ".join(text.split()).lower(), regex.IGNORECASE)
    words = ("".join(byte_characters()[byte] for byte in word.encode()) for word in words)
    return [ids[token] for word in words for token in merge(word)]


def tokenize(texts: str | list[str], length: int = 77) -> torch.LongTensor:
    """Ids (L, length) of L texts, each from the start to the end token, padded with zeros."""
    texts = [texts] if isinstance(texts, str) else texts
    rows = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(rows, texts):
        ids = [SOT, *encode(text), EOT]
        if len(ids) > length:
            raise ValueError(f"{text!r} is {len(ids)} tokens long; at most {length} fit")
        row[: len(ids)] = torch.tensor(ids)
    return rows


def number_tokens(depths: Tensor, integer_digits: int = 4) -> Tensor:
    """The ids (…, T) of depths (…,) in metres, as `tokenize(str(round(e, 4)), T)` gives them.

    T = integer_digits + 7: the start token, the digits, the point, 4 decimals and the end token.
    Depths must be at least 0, and less than 10^integer_digits after rounding.

    CLIP splits a number into single digits, and the id of a digit is 271 more than the digit. So no
    string is made, and the ids are computed on the depths' device, without a wait.

    >>> number_tokens(torch.tensor([2.5, 0.81961]), integer_digits=1)
    tensor([[49406,   273,   269,   276, 49407,     0,     0,     0],
            [49406,   271,   269,   279,   272,   280,   277, 49407]])
    """
    e = depths.detach()
    if e.device.type == "mps":  # has no float64, in which a float32 times 10^4 is exact
        e = e.cpu()
    metre = 10**DECIMALS  # we count in tenths of a millimetre
    number = (e.double() * metre).round().long()[..., None]  # (…, 1)
    powers = 10 ** torch.arange(integer_digits + DECIMALS - 1, -1, -1, device=e.device)
    digits = DIGIT_0 + number // powers % 10  # (…, integer_digits + 4)
    # Python prints the digits from the first to the last that is not 0. It also prints the two
    # digits beside the point: "0.5", "2.0".
    is_beside_point = (powers == metre) | (powers == metre // 10)
    is_inside = (powers >= metre) & (number >= powers)
    is_inside |= (powers < metre) & (number % (10 * powers) > 0)
    printed = digits * (is_beside_point | is_inside)
    whole, decimals = printed.split((integer_digits, DECIMALS), -1)
    one = torch.ones_like(number)
    ids = torch.cat([SOT * one, whole, POINT * one, decimals, EOT * one], -1)  # (…, T)
    # Digits that are not printed are 0 here. Move the other ids left, so that zeros pad the end.
    position = (ids > 0).cumsum(-1) - 1
    return torch.zeros_like(ids).scatter_add(-1, position, ids).to(depths.device)
