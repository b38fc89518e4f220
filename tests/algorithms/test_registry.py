"""Are plug-ins found by name, here and outside the repository, and is everything else refused in one line?"""

from pathlib import Path

import pytest

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.declarations import Allocator, Method, Refinement, RowStep
from neuronal_ray.cli.errors import BadInput

KINDS = {"methods": Method, "allocations": Allocator, "rows": RowStep, "refinements": Refinement}
FLAGS = {"methods": "--method", "allocations": "--allocation", "rows": "--row-step", "refinements": "--refinement"}

OUTSIDE = """
from neuronal_ray.algorithms.declarations import Method

def score(weight, inputs):
    return weight.float().abs()

METHOD = Method(score=score, statistic=None)
other = Method(score=score, statistic=None, released=True)
number = 3
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `outside_plugins` that can be imported."""
    package = tmp_path / "outside_plugins"
    package.mkdir()
    (package / "good.py").write_text(OUTSIDE)
    (package / "lacking.py").write_text(OUTSIDE.replace("score=score, statistic=None)", "statistic=None)", 1))
    (package / "half_solver.py").write_text(OUTSIDE.replace("released=True", "solve=score"))
    (package / "needy.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_a_folder_is_a_plug_in_of_its_kind(kind: str) -> None:
    names = registry.names(kind)
    assert names
    assert all(isinstance(registry.load(kind, name), KINDS[kind]) for name in names)


@pytest.mark.usefixtures("outside")
def test_a_plug_in_from_outside_is_an_object_or_a_module_s_constant() -> None:
    found = [registry.load("methods", f"outside_plugins.good{name}") for name in ("", ":METHOD", ":other")]
    assert found[0] is found[1]
    assert [method.released for method in found] == [False, False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["magic", "", "a b", ":magic", "a.b:", "a..b", "../wanda", "a.b:c.d"])
def test_an_unknown_name_answers_with_the_list(kind: str, name: str) -> None:
    with pytest.raises(BadInput) as refused:
        registry.check_name(kind, name)
    assert str(refused.value).startswith(f"{FLAGS[kind]}: unknown name {name!r}")
    assert str(refused.value).endswith(f"{', '.join(registry.names(kind))}, or package.module:object")
    with pytest.raises(BadInput):
        registry.load(kind, name)


def test_a_name_like_a_known_one_gets_a_hint() -> None:
    with pytest.raises(BadInput, match=r"unknown name 'wnada' \(did you mean wanda\?\), expected one of: alps, "):
        registry.check_name("methods", "wnada")


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_package.module", "absent_package.module cannot be imported: No module named 'absent_package'"),
        ("outside_plugins.absent", "outside_plugins.absent cannot be imported: No module named"),
        ("outside_plugins.needy", "cannot be imported: No module named 'a_library_that_is_not_there'"),
        ("outside_plugins.lacking", "cannot be imported: .* missing 1 required keyword-only argument: 'score'"),
        ("outside_plugins.half_solver", "cannot be imported: Method: a solver has both factorize and solve"),
        ("outside_plugins.good:absent", "outside_plugins.good has no absent, expected a .*Method"),
        ("outside_plugins:METHOD", "outside_plugins has no METHOD, expected a .*Method"),
        ("outside_plugins.good:number", r"number is of type int, expected a .*Method \(docs/plugins.md\)"),
    ],
)
def test_what_is_no_plug_in_is_refused_in_one_line(name: str, message: str) -> None:
    registry.check_name("methods", name)
    with pytest.raises(BadInput, match=f"^--method: {name}: .*{message}") as refused:
        registry.load("methods", name)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("outside")
def test_a_plug_in_of_another_kind_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"^--row-step: outside_plugins\.good:METHOD: METHOD is of type Method, expected"
    ):
        registry.load("rows", "outside_plugins.good:METHOD")
