"""Real text for devices: from files and from the Python installation, to users, tokens and ids.

`sources` and `installation` yield one `UserText` per person, `tokenizer` turns text into the words
and marks a keyboard learns from, `vocabulary` numbers them. All are plain functions of their input.
"""

from homespun.corpora.installation import docstrings, public_text
from homespun.corpora.sources import UserText, gather, read
from homespun.corpora.tokenizer import sentences, words
from homespun.corpora.vocabulary import Vocabulary

__all__ = [
    "UserText",
    "Vocabulary",
    "docstrings",
    "gather",
    "public_text",
    "read",
    "sentences",
    "words",
]
