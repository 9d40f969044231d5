"""What holds for every text."""

from hypothesis import given
from hypothesis import strategies as st

from homespun.corpora import Vocabulary, sentences, words
from homespun.corpora.tokenizer import MARKS, MAX_WORD_LENGTH

# Ordinary characters, the ones the patterns care about, and everything else.
PIECES = st.one_of(
    st.sampled_from([*"aZé'’.,:;!?@/_#%\\-<>()1२ﬁİन \n", "\n\n", "म्"]),
    st.sampled_from(["e.g.", "www.", "http://", "<unk>"]),
    st.characters(exclude_categories=["Cs"]),
)
TEXTS = st.lists(PIECES, max_size=60).map("".join)
WORDS = st.text("abcdefgh", min_size=1, max_size=6)


@given(TEXTS)
def test_tokens_read_again_are_the_same(text: str) -> None:
    found = sentences(text)
    again = "\n\n".join(" ".join(sentence) for sentence in found)
    assert sentences(again) == found


@given(TEXTS)
def test_tokens_are_words_marks_or_unknown(text: str) -> None:
    for sentence in sentences(text):
        assert any(token not in MARKS and token != "<unk>" for token in sentence)
        for token in sentence:
            if token not in MARKS and token != "<unk>":
                assert words(token) == [token]
                assert len(token) <= MAX_WORD_LENGTH
                assert not any(character.isdecimal() or character in "@_/" for character in token)


@given(st.lists(WORDS, min_size=1, max_size=30), st.permutations(range(30)), st.integers(17, 60))
def test_a_vocabulary_does_not_depend_on_the_order_of_texts(
    texts: list[str], order: list[int], size: int
) -> None:
    shuffled = [texts[index] for index in order if index < len(texts)]
    built = Vocabulary.build(texts, size)
    assert built.to_bytes() == Vocabulary.build(shuffled, size).to_bytes()
    assert Vocabulary.from_bytes(built.to_bytes()) == built


@given(st.lists(st.lists(WORDS, min_size=1, max_size=5), min_size=1, max_size=5))
def test_known_words_survive_encode_and_decode(spoken: list[list[str]]) -> None:
    text = " ".join(" ".join(sentence) + "." for sentence in spoken)
    vocabulary = Vocabulary.build([text], 1000)
    decoded = [vocabulary.decode(token_id) for token_id in vocabulary.encode(text)]
    assert decoded == [token for sentence in spoken for token in ("<s>", *sentence, ".")]


@given(TEXTS)
def test_every_encoded_id_is_in_range(text: str) -> None:
    vocabulary = Vocabulary.build(["a b c"], 20)
    assert all(token_id in {1, 2, *range(3, 9), 16, 17, 18} for token_id in vocabulary.encode(text))
