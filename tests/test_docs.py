"""The documentation against its subject: targets, links, JSON, Python, keys, and the commands of README's figures."""

import ast
import importlib
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from benchmarks import samples
from deepspeed_alst.config.compatibility import REFUSED
from deepspeed_alst.config.schema import AlstBlockConfig, parse
from deepspeed_alst.environment import NEWEST_TESTED
from deepspeed_alst.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
# What a page for a feature must say.
FEATURE_PAGES = ("sequence_parallelism", "tiled_mlp", "tiled_loss", "liger", "offload", "memory_lean", "reduction")


def text(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def snippets(content: str, language: str) -> list[str]:
    """The fenced blocks of a language, with a title or without."""
    return re.findall(rf"^```{language}(?: title=[^\n]*)?\n(.*?)^```", content, re.S | re.M)


def without_snippets(content: str) -> str:
    return re.sub(r"^```.*?^```", "", content, flags=re.S | re.M)


def named_targets(content: str) -> set[str]:
    """Of ``make``, in code: between backticks, or at the start of a line of a fenced block."""
    spans = re.findall(r"`[^`\n]+`", without_snippets(content))
    lines = [line for block in snippets(content, r"\w*") for line in block.splitlines() if line.startswith("make ")]
    return set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", "\n".join(spans + lines)))


def makefile_targets(content: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):", content, re.M))


def links(content: str) -> list[str]:
    """Relative links, with what follows a #."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_snippets(content))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(content: str) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", without_snippets(content), re.M)}


def broken(page: Path, link: str) -> bool:
    path, _, place = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return True
    return bool(place) and place not in anchors(target.read_text(encoding="utf-8"))


def first_table(content: str, heading: str = "") -> list[list[str]]:
    """The cells of the first table's rows after a heading, its head left out."""
    content = content[content.index(heading) :]
    rows = re.search(r"(?:^\|.*\n)+", content, re.M)
    assert rows, "no table"
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in rows[0].splitlines()[2:]]


def commands(cell: str) -> list[str]:
    return re.findall(r"`(make [a-z0-9-]+)", cell)


# --- the checks find what breaks them


def test_a_target_that_is_not_there_is_found():
    named = named_targets("run `make bench-wire`, or:\n\n```\nmake demo    # makes .venv\n```\nmake sure, `python x`")
    assert named == {"bench-wire", "demo"}
    assert makefile_targets("demo: setup\n\techo: x\nTORCH ?= 1\nbench-wire:\n") == {"demo", "bench-wire"}


def test_a_link_that_leads_nowhere_is_found():
    readme = PAGES["README.md"]
    assert links("[a](docs/faq.md) [b](https://x.y/z.md)\n```\n[c](no.md)\n```\n[d](#features)") == [
        "docs/faq.md",
        "#features",
    ]
    assert not broken(readme, "docs/faq.md") and not broken(readme, "#features")
    assert broken(readme, "docs/no.md") and broken(readme, "#no-such-heading") and broken(readme, "docs/faq.md#no")


def test_rows_and_commands_of_a_table_are_read():
    table = "x\n\n| a | b | c |\n|---|---|---|\n| one | 2, 2 | `make parity` |\n| two | | |\n\ny"
    assert [row[0] for row in first_table(table)] == ["one", "two"]
    assert [commands(row[-1]) for row in first_table(table)] == [["make parity"], []]


# --- and the pages keep them


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_is_named_exists(page):
    targets = makefile_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert named_targets(text(page)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    assert [link for link in links(text(page)) if broken(PAGES[page], link)] == []


def ragged(content: str) -> list[str]:
    """The rows of tables that have not as many cells as their heads."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", without_snippets(content), re.M):
        rows = table.splitlines()
        cells = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows]
        found += [row for row, count in zip(rows, cells, strict=True) if count != cells[0]]
    return found


def test_a_row_with_a_cell_too_many_is_found():
    assert ragged("| a | b |\n|---|---|\n| `x|y` | 1 |\n| one | 2 | 3 |\n") == ["| one | 2 | 3 |"]


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_the_cells_of_its_head(page):
    assert ragged(text(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_json_snippet_is_accepted_by_the_parser(page):
    for snippet in snippets(text(page), "json"):
        parse(json.loads(snippet))


def test_a_snippet_with_a_wrong_key_is_not_accepted():
    with pytest.raises(ConfigError, match="tile_tokens"):
        parse(json.loads('{"alst": {"tiled_mlp_compute": {"tile_tokns": 1}}}'))


@pytest.mark.parametrize("page", PAGES)
def test_every_python_snippet_is_python_and_what_it_imports_of_this_package_is_there(page):
    for snippet in snippets(text(page), "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed_alst"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, each.name) for each in node.names)


def test_each_of_readmes_results_has_its_command_in_reproduce():
    wanted = [command for row in first_table(text("README.md"), "## Results") for command in commands(row[-1])]
    given = [command for row in first_table(text("docs/reproduce.md")) for command in commands(row[3])]
    assert len(wanted) == 6
    assert set(wanted) <= set(given)


def test_readme_is_short():
    content = text("README.md")
    assert len(content.splitlines()) <= 200 and len(content.encode()) <= 12 * 1024


def test_the_index_names_every_page():
    targets = {link.partition("#")[0] for link in links(text("docs/index.md"))}
    pages = {Path(page).name for page in PAGES if page not in ("README.md", "docs/index.md")}
    assert pages - targets == set()


def test_every_target_that_prints_figures_is_in_reproduce():
    targets = makefile_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    measuring = {each for each in targets if each.startswith("bench-") or each in ("parity", "census")}
    assert measuring <= named_targets(text("docs/reproduce.md"))


@pytest.mark.parametrize("name", FEATURE_PAGES)
def test_a_features_page_says_when_not_to_use_it_what_it_costs_and_what_prints_its_figures(name):
    content = text(f"docs/{name}.md")
    assert re.search("when not to use it", content, re.I)
    assert "costs" in content and "saves" in content
    assert snippets(content, "json") and named_targets(content) and "arxiv.org" in content.lower()


def test_every_key_of_the_block_is_named_in_a_page():
    pages = "\n".join(text(page) for page in PAGES if page != "README.md")
    assert [key for key in AlstBlockConfig.model_fields if key not in pages] == []


def test_the_compatibility_page_is_the_table():
    rows = {row[0]: row[2] for row in first_table(text("docs/compatibility.md"))}
    refused = {each.name: f"refused: {each.refusal}" for each in REFUSED}
    assert {name: verdict for name, verdict in rows.items() if verdict != "right"} == refused


def test_readme_reproduce_the_census_and_the_list_count_the_same_models():
    from deepspeed_alst.verification.verify_model import VERIFIED_MODEL_TYPES

    rows = [
        line.strip("|").split("|") for line in text("docs/census.md").splitlines() if re.match(r"\| \w[\w-]* \|", line)
    ]
    models = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row[0].strip() != "model_type"}
    right = {name for name, cells in models.items() if cells[0] not in ("refused", "not built")}
    packed = sum(models[name][3] not in ("", "refused") for name in right)
    assert right == VERIFIED_MODEL_TYPES
    assert f"{len(models)} models: {len(VERIFIED_MODEL_TYPES)} right, " in text("docs/census.md")
    right_and_packed = f"{len(models)} | {len(VERIFIED_MODEL_TYPES)} right, {packed} of them packed too"
    assert f"SP 2, 3, 4: {right_and_packed}" in text("docs/reproduce.md")
    assert f"of {len(models)} | {len(VERIFIED_MODEL_TYPES)} match SP 1, none differs" in text("README.md")
    assert f"{len(VERIFIED_MODEL_TYPES)} causal LMs of transformers" in text("README.md")


# Their blocks are run by `make examples`, or have a title that says why not.
BLOCKS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*PAGES.values(), *ROOT.glob("*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("ds_configs/*.md"))
}


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_has_a_language_and_a_console_is_a_sample_or_has_a_title(page):
    heads = re.findall(r"^(.*)\n```([^`\n]*)\n(?:.*\n)*?```$", BLOCKS[page], re.M)
    allowed = re.compile(r'(bash|console|json|python|text)( title="[^"]+")?')
    assert [head for _, head in heads if not allowed.fullmatch(head)] == []
    assert [head for before, head in heads if head == "console" and "[[[cog" not in before] == []


def test_a_block_is_run_and_one_that_fails_or_has_a_title_is_not_passed_over(tmp_path):
    page = ROOT / "runs" / f"{tmp_path.name}.md"
    page.parent.mkdir(exist_ok=True)
    blocks = (
        "python\nx = 1",
        "python\nassert x == 1",
        "python\nassert x == 2",
        "bash\nds_alst recipes sp2 --copy new.json",
    )
    blocks += ("bash\ntest -s new.json", "bash\nfalse\ntrue", 'bash title="needs what is not here"\nfalse')
    page.write_text("".join(f"```{block}\n```\n\n" for block in blocks), encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-p", "tests.code_blocks", "-q", str(page)]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    finally:
        page.unlink()
    assert "2 failed, 4 passed" in done.stdout, done.stdout


def test_samples_and_tables_that_are_quick_to_make_are_up_to_date():
    """``make docs-data`` writes them."""
    words = [sys.executable, "-m", "benchmarks.samples", "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_every_sample_has_its_place_in_a_page_and_no_page_has_another():
    pages = "".join(path.read_text(encoding="utf-8") for path in samples.PAGES)
    put = re.findall(r'\[\[\[cog put\("([^"]+)"\) \]\]\]', pages)
    assert sorted(put) == sorted(samples.SAMPLES)


def files_of(page: str) -> dict[str, str]:
    """The snippets of a page that are files: a line with a name and a colon stands before each."""
    pattern = r"^`(\w+\.(?:py|json))`[^\n]*:\n\n```(?:python|json)\n(.*?)^```"
    return dict(re.findall(pattern, text(page), re.S | re.M))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("program", "config", "says"),
    [
        ("before.py", "before.json", "loss 5.5551 norm 0.7668"),
        ("before.py", "block.json", "loss 5.5551 norm 0.3834"),
        ("after.py", "after.json", "loss 5.5551 norm 0.3834"),
        ("trainer_before.py", "trainer_before.json", "'train_loss'"),
        ("trainer_after.py", "trainer_after.json", "'train_loss'"),
        ("accelerate_after.py", "accelerate_after.json", "steps 4"),
    ],
)
def test_the_programs_of_the_migration_page_run(program, config, says, tmp_path):
    for name, content in files_of("docs/migration.md").items():
        (tmp_path / name).write_text(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", str(port)]
    done = subprocess.run([*launcher, program, config], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout


def test_the_newest_versions_that_are_not_warned_of_are_those_that_were_right():
    table = text("docs/versions.md").partition("<!-- table -->\n")[2].splitlines()
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line[:1] == "|"]
    right = [dict(zip(head, row, strict=True)) for row in rows if "failed" not in " ".join(row) and row[0][:1] == "2"]
    newest = {name: max(Version(row[name]).release[:2] for row in right) for name in NEWEST_TESTED}
    assert newest == {name: Version(version).release for name, version in NEWEST_TESTED.items()}
