"""Sweep files: a grid of options times named variants, every cell checked.

title = "..."
output = "runs/x"
extends = "x.toml"         # a sweep file next to this one, whose keys, options and grid this one replaces or adds to
equal-budgets = "A"        # all variants remove as many weights as variant A does in the same combination
compare = ["A", ["B","C"]] # the report compares all variants with A, and with the better of B and C
[options]                  # for all cells; names as in the files of `neuronal-ray prune`
[grid]                     # lists: every combination of their values
[[variant]]                # named sets of options: every combination with each of them
[[skip]]                   # combinations to leave out
"""

import difflib
import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.options import option_name, option_value, options_of, read_options
from neuronal_ray.cli.read_files import read_toml
from neuronal_ray.prune.config import PruneConfig

_KEYS = (
    *("title", "about", "reproduces", "output", "extends", "equal-budgets", "compare"),
    *("options", "grid", "variant", "skip"),
)
_NOT_IN_CELLS = ("output", "overwrite", "dry_run", "baselines")
_PLACE = ("address", "replicas", "device", "threads", "output", "overwrite", "dry_run", "baselines")
"""Options of where a cell runs and what it writes: its results do not depend on them."""
_DEFAULT_VARIANT = "default"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the sweep; `variant` is the name that reports give to its set of options.

    `combination` is equal for cells whose options differ by their variants alone. `budget_of` is the id of the cell
    whose achieved sparsity takes the place of the configured one.
    """

    variant: str
    config: PruneConfig
    combination: str = ""
    budget_of: str | None = None

    @property
    def id(self) -> str:
        """Return 12 hexadecimal digits that are equal for equal results, wherever the cell runs."""
        key = [self.variant, self.options()] + ([] if self.budget_of is None else [self.budget_of])
        text = json.dumps(key, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def options(self) -> dict[str, Any]:
        """Return the options that results depend on and that differ from their defaults."""
        values = {key: _plain(value) for key, value in asdict(self.config).items()}
        default = {key: _plain(value) for key, value in asdict(PruneConfig(model="")).items()}
        return {key: value for key, value in values.items() if key not in _PLACE and value != default[key]}

    def __str__(self) -> str:
        config = self.config
        sparsity = "" if config.sparsity is None else f" {config.sparsity:g}"
        return f"{Path(config.model).name} {config.method} {self.variant}{sparsity} seed {config.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A sweep file.

    `equal_budgets` names the variant whose achieved sparsity is the target of the others, "" for none. Reports compare
    all variants with each member of `compare`: with one variant, or with the best of several.
    """

    title: str
    reproduces: tuple[str, ...]
    output: Path
    cells: tuple[Cell, ...]
    equal_budgets: str = ""
    compare: tuple[tuple[str, ...], ...] = ()


MOST_CELLS = 10_000
"""The cells that a sweep may have, unless --max-cells says otherwise."""


def read_study(
    path: Path, overrides: Mapping[str, object], *, output: Path | None, max_cells: int = MOST_CELLS
) -> Study:
    """Read the sweep of a TOML file. Raises BadInput for what cannot work, and for more than `max_cells` cells.

    `overrides` by option name replace the options of the file: one value for all cells, or a list of values as a row of
    the grid (for options that are lists themselves: a list of lists).
    """
    table = _read_table(path)
    folder = output or (Path(table["output"]) if isinstance(table.get("output"), str) else None)
    if folder is None:
        raise BadInput(f'FILE: {path} names no output directory; add output = "runs/..", or use --output')
    cells = tuple(_cells(table, overrides, max_cells, where=str(path)))
    if not cells:
        raise BadInput(f"FILE: {path}: the grid is empty, expected at least one combination that is not skipped")
    _check_distinct(cells, where=str(path))
    reproduces = table.get("reproduces", [])
    return Study(
        title=str(table.get("title", path.stem)),
        reproduces=tuple(reproduces),
        output=folder,
        cells=cells,
        equal_budgets=str(table.get("equal-budgets", "")),
        compare=tuple(_compared(table, {cell.variant for cell in cells}, where=str(path))),
    )


def _read_table(path: Path, *, is_base: bool = False) -> dict[str, Any]:
    """Read a sweep file, merged with the file that it extends."""
    table = read_toml(path, flag="FILE")
    for key in table:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of: {', '.join(_KEYS)}"
            inside = " (options go into [options])" if key.replace("-", "_") in options_of(PruneConfig) else ""
            raise BadInput(f"FILE: {path}: unknown key {key!r}, {hint}{inside}")
    if "extends" not in table:
        return table
    if is_base or not isinstance(table["extends"], str):
        raise BadInput(f"FILE: {path}: extends is {table['extends']!r}, expected a sweep file that extends no other")
    base = _read_table(path.parent / table["extends"], is_base=True)
    options, grid = (_table(table.get(key, {}), key, str(path)) for key in ("options", "grid"))
    base_options, base_grid = (_table(base.get(key, {}), key, table["extends"]) for key in ("options", "grid"))
    return (
        base
        | table
        | {
            "options": dict(base_options) | dict(options),
            "grid": {key: values for key, values in base_grid.items() if key not in options} | dict(grid),
        }
    )


def _cells(table: Mapping[str, Any], overrides: Mapping[str, object], max_cells: int, *, where: str) -> Iterator[Cell]:
    common = _values(table, "options", where=where)
    axes = _axes(table, overrides, where=where)
    for key, value in overrides.items():
        common.pop(key, None)
        if key not in axes:
            common[key] = value
    variants = _variants(table, where=where)
    skips = [
        read_options(_table(skip, "skip", where), _options(), flag="FILE", place=f"[[skip]] of {where}")
        for skip in _list(table, "skip", where)
    ]
    sizes = [len(values) for values in axes.values()] + [len(variants)]
    if (count := math.prod(sizes)) > max_cells:
        shown = " x ".join(f"{size:,}" for size in sizes)
        raise BadInput(f"FILE: {where}: the grid has {count:,} cells ({shown}), --max-cells allows {max_cells:,}")
    for combination in itertools.product(*axes.values()):
        cells = {}
        shared = common | dict(zip(axes, combination, strict=True))
        key = Cell(variant="", config=PruneConfig(**{"model": "", **shared})).id
        for name, variant in variants.items():
            values = shared | variant
            values = _joined_settings(values, common, variant)
            if any(all(values.get(key) == value for key, value in skip.items()) for skip in skips):
                continue
            cells[name] = _cell(name, values, key, where=where)
        yield from _with_budget(cells, table.get("equal-budgets"), where=where)


def _with_budget(cells: Mapping[str, Cell], reference: object, *, where: str) -> Iterator[Cell]:
    """Yield the cells of one combination; with a reference, the others take its budget."""
    if reference is None:
        yield from cells.values()
        return
    if not isinstance(reference, str) or (cells and reference not in cells):
        raise BadInput(f"FILE: {where}: equal-budgets is {reference!r}, expected a variant of every combination")
    for name, cell in cells.items():
        if cell.config.model != cells[reference].config.model:
            raise BadInput(f"FILE: {where}: cell {cell} has another model than {reference}, whose budget it takes")
        yield cell if name == reference else replace(cell, budget_of=cells[reference].id)


def _compared(table: Mapping[str, Any], variants: set[str], *, where: str) -> Iterator[tuple[str, ...]]:
    """Yield the variants that reports compare with: one, or several of which the best counts."""
    given = table.get("compare", [])
    for entry in given if isinstance(given, list) else [given]:
        names = tuple(entry) if isinstance(entry, list) else (entry,)
        if not names or not variants.issuperset(names):
            raise BadInput(f"FILE: {where}: compare has {entry!r}, expected some of: {', '.join(sorted(variants))}")
        yield names


def _cell(name: str, values: dict[str, Any], combination: str, *, where: str) -> Cell:
    if "model" not in values:
        raise BadInput(f"FILE: {where}: no model, expected one in [options] or a list in [grid]")
    config = PruneConfig(**values)
    cell = Cell(variant=name, config=config, combination=combination)
    try:
        config.check()
    except BadInput as error:
        raise BadInput(f"FILE: {where}: cell {cell}: {error}") from error
    return cell


def _axes(table: Mapping[str, Any], overrides: Mapping[str, object], *, where: str) -> dict[str, list[Any]]:
    """Return the values of each row of the grid; an override replaces the values of its row."""
    axes: dict[str, list[Any]] = {}
    options = _options()
    for key, values in _table(table.get("grid", {}), "grid", where).items():
        name = option_name(key, options, flag="FILE", place=f"[grid] of {where}")
        if not isinstance(values, list) or not values:
            raise BadInput(f"FILE: {where}: [grid] {key} is {values!r}, expected a list of at least one value")
        axes[name] = [option_value(value, options[name], where=f"FILE: {key} in [grid] of {where}") for value in values]
        if name in overrides:
            axes[name] = [overrides[name]]
    for name, value in overrides.items():
        if isinstance(value, list):
            axes[name] = value
    return axes


def _variants(table: Mapping[str, Any], *, where: str) -> dict[str, dict[str, object]]:
    variants: dict[str, dict[str, object]] = {}
    for given in _list(table, "variant", where):
        entry = dict(_table(given, "variant", where))
        name = entry.pop("name", None)
        if not isinstance(name, str) or name in variants:
            raise BadInput(f"FILE: {where}: [[variant]] has the name {name!r}, expected a name of its own")
        variants[name] = read_options(entry, _options(), flag="FILE", place=f"variant {name} of {where}")
    return variants or {_DEFAULT_VARIANT: {}}


def _joined_settings(values: dict[str, Any], common: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    """Add the `[set]` tables of a variant to the common ones instead of replacing them."""
    if "settings" in common and "settings" in variant:
        return values | {"settings": {**common["settings"], **variant["settings"]}}
    return values


def _options() -> dict[str, Any]:
    return {name: option for name, option in options_of(PruneConfig).items() if name not in _NOT_IN_CELLS}


def _values(table: Mapping[str, Any], key: str, *, where: str) -> dict[str, Any]:
    return read_options(_table(table.get(key, {}), key, where), _options(), flag="FILE", place=f"[{key}] of {where}")


def _table(value: object, key: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"FILE: {where}: {key} is {value!r}, expected a table")
    return value


def _list(table: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise BadInput(f"FILE: {where}: {key} is {value!r}, expected tables written [[{key}]]")
    return value


def _check_distinct(cells: Sequence[Cell], *, where: str) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.id in seen:
            raise BadInput(f"FILE: {where}: the cell {cell} comes twice; does the grid repeat a value?")
        seen[cell.id] = cell


def read_override(text: str) -> tuple[str, object]:
    """Return the option name and value of `--option KEY=VALUE`: the value in TOML's notation, or a bare string."""
    key, equals, word = text.partition("=")
    if not equals:
        raise BadInput(f'--option: {text!r} is not KEY=VALUE, for example sparsity=0.7 or model=["a", "b"]')
    options = _options()
    name = option_name(key, options, flag="--option", place=text)
    try:
        value: object = tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        value = word
    except RecursionError as error:
        raise BadInput(f"--option: {key} is nested too deeply") from error
    accepts_lists = options[name].kind in ("numbers", "names")
    if isinstance(value, list) and (not accepts_lists or any(isinstance(item, list) for item in value)):
        return name, [option_value(item, options[name], where=f"--option: {key}") for item in value]
    return name, option_value(value, options[name], where=f"--option: {key}")


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
