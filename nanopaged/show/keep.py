"""What of a run is kept? Its recording, a movie made of it, a trace: whichever files are named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nanopaged.report import refuse_unwritable
from nanopaged.show.movie import Scene, page, pool_scene
from nanopaged.show.reading import read
from nanopaged.show.recording import record
from nanopaged.show.trace import write_trace

if TYPE_CHECKING:
    from nanopaged.engine import LLM


@contextmanager
def kept(llm: LLM, recording: str | None = None, movie: str | None = None, trace: str | None = None, text: bool = True,
         title: str = "", intro: str = "", scenes_before: Sequence[Scene] = ()) -> Iterator[None]:
    """Records what the engine does inside the `with`; at its end writes the files that are named.

    Args:
        recording, movie, trace: where to write the recording, a page for a browser, and a trace for Perfetto.
        text: False leaves out what requests say.
        title, intro: of this run, in the page.
        scenes_before: other scenes of the page.

    Raises OSError before the run if a file cannot be written, and ValueError after it if a page would be too large.
    """
    paths = [path for path in (recording, movie, trace) if path]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ValueError(f"recording, movie and trace must be different files, got {', '.join(paths)}")
    for path in paths:
        refuse_unwritable(path)
    with TemporaryDirectory() as folder:
        source = recording or f"{folder}/run.jsonl"
        try:
            with record(llm, source, text):
                yield
        except BaseException:
            with suppress(ValueError):  # what there is of a run that was interrupted, or failed
                _write(source, movie, trace, title, intro, scenes_before)
            raise
        _write(source, movie, trace, title, intro, scenes_before)


def _write(recording: str, movie: str | None, trace: str | None, title: str, intro: str,
           scenes_before: Sequence[Scene]) -> None:
    if trace:
        write_trace(read(recording), trace)
    if movie:
        scenes = [*scenes_before, pool_scene(recording, title, intro)]
        Path(movie).write_text(page(scenes, "nanopaged: what happens in the pool"), encoding="utf-8")
