"""What stands where a file or directory should: FIFOs, devices, directories, links; and outputs that exist already."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bad_inputs.case import Case, each, flags

_ODD: dict[str, Callable[[Path], object]] = {
    "a FIFO": lambda path: os.mkfifo(path),
    "a directory": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("absent"),
    "a cyclic link": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a FIFO": lambda path: [os.mkfifo(path.with_name("fifo")), path.symlink_to("fifo")],
    "nothing": lambda _: None,
}
_LOADS = ("prune", "prune --dry-run", "evaluate", "sweep --dry-run")
_READ: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "model": ((*_LOADS, "export", "export --format packed", "export --masks"), ("--model",)),
    "model/config.json": ((*_LOADS, "export", "export --format packed", "export --masks"), ("--model", "config.json")),
    "model/model.safetensors": ((*_LOADS, "export", "export --masks"), ("--model", "model.safetensors")),
    "model/tokenizer.json": (_LOADS, ("--model", "tokenizer")),
    "calibration.txt": (("prune", "prune --dry-run", "sweep"), ("--calibration",)),
    "evaluation.txt": (("prune", "prune --dry-run", "evaluate", "sweep"), ("--evaluate",)),
    "sweep.toml": (("sweep", "sweep --dry-run"), ("FILE", "sweep.toml")),
    "run": (("report RUN",), ("RUNS",)),
    "run/pruning.json": (("report RUN",), ("pruning.json",)),
    "run/search.parquet": (("report RUN",), ("search.parquet",)),
    "run/allocation.parquet": (("report RUN",), ("allocation.parquet",)),
    "study": (("report STUDY",), ("RUNS",)),
    "study/sweep.json": (("report STUDY", "sweep --resume"), ("sweep.json", "--output", "RUNS")),
    "study/results": (("report STUDY",), ("results",)),
    "search.json": (("benchmark table",), ("search.json",)),
    "masks.safetensors": (("export --masks",), ("--masks",)),
}
_OPTIONAL = {"model/generation_config.json", "study/journal.jsonl", "model/tokenizer_config.json"}
_WRITES: dict[str, Sequence[str]] = {
    "prune": ("--output", "out"),
    "evaluate": ("--output", "out"),
    "export --format packed": ("--output", "out"),
    "export --format dense": ("--output", "out"),
    "export --format masks": ("--output", "out.safetensors"),
    "export --masks": ("--output", "out"),
    "sweep": ("--output", "out"),
    "report STUDY": ("--output", "out.html"),
}


def cases() -> Iterator[Case]:
    """All of this file."""
    for name, (commands, named) in _READ.items():
        for what, make in _ODD.items():
            damage = partial(_instead, name, make)
            yield from each(commands, reader="paths", what=f"{what} at {name}", named=named, damage=damage)
    for name in _OPTIONAL:
        commands = ("sweep --resume",) if "journal" in name else ("prune", "prune --dry-run", "evaluate")
        for what, make in _ODD.items():
            if what != "nothing":
                damage = partial(_instead, name, make)
                yield from each(
                    commands, reader="paths", what=f"{what} at {name}", named=(Path(name).name, "--model", "tokenizer"),
                    damage=damage, either=True,
                )  # fmt: skip
    for flag, commands in (("--config", ("prune", "evaluate", "export")), ("--task-data", ("evaluate",))):
        for what, make in _ODD.items():
            if (flag, what) != ("--task-data", "a directory"):
                damage = partial(_added, flag, make)
                yield from each(commands, reader="paths", what=f"{what} for {flag}", named=(flag,), damage=damage)
    yield from _outputs()


def _instead(name: str, make: Callable[[Path], object], folder: Path) -> Sequence[str]:
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)
    return []


def _added(flag: str, make: Callable[[Path], object], folder: Path) -> Sequence[str]:
    make(folder / "given")
    return [flag, str(folder / "given")]


def _outputs() -> Iterator[Case]:
    precious: dict[str, Callable[[Path], object]] = {
        "a text file": lambda path: path.write_text("precious"),
        "a JSON file": lambda path: path.write_text('{"model_type": "llama"}'),
        "an empty file": lambda path: path.touch(),
        "a directory with a file": lambda path: [path.mkdir(), (path / "thesis.txt").write_text("precious")],
        "a FIFO": lambda path: os.mkfifo(path),
        "a link to a file": lambda path: [path.with_name("file").write_text("x"), path.symlink_to("file")],
        "a link to a directory": lambda path: (
            [path.with_name("precious").mkdir(), path.symlink_to("precious")]
            and (path / "thesis.txt").write_text("precious")
        ),
        "a cyclic link": lambda path: path.symlink_to(path.name),
        "a device": lambda path: path.symlink_to("/dev/null"),
    }
    for command, (flag, name) in _WRITES.items():
        suffix = Path(name).suffix
        for what, make in precious.items():

            def damage(
                folder: Path, make: Callable[[Path], object] = make, name: str = name, flag: str = flag
            ) -> Sequence[str]:
                make(folder / name)
                return [flag, str(folder / name)]

            yield Case(reader="outputs", what=f"{what} there", command=command, named=(flag,), damage=damage)
        places = [
            "",
            " ",
            "/proc/x",
            "/proc/self/x",
            "/dev/null/x",
            "/dev/null",
            "/sys/x",
            "x" * 300,
            "x/" * 2500,
            "/",
            ".",
        ]
        places += ["..", "FOLDER/model", "FOLDER/model/new", "FOLDER/study", "\ud8ff"]
        for place in places:
            if ("model" in place and command.startswith("report")) or ("study" in place and "report" not in command):
                continue
            if command == "sweep" and place == ".":
                continue  # `here` is empty, which is as good as none
            given = place + suffix if place[-1:] in ("x", "w", "\ud8ff") else place
            yield Case(
                reader="outputs", what=f"{flag} {place[:20]!a} ({len(place)})", command=command, named=(flag,),
                damage=flags(f"{flag}={given}"),
            )  # fmt: skip
    for command in ("prune", "evaluate"):
        for name in ("config.json", "model.safetensors", "tokenizer.json", ""):
            words = ("--output", f"FOLDER/model/{name}", *(("--overwrite",) if command == "prune" else ()))
            yield Case(
                reader="outputs", what=f"{name or 'all'} of the model", command=command, 
                named=("--output", "--overwrite"), damage=flags(*words),
            )  # fmt: skip
    damage = flags("--output", "FOLDER/evaluation.txt")
    yield Case(reader="outputs", what="a text", command="evaluate", named=("--output",), damage=damage)
    yield Case(
        reader="outputs",
        what="below a file",
        command="prune",
        named=("--output",),
        damage=flags("--output", "FOLDER/calibration.txt/out"),
    )
