"""Globs and regular expressions over dotted names."""

import difflib
import re
from collections.abc import Callable, Iterable

_GLOB_TOKEN = re.compile(r"(?<![^.])\*\*\.|\*\*|\*|\?|\[!?[^\]!][^\]]*\]|.", re.DOTALL)


def matching_names(names: Iterable[str], pattern: str) -> list[str]:
    """Return the names that a string matches as a whole, else those without their first segment."""
    names, matches = list(names), compile_pattern(pattern)
    return [n for n in names if matches(n)] or [n for n in names if matches(n.partition(".")[2])]


def nearest_names(pattern: str, names: Iterable[str], count: int = 5) -> list[str]:
    """Return the names that look most like a pattern, compared as a whole and by their ends."""
    wanted = pattern.removeprefix("re:").strip("*.^$")
    segments = wanted.count(".") + 1

    def likeness(name: str) -> float:
        ends = [name, ".".join(name.split(".")[-segments:])]
        return max(difflib.SequenceMatcher(None, wanted, end).ratio() for end in ends)

    return sorted(names, key=likeness, reverse=True)[:count]


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Turn a glob, or a regular expression after ``re:``, into a predicate."""
    if not pattern.removeprefix("re:").strip():
        raise ValueError(f"layers={pattern!r}: a pattern must not be empty")
    is_regex = pattern.startswith("re:")
    text = pattern[3:] if is_regex else "".join(_translate(token) for token in _GLOB_TOKEN.findall(pattern))
    try:
        expression = re.compile(text)
    except re.error as error:
        kind = "regular expression" if is_regex else "glob"
        raise ValueError(f"layers={pattern!r}: no valid {kind} ({error})") from error
    search = expression.search if is_regex else expression.fullmatch
    return lambda name: bool(name) and search(name) is not None


def _translate(token: str) -> str:
    """Translate one token of a glob to a regular expression."""
    if token.startswith("[") and len(token) > 1:
        excluded = token[1] == "!"
        members = re.sub(r"([\\\[\]^&~|])", r"\\\1", token[2 if excluded else 1 : -1])
        return f"[^{members}.]" if excluded else f"[{members}]"
    wildcards = {"**.": r"(?:[^.]+\.)*", "**": ".*", "*": "[^.]*", "?": "[^.]"}
    return wildcards.get(token, re.escape(token))
