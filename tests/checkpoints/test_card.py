"""Text of others in the model card: shown as it is written, never as markup."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from taskvec.errors import CheckpointError
from taskvec.methods import METHODS
from taskvec.outputs.card import add_scores, escaped, licence_of, model_card
from taskvec.recipes.recipe import Output, TaskSpec


def member(folder: Path, readme: str | None = None, where: str | None = None) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return SimpleNamespace(folder=folder, where=where or str(folder), parts=())


def recipe(scales: dict[str, float], published: dict[str, str] | None = None) -> Any:
    tasks = {name: TaskSpec("model", scale) for name, scale in scales.items()}
    known = {"method": METHODS["ties"], "out": Output(), "published": published or {}}
    return SimpleNamespace(tasks=tasks, **known)


def made(**members: Any) -> tuple[dict[str, Any], str, list[str]]:
    card, warnings = model_card("out", members, recipe({"a|b": 0.5}), "ties")
    _, front, text = card.decode().split("---\n", 2)
    return yaml.safe_load(front), text, warnings


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit", "mit"),
        ("license: 'apache-2.0'", "apache-2.0"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license:\n  - mit", "mit"),
        ("license: ' mit '", "mit"),
        ("license: {a: b}", "not stated"),
        ("license:", "not stated"),
        ("license: [[mit]]", "not stated"),
        ("x: &l mit\nlicense: *l", "mit"),
        ("licence: mit", "not stated"),
        ("- license: mit", "not stated"),
        ("", "not stated"),
        ("license: |\n  a\n  b", "a\\nb"),
        ("license: " + "x" * 100, "x" * 79 + "…"),
    ],
)
def test_licence_that_a_card_states(tmp_path, front, expected):
    for ends in ("\n", "\r\n"):
        text = f"---\n{front}\n---\n# card\n".replace("\n", ends)
        assert licence_of(member(tmp_path, text)) == expected


@pytest.mark.parametrize(
    "licence", ["mit\n---\n# taken over", "a|b", "<script>", "[x](http://e.x)", "no such licence"]
)
def test_a_licence_that_is_none_is_not_in_the_metadata(tmp_path, licence):
    readme = "---\n" + yaml.safe_dump({"license": licence}) + "---\n"
    front, text, warnings = made(target=member(tmp_path, readme))
    assert "license" not in front
    assert warnings == []
    assert "# taken over" not in text.splitlines()
    (row,) = [line for line in text.splitlines() if line.startswith("| target")]
    assert row.replace("\\|", "").count("|") == 4
    assert "<script" not in text.replace("\\<", "")
    assert "[x](" not in text


NAMES = ["a\n---\nlicense: evil\n---\n", "a|b|c", "**bold**", "<img src=x>", "a: b", "- a", "#a",
         "\udcff", "a\x00b", "' \"", "{a: [b]}", "\u2028x"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_members(tmp_path, name):
    source = SimpleNamespace(folder=None, where=f"/models/{name}", parts=())
    front, text, _ = made(target=source, **{f"task {name!r}": source})
    assert "license" not in front
    assert set(front) == {"library_name", "tags"}  # a local folder is no name on the hub
    rows = [line for line in text.splitlines() if line.startswith("| t")]
    assert len(rows) == 3  # two members, and the head of the other table
    assert {row.replace("\\|", "").count("|") for row in rows[:2]} == {4}
    assert "**bold**" not in text
    assert "<img" not in text.replace("\\<", "")
    assert "a\\|b" in text  # the task's


def test_text_that_needs_no_escape_is_left_alone():
    for text in ("org/name@0123abc", "task 'math'", "snake_case-2.0", "mit", "Llama-3.1-8B (v2)"):
        assert escaped(text) == text
    assert escaped("_a_ http://x www.x.org `b` &amp; $x$ ~s~") == (
        "\\_a\\_ http\\://x www\\.x.org \\`b\\` \\&amp; \\$x\\$ \\~s\\~"
    )


def test_only_names_on_the_hub_are_metadata(tmp_path):
    def model(where: Path | str, *parts: Any) -> Any:
        return SimpleNamespace(folder=None, where=str(where), parts=parts)

    known, local = model(tmp_path / "known"), model(tmp_path / "local")
    made_of = model("added", known, model("org/downloaded@abc"), local)
    card, _ = model_card(
        "out",
        {"target": made_of, "task 'math'": known},
        recipe({"z": 1.0, "a": 2.0}, {str(tmp_path / "known"): "org/known@v1"}),
        "ties",
    )
    _, front, text = card.decode().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == ["org/downloaded", "org/known"]
    assert text.index("| z | 1 |") < text.index("| a | 2 |")  # as in the recipe


# --- scores -------------------------------------------------------------------------------------

SCORE = {"task": "gsm8k", "metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "n": 100}


def test_scores_are_put_into_a_card_once(tmp_path):
    card, _ = model_card("out", {"target": member(tmp_path)}, recipe({}), "ties")
    path = tmp_path / "README.md"
    path.write_bytes(card)
    add_scores(tmp_path, [SCORE | {"value": 0.25}, SCORE | {"task": "old"}])
    add_scores(tmp_path, [SCORE, SCORE | {"metric": "c|d", "value": float("nan")}])
    _, front, text = path.read_text().split("---\n", 2)
    (entry,) = yaml.safe_load(front).pop("model-index")
    assert entry["name"] == tmp_path.name
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "gsm8k", "type": "gsm8k"}
    assert result["metrics"] == [{"type": "accuracy", "value": 0.5}]
    assert "| gsm8k | accuracy | 0.5 | 0.4 | 0.6 | 100 |" in text
    assert "c\\|d | nan" in text
    assert text.count("| gsm8k | accuracy") == 1
    before = card.decode().split("---\n", 2)
    assert text.startswith(before[2].rstrip())
    assert yaml.safe_load(front).items() >= yaml.safe_load(before[1]).items()


@pytest.mark.parametrize("text", ["# no metadata\n", "---\n- a\n---\n", "---\na: [\n---\n",
                                  "---\na: 2024-02-30\n---\n"])  # fmt: skip
def test_a_card_without_metadata_takes_no_scores(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(CheckpointError, match=r"README\.md"):
        add_scores(tmp_path, [SCORE])
    assert (tmp_path / "README.md").read_text() == text
