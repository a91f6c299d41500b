"""The Markdown pages of the project: their code blocks, headings and links.

Two comments before a code block control the test. They are invisible in the rendered page:

- ``<!-- setup: ... -->``: Python code that the test runs before the block, for example to build the model of the block
- ``<!-- not run: REASON -->``: the test does not run the block
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
}

_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
_COMMENTS = re.compile(r"(?:<!--(?:(?!-->).)*-->\s*)+\Z", re.DOTALL)
_COMMENT = re.compile(r"<!--\s*(setup|not run):(.*?)-->", re.DOTALL)


@dataclass
class Block:
    """One fenced block: its language, its text, the line of its first line of text, and its comments."""

    page: str
    line: int
    language: str
    text: str
    setup: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = PAGES[page].read_text()
    found = []
    for match in _FENCE.finditer(text):
        before = _COMMENTS.search(text[: match.start()])
        comments = dict(_COMMENT.findall(before.group() if before else ""))
        reason = comments.get("not run")
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start(3)) + 1,
                language=match[2].strip(),
                text=match[3],
                setup=comments.get("setup", ""),
                not_run=None if reason is None else reason.strip(),
            )
        )
    return found


def without_code(page: str) -> str:
    """The page's text without fenced blocks, comments and inline code."""
    text = _FENCE.sub("", PAGES[page].read_text())
    return re.sub(r"`[^`\n]+`", "", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))


def links(page: str) -> list[str]:
    """The targets of all links and images of a page."""
    return re.findall(r"\]\(([^()\s]+)\)", without_code(page))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text()), re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {slug.strip().replace(" ", "-") for slug in slugs}
