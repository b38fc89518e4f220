"""--config files and sweep files: no TOML, wrong types, unknown keys, and sweeps that make no sense."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bad_inputs.case import Case, Damage
from bad_inputs.good import COMMANDS, SWEEP

from neuronal_ray.cli.options import Option, flag_of, options_of
from neuronal_ray.evaluate.config import EvaluateConfig
from neuronal_ray.export.config import ExportConfig
from neuronal_ray.prune.config import PruneConfig

_CONFIGS = {"prune": PruneConfig, "evaluate": EvaluateConfig, "export": ExportConfig}
_BAD_TEXTS: dict[str, bytes] = {
    "a word": b"model",
    "JSON": b'{"model": "x"}',
    "no value": b"sparsity =",
    "a list that does not end": b"sparsity = [0.5",
    "a string that does not end": b'model = "x',
    "a key twice": b"seed = 1\nseed = 2\n",
    "a table twice": b"[set.method]\n[set.method]\n",
    "an unknown key": b"sparcity = 0.5\n",
    "an empty key": b'"" = 0.5\n',
    "a key with a NUL": b'"a\\u0000" = 1\n',
    "a key with colors": b'"\\u001b[31m" = 1\n',
    "a key of 5000 letters": b"x" * 5000 + b" = 1\n",
    "a surrogate": b'model = "\\ud800"\n',
    "a NUL": b'model = "x\0"\n',
    "latin 1": "model = 'caf\xe9'".encode("latin-1"),
    "UTF-16": 'model = "x"'.encode("utf-16"),
    "bytes": bytes(range(256)),
    "zeros": bytes(300),
    "lists too deep": b"model = " + b"[" * 50_000,
    "lists too deep, closed": b"model = " + b"[" * 5_000 + b"]" * 5_000,
    "tables too deep": b"a." * 20_000 + b"b = 1",
    "inline tables too deep": b"set = " + b"{a=" * 5_000 + b"1" + b"}" * 5_000,
    "an unknown table": b"[nope]\nx = 1\n",
    "a page": b"<html></html>",
}
_BAD_VALUES: dict[str, Sequence[str]] = {
    "str": ("3", "true", "[]", '["x"]', "{}", "1979-05-27", "nan", '"a\\u0000b"', '""', '" "'),
    "int": ('"3"', "1.5", "true", "[]", "[1]", "{}", "nan", "inf", "1979-05-27", "99999999999999999999", "-1", '""'),
    "float": ('"0.5"', "true", "[]", "[0.5]", "{}", "nan", "inf", "-inf", "1e400", "07:32:00", "-0.5", '""'),
    "path": ("3", "true", "[]", '["x"]', "{}", "nan", '"a\\u0000b"', '""', '" "', f'"{"x" * 300}"', f'"{"x/" * 2500}"'),
    "numbers": ("0.5", "true", '"x"', '["x"]', "[true]", "[[0.5]]", "[nan]", "[inf]", "[-1]", "{}", "[]", "[1e400]"),
    "names": ("3", "true", "[3]", '["x", 3]', "{}", "[[]]", '["a\\u0000"]', "nan", '[""]', '[" "]', '""'),
    "settings": ("3", "true", '"x"', "[]", "{x = 1}", '{"" = {x = 1}}', "{method = {nope = 1}}", "{nope = {x = 1}}"),
    "switch": ("1", "0", '"true"', '"x"', "[]", "{}", "nan"),
}
_IGNORED = {("seed", "-1"), ("seed", "99999999999999999999")}


def cases() -> Iterator[Case]:
    """All of this file."""
    for command, kind in _CONFIGS.items():
        for what, content in _BAD_TEXTS.items():
            damage = partial(_config_text, content)
            yield Case(reader="--config", what=what, command=command, named=("--config",), damage=damage)
        for name, option in options_of(kind).items():
            for value in _values(name, option):
                yield Case(
                    reader="--config", what=f"{name} = {value[:30]}", command=command,
                    named=("--config", flag_of(name)), whole_line=True,
                    damage=partial(_config_value, command, name, value),
                )  # fmt: skip
    yield from _sweep_options()
    yield from _sweep_structure()


def _values(name: str, option: Option) -> Iterator[str]:
    choices = ('"nope"', '"AUTO"') if option.choices else ()
    for value in (*_BAD_VALUES[option.kind], *choices):
        if (name, value) not in _IGNORED:
            yield value


def _config_text(content: bytes, folder: Path) -> Sequence[str]:
    (folder / "config.toml").write_bytes(content)
    return ["--config", str(folder / "config.toml")]


def _config_value(command: str, name: str, value: str, folder: Path) -> Sequence[str]:
    """Write the good arguments of the command as TOML, with one other value, where flags cannot win over it."""
    words = iter(COMMANDS[command][0](folder)[1:])
    lines = {}
    for word in words:
        text = next(words)
        lines[word[2:]] = text if text.replace(".", "").isdigit() else json.dumps(text)
    key = flag_of(name)[2:]
    lines[key] = value
    (folder / "config.toml").write_text("\n".join(f"{name} = {text}" for name, text in lines.items()))
    return [command, "--config", str(folder / "config.toml")]


def _edited(change: Callable[[str], str]) -> Damage:
    def damage(folder: Path) -> Sequence[str]:
        (folder / "sweep.toml").write_text(change(SWEEP))
        return []

    return damage


def _sweep_options() -> Iterator[Case]:
    """Each option of prune in [options] and in [grid]."""
    for name, option in options_of(PruneConfig).items():
        key = flag_of(name)[2:]
        for value in _values(name, option):
            text = "\n".join(line for line in SWEEP.splitlines() if not line.startswith(f"{key} = "))
            for where, line in (("options", f"{key} = {value}"), ("grid", f"{key} = [{value}]")):
                if where == "grid" and option.kind in ("settings",):
                    continue
                content = text.replace(f"[{where}]", f"[{where}]\n{line}")
                if value in ("-1", "-0.5", '"nope"', "nan", '"a\\u0000b"', '""') or where == "options":
                    yield Case(
                        reader="sweep file", what=f"[{where}] with {line[:60]}", command="sweep",
                        named=("FILE", "sweep.toml", flag_of(name)), damage=_edited(lambda _, content=content: content),
                    )  # fmt: skip


def _structure() -> dict[str, Callable[[str], str]]:
    def top(line: str) -> Callable[[str], str]:
        key = line.split(" = ")[0]
        return lambda text: line + "\n" + "\n".join(row for row in text.splitlines() if not row.startswith(f"{key} = "))

    def end(lines: str) -> Callable[[str], str]:
        return lambda text: text + lines

    changes = {
        what: top(content.decode()) for what, content in _BAD_TEXTS.items() if content.isascii() and len(content) < 4000
    }
    lines = [
        f"{key} = {value}"
        for key in ("title", "about", "output", "extends", "equal-budgets")
        for value in ("3", "[]", "{}", "true", "nan")
    ]
    lines += [
        f"{key} = {value}" for key in ("reproduces", "compare") for value in ("3", "{}", "[3]", "[[3]]", "nan", "true")
    ]
    lines += [
        'title = ""',
        'output = ""',
        'output = " "',
        'output = "a\\u0000"',
        'output = "/proc/x"',
        'output = "../model"',
    ]
    lines += [
        f'output = "{"x" * 300}"',
        f'output = "{"x/" * 2500}"',
        'output = "../sweep.toml"',
        'output = "/dev/null"',
    ]
    lines += [
        'extends = "absent.toml"',
        'extends = "sweep.toml"',
        'extends = ""',
        'extends = "."',
        'extends = "a\\u0000"',
    ]
    lines += ['extends = "/dev/zero"', 'extends = "evaluation.txt"', 'extends = "../../../etc/passwd"', "options = 3"]
    lines += [
        'equal-budgets = "nope"',
        'equal-budgets = ""',
        'compare = ["nope"]',
        "compare = [[]]",
        'compare = "nope"',
    ]
    lines += [
        'compare = [["Uniform", "nope"]]',
        'reproduces = ["table x"]',
        'reproduces = ["x"]',
        'reproduces = ["table "]',
    ]
    lines += ["grid = 3", "variant = 3", "skip = 3", "sparsity = 0.5", 'model = "x"', "grids = {}"]
    for line in lines:
        if line.split(" = ")[0] in ("options", "grid", "variant", "skip"):
            key = line.split(" = ")[0]
            changes[line] = lambda text, line=line, key=key: line + "\n" + text.replace(f"[{key}]", "[about]")  # type: ignore[misc]
        else:
            changes[line[:60]] = top(line)
    variants = ["", 'name = "Uniform"', 'name = ""', 'name = " "', "name = 3", "name = []", 'name = "a\\u0000"']
    variants += ['allocation = "owl"', 'name = "B"\nnope = 1', 'name = "B"\nsparsity = "x"', 'name = "B"\noutput = "x"']
    variants += [
        'name = "B"\nmethod = "nope"',
        'name = "B"\nsparsity = 2',
        'name = "B"\nset = 3',
        'name = "B"\nset.x = 1',
    ]
    variants += ['name = "\\u001b[31m"\nmethod = "nope"', 'name = "B"', f'name = "{"x" * 5000}"\nmethod = "nope"']
    variants += ['name = "B"\nset.method.nope = 1', 'name = "B"\npattern = "5:7"', 'name = "B"\nset.nope.x = 1']
    changes |= {f"[[variant]] {line!a:.50}": end(f"[[variant]]\n{line}\n") for line in variants if line != 'name = "B"'}
    changes["[[variant]] two with equal options"] = end('[[variant]]\nname = "Uniform"\nallocation = "owl"\n')
    skips = ["nope = 1", 'sparsity = "x"', "variant = 3", "seed = 1.5", 'output = "x"', "sparsity = [0.5]"]
    changes |= {f"[[skip]] {line}": end(f"[[skip]]\n{line}\n") for line in skips}
    changes["[[skip]] all"] = end('[[skip]]\nallocation = "uniform"\n')
    grids = ["sparsity = []", "sparsity = 0.5", "sparsity = {}", "sparsity = [0.5, 0.5]", "sparsity = [0.5, 'x']"]
    grids += ["sparsity = [[0.5]]", "sparsity = [nan]", "sparsity = [0.5, 2]", "sparsity = [true]", "sparsity = 'x'"]
    changes |= {f"[grid] {line}": partial(_grid, line) for line in grids}
    many = "\n".join(f"{name} = [{', '.join(map(str, range(1, 1001)))}]" for name in ("seed", "search-budget"))
    changes["[grid] of a million cells"] = lambda text: text.replace("[grid]", f"[grid]\n{many}")
    more = "\n".join(
        f"{name} = [{', '.join(map(str, range(1, 2001)))}]" for name in ("seed", "search-budget", "task-limit")
    )
    changes["[grid] of 16 billion cells"] = lambda text: text.replace("[grid]", f"[grid]\n{more}")
    changes["no output"] = lambda text: text.replace('output = "../study"', "")
    changes["no model"] = lambda text: text.replace('model = "../model"', "")
    return changes


def _grid(line: str, text: str) -> str:
    return text.replace("sparsity = [0.5, 0.6]", line)


def _sweep_structure() -> Iterator[Case]:
    for what, change in _structure().items():
        for command in ("sweep", "sweep --dry-run"):
            yield Case(
                reader="sweep file", what=what, command=command, named=("FILE", "sweep.toml", "--output", "--model"),
                damage=_edited(change),
            )  # fmt: skip

    def extended(base: str) -> Damage:
        def damage(folder: Path) -> Sequence[str]:
            (folder / "base.toml").write_text(base)
            (folder / "sweep.toml").write_text(f'extends = "base.toml"\n{SWEEP}')
            return []

        return damage

    for base in (
        "x",
        "options = 3",
        "grid = 3",
        'extends = "sweep.toml"',
        "nope = 1",
        "[options]\nnope = 1",
        "title = 3",
    ):
        yield Case(
            reader="sweep file",
            what=f"extends {base!a}",
            command="sweep",
            named=("FILE", "base.toml"),
            damage=extended(base),
        )
    yield Case(reader="sweep file", what="good", command="sweep", named=(), damage=lambda _: [], harmless=True)
    added: Any = _edited(
        lambda text: (
            text + '[[variant]]\nname = "OWL"\nallocation = "owl"\n[[skip]]\nallocation = "owl"\nsparsity = 0.6\n'
        )
    )
    yield Case(reader="sweep file", what="a skip", command="sweep", named=(), damage=added, harmless=True)
