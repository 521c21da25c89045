from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.sentences import split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["One.", "Two!", "Three?", "Four...", "Five"],
        ['He said "Stop!"', "Then he left.", '"Really?!"', "(Yes.)", "It was."],
        [
            "Dr. Smith met Mr. and Mrs. Jones.",
            "See Fig. 3 and Eq. 4, e.g. Pi, i.e. 3.14.",
            "J. R. R. Tolkien wrote it.",
        ],
        ["It was in the U.S. Army.", "It ended in the U.S.", "The end came at 3 p.m.", "We left."],
        ["She is taller than I.", "Acme Inc. Paris was sold.", "So was Acme Inc.", "The price fell."],
        ["Version 1.2.3 of x.y is out.", "2 people came.", "See example.com. for it"],
        ["Then he stopped... and went on, etc. and so forth."],
        ["Привет мир.", "Как дела? хорошо.", "Éa va.", "Ça va."],
        ["今日は。", "元気？", "はい！"],
    ],
)
def test_sentences_end_where_a_reader_ends_them(sentences):
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("\n".join(sentences)) == sentences


def test_wide_marks_need_no_blank():
    assert split_sentences("今日は。元気？「はい！」うん") == ["今日は。", "元気？", "「はい！」", "うん"]


def test_a_blank_line_ends_a_sentence_and_a_line_break_does_not():
    assert split_sentences("A title\n\nOne line\nand the next.\n \nmore") == [
        "A title",
        "One line\nand the next.",
        "more",
    ]


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_blanks_hold_no_sentence(text):
    assert split_sentences(text) == split_sentences(text, keep_newlines=True) == []


@given(st.text(alphabet='aB.?!。 \n"(1') | st.text())
def test_keeping_newlines_keeps_everything_and_changes_no_boundary(text):
    kept = split_sentences(text, keep_newlines=True)
    assert "".join(kept) == (text if text.strip() else "")
    assert [sentence.strip() for sentence in kept] == split_sentences(text)


@pytest.mark.parametrize("character", [".", " ", "\n", '"', "a", "。", ". "])
def test_a_million_of_anything_takes_no_more_than_its_length(character):
    assert split_sentences("A" + 1_000_000 * character + "B") != []
