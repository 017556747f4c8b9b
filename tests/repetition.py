"""How much of the training scripts is repeated from one to another.

    python -m tests.repetition

A line counts as repeated if it stands in a run of ten (or six) lines that another script has too.
Docstrings, comments and blank lines do not count. The scripts are meant to read alike; what repeats
beyond that belongs into a folder.
"""

import ast
import difflib
from collections.abc import Iterable

from tests.helpers import TRAINING


def code_lines(text: str) -> list[str]:
    """The lines of a script without docstrings, comments and blank lines."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            first = node.body[0]
            docstrings |= set(range(first.lineno, first.end_lineno + 1))
    numbered = enumerate(text.splitlines(), 1)
    lines = [line.rstrip() for number, line in numbered if number not in docstrings]
    return [line for line in lines if line and not line.lstrip().startswith("#")]


def repeated_share(texts: Iterable[str], length: int) -> float:
    """Percent of the code lines that stand in runs of `length` lines of another text too."""
    scripts = [code_lines(text) for text in texts]
    owners: dict[tuple[str, ...], set[int]] = {}
    for number, lines in enumerate(scripts):
        for i in range(len(lines) - length + 1):
            owners.setdefault(tuple(lines[i : i + length]), set()).add(number)
    repeated = total = 0
    for lines in scripts:
        marked: set[int] = set()
        for i in range(len(lines) - length + 1):
            if len(owners[tuple(lines[i : i + length])]) > 1:
                marked |= set(range(i, i + length))
        repeated += len(marked)
        total += len(lines)
    return 100 * repeated / max(total, 1)


def longest_run(texts: Iterable[str]) -> list[str]:
    """The longest run of code lines that stands in two texts."""
    scripts = [code_lines(text) for text in texts]
    best: list[str] = []
    for number, lines in enumerate(scripts):
        for other in scripts[number + 1 :]:
            matcher = difflib.SequenceMatcher(None, lines, other, autojunk=False)
            match = matcher.find_longest_match()
            if match.size > len(best):
                best = lines[match.a : match.a + match.size]
    return best


if __name__ == "__main__":
    texts = [path.read_text() for path in TRAINING]
    for length in (10, 6):
        print(f"in runs of {length:2}: {repeated_share(texts, length):.1f} % of the code lines")
    print("the longest run:", *longest_run(texts), sep="\n")
