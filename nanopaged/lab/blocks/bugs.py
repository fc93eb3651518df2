"""How can handing out blocks go wrong?"""

from __future__ import annotations

from nanopaged.lab.bugs import Bug

BUGS = (
    Bug("front-of-the-table-first", 3,
        "A table is a list, and the natural loop over it begins at its front. Then a parent is cached before its "
        "children, and evicted before them: the children stay in the cache, and nobody can find them.",
        "Prefixes are computed again although most of their blocks are in the pool.",
        (("block_allocator.py", "self.give_back(block_table.pop())", "self.give_back(block_table.pop(0))"),)),
)
