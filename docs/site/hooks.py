"""Pages of the site whose source is elsewhere: README, contributor's guide, changelog, the help of the commands."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File of the repository -> page of the site."""


def on_files(files: Files, config) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=with_site_links((ROOT / source).read_text())))
    files.append(File.generated(config, "api/cli.md", content=command_line()))
    return files


def with_site_links(text: str) -> str:
    """The same page with links that hold inside of the site; links to other files of the repository lose their link."""

    def replace(match: re.Match) -> str:
        label, target = match.groups()
        file = target.partition("#")[0]
        if target.startswith(("https://", "#")):
            return match[0]
        if file.startswith("docs/"):
            return f"[{label}]({target.removeprefix('docs/')})"
        return f"[{label}]({PAGES[file]})" if file in PAGES else label

    return re.sub(r"\[([^\]]*)\]\(([^()\s]+)\)", replace, text)


def command_line() -> str:
    """The help of every subcommand, as a page."""
    from crate_kernels.cli import COMMANDS

    parts = ["# Command line\n\nEvery command also answers `--help`.\n"]
    for name, (module, line) in COMMANDS.items():
        parser = argparse.ArgumentParser(
            f"crate-kernels {name}",
            description=line[0].upper() + line[1:] + ".",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100),
        )
        importlib.import_module(module).add_arguments(parser)
        parts.append(f"## {name}\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)
