"""Code blocks of Markdown files, as a reader would run them.

Python blocks of one file run in order, in one namespace and one folder, together with the
commands of its shell blocks. Two HTML comments, which readers do not see, steer this:

    <!-- setup
    code that runs before the next block: data and a model for it to use
    -->

    <!-- not run: the reason -->     on the line above a block that cannot run
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```+\s*(\w*)")
_NOT_RUN = re.compile(r"^<!-- not run: (.+?) -->$")
PYTHON = {"python", "py"}
SHELL = {"bash", "console", "sh", "shell"}


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        language: What stands behind the fence; ``python`` for hidden setup.
        line: Its first line of code in the file, from 1.
        code: The code.
        excuse: Why it is not run, or None if it is.
    """

    language: str
    line: int
    code: str
    excuse: str | None


def read_blocks(path: Path) -> list[Block]:
    """All code blocks of a Markdown file in order, hidden setup among them.

    Raises:
        ValueError: If a block or comment does not end.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    blocks: list[Block] = []
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        hidden = lines[number].strip() == "<!-- setup"
        if not (fence or hidden):
            number += 1
            continue
        closing = "-->" if hidden else "```"
        start = end = number + 1
        while end < len(lines) and lines[end].strip() != closing:
            end += 1
        if end == len(lines):
            raise ValueError(f"{path.name}, line {start}: this block never ends")
        above = _NOT_RUN.match(lines[number - 1].strip()) if number else None
        language = fence.group(1) if fence else "python"
        code = "\n".join(lines[start:end])
        blocks.append(Block(language, start + 1, code, above and above.group(1)))
        number = end + 1
    return blocks


def shell_commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, as words; comments and printed output left out.

    In a ``console`` block commands are the lines that start with ``$``; the rest is output.
    """
    joined = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        joined = [line[1:] for line in joined if line.startswith("$")]
    words = (shlex.split(line.removeprefix("$ "), comments=True) for line in joined)
    return [command for command in words if command]
