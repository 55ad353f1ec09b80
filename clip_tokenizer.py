"""CLIP's tokenizer: text to byte-pair ids, explained by its own code (CaBins, Sec. 3.1).

    >>> encode("a photo of a cat.")
    [320, 1125, 539, 320, 2368, 269]

A text goes through four steps:

1. clean     repair broken Unicode, unescape HTML, collapse white space, lower the case;
2. split     into words, runs of punctuation, and *single* digits;
3. bytes     each word becomes its UTF-8 bytes, and each byte one printable character,
             so that no text whatever is out of vocabulary;
4. merge     neighbouring pieces are joined, the most frequent pair in CLIP's training text
             first, until no known pair is left. Each remaining piece is one token.

The vocabulary holds, in this order: 256 bytes, the same 256 bytes at the end of a word ("</w>"),
48,894 merges, and the two special tokens that begin and end a text. It lies beside this file as
OpenAI published it with CLIP (MIT licence, see LICENSE).
"""

import functools
import gzip
import html
import itertools
from pathlib import Path

import torch

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
N_MERGES = 48_894
SOT, EOT = 49_406, 49_407  # <|startoftext|>, <|endoftext|>


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


@functools.cache
def word_pattern():
    """Special tokens, English contractions, words, single digits, runs of anything else."""
    import regex  # unlike re, knows the Unicode classes \p{L} (letters) and \p{N} (numbers)

    return regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
        r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )


def clean(text: str) -> str:
    """Repaired, unescaped, on one line and in lower case, as CLIP's training text was."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


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
    ids, _ = vocabulary()
    character = byte_characters()
    words = word_pattern().findall(clean(text))
    words = ("".join(character[byte] for byte in word.encode()) for word in words)
    return [ids[token] for word in words for token in merge(word)]


def decode(ids: list[int]) -> str:
    """The text of `ids`; the words are in lower case and single-spaced, as `encode` saw them."""
    tokens = {i: token for token, i in vocabulary()[0].items()}
    byte = {character: b for b, character in byte_characters().items()}
    text = "".join(tokens[int(i)] for i in ids).replace("</w>", " ")
    return b"".join(b" " if c == " " else bytes([byte[c]]) for c in text).decode(errors="replace")


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
