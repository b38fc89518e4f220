"""Results of a search by the digest of the plan: each distinct plan is tried once, in this run and after a restart."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.prune.journal import Journal, Number


@dataclass
class Results:
    """What is known of plans already, and what the workers hold to answer more queries.

    `seconds` is the time that a result took, by criterion and digest. `prepared`: the workers hold the search text;
    `with_dense_end`: and the dense model's last hidden states, which divergences are measured from.
    """

    trials: dict[bytes, Trial] = field(default_factory=dict)
    losses: dict[bytes, float] = field(default_factory=dict)
    divergences: dict[bytes, tuple[float, ...]] = field(default_factory=dict)
    changes: dict[bytes, float] = field(default_factory=dict)
    seconds: dict[tuple[str, bytes], float] = field(default_factory=dict)
    prepared: bool = False
    with_dense_end: bool = False
    excerpts: set[range] = field(default_factory=set)
    journal: Journal | None = None

    @classmethod
    def of(cls, journal: Journal) -> "Results":
        """Return the results of an earlier run, and keep new ones in its journal."""
        results = cls(journal=journal)
        results.trials |= dict(journal.trials())
        for number in journal.numbers():
            if number.kind == "kl":
                results.divergences[number.key] = number.values
            else:
                (value,) = number.values
                (results.losses if number.kind == "loss" else results.changes)[number.key] = value
        return results

    def __len__(self) -> int:
        return len(self.trials) + len(self.losses) + len(self.divergences) + len(self.changes)

    def record(self, digest: bytes, result: Trial | float | tuple[float, ...]) -> None:
        """Write one candidate's result to the journal, if there is one."""
        if self.journal is None:
            return
        if isinstance(result, Trial):
            self.journal.keep(digest, result)
        elif isinstance(result, tuple):
            self.journal.note(Number("kl", digest, result))
        else:
            self.journal.note(Number("loss", digest, (result,)))

    def record_change(self, digest: bytes, value: float) -> None:
        """Keep the divergence of a changed plan, in the journal too."""
        self.changes[digest] = value
        if self.journal is not None:
            self.journal.note(Number("change", digest, (value,)))


def change_digest(plan: Plan, change: Counts, sequences: range) -> bytes:
    """Return the digest of a plan with a change, on some of the search sequences."""
    sha = hashlib.sha256(plan.digest + repr(sequences).encode())
    for linear in sorted(change):
        sha.update(repr(linear).encode())
        sha.update(change[linear].numpy().tobytes())
    return sha.digest()


def mean(values: Sequence[float]) -> float:
    """Return the mean over the search sequences."""
    return sum(values) / len(values)
