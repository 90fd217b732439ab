"""What the options about the format of data mean, for verbs that train on data or measure."""

from __future__ import annotations

from taskvec.cli.commands import Arguments
from taskvec.cli.evaluating import pair


def fields_from(args: Arguments) -> dict[str, str]:
    """Names of fields by use.

    Raises:
        UsageError: an entry is not USE=NAME.
    """
    texts = [text for text in (args.fields or "").split(",") if text]
    return dict(pair(text, "--fields", "USE=NAME,…") for text in texts)
