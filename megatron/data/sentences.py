"""Where sentences end, by rules: no model, no download, the same on every machine.

A sentence ends behind ``.``, ``!``, ``?`` or an ellipsis, closing quotes and brackets included, where blanks follow
and then, behind opening ones, a capital letter, a digit, or a letter of a script without capitals. A single dot ends
none behind an initial ("J. Smith") or an abbreviation that stands before names and numbers ("Dr. Smith", "Fig. 3");
behind one that also ends sentences ("U.S.", "Inc.") it ends one before a word such as "The". A sentence also ends
behind 。！？, with or without blanks, and at a blank line.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_BEFORE_NAMES = frozenset(
    "mr mrs ms dr prof st mt ft rev hon sen rep gov gen col lt maj capt cpt sgt cmdr adm pres messrs mme mlle "
    "fig figs eq eqs sec secs ch vol vols no nos pp ed eds art vs cf viz approx ca e.g i.e eg ie a.k.a "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_AMBIGUOUS = frozenset("inc ltd co corp bros jr sr a.m p.m ph.d m.d b.a m.a al".split())
_STARTERS = frozenset(
    "the a an it he she they we you i this that these those there his her its their our my in on at by for from with "
    "as if when while where what who how why but and or so yet then thus however although after before since".split()
)
_CLOSING = "\"'”’»)\\]"
_OPENING = "\"'“‘«(\\["
# Only the first of several marks starts a match, which keeps a page of dots linear.
_END = re.compile(
    rf"(?<![.!?…])(?P<marks>[.!?…]+)[{_CLOSING}]*(?P<blanks>\s+)(?=[{_OPENING}]*(?P<next>\w+))"
    r"|[。！？]+[」』”’）]*(?P<wide>\s*)"
    r"|(?P<paragraph>\n[^\S\n]*\n\s*)"
)
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[—–/-]*\Z")
_LONGEST_ABBREVIATION = 8


def split_sentences(text: str, *, keep_newlines: bool = False) -> list[str]:
    """The sentences of `text` in order, stripped of the blanks around them.

    With `keep_newlines` nothing is stripped: blanks stay at the end of the sentence before them, and the sentences end
    to end are the text.
    """
    bounds = [0, *_sentence_starts(text), len(text)]
    sentences = [text[start:end] for start, end in itertools.pairwise(bounds)]
    if keep_newlines:
        return _without_blank_ones(sentences)
    return [stripped for sentence in sentences if (stripped := sentence.strip())]


def _without_blank_ones(sentences: list[str]) -> list[str]:
    """Sentences of blanks alone become the start of what follows them."""
    kept: list[str] = []
    before = ""
    for sentence in sentences:
        if not sentence.strip():
            before += sentence
            continue
        kept.append(before + sentence)
        before = ""
    return [*kept[:-1], kept[-1] + before] if kept else []


def _sentence_starts(text: str) -> Iterator[int]:
    for match in _END.finditer(text):
        if match["marks"] is None or _BLANK_LINE.search(match["blanks"]) or _starts_behind(text, match):
            yield match.end()


def _starts_behind(text: str, match: re.Match[str]) -> bool:
    is_single_dot = match["marks"] == "."
    return not match["next"][0].islower() and not (is_single_dot and _is_abbreviation(text, match))


def _is_abbreviation(text: str, match: re.Match[str]) -> bool:
    """Whether the dot of `match` belongs to the word before it and ends no sentence."""
    stop = match.start()
    found = _LAST_WORD.search(text, max(0, stop - _LONGEST_ABBREVIATION - 1), stop)
    word = found[0] if found else ""
    if word.lower() in _BEFORE_NAMES:
        return True
    is_initial = len(word) == 1 and word.isalpha() and word != "I"
    if is_initial:
        return True
    if word.lower() in _AMBIGUOUS or (word[1:2] == "." and len(word) % 2 == 1):
        return match["next"].lower() not in _STARTERS
    return False
