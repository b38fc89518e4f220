"""Does the version of the code change whenever a source file does that scores depend on, and only then?"""

import re
import sys
from pathlib import Path

import pytest

from neuronal_ray import __version__
from neuronal_ray.cli.versions import code_version, score_versions, source_digest, versions


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, content in (("core/plan.py", "a"), ("core/kernels/cut.c", "b"), ("report/page.py", "c")):
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "package"


def digest(package: Path) -> str:
    source_digest.cache_clear()
    return source_digest(package)


@pytest.mark.parametrize("name", ["core/plan.py", "core/kernels/cut.c", "workers/new.py"])
def test_another_file_is_another_version(package: Path, name: str) -> None:
    before = digest(package)
    path = package / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("edited")
    assert digest(package) != before


def test_a_file_under_another_name_is_another_version(package: Path) -> None:
    before = digest(package)
    (package / "core" / "plan.py").rename(package / "core" / "plans.py")
    assert digest(package) != before


@pytest.mark.parametrize("name", ["report/page.py", "core/notes.txt", "core/__pycache__/plan.pyc"])
def test_files_that_no_score_depends_on_do_not_count(package: Path, name: str) -> None:
    before = digest(package)
    path = package / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("edited")
    assert digest(package) == before


def test_the_version_is_the_release_and_a_digest() -> None:
    assert re.fullmatch(rf"{re.escape(__version__)}\+[0-9a-f]{{12}}", code_version())
    assert versions()["neuronal_ray"] == score_versions()["neuronal_ray"] == code_version()
    assert score_versions()["torch"] == versions()["torch"]


def test_a_plug_in_from_outside_belongs_to_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "outside_plug_in.py").write_text("def score(): ...")
    own = code_version("wanda", "outside_plug_in:score")
    assert own != code_version("wanda") == code_version("magnitude")
    (tmp_path / "outside_plug_in.py").write_text("def score(): return 1")
    assert code_version("outside_plug_in:score") != own
    sys.modules.pop("outside_plug_in", None)


@pytest.mark.parametrize("name", ["outside_package.impl:score", "outside_package:METHOD"])
def test_what_a_plug_in_imports_from_its_package_belongs_to_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "outside_package"
    folder.mkdir()
    for file, text in (("__init__", "from outside_package.impl import METHOD"), ("impl", ""), ("helper", "POWER = 1")):
        (folder / f"{file}.py").write_text(text)
    before = code_version(name)
    assert before == code_version(name)
    (folder / "helper.py").write_text("POWER = 2")
    assert code_version(name) != before
