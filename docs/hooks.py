"""MkDocs hook: add the pages outside docs/ to the site, and adapt links that leave docs/."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Pages outside docs/ and their names in the site.
PAGES = {
    "README.md": "overview.md" if (ROOT / "docs" / "index.md").exists() else "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "ds_configs/README.md": "recipes.md",
    "examples/README.md": "examples.md",
}
_LINK = re.compile(r"^```.*?^```|\[([^\[\]]+)\]\(([^)\s:]+)\)", re.S | re.M)


def on_files(files, config):
    """Add the pages outside docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the site's pages; replace links to sources by their text, or by the repository's if it is set."""
    names = {page: source for source, page in PAGES.items() if (ROOT / source).exists()}
    folder = posixpath.dirname(names.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    return _LINK.sub(lambda match: _adapted(match, folder, config.repo_url), markdown)


def _adapted(match, folder: str, repo_url: str | None) -> str:
    text, target = match.groups()
    path, hash_mark, place = (target or "").partition("#")
    if not path:
        return match[0]  # a code block, or a place in the same page
    path = posixpath.normpath(posixpath.join(folder, path))
    if path in PAGES or path.startswith("docs/"):
        return f"[{text}]({PAGES.get(path, path.removeprefix('docs/'))}{hash_mark}{place})"
    return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path})" if repo_url else text
