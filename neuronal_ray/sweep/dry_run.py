"""What a sweep will do and need, said before any weight is loaded."""

from collections import Counter
from collections.abc import Sequence

from neuronal_ray.prune.dry_run import tokens_by_stage
from neuronal_ray.prune.session import digest_of
from neuronal_ray.sweep.config import Study
from neuronal_ray.sweep.pipeline import Ready


def describe_study(study: Study, cells: Sequence[Ready]) -> str:
    """Cells, models, what is shared, and the tokens that pass through the blocks, alone and together."""
    models = Counter(one.cell.config.model for one in cells)
    texts = {(one.place, digest_of(one.inputs.calibration)) for one in cells}
    evaluations = sorted({name for one in cells for name in one.inputs.evaluations.names})
    alone = sum(sum(tokens_by_stage(one.cell.config, one.inputs).values()) for one in cells)
    lines = [
        f"{study.title}: {len(cells)} cells into {study.output}",
        *(f"model       {model}: {count} cells" for model, count in models.items()),
        f"evaluation  {', '.join(evaluations) or 'none'}",
        f"tokens      {alone:,} if every cell ran alone, {_shared(cells):,} as it is shared",
        f"shared      {len({one.place for one in cells})} loads, {len(texts)} calibration texts, "
        f"{len({one.order[:-3] for one in cells})} rankings",
    ]
    return "\n".join(lines)


def _shared(cells: Sequence[Ready]) -> int:
    """Tokens with one dense pass per calibration text and one dense evaluation per model and text."""
    total = 0
    known: set[tuple[object, ...]] = set()
    key: tuple[object, ...]
    for one in cells:
        for stage, count in tokens_by_stage(one.cell.config, one.inputs).items():
            if stage.startswith("perplexity"):
                key, pruned = (one.place, stage), count // 2
                total += pruned if key in known else count
            elif stage.startswith("dense pass"):
                key = (one.place, digest_of(one.inputs.calibration), stage)
                total += 0 if key in known else count
            else:
                key, total = (one.cell.id, stage), total + count
            known.add(key)
    return total
