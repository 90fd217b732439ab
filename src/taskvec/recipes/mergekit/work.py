"""What is known while a mergekit configuration is converted, and what was found to differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec.recipes.located import Document
from taskvec.recipes.mergekit.schema import Condition, Config, Ingredient
from taskvec.recipes.mergekit.values import Layered, layered, meant_pattern, whole_pattern
from taskvec.validation import Key

NO_SWITCH = ""


@dataclass(frozen=True, slots=True)
class Note:
    """One place where the meaning differs.

    Attributes:
        line: In the configuration; None if it is about what is not in it.
        theirs: What mergekit does.
        ours: What the recipe does.
        switch: What in a recipe gives the same as mergekit; empty if nothing does.
    """

    line: int | None
    theirs: str
    ours: str
    switch: str = NO_SWITCH

    @property
    def text(self) -> str:
        """Two lines for a reader."""
        place = "" if self.line is None else f"line {self.line}: "
        switch = f"; theirs: {self.switch}" if self.switch else ""
        return f"{place}mergekit: {self.theirs}\n   here: {self.ours}{switch}"


@dataclass(slots=True)
class Work:
    """What is known while a configuration is converted.

    Attributes:
        config: As read.
        folder: What relative paths are relative to.
        is_faithful: See `Imported`.
        notes: So far.
        stages: Stages that the recipe needs so far.
        inputs: The sources of each input over the slices, by task name.
        base: The source of the base in each slice; empty without a base.
        names: Earlier documents of the file, whose results are stages.
    """

    config: Config
    folder: Path
    is_faithful: bool
    notes: list[Note] = field(default_factory=list)
    stages: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[Ingredient]] = field(default_factory=dict)
    base: list[Ingredient] = field(default_factory=list)
    names: frozenset[str] = frozenset()

    @property
    def document(self) -> Document:
        """For messages."""
        return self.config.document

    def note(self, key: Key | None, theirs: str, ours: str, switch: str = NO_SWITCH) -> None:
        """Remember a difference; where the recipe is faithful and can be, it does as they do."""
        line = None
        while key and key not in self.document.lines:
            key = key[:-1]
        if key:
            line = self.document.lines[key]
        if self.is_faithful and switch:
            ours, switch = f"the same, by {switch}", NO_SWITCH
        self.notes.append(Note(line, theirs, ours, switch))

    def conditions(self, name: str) -> list[Condition]:
        """Every condition of a parameter of the whole."""
        return [c for s in self.config.slices for c in self.config.setting(name, None, s)]

    def shared_number(self, name: str) -> float:
        """A number of the whole, which must be the same for all tensors."""
        settings = [self.config.setting(name, None, s) for s in self.config.slices]
        found = layered(self.document, settings, self.config.slices, faithful=True).number
        if found is None:
            key = settings[0][0].key
            self.document.fail(
                key, f"{name} that differs by layer is not supported; give one number"
            )
        return found

    def switch(self, name: str) -> bool:
        """A parameter of the whole that is true or false."""
        conditions = self.conditions(name)
        words = {"true": True, "false": False, "yes": True, "no": False}
        values = {words.get(str(v).lower(), v) for c in conditions for v in c.values}
        if len(values) > 1 or not values <= {True, False}:
            shown = ", ".join(map(repr, values))
            self.document.fail(
                conditions[0].key, f"{name} must be true or false for all; got {shown}"
            )
        return bool(values.pop())

    def layered(self, name: str, task: str | None) -> Layered:
        """A number that may differ by layer; of one input, or of the whole."""
        slices = self.config.slices
        sources = [None] * len(slices) if task is None else self.inputs[task]
        settings = [
            self.config.setting(name, source, slice_)
            for source, slice_ in zip(sources, slices, strict=True)
        ]
        who = "" if task is None else f" of {task}"
        first, last = settings[0][0], settings[0][-1]
        if first.key and not last.key:
            rest = f"{name}{who} is left at {last.values[0]} where no filter fits"
            self.note(first.key, rest, "the same")
        for condition in (c for setting in settings for c in setting):
            if len(set(condition.values)) > 1 and condition.part is None:
                self.note(
                    condition.key,
                    f"the gradient {name}{who} gives final norm and head its first value",
                    "its last value, written out",
                    f"final_norm and head {condition.values[0]}",
                )
            part = condition.part
            if part is not None and meant_pattern(part) != whole_pattern(part):
                self.note(
                    condition.key,
                    f"the filter {part!r} fits every name that contains it, as in {part + '0'!r}",
                    f"whole numbers only, {meant_pattern(part)!r}",
                    f"pattern {whole_pattern(part)!r}",
                )
        return layered(self.document, settings, slices, faithful=self.is_faithful)

    def own(self, name: str, task: str) -> tuple[Layered, Key]:
        """A number of one input that may differ by layer, and where it stands."""
        setting = self.config.setting(name, self.inputs[task][0], self.config.slices[0])
        return self.layered(name, task), setting[0].key

    def for_all(self, name: str) -> dict[str, Any]:
        """A number of the whole that may differ by layer, as a recipe has it, by task."""
        return dict.fromkeys(self.inputs, self.written(self.layered(name, None)))

    def written(self, values: Layered) -> Any:
        """Values as a recipe has them: a number, or a mapping where it differs by layer."""
        return values.to_recipe(self.pattern)

    def pattern(self, part: str) -> str:
        """The shell pattern that stands for a part of a name."""
        return whole_pattern(part) if self.is_faithful else meant_pattern(part)
