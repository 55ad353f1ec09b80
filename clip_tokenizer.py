"""CLIP's tokenizer (CaBins, Sec. 3.1): a text to byte-pair ids, and a number to ids directly.

    >>> encode("a photo of a cat.")
    [320, 1125, 539, 320, 2368, 269]

A text goes through four steps:

1. clean     Repair broken Unicode, unescape HTML, collapse white space, lower the case.
2. split     Cut into words, runs of punctuation, and *single* digits.
3. bytes     Each word becomes its UTF-8 bytes, and each byte one printable character. So no text
             is out of vocabulary.
4. merge     Join neighbouring pieces in the vocabulary's order of merges, until none applies. Each
             remaining piece is one token.

The vocabulary: 256 bytes, the same at the end of a word ("</w>"), 48,894 merges, and the two special
tokens that begin and end a text. OpenAI published it with CLIP (MIT licence, see LICENSE).
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
SOT, EOT = 49_406, 49_407  # <|startoftext|>, <|endoftext|>
DIGIT_0, POINT = 271, 269  # "0</w>" to "9</w>" are 271 to 280, ".</w>" is 269
DECIMALS = 4
# special tokens, English contractions, words, single digits, runs of anything else
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
WORDS += r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@functools.cache
def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte, in the vocabulary's order.

    Printable Latin-1 bytes stand for themselves; the other 68 take the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Each token's id, and each merge's rank: the lower, the sooner it is applied."""
    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + N_MERGES]  # the first line is a version
    merges = [tuple(line.split()) for line in lines]
    tokens = list(byte_characters().values())
    tokens += [token + "</w>" for token in tokens]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(tokens)}
    return ids, {pair: rank for rank, pair in enumerate(merges)}


@functools.lru_cache(maxsize=65_536)
def merge(word: str) -> tuple[str, ...]:
    """Join the pieces of one word, given as byte characters, into the vocabulary's tokens.

    >>> merge("farthest")
    ('far', 'thest</w>')
    """
    _, ranks = vocabulary()
    if word in ("<|startoftext|>", "<|endoftext|>"):
        return (word,)
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        pair = min(itertools.pairwise(pieces), key=lambda pair: ranks.get(pair, N_MERGES))
        if pair not in ranks:
            break
        merged, i = [], 0
        while i < len(pieces):  # every occurrence of the pair, from the left
            found = tuple(pieces[i : i + 2]) == pair
            merged.append("".join(pair) if found else pieces[i])
            i += 2 if found else 1
        pieces = merged
    return tuple(pieces)


def encode(text: str) -> list[int]:
    """The ids of `text`, without the two special tokens that begin and end it."""
    import ftfy
    import regex  # unlike re, it knows the Unicode classes \p{L} (letters) and \p{N} (numbers)

    ids, _ = vocabulary()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice, as CLIP does
    words = regex.findall(WORDS, " ".join(text.split()).lower(), regex.IGNORECASE)
    words = ("".join(byte_characters()[byte] for byte in word.encode()) for word in words)
    return [ids[token] for word in words for token in merge(word)]


def tokenize(texts: str | list[str], length: int = 77) -> torch.LongTensor:
    """(L, length) ids of L texts, each between the start and end tokens, padded with zeros.

    Raises ValueError for a text that does not fit: nothing is ever cut off.
    """
    texts = [texts] if isinstance(texts, str) else texts
    rows = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(rows, texts):
        ids = [SOT, *encode(text), EOT]
        if len(ids) > length:
            raise ValueError(f"{text!r} is {len(ids)} tokens long; at most {length} fit")
        row[: len(ids)] = torch.tensor(ids)
    return rows


def number_tokens(depths: Tensor, integer_digits: int = 4) -> Tensor:
    """The ids that `tokenize(str(round(e, 4)), T)` gives for each depth e, on the depths' device.

    (…,) metres -> (…, T) from start to end token, padded with zeros, with T = integer_digits + 7.
    Depths must be at least 0, and after rounding below 10^integer_digits.

    CLIP splits a number into single digits, and the id of a digit is 271 more than it. So ids are
    computed: no string is made, and on a GPU nothing waits for the host.

    A small change of the number can change all of its text: "2.9999" and "3.0" share the point.

    >>> number_tokens(torch.tensor([2.5, 0.81961]), integer_digits=1)
    tensor([[49406,   273,   269,   276, 49407,     0,     0,     0],
            [49406,   271,   269,   279,   272,   280,   277, 49407]])
    """
    e = depths.detach()
    e = e.cpu() if e.device.type == "mps" else e  # it has no float64, where float32 * 10^4 is exact
    metre = 10**DECIMALS  # depths are counted in tenths of a millimetre
    number = (e.double() * metre).round().long()[..., None]  # (…, 1)
    places = 10 ** torch.arange(integer_digits + DECIMALS - 1, -1, -1, device=e.device)
    digits = DIGIT_0 + number // places % 10  # (…, integer_digits + 4)
    # Python drops zeros at both ends, but keeps one digit on each side of the point: "0.5", "2.0".
    # So print what lies between the first and the last digit that is not 0, and those two.
    is_whole, is_beside_point = places >= metre, (places == metre) | (places == metre // 10)
    is_printed = is_beside_point | is_whole & (number >= places)
    is_printed |= ~is_whole & (number % (10 * places) > 0)
    whole, decimals = (digits * is_printed).split((integer_digits, DECIMALS), -1)
    one = torch.ones_like(number)
    ids = torch.cat([SOT * one, whole, POINT * one, decimals, EOT * one], -1)  # (…, T)
    # Dropped digits are 0 now. Move the other ids left, over them; zeros pad the end.
    place = (ids > 0).cumsum(-1) - 1
    return torch.zeros_like(ids).scatter_add(-1, place, ids).to(depths.device)
