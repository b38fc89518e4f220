"""What goes together, what is refused in one line, and does everything that goes together run?"""

import logging

import pytest

from neuronal_ray.cli.options import parse_config
from neuronal_ray.core.pattern import Pattern
from neuronal_ray.core.stats import Moments, SquareSum
from neuronal_ray.prune.compose import Composition, compose
from neuronal_ray.prune.config import PruneConfig


def composed(*argv: str) -> Composition:
    """The choices of a command line, in paper mode unless it says otherwise."""
    argv = argv if "--mode" in argv else ("--mode", "paper", *argv)
    config = parse_config(
        PruneConfig, ["--model", "m", "--output", "out", *argv], prog="neuronal-ray prune", description=""
    )
    return compose(config)


REFUSED = {
    "--pattern 2:4 --allocation owl": "--allocation: owl has nothing to spread under --pattern 2:4",
    "--pattern 2:4 --sparsity 0.7": "--sparsity: 0.7 is not what --pattern 2:4 gives; leave it out",
    "--pattern 2:2": "--pattern: '2:2' is not a pattern, expected unstructured, N:M",
    "--pattern n:8 --row-step trim": "--row-step: --pattern n:8 gives every row of a linear the same number",
    "--pattern n:8 --neuronal-steps row": "--neuronal-steps row: --pattern n:8 gives every row of a linear",
    "--pattern n:8 --allocation besa --set allocation.per=row": "--set allocation.per: --pattern n:8 gives every row",
    "--method sparsegpt --row-step neuronal": "--row-step: --method sparsegpt shares a linear's budget among its rows",
    "--method alps --neuronal-steps row": "--neuronal-steps row: --method alps shares a linear's budget",
    "--method alps --refinement dsnot": "--refinement: dsnot moves a mask, alps solves .*; use --method wanda",
    "--neuronal-steps block --row-step trim": "--row-step: there is no row step with --neuronal-steps block; use both",
    "--neuronal-steps row --row-step trim": "--neuronal-steps: .*; use --allocation uniform --row-step trim",
    "--mode authors --method alps": "--method: alps is not in the released code; use --mode paper",
    "--mode authors --allocation dlp": "--allocation: dlp is not in the released code; use --mode paper",
    "--mode authors --pattern 2:4": "--pattern: 2:4 is not in the released code; use --mode paper",
    "--mode authors --row-step trim": "--row-step: trim with --allocation neuronal is not in the released code",
    "--mode authors --refinement dsnot": "--refinement: dsnot with --allocation neuronal is not in the released code",
    "--mode authors --schedule exp": "--schedule: exp is not in the released code; use --mode paper",
    "--mode authors --lambda-search continuous": "--lambda-search: continuous is not in the released code",
    "--mode authors --score-stream dense": "--score-stream: dense is not what the released code does",
    "--mode authors --criterion kl": "--criterion: kl is not in the released code; use --mode paper",
    "--mode authors --allocation adaptive": "--allocation: adaptive is not in the released code; use --mode paper",
    "--mode best --criterion alignment": "--allocation adaptive: compares by --criterion kl only",
    "--mode best --set allocation.starts=besa": "--set allocation.starts: 'besa', expected some of: neuronal, owl",
    "--mode best --set allocation.iterations=-1": "--set allocation.iterations: -1, expected 0 or more",
    "--mode best --set allocation.budget=3": "--set allocation.budget: has a flag of its own",
    "--set refinement.max_cycles=3": "--set refinement: there is no refinement to set; add --refinement",
    "--set method.damping=0.1": "--set method.damping: unknown setting, expected nothing: method has no settings",
    "--set allocation.steps=row": "--set allocation.steps: has a flag of its own",
    "--allocation owl --set allocation.lamb=1": "--set allocation.lamb: unknown setting, expected allocation.threshold",
    "--method sparsegpt --set method.slab=0": "--set method.slab: 0 given, expected at least 1",
    "--method sparsegpt --set method.damping=-1": "--set method.damping: -1.0 given, expected a positive number",
    "--method alps --set method.rho=-1": "--set method.rho: -1.0, expected a number greater than 0",
    "--allocation owl --set allocation.lam=-1": "--set allocation.lam: ",
    "--allocation dsa --set allocation.lam=-1": "--set allocation.lam: ",
    "--allocation besa --set allocation.per=column": "--set allocation.per: ",
    "--allocation alphapruning --set allocation.epsilon=3": "--set allocation.epsilon: ",
    "--allocation atp --set allocation.step=0": "--set allocation.step: ",
    "--refinement dsnot --set refinement.swaps=2": "--set refinement.swaps: 2.0 is not in",
    "--method sparsegpt --set method.slab=0.5": "--set method.slab: 0.5 is not of type int",
    "--set row-step.width=1": "--set row-step: no row step follows the allocation; add --row-step",
    "--row-step trim --set row-step.width=1": "--set row-step.width: unknown setting, expected nothing: row-step",
    "--allocation owl --row-step neuronal --set row-step.row_lambdas=1": "--set row-step.row_lambdas: has a flag",
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.items(), ids=REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        composed(*arguments.split())
    assert "\n" not in str(caught.value)


def spreads_rows_itself(found: Composition) -> bool:
    """Whether adaptive's own step over rows runs."""
    return found.terms.rows_may_differ and found.terms.row_step is None and found.settings.get("rows", True)


def test_the_defaults_of_best_mode_are_wanda_and_adaptive_by_kl_at_70_percent() -> None:
    config = parse_config(PruneConfig, ["--model", "m", "--output", "out"], prog="p", description="")
    found = compose(config)
    assert (found.pruner.method, found.allocation, found.criterion, found.target) == ("wanda", "adaptive", "kl", 0.7)
    assert (found.settings["budget"], spreads_rows_itself(found), found.levels) == (140, True, 0)
    assert not found.pruned_stream


@pytest.mark.parametrize(
    ("arguments", "rows", "levels"),
    [
        ("", True, 0),
        ("--allocation adaptive --mode paper", True, 0),
        ("--method sparsegpt", False, 20),
        ("--method sparsegpt --refinement dsnot", True, 0),
        ("--method alps --pattern n:8", False, 8),
        ("--pattern n:8", False, 0),
        ("--row-step trim", False, 0),
        ("--set allocation.rows=false", False, 0),
    ],
)
def test_adaptive_spreads_rows_where_nothing_else_does(arguments: str, rows: bool, levels: int) -> None:
    argv = arguments.split() if "--mode" in arguments else ["--mode", "best", *arguments.split()]
    found = composed(*argv)
    assert (found.allocation, found.criterion) == ("adaptive", "kl")
    assert (spreads_rows_itself(found), found.levels) == (rows, levels)


def test_the_criterion_is_the_mode_s_unless_asked() -> None:
    assert composed("--mode", "best", "--allocation", "neuronal").criterion == "kl"
    assert composed("--mode", "best", "--allocation", "neuronal", "--criterion", "alignment").criterion == "alignment"
    assert composed().criterion == "alignment"
    assert composed("--criterion", "kl").criterion == "kl"
    assert composed("--mode", "authors").criterion == "alignment"


def test_the_defaults_of_paper_mode_are_wanda_and_neuronal_at_70_percent() -> None:
    found = composed()
    assert (found.pruner.method, found.allocation, found.target, found.row_step) == ("wanda", "neuronal", 0.7, None)
    assert found.candidates() == {"block": 14, "row": 15}
    assert not found.pruned_stream
    assert not found.released


def test_a_fixed_pattern_says_the_sparsity_and_needs_no_allocation() -> None:
    found = composed("--pattern", "2:8")
    assert (found.target, found.allocation, found.pruner.pattern) == (0.75, "uniform", Pattern(2, 8))
    assert composed("--pattern", "2:4", "--sparsity", "0.5").target == 0.5


@pytest.mark.parametrize("arguments", ["--method sparsegpt", "--method alps", "--pattern n:8"])
def test_rows_that_cannot_be_adapted_leave_the_block_step(arguments: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="neuronal_ray"):
        found = composed(*arguments.split())
    assert found.candidates() == {"block": 14}
    assert found.row_step is None
    assert "block step only" in caplog.text


def test_a_solver_sees_what_its_predecessors_left() -> None:
    assert composed("--method", "sparsegpt").pruned_stream
    assert not composed("--method", "sparsegpt", "--score-stream", "dense").pruned_stream
    assert not composed("--method", "sparsegpt", "--refinement", "dsnot").pruned_stream


def test_a_refinement_takes_the_place_of_the_solver() -> None:
    assert composed("--method", "sparsegpt").pruner.solves
    found = composed("--method", "sparsegpt", "--refinement", "dsnot")
    assert not found.pruner.solves
    assert found.candidates() == {"block": 14, "row": 15}, "masks of a ranking: rows can be adapted"


def test_besa_learns_rates_of_rows_where_rows_may_differ() -> None:
    assert composed("--allocation", "besa").terms.rows_may_differ
    assert not composed("--allocation", "besa", "--method", "sparsegpt").terms.rows_may_differ


def test_trim_takes_the_place_of_neuronal_s_rows() -> None:
    found = composed("--row-step", "trim")
    assert (found.row_step, found.candidates()) == ("trim", {"block": 14})
    found = composed("--allocation", "owl", "--row-step", "neuronal")
    assert (found.row_step, found.candidates()) == ("neuronal", {"row": 15})
    assert composed("--allocation", "owl").row_step is None


def test_candidates_are_counted_before_the_run() -> None:
    assert composed("--mode", "best").candidates() == {"adaptive": 140}
    assert composed("--mode", "best", "--row-step", "neuronal").candidates() == {"adaptive": 140, "row": 15}
    assert composed("--mode", "authors", "--sparsity", "0.8").candidates() == {"block": 13, "row": 15}
    assert composed("--allocation", "owl", "--row-step", "trim").candidates() == {}


def test_the_dense_pass_gathers_no_more_than_is_read() -> None:
    kinds = {
        "--method magnitude": None,
        "--method magnitude --allocation owl": SquareSum,
        "--method wanda": SquareSum,
        "--method magnitude --refinement dsnot": Moments,
        "--method wanda --refinement dsnot --score-stream pruned": SquareSum,
        "--method sparsegpt": None,
        "--method sparsegpt --allocation owl": SquareSum,
        "--method wanda --mode authors": None,
        "--method magnitude --mode authors --allocation owl": SquareSum,
    }
    assert {arguments: composed(*arguments.split()).dense_statistic for arguments in kinds} == kinds


@pytest.mark.parametrize(
    ("argument", "parts"), [("attention", ("attention",)), ("mlp", ("mlp",)), ("all", ("attention", "mlp"))]
)
def test_parts_to_refine_are_chosen_by_a_flag(argument: str, parts: tuple[str, ...]) -> None:
    assert composed("--refinement", "dsnot", "--refined-parts", argument).pruner.parts == parts
