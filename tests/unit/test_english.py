"""The project's English: no word of the word list is left, and the patterns find each of them."""

from __future__ import annotations

import pytest

from tests.english import PATHS, ROOT, WORDS, find, hits

# Sentences of the old code, from the table of the review, with the words that they contain.
EXAMPLES = {
    "Work that is begun before it is asked for.": {"asked for"},
    "opened whatever their compression, their failures told in a sentence.": {"told"},
    "acted upon, and recorded for whoever comes later.": {"who comes later"},
    "A checkpoint that does not prove itself.": {"prove itself"},
    "the child left with SIGSEGV after 'computing'": {"child"},
    "... set aside, and why: the process dies of them.": {"set aside", "dies"},
    "every GPU, or where there is none the CPU, a child a core": {"where there is none", "child"},
    "What becomes of a protein that the model dies of": {"becomes of", "dies"},
    "not put together yet; a run is going on: ...": {"put together", "going on"},
    "the same command goes on from there": {"goes on"},
    # The other words, in the forms of code: identifiers, line ends, continued strings.
    "def check_at_the_door():": {"at the door"},
    "class ChildEvent:": {"child"},
    "num_cpu_children(model)": {"child"},
    "MAX_LETTERS = 3": {"letters"},
    "# It is put\n    # together here.": {"put together"},
    '"the run is going "\n        f"on"': {"going on"},
    "the second process is refused, and leaves": {"leaves"},
    "made anew": {"anew"},
    "mend it or make it again": {"mended"},
    "measured beside fair-esm": {"beside"},
    "windows in the\nplace of a batch": {"in the place of"},
    "written a line a protein": {"a line a"},
    "the type as it comes": {"as it comes"},
    "Put there by whomever.": {"by whomever"},
}

RIGHT = (
    "a child flow run of Prefect",
    "for layer in network.children():",
    "A rename leaves both names, and a crash leaves nothing behind.",
    "Besides, it is fast.",
    "upper-case letters, or letters and digits",
    'counts["letters"]',
    "Recommended: amend the commit; a canoe goes along.",
    "The stoldren of a foretold.",
)


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: text[:20].replace("\n", " "))
def test_words_found(text):
    """Each word is found in a sentence of the old code."""
    assert {word for _, word in find(text)} == EXAMPLES[text]


def test_every_word_has_an_example():
    """No pattern is untried."""
    assert set().union(*EXAMPLES.values()) == {word for word, _, _ in WORDS}


@pytest.mark.parametrize("text", RIGHT)
def test_right_words_pass(text):
    """Words of other libraries and words of another meaning are no hits."""
    assert list(find(text)) == []


def test_line_numbers(tmp_path):
    """A hit has the number and the text of the line where it begins."""
    path = tmp_path / "page.md"
    path.write_text("Fine.\n  It is put\ntogether.\n")
    assert hits([tmp_path]) == [(path, 2, "put together", "It is put")]


@pytest.mark.parametrize("path", PATHS)
def test_no_word_is_left(path):
    """Code, messages and pages are in plain technical English."""
    found = [
        f"{file.relative_to(ROOT)}:{number}: {word}: {line}"
        for file, number, word, line in hits([ROOT / path])
    ]
    assert found == []
