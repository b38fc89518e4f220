"""Write the texts of the study in docs/results/quality.md: the first windows of each, tokenized for one model.

    python jobs/quality_texts.py --model DIR --in-domain FILE --out-of-domain FILE --output DIR

writes in-domain.safetensors and out-of-domain.safetensors, which `--option evaluate=..` of the sweep takes. With
--held-out SHARE the in-domain text is the last share of its file, and calibration.txt has the rest.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from neuronal_ray.cli.exit_codes import exit_code


def split_text(text: str, share: float, *, drop: str = "") -> tuple[str, str]:
    """Return the text without its last share, and the last share, from the start of a line; `drop` is taken out."""
    whole = text.replace(drop, "") if drop else text
    start = whole.index("\n", int(len(whole) * (1 - share)))
    return whole[:start], whole[start:]


def main(argv: Sequence[str] | None = None) -> int:
    """Return exit code 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("quality_texts", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a model directory, or builtin")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    for flag in ("--in-domain", "--out-of-domain"):
        parser.add_argument(flag, metavar="TEXT", help="a text as neuronal-ray's --evaluate takes it")
    parser.add_argument("--held-out", type=float, metavar="SHARE", help="of the in-domain file, for evaluation")
    parser.add_argument("--drop", default="", metavar="TEXT", help="removed from that file, a separator for example")
    parser.add_argument("--windows", type=int, default=24, metavar="N", help="the first N windows (default: 24)")
    parser.add_argument("--sequence-length", type=int, default=256, metavar="N", help="tokens (default: 256)")
    options = parser.parse_args(argv)
    from safetensors.torch import save_file

    from neuronal_ray.evaluate.inputs import read_windows
    from neuronal_ray.evaluate.window_start import WindowStart
    from neuronal_ray.models.checkpoint import open_checkpoint
    from neuronal_ray.models.hub import resolve_model

    options.output.mkdir(parents=True, exist_ok=True)
    texts = {"in-domain": options.in_domain, "out-of-domain": options.out_of_domain}
    if options.held_out is not None:
        text = Path(options.in_domain).read_text(encoding="utf-8")
        texts["in-domain"] = str(options.output / "held-out.txt")
        kept, held_out = split_text(text, options.held_out, drop=options.drop)
        (options.output / "calibration.txt").write_text(kept, encoding="utf-8")
        Path(texts["in-domain"]).write_text(held_out, encoding="utf-8")
    checkpoint = open_checkpoint(resolve_model(options.model))
    for name, source in texts.items():
        if source is not None:
            read = read_windows(
                [source],
                checkpoint,
                length=options.sequence_length,
                trust_remote_code=False,
                start=WindowStart(used="papers"),
            )
            (windows,) = read.values()
            save_file({"input_ids": windows.tokens[: options.windows].clone()}, options.output / f"{name}.safetensors")


if __name__ == "__main__":
    sys.exit(main())
