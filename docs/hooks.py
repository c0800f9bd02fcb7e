"""What MkDocs needs to make a site of files that are written to be read in the repository.

README, CONTRIBUTING and CHANGELOG become pages. What pages link to outside docs/ (pictures, configs, tables) comes
along, and so do the colours of the explorer's page. Links are changed on the way into the site only; a link to what is
not there fails a strict build.
"""

import os
import re
import runpy
from pathlib import Path, PurePosixPath
from posixpath import dirname, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
TABLES = {"<!-- every key -->": "config_keys", "<!-- every job -->": "jobs"}  # where a page has those of docs/tables.py
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=[)\s])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root, and the files that pages link to outside docs/."""
    files.append(File.generated(config, "palette.css", abs_src_path=str(ROOT / "vmoe" / "palette.css")))
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
    for source, page in PAGES.items():
        texts[source] = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=_for_site(texts[source], source)))
    wanted = {_target(source, match[1]) for source, text in texts.items() for match in LINK.finditer(text)}
    for target in sorted(wanted):
        if not target.startswith("docs/") and target not in PAGES and (ROOT / target).is_file():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Points the links of a page in docs/ to where the files lie in the site."""
    for mark, table in TABLES.items():
        if mark in markdown:
            markdown = markdown.replace(mark, runpy.run_path(str(ROOT / "docs" / "tables.py"))[table]())
    source = f"docs/{page.file.src_uri}"
    return _for_site(markdown, source) if (ROOT / source).is_file() else markdown


def on_page_content(html: str, page, **_) -> str:
    """Puts a link that opens it in Colab above a notebook, where the build knows its repository, as GitHub's does."""
    repository = os.environ.get("GITHUB_REPOSITORY")
    if repository is None or not page.file.src_uri.endswith(".ipynb"):
        return html
    address = f"https://colab.research.google.com/github/{repository}/blob/main/docs/{page.file.src_uri}"
    return f'<p><a class="md-button" href="{address}">Open in Colab</a></p>\n{html}'


def _for_site(text: str, source: str) -> str:
    """The text of a file of the repository with its links as the site has them."""
    here = dirname(_place(source)) or "."

    def changed(match: re.Match) -> str:
        target, anchor = _target(source, match[1]), match[2] or ""
        return relpath(_place(target), here) + anchor

    return LINK.sub(changed, text)


def _target(source: str, link: str) -> str:
    """The file of the repository that a link of `source` means."""
    return normpath(PurePosixPath(source).parent / link)


def _place(target: str) -> str:
    """Where a file of the repository lies in the site."""
    return PAGES.get(target, target.removeprefix("docs/"))
