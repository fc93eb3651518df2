"""What is in the file of a recording? Its lines, the header first; docs/recording.md describes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

FORMAT = "nanopaged recording"
VERSION = 1
Line = dict[str, Any]
Event = list[Any]  # [name, request id, ...]


def read(path: str) -> Iterator[Line]:
    """The lines of a recording, the header first. A last line that was cut off is left out.

    Raises OSError if the file cannot be read, and ValueError, with the number of the line, if it is no recording.
    """
    with open(path, encoding="utf-8", errors="replace") as lines:
        number = 0
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
            except ValueError:
                if not text.endswith("\n") and number > 1:  # cut off
                    return
                raise ValueError(f"{path}, line {number}: not JSON: this is no recording, or a damaged one") from None
            if not isinstance(line, dict):
                raise ValueError(f"{path}, line {number}: not an object: this is no recording")
            if number == 1:
                _check_header(path, line)
            yield line
    if number == 0:
        raise ValueError(f"{path} is empty: this is no recording, or one that could not be written")


def _check_header(path: str, header: Line) -> None:
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is no recording: it does not begin with {json.dumps({'format': FORMAT})}")
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has version {header.get('version')!r} of the format, and this program reads version "
                         f"{VERSION}: record it again")
