import pytest

from megatron.errors import TokenizerError
from megatron.tokenizer.null import NullTokenizer


def test_it_has_exactly_the_ids_asked_for_and_no_special_ones():
    tokenizer = NullTokenizer(10)
    assert tokenizer.vocab_size == 10
    assert tokenizer.bos is tokenizer.eos is tokenizer.pad is tokenizer.eod is None


def test_a_text_is_its_ids():
    tokenizer = NullTokenizer(10)
    assert tokenizer.encode("0 9  3\n") == [0, 9, 3]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["1 2", ""], num_threads=2)] == [[1, 2], []]
    assert tokenizer.decode([0, 9, 3]) == "0 9 3"


def test_an_id_that_is_too_large_is_refused():
    with pytest.raises(TokenizerError, match="id 10 is outside --vocab_size 10; ids go from 0 to 9"):
        NullTokenizer(10).encode("10")
    with pytest.raises(TokenizerError, match="id 10 is outside the 10 ids of the NullTokenizer"):
        NullTokenizer(10).decode([10])


@pytest.mark.parametrize("word", ["-1", "a", "1.5", "²"])
def test_a_word_that_is_no_id_is_refused(word):
    with pytest.raises(TokenizerError, match="is not an id; with NullTokenizer a text holds decimal ids"):
        NullTokenizer(10).encode(word)
