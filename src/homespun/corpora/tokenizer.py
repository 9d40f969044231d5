r"""Text to tokens, as a keyboard sees it.

A keyboard learns from words and a few punctuation marks. What could identify a person or open a
door (numbers, e-mail addresses, links, @handles) is dropped before anything is stored; what is not
language (`os.path`, `utf8`, `__init__`, `%s`) becomes the one token `<unk>`.

The rules are few, and exact enough to be repeated on another runtime (in TypeScript: the same
patterns with the `u` flag, `[\p{L}\p{Nl}\p{No}]` for `[^\W\d_]`, `\p{M}` for the combining marks,
`\p{Nd}` for `\d`, and all of these and `_` for `\w`):

1. Normalise: Unicode NFKC, lower case, NFKC again; curly apostrophes become `'`.
2. Scan with `CHUNK`, left to right. What it does not match (brackets, hyphens, emoji) separates.

   | alternative | matches | becomes |
   |---|---|---|
   | unknown | `<unk>`, so that stored tokens can be read again | `<unk>` |
   | break | a blank line, or a line that starts with a bullet | end of the sentence |
   | link, host | `scheme://...`, `mailto:...`, `www....`; `host.name/...` | nothing |
   | handle | an e-mail address or `@name` | nothing |
   | letters | abbreviations of single letters, `e.g.` | one word, dots kept |
   | run | letters, digits, `_`, inner `'` `.`; `,` `:` among digits; a leading `# $ % \` | rule 3 |
   | mark | one of `. , ; : ! ?`, repeated or not | that mark, once |

3. A run without letters and `_` is a number: nothing. One that matches `WORD` and is at most
   `MAX_WORD_LENGTH` long is a word. Any other run is `<unk>`.
4. `.` `!` `?` and breaks end a sentence; a sentence without a word is dropped.

Languages that put no spaces between words (Chinese, Thai) need a segmenter before this.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

UNKNOWN = "<unk>"
MARKS = (".", ",", ";", ":", "!", "?")
SENTENCE_ENDS = frozenset(".!?")
MAX_WORD_LENGTH = 32

# `re` knows no \p{M}; without combining marks, Hindi words would break at their vowel signs.
_COMBINING = "".join(
    chr(point) for point in range(0x300, 0x10000) if unicodedata.category(chr(point))[0] == "M"
)
_LETTER = rf"(?:[^\W\d_][{_COMBINING}]*)"
_ANY = rf"[\w{_COMBINING}]"
# A link or an address may be followed by punctuation that is not part of it.
_REST = r"""\S{0,2000}[^\s.,;:!?()\[\]{}<>"'`]"""

CHUNK = re.compile(
    rf"""
    (?P<unknown>{UNKNOWN})
  | (?P<break>\n\s*(?:\n|[-*•]\s))
  | (?P<link>(?:[a-z][a-z0-9+.-]{{0,20}}://|mailto:|www\.){_REST})
  | (?P<host>{_ANY}{{1,60}}(?:\.{_ANY}{{1,60}}){{1,8}}/\S{{0,2000}})
  | (?P<handle>[^\s@,;:!?()\[\]{{}}<>"'`]{{0,64}}@(?:{_REST})?)
  | (?P<letters>{_LETTER}\.(?:{_LETTER}\.)+(?!{_ANY}))
  | (?P<run>[\#$%\\]?{_ANY}+(?:(?:['.]|(?<=\d)[,:](?=\d)){_ANY}+)*)
  | (?P<mark>[.,;:!?])(?P=mark)*
    """,
    re.VERBOSE,
)
WORD = re.compile(rf"{_LETTER}+(?:'{_LETTER}+)*")
NUMBER = re.compile(r"[\#$%\\]?[\d.',:]+")


def normalise(text: str) -> str:
    """Rule 1. Lower-casing can undo NFKC, and NFKC can make capitals: hence on both sides."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return unicodedata.normalize("NFKC", folded).replace("’", "'").replace("ʼ", "'")


def sentences(text: str) -> list[list[str]]:
    """The sentences of `text`, each a non-empty list of words, marks and `<unk>`."""
    found: list[list[str]] = []
    sentence: list[str] = []
    for token in _tokens(text):
        if token is not None:
            sentence.append(token)
        if token is None or token in SENTENCE_ENDS:
            found.append(sentence)
            sentence = []
    found.append(sentence)
    return [sentence for sentence in found if any(is_word(token) for token in sentence)]


def words(text: str) -> list[str]:
    """Only the words of `text`: no marks, no `<unk>`."""
    return [token for sentence in sentences(text) for token in sentence if is_word(token)]


def is_word(token: str) -> bool:
    """Whether a token of `sentences` is a word: not a mark, not `<unk>`."""
    return token != UNKNOWN and token not in MARKS


def _tokens(text: str) -> Iterator[str | None]:
    """Words, marks and `<unk>` in order; None where a break ends the sentence."""
    for match in CHUNK.finditer(normalise(text)):
        kind, chunk = match.lastgroup, match.group()
        if kind == "run":
            if WORD.fullmatch(chunk) and len(chunk) <= MAX_WORD_LENGTH:
                yield chunk
            elif not NUMBER.fullmatch(chunk):
                yield UNKNOWN
        elif kind == "mark":
            yield match["mark"]
        elif kind == "letters":
            yield chunk if len(chunk) <= MAX_WORD_LENGTH else UNKNOWN
        elif kind == "unknown":
            yield UNKNOWN
        elif kind == "break":
            yield None
