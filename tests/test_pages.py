"""The pages lead to what is there: links, files they mention, the tree and the glossary of docs/design.md."""

import re
from pathlib import Path

import pytest

import neuronal_ray

PACKAGE = Path(neuronal_ray.__file__).parent
REPOSITORY = PACKAGE.parent
DESIGN = REPOSITORY / "docs" / "design.md"

TOP = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
FOLDERS = [REPOSITORY / name / "README.md" for name in ("jobs", "cluster")]
PAGES = [*TOP, *FOLDERS, *sorted((REPOSITORY / "docs").rglob("*.md"))]
OF_THE_PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Pages that describe the repository as it is; a changelog names files of the past."""

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(r"`([a-z.][\w.-]*(?:/[\w.-]+)+\.(?:py|c|toml|yaml|sh|sbatch|md|json|txt))`")
_MOST_FILES_OF_A_WALK = 10
_MADE_BY_THE_READER = {"neuronal_ray/algorithms/methods/softwanda.py"}
"""Files that a tutorial has its reader write; tests/test_docs.py writes them."""


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def anchors_of(page: Path) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(mention: str, *more: Path) -> bool:
    """Whether a path is in the repository, in the package, in jobs/ or in one of `more` folders."""
    return any((folder / mention).exists() for folder in (REPOSITORY, PACKAGE, REPOSITORY / "jobs", *more))


def section(title: str) -> str:
    """The text of docs/design.md under a heading or a bold title, up to the next."""
    found = re.split(rf"^(?:## |\*\*){re.escape(title)}.*$", DESIGN.read_text(), maxsplit=1, flags=re.MULTILINE)
    assert len(found) == 2, f"docs/design.md has no {title!r}"
    return re.split(r"^(?:## |\*\*)", found[1], maxsplit=1, flags=re.MULTILINE)[0]


def tree() -> list[str]:
    """The paths in the tree of docs/design.md, below the package; folders end in a slash."""
    lines = section("Where things are").split("```")[1].strip().splitlines()
    assert lines[0] == "neuronal_ray/"
    paths, folders = [], dict[int, str]()
    for line in lines[1:]:
        name = line.split()[0]
        depth = len(line) - len(line.lstrip())
        path = "".join(folder for level, folder in sorted(folders.items()) if level < depth) + name
        folders = {level: folder for level, folder in folders.items() if level < depth}
        if name.endswith("/"):
            folders[depth] = name
        paths.append(path)
    return paths


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in _LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", OF_THE_PRESENT, ids=name_of)
def test_files_that_a_page_mentions_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    mentioned = set(_FILE.findall(text)) - _MADE_BY_THE_READER
    assert not [mention for mention in mentioned if not exists(mention, page.parent)]


def test_the_tree_names_every_package_and_only_what_exists() -> None:
    packages = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("*/__init__.py")}
    named = tree()
    assert not packages - set(named)
    assert not [path for path in named if not exists(path)]


@pytest.mark.parametrize(
    "title", ["From the command line to a zero in a file", "A candidate, from the driver to its score and back"]
)
def test_a_walk_is_short_and_in_the_tree(title: str) -> None:
    files = re.findall(r"^\d+\. `(\S+?)`", section(title), re.MULTILINE)
    assert 0 < len(files) <= _MOST_FILES_OF_A_WALK
    assert not [file for file in files if not (PACKAGE / file).is_file()]


def test_every_word_of_the_glossary_is_used() -> None:
    design = DESIGN.read_text().replace(section("Glossary"), "")
    texts = [page.read_text() for page in PAGES if page != DESIGN]
    texts += [path.read_text() for path in PACKAGE.rglob("*.py")]
    used = re.sub(r"[\s_]+", " ", " ".join([design, *texts])).lower()
    words = re.findall(r"^\| ([a-z][a-z -]*) \|", section("Glossary"), re.MULTILINE)
    words = [word for word in words if word != "word"]
    assert len(words) >= 30
    assert not [word for word in words if not re.search(rf"\b{word}", used)]
