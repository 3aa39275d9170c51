from __future__ import annotations

import re

from examples.language import sources
from examples.language.tasks import TOPICS

BROWN = """

\tThe/at jury/nn said/vbd that/cs it/pps was/bedz very/ql late/rb ./.
\tTown/nn-hl Hall/nn-hl of/in the/at old/jj new/jj city/nn ./.
Short/jj ./.
He/pps said/vbd ``/`` we/ppss will/md go/vb home/nr ''/'' ./.
"""


def test_sentences_of_films_only():
    table = 'text,label,source\n"a long one, ""quoted""",0,imdb\n" fine , really ",1,rotten_tomatoes\n'
    assert sources.sentiment(table) == [("fine , really", 1.0)]


def test_ratings_with_their_signs_as_people_write_them():
    assert sources.rating("1\t-1.25\tbed &lt; work\n2\t3\ta\tb\n") == [("bed < work", -1.25), ("a\tb", 3.0)]


def test_definitions_without_examples_and_as_many_of_each_topic():
    lines = ["  1 the licence | is no gloss"]
    for place, number in enumerate(TOPICS):
        for one in range(2 + place % 2):
            lines.append(f'0000{place}{one} {number} n 01 word 0 000 | meaning {place} {one}; "an example"  ')
    lines.append("00009 03 n 01 entity 0 000 | of another topic  ")
    found = sources.topic("\n".join(lines))
    assert len(found) == 2 * len(TOPICS)
    assert ("meaning 0 0", 0.0) in found
    assert {label for _, label in found} == set(map(float, range(len(TOPICS))))
    assert not any("example" in text or "another" in text for text, _ in found)


def test_sentences_are_kept_or_put_out_of_order():
    found = sources.acceptability([BROWN] * 20)
    right = {"The jury said that it was very late.", 'He said " we will go home ".'}
    assert {text for text, label in found if label} == right
    wrong = [text for text, label in found if not label]
    assert wrong
    assert not right & set(wrong)
    assert all(text.split()[0] in ("The", "He") for text in wrong)
    assert {bag(text) for text in wrong} == {bag(text) for text in right}


def bag(text: str) -> tuple[str, ...]:
    """A text's words in the order of the alphabet."""
    return tuple(sorted(re.findall(r"\w+", text)))


def test_no_text_is_in_two_parts(monkeypatch):
    monkeypatch.setattr(sources, "SIZES", {"train": 6, "validation": 2, "test": 3})
    labelled = [(f"text {number % 15}", 0.0) for number in range(30)]
    parts = sources.split(labelled, "sentiment")
    assert {part: len(texts.texts) for part, texts in parts.items()} == {"train": 6, "validation": 2, "test": 3}
    assert len({text for texts in parts.values() for text in texts.texts}) == 11
    assert sources.split(labelled, "sentiment") == parts
