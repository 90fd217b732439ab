"""Perplexity of texts: exp(Σ −log p(document) / Σ units) over all documents.

The unit is a token, a word or a byte. Perplexity per token is what papers report; it depends on the
tokenizer. Those per word and per byte can be compared between tokenizers.

WikiText-2 is cut into articles, detokenized and counted as lm-evaluation-harness does, so that its
word and byte perplexity are the same. Words and bytes are those of the text before detokenizing.

Source: Merity et al., arXiv:1609.07843; lm-evaluation-harness, task `wikitext`.
"""

from __future__ import annotations

import re

from taskvec.errors import DataError
from taskvec.evaluation.data import DataFile, DataRow, HubData
from taskvec.evaluation.task import (
    Metric,
    Replies,
    RowsByRole,
    Sample,
    SampleSettings,
    Score,
    Task,
    each,
)
from taskvec.evaluation.tasks.shared import likelihoods, nonblank_text, one_each, refuse_shots
from taskvec.running.requests import WholeText

METRICS = (
    Metric("perplexity", "perplexity", higher_is_better=False, value="nll", per="tokens"),
    Metric("word_perplexity", "perplexity", higher_is_better=False, value="nll", per="words"),
    Metric("byte_perplexity", "perplexity", higher_is_better=False, value="nll", per="bytes"),
)

# One level-1 heading in a line: ` = Title = `, not ` = = Section = = `.
TITLE = re.compile(r"= (?!= ).*(?<! =) =")

# How WikiText's tokens become plain text; in this order. The harness also has a rule for `/' 5/`,
# which no text has.
BEFORE_PAIRS = (
    ("s '", "s'"),
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
)
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
AFTER_PAIRS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def articles(text: str) -> list[str]:
    """The articles of a WikiText file, each from its title on; blank ones are left out."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if TITLE.fullmatch(line.strip()):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def detokenize(text: str) -> str:
    """Plain text from WikiText's tokens.

    >>> detokenize("a 2 @.@ 5 @-@ inch ( 64 mm ) ' gun ' , and more .")
    "a 2.5-inch (64 mm) 'gun', and more ."
    """
    for old, new in BEFORE_PAIRS:
        text = text.replace(old, new)
    for left, right in PAIRS:
        text = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", text)
    for old, new in AFTER_PAIRS:
        text = text.replace(old, new)
    return text


def _wikitext_samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    refuse_shots("wikitext-2", settings)
    # On the hub, every row is a line, and blank lines (a space and a line feed) are empty.
    text = "".join(row.text("text") or " \n" for row in rows["test"])
    pages = articles(text)
    if not TITLE.fullmatch(pages[0].split("\n")[0].strip() if pages else ""):
        raise DataError(
            f"{rows['test'][0].where}: does not begin with a ' = Title = ' line of WikiText; "
            "task 'text' takes any text"
        )
    # The harness counts what whitespace separates, with the empty texts at both ends.
    return [
        _sample(str(number), detokenize(page), len(re.split(r"\s+", page)), page)
        for number, page in enumerate(pages)
    ]


@one_each("text", "id")
def _text_samples(name: str, row: DataRow) -> Sample:
    text = nonblank_text(row, "text")
    return _sample(name, text, len(text.split()), text)


def _sample(name: str, text: str, words: int, original: str) -> Sample:
    counts = {"words": words, "bytes": len(original.encode())}
    return Sample(name, (WholeText(text),), counts)


def _score(sample: Sample, replies: Replies) -> Score:
    (reply,) = likelihoods(replies)
    counts = {key: float(sample.reference[key]) for key in ("words", "bytes")}
    return Score({"nll": -reply.log_likelihood, "tokens": float(reply.tokens), **counts})


TASKS = (
    Task(
        name="wikitext-2",
        summary="perplexity of 62 Wikipedia articles",
        files=(
            DataFile(
                "test",
                (
                    "wikitext-2-raw/wiki.test.raw",
                    "wikitext-2-raw-v1/test-*.parquet",
                    "wikitext-2/wiki.test.tokens",
                    "wikitext-2/test.txt",
                ),
                HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
            ),
        ),
        samples=_wikitext_samples,
        score=each(_score),
        metrics=METRICS,
        source="Merity et al., arXiv:1609.07843; lm-evaluation-harness, task wikitext",
    ),
    Task(
        name="text",
        summary="perplexity of texts of your own",
        files=(DataFile("test", ("text/*.txt", "text/*.jsonl")),),
        samples=_text_samples,
        score=each(_score),
        metrics=METRICS,
        source="taskvec",
    ),
)
