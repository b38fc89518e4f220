"""The summary of a sweep that is printed before any weight is loaded: its cells, and what they share."""

from collections import Counter
from collections.abc import Sequence

from neuronal_ray.prune.dry_run import tokens_by_stage
from neuronal_ray.sweep.config import Study
from neuronal_ray.sweep.inputs import Ready


def describe_study(study: Study, cells: Sequence[Ready]) -> str:
    """Return the summary: cells, models, what is shared, and the tokens that pass through the blocks."""
    models = Counter(ready.cell.config.model for ready in cells)
    texts = {(ready.place, ready.text) for ready in cells}
    evaluations = sorted({name for ready in cells for name in ready.inputs.evaluations.names})
    alone = sum(sum(tokens_by_stage(ready.cell.config, ready.inputs).values()) for ready in cells)
    budgets = [f"budgets     as {study.equal_budgets} achieves them"] if study.equal_budgets else []
    lines = [
        f"{study.title}: {len(cells)} cells into {study.output}",
        *(f"model       {model}: {count} cells" for model, count in models.items()),
        *budgets,
        f"evaluation  {', '.join(evaluations) or 'none'}",
        f"tokens      {alone:,} if every cell ran alone, {_shared(cells):,} with what they share",
        f"shared      {len({ready.place for ready in cells})} loads, {len(texts)} calibration texts, "
        f"{len({ready.ranking for ready in cells})} rankings",
    ]
    return "\n".join(lines)


def _shared(cells: Sequence[Ready]) -> int:
    """Count tokens with one dense pass per calibration text and one dense evaluation per model and text."""
    total = 0
    known: set[tuple[object, ...]] = set()
    key: tuple[object, ...]
    for ready in cells:
        for stage, count in tokens_by_stage(ready.cell.config, ready.inputs).items():
            if stage.startswith("perplexity"):
                key, pruned = (ready.place, stage), count // 2
                total += pruned if key in known else count
            elif stage.startswith("dense pass"):
                key = (ready.place, ready.text, stage)
                total += 0 if key in known else count
            else:
                key, total = (ready.cell.id, stage), total + count
            known.add(key)
    return total
