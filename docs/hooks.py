"""What MkDocs needs beyond its settings: pages from elsewhere, public names, formulas without a script."""

import html
import importlib
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/evidence.md")
LINKED = (
    "benchmarks/results/*",
    "benchmarks/**/*.py",
    "benchmarks/**/*.yaml",
    "examples/*",
    "LICENSE",
    "CITATION.cff",
)
ALL_OF = re.compile(r"^::: all of (\S+)$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live where repositories keep them, and what they link to."""
    for pattern in (*PAGES, *LINKED):
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Shorten links into docs/ and out of it, which is the site's root, and list today's public names."""
    if "/" not in page.file.src_uri:
        markdown = markdown.replace("](../", "](")
    return ALL_OF.sub(_name_each, markdown.replace("](docs/", "]("))


def on_page_content(content: str, **_: object) -> str:
    """Turn TeX into MathML, which browsers show by themselves."""
    return FORMULA.sub(_to_mathml, content)


def _name_each(match: re.Match[str]) -> str:
    """Write an entry for each name of a module's ``__all__``, under the module that defines it."""
    module = importlib.import_module(match[1])
    homes = {name: getattr(getattr(module, name), "__module__", match[1]) for name in module.__all__}
    return "\n\n".join(f"::: {home}.{name}" for name, home in homes.items())


def _to_mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    return convert(html.unescape(match[2]).strip(), display=display)
