"""The planner's formula for a search with offloaded blocks, compared with the bytes that live in one, and with aims."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from neuronal_ray.benchmark.live_bytes import LiveBytes
from neuronal_ray.benchmark.output import add_output, check_figures
from neuronal_ray.benchmark.record import machine, publish
from neuronal_ray.benchmark.shapes import SHAPES, check_counts, kept_or_temporary
from neuronal_ray.benchmark.timed import Setting, random_tokens, timed_search, worker_of
from neuronal_ray.cli.parser import Parser
from neuronal_ray.models.checkpoint import empty_model
from neuronal_ray.models.synthetic import empty_llama, write_random_llama
from neuronal_ray.workers.footprint import GIB, Footprint, Work
from neuronal_ray.workers.pools.in_process import InProcessPool

AIMS_GIB = {"7b": 8, "13b": 12, "70b": 40}
"""The memory that a device should need for a search with offloaded blocks, on 8 x 2048 tokens in 16 bits."""

_MIB = 2**20
_CONFIG = {"vocab_size": 1024, "max_position_embeddings": 2048, "num_hidden_layers": 3}
SMALL = {
    "square": _CONFIG | {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8},
    "llama": _CONFIG | {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8},
    "grouped": _CONFIG
    | {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 1},
}


@dataclass(frozen=True, kw_only=True)
class Lived:
    """The peak of living bytes on the device's side of a search with offloaded blocks, and the formula's value."""

    name: str
    tokens: int
    measured: int
    formula: int


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The formula for a shape with offloaded blocks, by its terms, and the device's size that it should stay within."""

    name: str
    terms: Mapping[str, int]
    aim: int

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())


@dataclass(frozen=True, kw_only=True)
class MemoryMeasured:
    """Small searches that were run, large ones that were only planned."""

    lived: tuple[Lived, ...]
    planned: tuple[Planned, ...]

    def lines(self) -> list[str]:
        """Return the lines of the printed tables, in Markdown."""
        rows = [
            "| searched here, blocks offloaded | tokens | peak of living bytes | formula | formula / peak |",
            "|---|---|---|---|---|",
            *(
                f"| {small.name} | {small.tokens:,} | {small.measured / _MIB:.1f} MiB | "
                f"{small.formula / _MIB:.1f} MiB | {small.formula / small.measured:.2f} |"
                for small in self.lived
            ),
            "",
            f"| formula | aim | whole | {' | '.join(self.planned[0].terms)} |",
            "|---" * (3 + len(self.planned[0].terms)) + "|",
        ]
        for large in self.planned:
            terms = " | ".join(f"{size / GIB:.2f}" for size in large.terms.values())
            rows.append(f"| {large.name.upper()} | {large.aim / GIB:.0f} GiB | {large.total / GIB:.2f} GiB | {terms} |")
        return rows


def main(argv: Sequence[str]) -> None:
    """Measure small shapes, plan large ones."""
    parser = Parser(
        prog="neuronal-ray benchmark memory",
        description="Compare the peak of living tensors' bytes in a search with offloaded blocks, on a CPU, with the "
        "planner's formula; print the formula for the shapes of Llama 2. On a GPU `benchmark search --offload` prints "
        "the allocator's peak and the formula.",
    )
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="search sequences (default: 4)")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of each (default: 1024)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add_output(parser)
    arguments = parser.parse_args(argv)
    check_counts(arguments, samples=1, length=2, threads=1)
    check_figures(arguments)
    print(machine(), flush=True)
    lived = []
    with kept_or_temporary(None) as folder:
        for name, config in SMALL.items():
            write_random_llama(folder / name, config, dtype=torch.bfloat16)
            setting = Setting(
                name=name,
                path=folder / name,
                device="cpu",
                dtype="bfloat16",
                samples=arguments.samples,
                length=arguments.length,
                calibration_samples=arguments.samples,
                threads=arguments.threads,
                offload=True,
            )
            lived.append(measure_lived(setting))
    planned = tuple(planned_streaming(name) for name in AIMS_GIB)
    measured = MemoryMeasured(lived=tuple(lived), planned=planned)
    print("\n".join(measured.lines()), flush=True)
    publish([measured], arguments.output)


def measure_lived(setting: Setting) -> Lived:
    """Run a search with offloaded blocks on a CPU and count the bytes that live on the device's side.

    A CPU does not prefetch the next block, so the formula is taken without it.
    """
    pool = InProcessPool(setting.spec)
    worker = worker_of(pool)
    tokens = random_tokens(setting, worker)
    model, dtype = worker.replica.stream.model, worker.replica.stream.model.dtype
    in_blocks = {id(tensor) for block in worker.replica.stream.blocks for tensor in block.parameters()}
    outside = sum(tensor.nbytes for tensor in model.parameters() if id(tensor) not in in_blocks)
    with LiveBytes() as live:
        timed_search(setting, pool, tokens)
    work = Work(item=dtype.itemsize, held=setting.samples * setting.length, device="cpu")
    footprint = Footprint.of(empty_model(worker.replica.checkpoint), work)
    return Lived(
        name=setting.name,
        tokens=work.held,
        measured=outside + live.peak,
        formula=footprint.offloaded() - max(footprint.weights),
    )


def planned_streaming(name: str) -> Planned:
    """Return the formula for 8 x 2048 tokens of a shape in 16 bits, term by term."""
    model = empty_llama(**SHAPES[name].config)
    work = Work(item=2, held=8 * 2048)
    footprint, unranked = Footprint.of(model, work), Footprint.of(model, replace(work, ranks=False))
    terms = {
        "this block and the next": 2 * max(footprint.weights),
        "its masked copy": max(footprint.weights),
        "its rankings": max(footprint.ranks),
        "a linear being ranked": footprint.passing - unranked.passing,
        "outside the blocks": footprint.outside,
    }
    terms["text and activations"] = footprint.offloaded() - sum(terms.values())
    return Planned(name=name, terms=terms, aim=AIMS_GIB[name] * GIB)
