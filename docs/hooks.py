"""What MkDocs needs to make a site of files that are written to be read in the repository.

README, CONTRIBUTING and CHANGELOG become pages, and what pages link to outside docs/ (pictures, configs, tables) comes
along. README's longer sections have pages of their own, so that the first page is short. Links are changed on the way
into the site only; a link to what is not there fails a strict build.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import dirname, normpath, relpath

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# README's sections that are not on the first page
SECTIONS = {
    "The original's checkpoints": "original.md",
    "Named models": "models.md",
    "Recipes": "recipes.md",
    "What the experts do": "experts.md",
    "How fast it is": "speed.md",
    "How the code is laid out": "layout.md",
}
_ANCHORS = {f"#{slugify(heading, '-')}": page for heading, page in SECTIONS.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=[)\s])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root, and the files that pages link to outside docs/."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
    for source, page in PAGES.items():
        texts[source] = (ROOT / source).read_text()
        parts = _first_page_and_others(texts[source]) if source == "README.md" else {page: texts[source]}
        for place, text in parts.items():
            files.append(File.generated(config, place, content=_for_site(text, source)))
    wanted = {_target(source, match[1]) for source, text in texts.items() for match in LINK.finditer(text)}
    for target in sorted(wanted):
        if not target.startswith("docs/") and target not in PAGES and (ROOT / target).is_file():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Points the links of a page in docs/ to where the files lie in the site."""
    source = f"docs/{page.file.src_uri}"
    return _for_site(markdown, source) if (ROOT / source).is_file() else markdown


def _first_page_and_others(readme: str) -> dict[str, str]:
    """README as pages by their place: the first one, and those of `SECTIONS`."""
    first, *rest = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    pages = {}
    for section in rest:
        heading = section.partition("\n")[0].removeprefix("## ")
        if heading in SECTIONS:
            pages[SECTIONS[heading]] = re.sub(r"^#(#+ )", r"\1", section, flags=re.MULTILINE)
        else:
            first += section
    missing = SECTIONS.keys() - {heading for heading, page in SECTIONS.items() if page in pages}
    if missing:
        raise PluginError(f"docs/hooks.py: README has no section named {', '.join(sorted(missing))}")
    more = "\n".join(f"- [{heading}]({page})" for heading, page in SECTIONS.items())
    return {PAGES["README.md"]: f"{first.rstrip()}\n\n## More\n\n{more}\n", **pages}


def _for_site(text: str, source: str) -> str:
    """The text of a file of the repository with its links as the site has them."""
    here = dirname(_place(source)) or "."

    def changed(match: re.Match) -> str:
        target, anchor = _target(source, match[1]), match[2] or ""
        if source == "README.md" and target in SECTIONS.values():  # the list that is made here
            return match[0]
        place = _ANCHORS.get(anchor, _place(target)) if target == "README.md" else _place(target)
        return relpath(place, here) + anchor

    return LINK.sub(changed, text)


def _target(source: str, link: str) -> str:
    """The file of the repository that a link of `source` means."""
    return normpath(PurePosixPath(source).parent / link)


def _place(target: str) -> str:
    """Where a file of the repository lies in the site."""
    return PAGES.get(target, target.removeprefix("docs/"))
