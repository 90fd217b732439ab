"""WikiText-2 and texts of one's own: documents, counts, figures."""

from __future__ import annotations

import math

import pytest
from tests.evaluation.tasks.support import harness, rows_from, samples_of, task_named

from taskvec.errors import DataError, UsageError
from taskvec.evaluation.intervals import figure
from taskvec.evaluation.task import SampleSettings, Tools
from taskvec.evaluation.tasks import perplexity
from taskvec.running.requests import Likelihood, WholeText

WIKITEXT = task_named(perplexity.TASKS, "wikitext-2")
TEXT = task_named(perplexity.TASKS, "text")

# Two articles in WikiText's form, with a line that only looks like a title of level 1.
LINES = [
    " \n",
    " = Grey Owl ( bird ) = \n",
    " \n",
    ' The owl \'s wings are 1 @,@ 250 mm ; it weighs 2 @.@ 5 kg . It is called " grey " . \n',
    " \n",
    " = = Habits = = \n",
    " \n",
    " = = = Food = = = \n",
    " \n",
    " It eats mice [ 3 ] , the keepers ' favourites , at 20 ° C . Is it <unk> ? Yes ! \n",
    " 1 = 1 and 2 = 2 \n",
    " = Second @-@ hand = \n",
    " \n",
    " A term : { used } N times for ' old ' goods — ÄÖÜ 日本 . \n",
    " \n",
]


def test_articles_begin_at_their_titles() -> None:
    (first, second) = perplexity.articles("".join(LINES))
    assert first == "".join(LINES[1:11]).removesuffix("\n")
    assert second == "".join(LINES[11:])


@pytest.mark.parametrize(
    ("line", "is_title"),
    [
        (" = A = ", True),
        ("= A =", True),
        (" = 1 <unk> / s and a <unk> k = ", True),  # an equation, as in WikiText-2's own test set
        (" = A = B = ", True),
        (" = = A = = ", False),
        (" = = = A = = = ", False),
        (" = A = = ", False),
        (" = = A = ", False),
        (" = A ", False),
        (" =A= ", False),
        (" = = ", False),
        ("", False),
    ],
)
def test_titles(line: str, is_title: bool) -> None:
    assert (perplexity.TITLE.fullmatch(line.strip()) is not None) == is_title
    # The rule of the harness's data set, written out.
    short = line.replace("= = =", "===").replace("= =", "==").strip()
    assert (short.startswith("= ") and short.endswith(" =")) == is_title


def test_a_line_a_row_is_the_same_as_the_whole_file() -> None:
    lines = [{"text": "" if line == " \n" else line} for line in LINES]  # as on the hub
    assert samples_of(WIKITEXT, lines) == samples_of(WIKITEXT, [{"text": "".join(LINES)}])


def test_documents_are_plain_text() -> None:
    (first, _) = samples_of(WIKITEXT, [{"text": "".join(LINES)}])
    assert first.requests[0] == WholeText(
        " = Grey Owl (bird) =\n\n"
        'The owl\'s wings are 1,250 mm; it weighs 2.5 kg. It is called "grey".\n\n'
        "== Habits ==\n\n=== Food ===\n\n"
        "It eats mice [3], the keepers' favourites, at 20°C. Is it <unk>? Yes!\n1 = 1 and 2 = 2 "
    )


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("the keepers ' hall", "the keepers' hall"),
        ("it 's", "it's"),
        ("( a ( b ) )", "(a ( b) )"),  # pairs do not nest
        ('" a " b " c "', '"a" b "c"'),
        ("1 @-@ 2 @,@ 3 @.@ 4", "1-2,3.4"),
        ("N of N N ones", "N of 1 N ones"),  # between spaces, each space once
        (" = = A = = \n", " == A ==\n"),
    ],
)
def test_detokenized(tokens: str, text: str) -> None:
    assert perplexity.detokenize(tokens) == text


def test_words_and_bytes_are_of_the_original_text() -> None:
    (_, second) = samples_of(WIKITEXT, [{"text": "".join(LINES)}])
    assert second.requests == (
        WholeText(" = Second-hand =\n\nA term: {used} 1 times for 'old' goods — ÄÖÜ 日本.\n\n"),
    )
    original = "".join(LINES[11:])
    # 5 words of the title, 17 of the text, and the empty ones before the first and after the last.
    assert second.reference == {"words": 5 + 17 + 2, "bytes": len(original) + 2 + 3 + 4}


def test_perplexities() -> None:
    samples = samples_of(TEXT, [{"text": "two words"}, {"text": "and three more", "id": "b"}])
    assert [sample.id for sample in samples] == ["0", "b"]
    replies = [[Likelihood(-6.0, 4, False)], [Likelihood(-9.0, 6, False)]]
    scores = TEXT.score(samples, replies, Tools())
    assert scores[0].values == {"nll": 6.0, "tokens": 4.0, "words": 2.0, "bytes": 9.0}
    values = {metric.name: figure(metric, scores).value for metric in TEXT.metrics}
    assert values == {
        "perplexity": pytest.approx(math.exp(15 / 10)),
        "word_perplexity": pytest.approx(math.exp(15 / 5)),
        "byte_perplexity": pytest.approx(math.exp(15 / 23)),
    }
    assert [metric.higher_is_better for metric in TEXT.metrics] == [False] * 3


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (
            WIKITEXT,
            "Some text\n = A = \n",
            "data.jsonl, line 1: does not begin with a ' = Title = ' line of WikiText; "
            "task 'text' takes any text",
        ),
        (TEXT, " \n", "data.jsonl, line 1: 'text' must not be blank"),
        (TEXT, 5, "data.jsonl, line 1: 'text' must be a text; got 5"),
    ],
)
def test_malformed_data(task: object, text: object, message: str) -> None:
    with pytest.raises(DataError) as error:
        samples_of(task, [{"text": text}])  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.parametrize("task", perplexity.TASKS, ids=lambda task: task.name)
def test_worked_examples_are_refused(task: object) -> None:
    with pytest.raises(UsageError, match="takes no worked examples; got --shots 1"):
        task.samples({"test": rows_from([{"text": "a"}])}, SampleSettings(shots=1))  # type: ignore[attr-defined]


def test_documents_and_counts_are_those_of_the_harness() -> None:
    text = "".join(LINES)
    pages = [{"page": page} for page in perplexity.articles(text)]
    theirs = harness("wikitext/wikitext.yaml", data={"train": pages, "test": pages})
    for doc, sample in zip(theirs.test_docs(), samples_of(WIKITEXT, [{"text": text}]), strict=True):
        assert sample.requests[0].text == theirs.doc_to_target(doc)
        result = theirs.process_results(doc, [-9.0])
        assert result["word_perplexity"] == (-9.0, sample.reference["words"])
        assert result["byte_perplexity"] == (-9.0, sample.reference["bytes"])
