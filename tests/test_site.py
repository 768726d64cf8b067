"""The documentation site: its navigation against the pages, its links against the repository's."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import yaml

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def adapted(text: str, page: str, repo_url: str | None = None) -> str:
    config = SimpleNamespace(repo_url=repo_url)
    return hooks.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=page)), config, None)


def test_every_page_is_in_the_navigation_and_there_is_no_other():
    # The file names a Python function, which plain YAML does not load.
    text = re.sub(r"!!python/\S+ \{.*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    pages |= {page for source, page in hooks.PAGES.items() if (ROOT / source).exists()}

    def leaves(node):
        if isinstance(node, str):
            return [node]
        return [leaf for each in (node.values() if isinstance(node, dict) else node) for leaf in leaves(each)]

    assert sorted(leaves(yaml.safe_load(text)["nav"])) == sorted(pages)


def test_links_follow_the_pages_into_the_site():
    home = hooks.PAGES["README.md"]
    assert adapted("[limits](../README.md#limits)", "faq.md") == f"[limits]({home}#limits)"
    assert adapted("![m](docs/images/memory.png)", home) == "![m](images/memory.png)"
    assert adapted("[a](faq.md#x) [b](#y) [c](https://x.y/z)", "liger.md") == "[a](faq.md#x) [b](#y) [c](https://x.y/z)"
    assert adapted("```\n[a](../Makefile)\n```", "faq.md") == "```\n[a](../Makefile)\n```"


def test_links_to_sources_are_their_names_unless_the_repository_has_an_address():
    assert adapted("[Makefile](../Makefile)", "reproduce.md") == "Makefile"
    assert adapted("[M](../Makefile)", "reproduce.md", "https://x.y/z/") == "[M](https://x.y/z/blob/main/Makefile)"
