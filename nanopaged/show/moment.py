"""What must be known to draw one frame of a recording: the state after it, its caption, and what it changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nanopaged.show.captions import Told, narrate
from nanopaged.show.reading import Line, read
from nanopaged.show.replay import Frame, State, labels


class Moment(NamedTuple):
    """A frame of a recording, and the state after it. The state goes on when the next moment is asked for."""

    state: State
    told: Told
    labels: dict[str, str]  # of each request, by its id
    texts: dict[str, str]  # of each token, by its id: bytes, each as the character of its number
    changed: set[int]  # blocks that are not as they were before the frame

    def name(self, request_id: str) -> str:
        """A request's label where there is little room, and block numbers stand beside it."""
        label = self.labels[request_id]
        return label if "." in label else f"R{label}"

    def words(self, request_id: str, start: int, end: int) -> str:
        """What a request's tokens say, in printable characters; "" if the recording has no text."""
        token_ids = (self.state.sequences[request_id].token_ids or [])[start:end]
        raw = "".join(self.texts.get(str(token_id), "") for token_id in token_ids)
        text = raw.encode("latin-1").decode("utf-8", errors="replace").replace("\n", "↵")
        return "".join(character if character.isprintable() else "·" for character in text)


def moments(path: str) -> Iterator[Moment]:
    """The frames of a recording, one after another. Raises as `read` does."""
    lines = read(path)
    header = next(lines)
    names: dict[str, str] = {}
    texts: dict[str, str] = {}
    looks: list[tuple[int, int, bool]] = []

    def noting(lines: Iterator[Line]) -> Iterator[Line]:
        for line in lines:
            texts.update(line.get("texts", {}))
            if "add" in line:
                names.update(labels(line))
            yield line

    def note_looks(state: State, frame: Frame) -> None:
        looks[:] = _looks(state)

    for state, told in narrate(header, noting(lines), note_looks):
        changed = {block for block, look in enumerate(_looks(state)) if look != looks[block]}
        yield Moment(state, told, names, texts, changed)


def _looks(state: State) -> list[tuple[int, int, bool]]:
    """All that is seen of each block, but for its words."""
    return [(state.holders[block], state.filled[block], block in state.published) for block in range(state.num_blocks)]
