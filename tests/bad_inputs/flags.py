"""Every flag of every command with values that it cannot have; unknown flags and commands."""

from collections.abc import Iterator, Sequence

from bad_inputs.case import Case, each, flags

_LONG = "x" * 5000
_WORDS = ("", " ", "x", "nan", "1.5", "1e3", "0x10", "1,2", "--", "99999999999999999999999")
_CHOICES = ("", " ", "nope", "AUTO", "1", _LONG, "a\nb", "\x1b[31mred")
_PLUG_INS = ("", " ", "nope", ":", "os:path", "nope:nope", "os.path:join", "a:b:c", "../x", "a b", "\x1b[31m", _LONG)
_PLUG_INS += ("json:JSONDecoder", "neuronal_ray:main", ":x", "x:", "none,", "WANDA")
_PATHS = ("", " ", "absent", "absent/deeper", "/dev/null", "/proc/self/mem", "/dev/zero", "x" * 300, "x/" * 2500)
_PATHS += ("~", "\ud8ff", "/proc/1/root/x", "a\nb", "\x1b[31m")
_BENCHMARKS = ("search", "job", "kernels", "memory", "methods", "cluster", "inference", "export", "scaling")

_REVISIONS = ("", " ", "main", "../x", "/etc", "a b", "-x", "a..b", "refs/", "\ud8ff", _LONG)
_RUN: dict[str, Sequence[str]] = {
    "--sequence-length": (*_WORDS, "0", "1", "-1", "65", "99999999999"),
    "--replicas": (*_WORDS, "0", "-1", "2", "1000000000"),
    "--shards": (*_WORDS, "0", "-1", "4", "1000000000"),
    "--task-timeout": (*_WORDS, "0", "-1"),
    "--threads": (*_WORDS, "0", "-1", "1000000000"),
    "--device": (*_CHOICES, "cuda", "mps", "cuda:0"),
    "--dtype": (*_CHOICES, "float", "int8", "fp16"),
    "--address": (
        "", " ", "nope", "http://127.0.0.1:8265", "https://ray.example", "localhost:", ":6379", "1:2:3", _LONG, "ray://",
        "ray://x", "host:99999", "host:-1", "host:port", "127.0.0.1:0", "None", "LOCAL", "a b:1",
    ),
    "--model": (
        *_PATHS, "nope", "nope/nope", "a/b/c", "https://huggingface.co/meta-llama/Llama-2-7b-hf", "a//b", "-x",
        "https://example.org/x", "x.gguf", "FOLDER/evaluation.txt", "FOLDER", "FOLDER/here", "hf://a/b", "a b", _LONG,
    ),
    "--revision": _REVISIONS,
    "--few-shot": (*_WORDS, "-1"),
    "--task-limit": (*_WORDS, "0", "-1"),
    "--task-data": (*_PATHS, "FOLDER/evaluation.txt"),
}  # fmt: skip
_TEXTS = (*_PATHS, "nope", "c5", "nope.txt", "nope.parquet", "FOLDER", "FOLDER/model", "x" * 300 + ".txt", ".txt")
_TEXTS += ("https://example.org/x.txt", "FOLDER/model/config.json", "FOLDER/model/model.safetensors", "nope/nope")
_PRUNE: dict[str, Sequence[str]] = _RUN | {
    "--sparsity": ("", " ", "x", "nan", "inf", "-inf", "-0.1", "1", "1.5", "1e309", "0,5", "50%", "0x1", "--"),
    "--method": (*_PLUG_INS, "none"),
    "--allocation": (*_PLUG_INS, "none"),
    "--row-step": (*_PLUG_INS, "none"),
    "--refinement": _PLUG_INS,
    "--refined-parts": (*_CHOICES, "mlp,attention"),
    "--pattern": (
        "", " ", "x", "2:", ":4", "4:2", "4:4", "0:4", "2:4:8", "n:0", "n:1", "n:65", "-1:4", "2/4", "5:7", "n:7",
        "1.5:4", "\uff12:4", "2:4 ", "N:4", "999999999999:4", _LONG,
    ),
    "--mode": (*_CHOICES, "paper,best"),
    "--criterion": (*_CHOICES, "KL"),
    "--search-budget": (*_WORDS, "0", "-1"),
    "--neuronal-steps": (*_CHOICES, "rows"),
    "--block-lambdas": ("", " ", ",", "x", "0.1,,0.2", "nan", "inf", "-0.1", "2", "0.1;0.2", "0.1,x", "1e309", "[0.1]"),
    "--row-lambdas": ("", " ", ",", "x", "0.1,,0.2", "nan", "inf", "-0.1", "2", "0.1;0.2", "0.1,x", "1e309", "[0.1]"),
    "--schedule": (*_CHOICES, "cosine"),
    "--lambda-search": (*_CHOICES, "sets"),
    "--score-stream": (*_CHOICES, "pruned,dense"),
    "--calibration": _TEXTS,
    "--calibration-samples": (*_WORDS, "0", "-1", "1", "1000000000000"),
    "--search-samples": (*_WORDS, "0", "-1", "5", "1000000000000"),
    "--seed": ("", " ", "x", "nan", "1.5", "1e3", "0x10", "1,2", "--"),
    "--evaluate": (*_TEXTS, "FOLDER/evaluation.txt,FOLDER/evaluation.txt", "FOLDER/evaluation.txt,nope", "none,none"),
    "--set": (
        "", " ", "x", "method", "method.", ".x=1", "method.=1", "nope.x=1", "method.nope=1", "method.x", "=1", "=",
        "allocation.nope=1", "refinement.x=1", "row-step.x=1", "method.a.b=1", "method.x=" + "[" * 5000, "METHOD.x=1",
    ),
    "--config": _PATHS,
}  # fmt: skip
_SWITCHES = ("--overwrite", "--dry-run", "--baselines", "--resume", "--trust-remote-code")
_EVALUATE: dict[str, Sequence[str]] = _RUN | {
    "--evaluate": (*_TEXTS, "none", "nope,", "FOLDER/evaluation.txt,nope"),
    "--config": _PATHS,
}
_EXPORT: dict[str, Sequence[str]] = {
    "--revision": _REVISIONS,
    "--model": _RUN["--model"],
    "--format": (*_CHOICES, "gguf", "dense,packed", "Packed"),
    "--masks": (*_PATHS, "FOLDER/model", "FOLDER/model/config.json", "FOLDER/model/model.safetensors"),
    "--config": _PATHS,
}
_SWEEP: dict[str, Sequence[str]] = {
    "--revision": _REVISIONS,
    "--replicas": (*_WORDS, "0", "-1", "2"),
    "--address": _RUN["--address"],
    "--option": (
        "", " ", "x", "nope=1", "=1", "sparsity=x", "sparsity=[]", "sparsity=[0.5, 'x']", "sparsity=2", "sparsity",
        "model=", "output='x'", "evaluate=[[1]]", "dry-run=true", "sparsity=[0.5, 0.5]", "method=nope", "sparsity=nan",
        "model=3", "mode=[['best']]", "calibration-samples=1.5", "seed='0'", "evaluate=3",
        "sparsity=" + "[" * 5000,
    ),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """All of this file."""
    for command, table in (("prune", _PRUNE), ("evaluate", _EVALUATE), ("export", _EXPORT), ("sweep", _SWEEP)):
        for flag, values in table.items():
            for value in values:
                yield _flag(command, flag, value)
    for flag in _SWITCHES:
        yield _flag("prune", flag, "1")
    for flag in ("--sparsity", "--model", "--evaluate", "--address", "--shards"):
        for value in _PRUNE[flag][:12]:
            yield _flag("prune --dry-run", flag, value)
    yield from _report_and_table()
    yield from _unknown()
    yield from _benchmarks()


def _flag(command: str, flag: str, value: str) -> Case:
    shown = value if len(value) < 50 else f"{value[:20]}... ({len(value)})"
    named = (
        flag,
        *{"--calibration-samples": ("--search-samples",)}.get(flag, ()),
        *{"sweep": ("FILE", "sweep.toml"), "export": ("--output",)}.get(command, ()),
    )
    return Case(reader="flags", what=f"{flag} {shown!a}", command=command, named=named, damage=flags(f"{flag}={value}"))


def _report_and_table() -> Iterator[Case]:
    for value in ("", " ", "out", "out.pdf", "out.HTML", "absent/out.html", "x" * 300 + ".html", "/proc/out.html", "."):
        damage = flags("--output", value)
        yield Case(
            reader="flags", what=f"--output {value[:20]!a}", command="report STUDY", named=("--output",), damage=damage
        )
    for value in (*_PATHS, "FOLDER", "FOLDER/here", "FOLDER/search.json"):
        shown = f"{value[:20]!a} ({len(value)})"
        yield from each(
            ("report RUN", "report STUDY"),
            reader="flags",
            what=f"also {shown}",
            named=("RUNS", "unexpected argument"),
            damage=flags(value),
        )
        yield Case(reader="flags", what=f"report {shown}", command="", named=("RUNS",), damage=flags("report", value))
        table = flags("benchmark", "table", value)
        named = ("FILE", value.strip()[:20] or "FILE", "here")
        if value != "FOLDER/search.json":
            yield Case(reader="flags", what=f"benchmark table {shown}", command="", named=named, damage=table)


def _unknown() -> Iterator[Case]:
    lines: Sequence[tuple[str, ...]] = (
        (), ("",), ("nope",), ("prun",), ("PRUNE",), ("--nope",), ("-x",), ("prune ",), ("prune,evaluate",), (_LONG,),
        ("\x1b[31m",), ("a\nb",), ("__main__",), ("cli",), ("..prune",), ("prune.config",), ("benchmark", "nope"),
        ("benchmark", "serach"), ("benchmark", ""), ("benchmark", "--nope"), ("benchmark", "table"), ("report",),
        ("sweep",), ("prune",), ("evaluate",), ("export",), ("evaluate", "--model"), ("prune", "--model", "x"),
        ("report", "--output"),
    )  # fmt: skip
    for words in lines:
        shown = " ".join(words)[:40]
        yield Case(reader="command line", what=f"{len(words)} {shown!a}", command="", named=("",), damage=flags(*words))
    for command in ("prune", "prune --dry-run", "evaluate", "export", "sweep", "report RUN", "benchmark table"):
        for word in ("--nope", "--nope=1", "-x", "--modle=x", "--output-dir", "--Model=x", "--\x1b[31m", f"--{_LONG}"):
            named = (word.split("=")[0][:10].split("\x1b")[0],)
            yield Case(
                reader="command line", what=f"unknown {word[:30]!a}", command=command, named=named, damage=flags(word)
            )
    for command in ("prune", "evaluate", "export"):
        yield Case(reader="command line", what="a stray word", command=command, named=("stray",), damage=flags("stray"))
        yield Case(
            reader="command line", what="no value", command=command, named=("--output",), damage=flags("--output")
        )
    yield Case(reader="command line", what="two files", command="sweep", named=("stray",), damage=flags("stray"))


def _benchmarks() -> Iterator[Case]:
    for name in _BENCHMARKS:
        for word, named in (("--nope", "--nope"), ("--output=absent/x.json", "--output"), ("stray", "stray")):
            words = ("benchmark", name, word)
            if name == "inference" and word != "--nope":
                words = ("benchmark", name, "--model=x", "--against=x", word)
            named_also = (named, "--model", "--against", "is not installed")
            yield Case(reader="benchmark", what=f"{name} {word}", command="", named=named_also, damage=flags(*words))
    for name in ("search", "job"):
        for word in (
            "--shape=nope",
            "--shape=",
            "--shape=builtin,nope",
            "--blocks=0",
            "--blocks=-1",
            "--blocks=x",
            "--dtype=x",
        ):
            words = ("benchmark", name, word, *(("--shape=wide",) if word.startswith("--blocks") else ()))
            yield Case(
                reader="benchmark", what=f"{name} {word}", command="", named=(word.split("=")[0],), damage=flags(*words)
            )
        for flag in ("--threads", "--length", "--device", "--calibration-samples"):
            for value in ("0", "-1", "x", "", "1.5", "99999999999999999999"):
                words = ("benchmark", name, f"{flag}={value}")
                yield Case(
                    reader="benchmark", what=f"{name} {flag}={value}", command="", named=(flag,), damage=flags(*words)
                )
