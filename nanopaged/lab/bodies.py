"""How is an assignment made from the source? A function loses its body, and keeps everything else.

Signature, docstring, the comments above it, and the number of every line before it stay as they are: the text is cut by
the positions of the syntax tree, and not printed anew. In place of the body stands one line:

    raise NotImplementedError("lab blocks, part 1: hand out blocks")

A kernel is run by Triton, whose own error would hide this one. So each statement that launches a kernel gets such a
line before it too, and so does each that launches a kernel that calls it.
"""

from __future__ import annotations

import __future__

import ast
import re
import textwrap
from types import ModuleType
from typing import NamedTuple

BLANK = re.compile(r"lab \w+, part \d+: ")


class Body(NamedTuple):
    module: str  # without "nanopaged."
    function: str  # "Class.function", or "function"

    @classmethod
    def of(cls, name: str) -> Body:
        return cls(*name.split(":"))

    @property
    def file(self) -> str:  # from the package's folder
        return self.module.replace(".", "/") + ".py"


def node_of(source: str, function: str) -> ast.FunctionDef:
    """Raises ValueError if the source has no function of this name."""
    node: ast.AST = ast.parse(source)
    for name in function.split("."):
        found = [child for child in getattr(node, "body", []) if getattr(child, "name", None) == name]
        if not found:
            raise ValueError(f"there is no function {function}")
        node = found[-1]
    return node


def written(node: ast.FunctionDef) -> list[ast.stmt]:
    """The statements after the docstring."""
    return node.body[ast.get_docstring(node) is not None :]


def is_blank(source: str, function: str) -> bool:
    match written(node_of(source, function)):
        case [ast.Raise(exc=ast.Call(func=ast.Name(id="NotImplementedError"), args=[ast.Constant(value=str(text))]))]:
            return BLANK.match(text) is not None
    return False


def blanked(source: str, messages: dict[str, str]) -> str:
    """The source with a line that raises, in place of the body of each function that `messages` names."""
    nodes = {function: node_of(source, function) for function in messages}
    lines = source.splitlines(keepends=True)
    for function, node in sorted(nodes.items(), key=lambda item: -item[1].lineno):  # the last first: lines keep places
        first = node.body[0].end_lineno + 1 if ast.get_docstring(node) is not None else node.body[0].lineno
        lines[first - 1 : node.end_lineno] = [_raising(node.body[0].col_offset, messages[function])]
    return "".join(lines)


def launches_blanked(source: str, messages: dict[str, str]) -> str:
    """The source with a line that raises before each statement that launches a kernel that `messages` names."""
    lines = source.splitlines(keepends=True)
    launching = [(node, messages[kernel]) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)
                 for kernel in messages if _launches(node, kernel)]
    for node, message in sorted(launching, key=lambda launch: -launch[0].lineno):
        lines.insert(node.lineno - 1, _raising(node.col_offset, message))
    return "".join(lines)


def users_of(source: str, function: str) -> list[str]:
    """A function of a module, and the module's functions that call it, directly or not."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    users = [function]
    for user in users:  # which grows meanwhile
        users += [node.name for node in functions if node.name not in users and _calls(node, user)]
    return users


def _calls(function: ast.FunctionDef, name: str) -> bool:
    return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
               for node in ast.walk(function))


def _launches(node: ast.stmt, kernel: str) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Subscript(value=ast.Name(id=name)))):
            return name == kernel
    return False


def _raising(indent: int, message: str) -> str:
    return f'{" " * indent}raise NotImplementedError("{message}")\n'


def text_of(source: str, function: str) -> str:
    """A function as it stands there, with its decorators, at the margin."""
    node = node_of(source, function)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("".join(source.splitlines(keepends=True)[first - 1 : node.end_lineno]))


def lend(module: ModuleType, source: str, function: str, filename: str) -> None:
    """Puts a function of another version of a module's source into the module."""
    flags = __future__.annotations.compiler_flag
    code = compile(text_of(source, function), filename, "exec", flags, dont_inherit=True)
    owner, _, name = function.rpartition(".")
    made: dict[str, object] = {}
    exec(code, module.__dict__, made)
    setattr(getattr(module, owner) if owner else module, name, made[name])
