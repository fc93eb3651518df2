"""A body is taken out, and nothing else is."""

from __future__ import annotations

import ast
import textwrap
import types

import pytest

from nanopaged.lab import labs
from nanopaged.lab.bodies import Body, blanked, is_blank, launches_blanked, lend, text_of, users_of
from nanopaged.lab.workspace import PACKAGE, message

SOURCE = textwrap.dedent('''\
    """A module."""

    class Pool:
        # Why it is so.
        @property
        def room(self) -> int:  # blocks
            return 1

        def take(self, count: int = 1) -> int:
            """Takes.

            Several lines.
            """
            # Counted first.
            if count:
                return count
            return 0

        def after(self) -> int:
            return 7


    def alone(x: int) -> int:
        """One line."""
        return x
''')


def test_signature_docstring_and_the_comments_above_stay() -> None:
    text = blanked(SOURCE, {"Pool.take": "lab pool, part 1: write it"})
    lines, expected = text.splitlines(), SOURCE.splitlines()
    first = expected.index("        # Counted first.")
    assert lines[:first] == expected[:first], "every line before the body is where it was"
    assert lines[first] == '        raise NotImplementedError("lab pool, part 1: write it")'
    assert lines[first + 1 :] == expected[first + 4 :]


def test_several_bodies_are_taken_out_of_one_module() -> None:
    text = blanked(SOURCE, dict.fromkeys(("alone", "Pool.room", "Pool.take"), "lab pool, part 1: write it"))
    assert text.count("raise NotImplementedError") == 3 and "def after(self) -> int:\n        return 7" in text
    ast.parse(text)
    assert all(is_blank(text, function) for function in ("alone", "Pool.room", "Pool.take"))
    assert not any(is_blank(SOURCE, function) for function in ("alone", "Pool.room", "Pool.take"))


def test_another_refusal_is_not_a_body_to_be_written() -> None:
    assert not is_blank('def f():\n    raise NotImplementedError("only on a GPU")\n', "f")


def test_a_function_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="there is no function Pool.give"):
        blanked(SOURCE, {"Pool.give": ""})


def test_a_launch_raises_before_the_kernel_is_started() -> None:
    source = "def launch():\n    x = 1\n    kernel[(1,)](x,\n                 2)\n    other[(1,)](x)\n"
    assert launches_blanked(source, {"kernel": "lab k, part 1: write it"}) == (
        'def launch():\n    x = 1\n    raise NotImplementedError("lab k, part 1: write it")\n'
        "    kernel[(1,)](x,\n                 2)\n    other[(1,)](x)\n")


def test_a_lent_function_takes_the_place_of_one_that_is_not_written() -> None:
    module = types.ModuleType("student")
    exec(blanked(SOURCE, dict.fromkeys(("alone", "Pool.room", "Pool.take"), "lab p, part 1: x")), module.__dict__)
    for function in ("alone", "Pool.room", "Pool.take"):
        lend(module, SOURCE, function, "source.py")
    pool = module.Pool()
    assert (module.alone(3), pool.room, pool.take(2), pool.after()) == (3, 1, 2, 7)


def test_the_text_of_a_function_has_its_decorators_and_stands_at_the_margin() -> None:
    assert text_of(SOURCE, "Pool.room") == "@property\ndef room(self) -> int:  # blocks\n    return 1\n"


@pytest.mark.parametrize("lab", labs.NAMES)
def test_every_body_of_a_lab_is_in_the_source(lab: str) -> None:
    chosen = labs.get(lab)
    for name in chosen.bodies():
        body = Body.of(name)
        source = (PACKAGE / body.file).read_text(encoding="utf-8")
        text = blanked(source, {body.function: message(chosen, name)})
        assert is_blank(text, body.function)
        assert len(text.splitlines()) <= len(source.splitlines())


def test_whoever_calls_a_function_uses_it_and_so_does_its_caller() -> None:
    source = ("def inner(x):\n    return x\n\ndef middle(x):\n    return inner(x)\n\n"
              "def outer(x):\n    return middle(x) + 1\n\ndef other(x):\n    return other(x)\n")
    assert users_of(source, "inner") == ["inner", "middle", "outer"]
    assert users_of(source, "other") == ["other"]
