"""`taskvec.report`: everything that taskvec measured, as one page that opens anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from taskvec.errors import UsageError
from taskvec.extras import require
from taskvec.files import write_text
from taskvec.reporting.collect import collect, with_errors
from taskvec.reporting.comparing import compare_section
from taskvec.reporting.document import ReportData
from taskvec.reporting.evaluations import scores_section, verdict_section
from taskvec.reporting.layers import family_section, layers_section, tasks_section
from taskvec.reporting.sections import ReportSection
from taskvec.reporting.studies import (
    disentanglement_section,
    fit_section,
    search_section,
    sweeps_section,
    training_section,
)
from taskvec.statistics.scan import Scan

FORMATS = ("html", "json", "md")
Source = str | os.PathLike[str] | Scan


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """A report in memory.

    Attributes:
        document: All data.
        sections: What the page shows.
        refreshes: Seconds after which the page loads itself again; None: never.
    """

    document: ReportData
    sections: Sequence[ReportSection]
    refreshes: float | None = None

    def __repr__(self) -> str:
        titles = ", ".join(section.title for section in self.sections)
        return f"<Report of {self.document.title}: {titles}>"

    def to_json(self) -> str:
        """The document as JSON."""
        return self.document.model_dump_json()

    def to_html(self) -> str:
        """The page.

        Raises:
            MissingExtraError: vl-convert is not installed.
        """
        from taskvec.reporting.page import page

        return page(self.document, self.sections, self.refreshes)

    def to_markdown(self) -> str:
        """Words and tables for a model card; figures are written by `save`."""
        from taskvec.reporting.markdown import markdown

        return markdown(self.document, {})

    def save(self, path: str | os.PathLike[str], format: str | None = None) -> Path:
        """Write the report.

        Args:
            path: A file.
            format: `html`, `json` or `md`; default: by the name of the file, or else `html`.

        Returns:
            The file.

        Raises:
            UsageError: unknown format.
            OutputError: a file cannot be written.
        """
        from taskvec.reporting.markdown import write_markdown

        path = Path(path)
        kind = format or (path.suffix[1:] if path.suffix[1:] in FORMATS else "html")
        if kind not in FORMATS:
            raise UsageError(f"format must be one of {', '.join(FORMATS)}; got {kind!r}")
        if kind == "md":
            write_markdown(self.document, path)
        else:
            write_text(path, self.to_html() if kind == "html" else self.to_json() + "\n")
        return path

    def _repr_html_(self) -> str:
        """The page in a frame, so that its styles stay inside."""
        return (
            f'<iframe srcdoc="{escape(self.to_html())}" width="100%" height="720" '
            'style="border:0" title="taskvec report"></iframe>'
        )


def report(
    source: Source | Sequence[Source],
    out: str | os.PathLike[str] | None = None,
    *,
    format: str | None = None,
    refreshes: float | None = None,
) -> Report:
    """Put everything that lies under some paths on one page.

    Args:
        source: Files or folders that taskvec wrote, or a scan; several as a list.
        out: File to write; None: nothing is written.
        format: `html`, `json` (the data alone) or `md` (for a model card); default: by the name.
        refreshes: Seconds after which the page loads itself again; None: never.

    Returns:
        The report, which a notebook shows.

    Raises:
        UsageError: a path does not exist, holds nothing to report or is damaged; unknown format.
        MissingExtraError: the extra `report` is not installed.
        OutputError: the file cannot be written.
    """
    if isinstance(source, (str, os.PathLike, Scan)):
        source = [source]
    sources: list[Source] = list(source)
    if not sources:
        raise UsageError("no path is given; give files or folders that taskvec wrote")
    require("altair", "report")
    document = collect([s if isinstance(s, Scan) else os.fspath(s) for s in sources])
    found = Report(document, sections_of(document), refreshes)
    if out is not None:
        found.save(out, format)
    return found


def sections_of(document: ReportData) -> list[ReportSection]:
    """The sections for which there are data, in their order."""
    where = ", ".join(document.sources) or document.title
    sections: list[ReportSection] = with_errors(where, lambda: _sections(document))
    return sections


def _sections(document: ReportData) -> list[ReportSection]:
    found: list[ReportSection | None] = [verdict_section(document)]
    if document.families:
        found.append(family_section(document, document.families[0]))
    found += [layers_section(document, f, i) for i, f in enumerate(document.families)]
    if document.families:
        found.append(tasks_section(document, document.families[0]))
    found += [scores_section(document, i) for i in range(len(document.evaluations))]
    for parts, make in (
        (document.searches, search_section),
        (document.fits, fit_section),
        (document.sweeps, sweeps_section),
        (document.disentanglements, disentanglement_section),
        (document.trainings, training_section),
    ):
        if parts:
            found.append(make(document))
    found.append(compare_section(document))
    return [section for section in found if section is not None]


def schema() -> str:
    """The JSON schema of the document."""
    return json.dumps(ReportData.model_json_schema(), indent=1) + "\n"
