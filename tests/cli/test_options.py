"""Are options read from flags, then TOML, then defaults, checked once, and refused in one line that names the flag?"""

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from neuronal_ray.algorithms import registry
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.options import parse_config
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.evaluate.config import EvaluateConfig
from neuronal_ray.prune.config import PruneConfig

NEEDED = ["--model", "m", "--output", "out"]

RUN_OPTIONS = {
    "few-shot",
    "window-start",
    "shards",
    "task-timeout",
    "task-limit",
    "task-data",
    "text-column",
    "model",
    "revision",
    "sequence-length",
    "address",
    "replicas",
    "device",
    "dtype",
    "threads",
    "trust-remote-code",
}
PRUNE_OPTIONS = RUN_OPTIONS | {
    "output",
    "sparsity",
    "method",
    "allocation",
    "row-step",
    "refinement",
    "refined-parts",
    "pattern",
    "mode",
    "criterion",
    "search-budget",
    "neuronal-steps",
    "block-lambdas",
    "row-lambdas",
    "schedule",
    "lambda-search",
    "score-stream",
    "calibration",
    "calibration-packing",
    "calibration-samples",
    "search-samples",
    "seed",
    "evaluate",
    "baselines",
    "set",
    "overwrite",
    "resume",
    "revive",
    "dry-run",
}
EVALUATE_OPTIONS = RUN_OPTIONS | {"evaluate", "output", "overwrite"}


def prune(*argv: str, needed: bool = True) -> PruneConfig:
    arguments = [*NEEDED, *argv] if needed else list(argv)
    return parse_config(PruneConfig, arguments, prog="neuronal-ray prune", description="")


def toml(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_text(text)
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, needed: bool = True) -> str:
    """The one line in which a command line is refused; nothing is printed on the way."""
    try:
        config = prune(*argv, needed=needed)
    except BadInput as error:
        message = str(error)
        assert capsys.readouterr() == ("", "")
    else:
        pytest.fail(f"{argv} was accepted: {config}")
    assert len(message.splitlines()) == 1, message
    return message


# Where values come from


@pytest.mark.parametrize(("kind", "options"), [(PruneConfig, PRUNE_OPTIONS), (EvaluateConfig, EVALUATE_OPTIONS)])
def test_the_options_are_these_and_no_others(kind: type, options: set[str]) -> None:
    found = {"set" if entry.name == "settings" else entry.name.replace("_", "-") for entry in fields(kind)}
    assert found == options


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        prune("--help", needed=False)
    assert stopped.value.code == 0
    words = capsys.readouterr().out.split()
    assert {f"--{option}" for option in PRUNE_OPTIONS | {"config"}} <= set(words)


def test_defaults() -> None:
    config = prune()
    assert (config.sparsity, config.method, config.allocation, config.mode) == (None, "wanda", None, "best")
    assert (config.criterion, config.search_budget) == (None, 140)
    assert (config.row_step, config.refinement, config.refined_parts) == (None, "none", "attention")
    assert (config.pattern, config.schedule, config.lambda_search) == ("unstructured", "linear", "set")
    assert (config.block_lambdas, config.row_lambdas) == (LAMBDAS, ROW_LAMBDAS)
    assert (config.calibration, config.calibration_samples, config.search_samples, config.seed) == ("c4", 128, 8, 0)
    assert (config.evaluate, config.baselines, config.overwrite, config.dry_run) == (
        ("wikitext2",),
        False,
        False,
        False,
    )
    assert (config.sequence_length, config.address, config.replicas, config.threads) == (None, None, None, None)


VALUES = [
    ("model", "a/b", '"a/b"', "a/b"),
    ("method", "magnitude", '"magnitude"', "magnitude"),
    ("seed", "-3", "-3", -3),
    ("sparsity", "0.25", "0.25", 0.25),
    ("sparsity", "0", "0", 0.0),
    ("sequence-length", "77", "77", 77),
    ("output", "some/where", '"some/where"', Path("some/where")),
    ("block-lambdas", "0.1,0.2", "[0.1, 0.2]", (0.1, 0.2)),
    ("row-lambdas", "0,1", "[0, 1]", (0.0, 1.0)),
    ("evaluate", "ptb,my text.txt", '["ptb", "my text.txt"]', ("ptb", "my text.txt")),
    ("evaluate", "ptb,c4", '"ptb,c4"', ("ptb", "c4")),
    ("evaluate", "none", '"none"', ()),
    ("evaluate", "none", "[]", ()),
    ("score-stream", "pruned", '"pruned"', "pruned"),
    ("overwrite", None, "true", True),
]


@pytest.mark.parametrize(("option", "word", "value", "expected"), VALUES)
def test_every_type_of_option_is_read_from_flags_and_from_toml(
    tmp_path: Path, option: str, word: str | None, value: str, expected: object
) -> None:
    name = option.replace("-", "_")
    from_flags = getattr(prune(f"--{option}", *([] if word is None else [word])), name)
    table = toml(
        tmp_path,
        "".join(f"{key} = {text}\n" for key, text in ({"model": '"m"', "output": '"o"'} | {option: value}).items()),
    )
    from_toml = getattr(prune("--config", table, needed=False), name)
    assert from_flags == from_toml == expected
    assert type(from_flags) is type(from_toml) is type(expected)
    assert json.dumps(from_flags, default=str) == json.dumps(from_toml, default=str)


def test_keys_of_toml_may_be_written_with_underscores(tmp_path: Path) -> None:
    assert prune("--config", toml(tmp_path, "calibration_samples = 9")).calibration_samples == 9


def test_flags_win_over_toml_and_toml_over_defaults(tmp_path: Path) -> None:
    table = toml(tmp_path, 'model = "toml"\noutput = "toml"\nsparsity = 0.5\nseed = 7\nbaselines = true\n')
    config = prune("--config", table, "--sparsity", "0.6", "--model", "flag", needed=False)
    assert (config.model, config.sparsity) == ("flag", 0.6)
    assert (config.output, config.seed, config.baselines) == (Path("toml"), 7, True)
    assert config.search_samples == 8


def test_a_flag_that_repeats_the_default_still_wins_over_toml(tmp_path: Path) -> None:
    assert prune("--config", toml(tmp_path, "sparsity = 0.5"), "--sparsity", "0.7").sparsity == 0.7


# Settings of plug-ins


def test_settings_take_values_in_toml_notation_and_bare_strings() -> None:
    arguments = ["method.power=0.5", "method.count=3", "method.on=true", "allocation.kind=owl", "allocation.s='a b'"]
    config = prune(*(word for argument in arguments for word in ("--set", argument)))
    assert config.settings_of("method") == {"power": 0.5, "count": 3, "on": True}
    assert config.settings_of("allocation") == {"kind": "owl", "s": "a b"}


def test_settings_in_toml_are_tables_and_flags_win_one_by_one(tmp_path: Path) -> None:
    table = toml(tmp_path, "[set.method]\npower = 0.5\ncount = 3\n[set.allocation]\nlam = 0.1\n")
    config = prune("--config", table, "--set", "method.power=2.0")
    assert config.settings_of("method") == {"power": 2.0, "count": 3}
    assert config.settings_of("allocation") == {"lam": 0.1}


@pytest.mark.parametrize("word", ["power=0.5", "method.power", "=1", "model.power=1"])
def test_settings_of_another_shape_are_refused(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert "--set" in refusal(capsys, "--set", word)


# Refusals: one line that names the flag


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("model", " "),
        ("model", "a\0b"),
        ("model", "\udcff"),
        ("output", ""),
        ("output", "a\0b"),
        ("output", "x" * 300),
        ("output", "y/" * 3000),
        ("config", "x" * 300),
        ("evaluate", ""),
        ("evaluate", "c4,"),
        ("evaluate", "c4, ,ptb"),
        ("seed", "9" * 30),
        ("seed", "9" * 9000),
        ("threads", "9223372036854775808"),
        ("replicas", "1000000"),
        ("task-timeout", "1000000000000"),
        ("few-shot", "100000"),
        ("search-budget", "1000000000"),
        ("sparsity", "1e999"),
        ("block-lambdas", "1e999"),
        ("set", "method.=1"),
        ("set", ".power=1"),
        ("set", "method.power=inf"),
        ("set", "method.power=" + "[" * 5000),
        ("set", "method.power=99999999999999999999"),
        ("set", "method.power=1979-05-27"),
        ("set", "method.power={a = 1}"),
        ("sparsity", "-0.1"),
        ("sparsity", "1"),
        ("sparsity", "1.5"),
        ("sparsity", "nan"),
        ("sparsity", "inf"),
        ("sparsity", "half"),
        ("sparsity", ""),
        ("seed", "1.5"),
        ("seed", "zero"),
        ("sequence-length", "0"),
        ("sequence-length", "-1"),
        ("sequence-length", "1"),
        ("sequence-length", "64.0"),
        ("calibration-samples", "0"),
        ("search-samples", "0"),
        ("search-samples", "129"),
        ("replicas", "0"),
        ("replicas", "-2"),
        ("threads", "0"),
        ("block-lambdas", "0.1,1.1"),
        ("block-lambdas", "-0.1"),
        ("block-lambdas", "0.1,,0.2"),
        ("block-lambdas", "nan"),
        ("block-lambdas", ""),
        ("row-lambdas", "0.1;0.2"),
        ("method", "magic"),
        ("allocation", "magic"),
        ("mode", "published"),
        ("criterion", "loss"),
        ("search-budget", "0"),
        ("neuronal-steps", "rows"),
        ("score-stream", "sparse"),
        ("device", "tpu"),
        ("dtype", "float64"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_flag(
    capsys: pytest.CaptureFixture[str], flag: str, word: str
) -> None:
    message = refusal(capsys, f"--{flag}", word)
    assert message.startswith(f"--{flag}"), message
    assert len(message) < 300, message
    if len(word) < 20 and word.isprintable():
        assert all(part in message for part in word.split(",")), message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparsity", '"0.7"'),
        ("seed", "9" * 30),
        ("seed", "0x" + "f" * 9000),
        ("model", '""'),
        ("model", '"\\u0000"'),
        ("output", '"' + "x" * 300 + '"'),
        ("evaluate", '[""]'),
        ("evaluate", '""'),
        ("set", "{ method = { power = nan } }"),
        ("set", "{ method = { power = 99999999999999999999 } }"),
        ("set", "{ method = { power = 1979-05-27 } }"),
        ("sparsity", "nan"),
        ("sparsity", "inf"),
        ("sparsity", "true"),
        ("sparsity", "[0.7]"),
        ("sparsity", "1.5"),
        ("seed", "1.0"),
        ("seed", "false"),
        ("seed", '"1"'),
        ("calibration-samples", "0"),
        ("method", '"magic"'),
        ("method", "1"),
        ("method", '["wanda"]'),
        ("output", "3"),
        ("block-lambdas", "0.1"),
        ("block-lambdas", '"0.1,0.2"'),
        ("block-lambdas", '["a", 0.1]'),
        ("block-lambdas", "[true]"),
        ("block-lambdas", "[nan]"),
        ("block-lambdas", "[[0.1]]"),
        ("block-lambdas", "[]"),
        ("evaluate", "1"),
        ("evaluate", "[1]"),
        ("evaluate", "[[]]"),
        ("overwrite", '"yes"'),
        ("overwrite", "1"),
        ("set", "1"),
        ("set", "{ power = 1 }"),
        ("set", "{ model = { power = 1 } }"),
        ("dry-run", "{}"),
    ],
)
def test_a_toml_value_that_cannot_work_is_refused_by_its_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, value: str
) -> None:
    needed = {"output": NEEDED[:2], "model": NEEDED[2:]}.get(key, NEEDED)
    message = refusal(capsys, "--config", toml(tmp_path, f"{key} = {value}\n"), *needed, needed=False)
    assert message.startswith((f"--config: {key} in ", f"--{key}")), message


def test_an_unknown_key_answers_with_the_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refusal(capsys, "--config", toml(tmp_path, "sparcity = 0.7\n"))
    assert message.startswith("--config: unknown key 'sparcity'")
    assert "did you mean sparsity" in message
    assert {part.strip() for part in message.partition("expected one of: ")[2].split(",")} == PRUNE_OPTIONS


@pytest.mark.parametrize(
    "content", [b"sparsity = \n", b"= 3\n", b"model\n", b"\xff\xfe\x00", b"sparsity = 0.7\nsparsity = 0.6\n"]
)
def test_a_file_that_is_not_toml_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    message = refusal(capsys, "--config", str(path))
    assert message.startswith("--config: ")
    assert "is not TOML" in message or "is not UTF-8" in message, message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent.toml", "does not exist"),
        (".", "is a directory"),
        ("fifo", "is a device or a FIFO"),
        ("dangling", "is a link to a file that does not exist"),
        ("loop", "cannot read"),
        ("x" * 300, "too long"),
        ("file/below", "cannot read"),
        (" ", "blank"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, expected: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    message = refusal(capsys, "--config", name if name == " " else str(tmp_path / name))
    assert message.startswith("--config: ")
    assert expected in message, message


@pytest.mark.parametrize(("flag", "kind"), [("method", "methods"), ("allocation", "allocations")])
def test_an_unknown_plug_in_answers_with_the_list(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str, kind: str
) -> None:
    for arguments in (["--" + flag, "magic"], ["--config", toml(tmp_path, f'{flag} = "magic"')]):
        message = refusal(capsys, *arguments)
        assert "magic" in message
        assert all(name in message for name in registry.names(kind)), message
    with pytest.raises(ValueError, match=f"--{flag}: unknown name 'magic', expected one of: .*, ") as refused:
        registry.load(kind, "magic")
    assert all(name in str(refused.value) for name in registry.names(kind))


def test_an_unknown_flag_is_refused_and_abbreviations_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--sparsty" in refusal(capsys, "--sparsty", "0.7")
    assert "--spars" in refusal(capsys, "--spars", "0.7")


def test_what_is_required_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--output", "out", needed=False).startswith("--model: missing")
    assert prune("--model", "m", "--dry-run", needed=False).output is None


def test_options_that_contradict_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--replicas", "2", "--address", "none").startswith("--replicas")
    assert refusal(capsys, "--calibration-samples", "4", "--search-samples", "5").startswith("--search-samples")
    assert prune("--replicas", "1", "--address", "none").replicas == 1


def test_evaluate_refuses_to_measure_nothing() -> None:
    with pytest.raises(ValueError, match="--evaluate"):
        parse_config(EvaluateConfig, ["--model", "m", "--evaluate", "none"], prog="p", description="")


def test_options_that_are_ignored_are_said(caplog: pytest.LogCaptureFixture) -> None:
    prune("--allocation", "uniform", "--neuronal-steps", "row", "--row-lambdas", "0.1")
    assert caplog.messages == [
        "--neuronal-steps: ignored by --allocation uniform",
        "--row-lambdas: ignored by --allocation uniform",
    ]
    caplog.clear()
    prune("--allocation", "owl", "--row-step", "neuronal", "--row-lambdas", "0.1", "--refined-parts", "all")
    assert caplog.messages == ["--refined-parts: ignored without --refinement"]


def test_a_value_from_a_file_is_refused_with_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = toml(tmp_path, "sparsity = 1.5\nseed = 3\n")
    assert refusal(capsys, "--config", path) == (
        f"--sparsity: 1.5 is outside [0, 1), expected for example 0.7 (in {path})"
    )
    assert refusal(capsys, "--config", path, "--sparsity", "2").endswith("for example 0.7")
