"""The search of a recipe: baselines, limits, prior, tests. Each is in the journal before it is used."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from dapa_merge.checkpoint.units import Unit, auto_modules, parts_of_modules
from dapa_merge.delta.minimize import Minimum, SearchInterrupted, SearchStopped
from dapa_merge.errors import CannotRepair, CheckpointError, Stopped, UsageError
from dapa_merge.measure.decode import DoesNotFit
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.plan.edit import Directions
from dapa_merge.plan.plan import Plan, divide, join, reduced
from dapa_merge.plan.selection import units_that_differ, without_equal_units
from dapa_merge.progress import LOG, remain, task
from dapa_merge.recipe.constraints import SCORE
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.attribution import MAX_CONTRASTS, effects_between
from dapa_merge.search.bench import Bench, make_bench, start_actors, start_workers, workers_in
from dapa_merge.search.bundles import MAX_ALONE, Bundle, by_layer, each_alone, minimize_bundles, scans
from dapa_merge.search.choose import (
    DIVERGENCE,
    SMALL_DIVERGENCE,
    Chosen,
    check_pick,
    choose,
    no_point,
    settle,
    with_front,
)
from dapa_merge.search.forecast import ASKED, expected_tests
from dapa_merge.search.identity import open_journal
from dapa_merge.search.journal import Journal, MarkedJournal
from dapa_merge.search.parts import Part, Parts, best_part, how_to_pick, nearest
from dapa_merge.search.requirement import (
    Requirement,
    is_noise,
    limits_text,
    noisy_prompts,
    requirement,
    settings_of,
)
from dapa_merge.search.result import Asked, Baseline, Point, Search, thrift
from dapa_merge.search.rounds import Helpers, Rounds
from dapa_merge.search.session import Scores, Session, baselines, check_same, scores_text
from dapa_merge.search.slopes import Settings
from dapa_merge.search.workers import Oracle, Workers, in_order, is_test, names_of, pieces_of_test

Prior = Mapping[Unit, float]
# How far from the target a selection may stray: so many times as far as the point that it is part of, or as far as
# hardly shows.
MORE_DIVERGENCE = 1.1


def search_plan(
    recipe: Recipe,
    plan: Plan,
    options: Options,
    *,
    possible: float | None = None,
    is_rung: bool = False,
    opened: Callable[[Journal], object] = lambda _: None,
) -> Search:
    """Load the target of a recipe's plan and `search`, whatever layers the recipe names.

    `possible` is for a rung, whose prompts are parted as for all edits; with `is_rung` alone, only they are. `opened`
    is called with the journal before anything is searched.
    """
    check_pick(options.pick, plan)
    parts = split_prompts(recipe, is_rung=is_rung or possible is not None)
    plan = without_equal_units(recipe, plan)
    with (
        closing(make_bench(recipe, plan, parts.search, options)) as bench,
        closing(open_journal(recipe, plan, bench, options.journal, possible)) as journal,
        journal.telling(),
        _helping(recipe, plan, bench, options) as helpers,
    ):
        opened(journal)
        return search(Session(recipe, plan, bench, journal, options, parts.choice, possible, helpers))


@contextmanager
def _helping(recipe: Recipe, plan: Plan, bench: Bench, options: Options) -> Iterator[Helpers | None]:
    """The workers of a search whose edit chooses, from its beginning to its end; None for any other."""
    if not (options.uses_ray and plan.edit.chooses):
        yield None
        return
    with closing(start_actors(recipe, plan, bench, options)) as actors:
        yield Helpers(actors)


def search(session: Session) -> Search:
    """Find a 1-minimal selection that meets the recipe's requirement.

    Raises:
        CannotRepair: If the full transplant does not improve the score, or violates a limit.
        Stopped: After Ctrl-C, with the best selection so far.
        CheckpointError: If a model computes infinities or NaN.
        DapaError: For any other error; finished tests are in the journal.
    """
    start = time.monotonic()
    if session.possible is not None and not session.plan.edit.chooses:
        _check_scores(session)
    target, full = baselines(session)
    limits = _limits(session, target, full)
    search_all = _search_points if session.plan.edit.chooses else _search_transplant
    found = search_all(session, limits, target, full)
    if session.journal.earlier:
        found = _measured_again(session, found)
    return replace(found, seconds=time.monotonic() - start)


def _search_transplant(session: Session, limits: Requirement, target: Baseline, full: Baseline) -> Search:
    """Delta debugging among all units or, where together they violate a limit, among those of the best part of them."""
    if limits.complaint(full.figures) is not None:
        return _search_parts(session, limits, target, full)
    if session.options.pick is not None:
        raise UsageError(
            f"--pick (DAPA_PICK) is {session.options.pick}, but there is nothing to pick from: all units together keep "
            f"to the limits, so that a search takes the fewest that are needed; leave it out"
        )
    return _search_units(session, limits, target, full)


def _search_parts(session: Session, limits: Requirement, target: Baseline, full: Baseline) -> Search:
    """Look for as much of the transplant as the limits allow, and search among its units, unless the user picked it."""
    recipe, plan, bench, journal = session.recipe, session.plan, session.bench, session.journal
    assert isinstance(journal, Journal)
    why = f"with all {len(plan.units)} units {limits.complaint(full.figures)}"
    LOG.info(f"{why}: looking for the part of them that scores highest within the limits")
    effects = effects_of(session, plan.units, "prior", target, full)
    limited = {one for one, _ in limits.limits}
    bench.measure_all()
    limits = Requirement((*limits.limits, *((one, math.nan) for one in bench.constraints if one not in limited)))
    measure = Parts(bench, journal, limits)
    parts = measure.within_limits(plan.units, effects)
    pick = session.options.pick
    if pick is not None:
        if pick > len(parts):
            raise UsageError(no_point(pick, len(parts)))
        taken, whole = parts[pick - 1], Minimum(parts[pick - 1].units, 0, False, {})
        LOG.info(f"taking point {pick}")
        found = Search(whole, limits, target, full, None, (), len(plan.units), 0, 0, 0, 0, 0.0, plan)
        points = [part.point for part in parts]
    else:
        taken = _best_part(session, parts, limits, target, why)
        LOG.info(f"taking point {taken.point.number}, which scores highest within the limits")
        if session.possible is None:
            # What the recipe's share of the gain is, is decided by what the limits allow.
            floor = requirement(bench.constraints[:1], target.figures, taken.baseline.figures, settings_of(recipe))
            limits = Requirement((*floor.limits, *limits.limits[1:]))
        points = [replace(part.point, complaint=limits.complaint(part.baseline.figures)) for part in parts]
        found = _search_units(replace(session, plan=replace(plan, units=taken.units)), limits, target, taken.baseline)
        if set(found.minimum.units) != set(taken.units):
            left = replace(measure, limits=limits).measured(found.minimum.units, len(points) + 1, taken.point.number)
            points.append(left.point)
    return replace(
        found,
        points=with_front(points),
        picked=taken.point.number,
        by_hand=pick is not None,
        limits=limits,
        plan=plan,
    )


def _best_part(session: Session, parts: Sequence[Part], limits: Requirement, target: Baseline, why: str) -> Part:
    """The part to search in; raises `CannotRepair` if none within the limits scores enough."""
    # A rung of a ladder must reach what another edit can; otherwise any gain counts.
    least = target.score if session.possible is None else limits.min_score - 1e-12
    taken = best_part(parts, limits, least)
    if taken is not None:
        return taken
    enough = "scores higher than the target" if session.possible is None else f"scores {limits.min_score:.3f}"
    numbers = session.bench.num_of_kind
    # All units themselves are among the points, so that one is nearest.
    near = nearest([part.point for part in parts], limits)
    assert near is not None
    raise CannotRepair(
        f"the source {session.recipe.source} cannot repair this target within the recipe's limits: {why}, and no part "
        f"of them that was tried keeps to {limits_text(Requirement(limits.limits[1:]).to_json(), numbers)} and "
        f"{enough}. Nearest is {near.text(limits)}: {how_to_pick(near)}",
        f"{why}, and no part of them within the limits {enough}",
        near.number,
    )


def _measured_again(session: Session, found: Search) -> Search:
    """Measure the selection in this process, where tests or figures that led to it are from another one.

    Raises:
        UsageError: If it does not meet the requirement: then the journal is not one of these models on this machine.
    """
    bench, journal = session.bench, session.journal
    bench.use(found.plan)
    remain(prompts=bench.num_prompts, steps=0, parameters=0)
    figures = bench.baseline(found.minimum.units, what="measuring the result, whose tests an earlier run made").figures
    if found.result is not None:
        check_same(session, f"point {found.result.name}", found.result.figures, figures)
    limits = found.limits or found.requirement
    if not found.by_hand:
        if (complaint := limits.loosened(bench.num_of_kind).complaint(figures)) is not None:
            raise UsageError(
                f"the journal {journal.path} is not true of these models on this machine: its tests lead to "
                f"{spans(join(found.plan, found.minimum.units))}, but measured now {complaint}; remove the journal to "
                f"search again"
            )
        if (complaint := limits.complaint(figures)) is not None:
            LOG.warning(f"measured again, {complaint}: two tokens that are nearly as likely can do this")
    return replace(found, measured=figures)


def _search_points(session: Session, limits: Requirement, target: Baseline, reference: Baseline) -> Search:
    """Let the edit choose, and search among the matrices of the point that was taken, unless the user picked it."""
    assert session.choice is not None
    assert isinstance(session.journal, Journal)
    rounds = Rounds(session.plan, session.bench, session.journal, session.choice, Settings(), session.helpers)
    chosen = choose(rounds, limits, reference, session.options.pick)
    LOG.info(f"taking point {chosen.number}")
    session.bench.use(chosen.plan)
    session = replace(session, plan=chosen.plan, journal=_marked(session.journal, chosen.plan))
    plan, points = chosen.plan, chosen.points
    by_hand = session.options.pick is not None
    if by_hand:
        # Whoever picks a point has seen its figures.
        whole, num_units = Minimum(plan.units, 0, False, {}), len(plan.units)
        found = Search(whole, limits, target, chosen.baseline, None, (), num_units, 0, 0, 0, 0, 0.0, plan)
    else:
        # A part may stray hardly further from the target than the point, and must score as high: what is left out down
        # to the recipe's limit on these prompts falls short of it on others (tests/benchmarks/RESULTS.md).
        figures = chosen.baseline.figures
        allowed = max(figures[DIVERGENCE] * MORE_DIVERGENCE, SMALL_DIVERGENCE)
        kept = limits.tightened(DIVERGENCE, allowed)
        kept = kept.tightened(SCORE.figure, figures[SCORE.figure] - 1e-9)
        found = _search_units(session, kept, target, chosen.baseline)
        if set(found.minimum.units) != set(plan.units):
            found, point = _rest(session, rounds, found, kept, limits, chosen)
            points += (point,)
    return replace(
        found,
        points=with_front(points),
        picked=chosen.number,
        by_hand=by_hand,
        limits=limits,
        reference=reference,
    )


def _rest(
    session: Session, rounds: Rounds, found: Search, kept: Requirement, limits: Requirement, chosen: Chosen
) -> tuple[Search, Point]:
    """Settle what the search left of the point that was taken, unless it would score less then.

    Returns the search with the plan and units of what is left, and the point of their figures.
    """
    units = in_order(found.minimum.units)
    settled = settle(rounds, units, chosen)
    point = _point(session, settled, limits, chosen)
    if point.complaint is None and point.figures[SCORE.figure] >= kept.min_score:
        # A core may have shrunk to nothing.
        still, minimum = set(settled.units), found.minimum
        left = tuple(unit for unit in minimum.units if unit in still)
        certificate = {unit: others for unit, others in minimum.certificate.items() if unit in still}
        minimum = replace(minimum, units=left, certificate=certificate)
        return replace(found, plan=settled, minimum=minimum), point
    LOG.info("what is left is not settled: that would score less")
    return found, _point(session, reduced(session.plan, units).with_changing_units(), limits, chosen)


def _point(session: Session, plan: Plan, limits: Requirement, chosen: Chosen) -> Point:
    """The figures of all units of a plan with fewer directions than the point that was taken, as a point."""
    edit = plan.edit
    assert isinstance(edit, Directions)
    session.bench.use(plan)
    figures = session.bench.recorded(session.journal, f"figures of {edit.digest}", plan.units, "the selection").figures
    point = Point(
        len(chosen.points) + 1,
        dict(figures),
        edit.factors.num_directions,
        limits.complaint(figures),
        part_of=chosen.number,
    )
    LOG.info(point.text(limits))
    return point


def _search_units(session: Session, limits: Requirement, target: Baseline, full: Baseline) -> Search:
    """Delta debugging among the units of the session's plan; see `search`."""
    plan, journal, bench = session.plan, session.journal, session.bench
    recorded = frozenset(journal.tests)
    if recorded:
        LOG.info(f"{len(recorded)} tests are in the journal already")
    if not all(map(is_test, journal.tests.values())):
        raise UsageError(f"the journal {journal.path} has tests that no search makes; remove it to search again")
    bench.require(limits).learn(piece for test in journal.tests.values() for piece in pieces_of_test(test))
    try:
        with closing(_workers(session, limits)) as workers:
            oracle = Oracle(journal, workers)
            minimum, prior, num_candidates = _minimum(session, oracle, limits, target, full)
    except (SearchInterrupted, SearchStopped) as stop:
        best = f"the best selection so far: {spans(join(plan, stop.best.units))}"
        LOG.info(best)
        if journal.path and isinstance(stop, SearchInterrupted):
            LOG.info(f"every test is in the journal {journal.path}; run again to go on")
        if isinstance(stop, SearchStopped):
            raise Stopped(best) from stop
        raise (stop.__cause__ or stop) from None
    tests = [journal.tests[name] for name in oracle.asked if name in journal.tests]
    found = Search(
        replace(minimum, tests=len(oracle.asked)),
        limits,
        target,
        full,
        prior,
        tuple(_path(session, oracle, target, full)),
        num_candidates,
        num_recorded=len(oracle.asked.keys() & recorded),
        num_unneeded=len(set(journal.tests) - recorded - oracle.asked.keys()),
        num_asked=sum(piece.num_prompts for test in tests for piece in pieces_of_test(test)),
        num_prompts=sum(test["num_prompts"] for test in tests),
        seconds=0.0,
        plan=plan,
    )
    saved = thrift(found.num_recorded, found.num_unneeded, found.share_saved)
    LOG.info(f"found {spans(join(plan, minimum.units))} in {found.minimum.tests} tests; saved {saved}")
    return found


def _workers(session: Session, limits: Requirement) -> Workers:
    """Who tests: the helpers if there are any."""
    if session.helpers is not None:
        return workers_in(session.helpers.actors, session.plan, limits)
    return start_workers(session.recipe, session.plan, session.bench, limits, session.options)


def _check_scores(session: Session) -> None:
    """Raise `CannotRepair` where the scores of target and full transplant alone tell so, before more is measured."""
    scores = Scores(session)
    if not scores.are_own:
        return
    for is_begun in (True, False):
        # A target scores at least 0, and what must be reached rises with that: often it need not be asked.
        lowest, highest = scores.full(is_begun=is_begun)
        _check_reaches(session, _floor(session, 0.0, lowest), lowest, highest)
    target = scores.target()
    _check_gain(session, target, highest)
    _check_reaches(session, _floor(session, target, highest), lowest, highest)


def _floor(session: Session, target: float, full: float) -> Requirement:
    """The limit on the score alone, as the scores of target and full transplant set it."""
    figures = {SCORE.figure: target}, {SCORE.figure: _possible(session, full)}
    return requirement(session.bench.constraints[:1], *figures, settings_of(session.recipe))


def _limits(session: Session, target: Baseline, full: Baseline) -> Requirement:
    """The limits of a selection; raises `CannotRepair` if the full transplant violates one or gains nothing."""
    recipe, bench = session.recipe, session.bench
    _check_gain(session, target.score, full.score)
    figures = {**full.figures, SCORE.figure: _possible(session, full.score)}
    limits = requirement(bench.constraints, target.figures, figures, settings_of(recipe))
    LOG.info(f"the limits: {limits_text(limits.to_json(), bench.num_of_kind)}")
    # The source itself may violate what a part of it, or a choice of its directions, does not.
    if not session.plan.edit.chooses:
        _check_reaches(session, limits, full.score, full.score)
    return limits


def _possible(session: Session, full: float) -> float:
    """The score that is possible with this edit or another one."""
    return full if session.possible is None else max(full, session.possible)


def _check_gain(session: Session, target: float, full: float) -> None:
    """Raise `CannotRepair` if the full transplant scores no higher than the target, by more than noise."""
    recipe, number = session.recipe, session.bench.num_scored
    gain = full - target
    if gain > 0 and not is_noise(gain, number):
        return
    others = auto_modules(session.plan.target.config, session.plan.target.shapes)
    # A plan without the units that are equal may lack modules that the recipe has.
    has_all = recipe.is_auto or parts_of_modules(others) <= parts_of_modules(recipe.modules)
    noise = f", which may be noise of {noisy_prompts(number)} in {number} prompts" if gain > 0 else ""
    more = "" if has_all else "; other modules may: try `modules: auto`"
    told = f"{scores_text(session, target, full)}{noise}"
    modules = ", ".join(session.plan.modules)
    raise CannotRepair(
        f"the source {recipe.source} cannot repair this target through its modules {modules}: {told}{more}", told
    )


def _check_reaches(session: Session, limits: Requirement, lowest: float, highest: float) -> None:
    """Raise `CannotRepair` if the full transplant, whose score is between two bounds, does not reach what it must."""
    one, limit = limits.limits[0]
    if (complaint := one.complaint(lowest, highest, limit)) is None:
        return
    raise CannotRepair(
        f"the source {session.recipe.source} cannot repair this target within the recipe's limits: even with every "
        f"unit ({', '.join(session.plan.modules)}) {complaint}",
        f"with all {len(session.plan.units)} units {complaint}",
    )


def _marked(journal: Journal | MarkedJournal, plan: Plan) -> MarkedJournal:
    assert isinstance(journal, Journal)
    assert isinstance(plan.edit, Directions)
    return MarkedJournal(journal, f"directions {plan.edit.digest}")


def _minimum(
    session: Session, oracle: Oracle, limits: Requirement, target: Baseline, full: Baseline
) -> tuple[Minimum[Unit], Prior | None, int]:
    """Search among the plan's units and then, if the recipe asks for it, among blocks of the kept units.

    Returns the outcome, the prior of the plan's units, and the number of candidates.
    """
    recipe, plan = session.recipe, session.plan
    units = _preferred(session, oracle)
    prior = _weigh(session, plan.units, "prior", target, full)
    of = "the point's" if plan.edit.chooses else "a"
    wanted = f"for the few that keep {of} {limits.measure} of {limits.min_score:.3f}"
    if plan.edit.chooses and len(units) > MAX_ALONE:
        bundles = by_layer(units)
        LOG.info(f"searching among {len(bundles)} bundles, of the attention or the MLP of one layer each, {wanted}")
        return _minimum_of_bundles(session, oracle, bundles, prior)
    LOG.info(f"searching among {len(units)} units {wanted}")
    minimum = _minimize(session, oracle, each_alone(units), prior)
    if recipe.granularity == "layer" or not minimum.one_minimal:
        return minimum, prior, len(plan.units)
    blocks = divide(plan, minimum.units, recipe.rows_per_block).units
    if blocks == minimum.units:
        return minimum, prior, len(plan.units)
    blocks = units_that_differ(plan, blocks)
    of_what = "the experts" if recipe.rows_per_block is None else f"blocks of {recipe.rows_per_block} rows"
    LOG.info(f"searching among {len(blocks)} smaller units: {of_what} of those found")
    finer_prior = _weigh(session, blocks, f"prior of {recipe.granularity}", target, full)
    finer = _minimize(session, oracle, each_alone(blocks), finer_prior, num_free=1)
    # All blocks together are the selection found before, so its test does not count twice.
    oracle.asked.pop(names_of(blocks), None)
    return finer, prior, len(plan.units) + len(blocks)


def _minimum_of_bundles(
    session: Session, oracle: Oracle, bundles: Sequence[Bundle], prior: Prior | None
) -> tuple[Minimum[Unit], Prior | None, int]:
    """As `_minimum`: search among bundles and then, if few units are left, among those.

    Where the prior cannot tell half of the bundles that can be left out, each of the others takes about a test. Then
    none is left out: directions are small wherever they are, and the rest would have to make up for those.
    """
    num_begun = len(oracle.asked)
    for most, share in scans(len(bundles)) if prior is not None and session.recipe.max_tests is None else ():
        minimum = _minimize(session, oracle, bundles, prior, most=most)
        if minimum.one_minimal:
            break
        num_left = sum(bundle[0] in set(minimum.units) for bundle in bundles)
        if len(bundles) - num_left < share * len(bundles):
            LOG.info(
                f"{num_left} of {len(bundles)} bundles are left after {minimum.tests} tests, and to leave out few more "
                f"would take a test of each; so all {len(bundles)} are kept (a larger `max_tests` goes on)"
            )
            return Minimum(tuple(itertools.chain(*bundles)), minimum.tests, False, {}), prior, len(bundles)
    minimum = _minimize(session, oracle, bundles, prior, num_free=len(oracle.asked) - num_begun)
    if not minimum.one_minimal or len(minimum.units) > MAX_ALONE:
        return minimum, prior, len(bundles)
    LOG.info(f"searching among the {len(minimum.units)} units of those found")
    # That all of them hold has been asked.
    found = _minimize(session, oracle, each_alone(minimum.units), prior, num_free=1)
    return found, prior, len(bundles) + len(minimum.units)


def _preferred(session: Session, oracle: Oracle) -> tuple[Unit, ...]:
    """The units of the preferred module if they are enough, or else all units."""
    units, prefer = session.plan.units, session.recipe.prefer
    preferred = tuple(unit for unit in units if unit.module == prefer)
    if not preferred or preferred == units:
        return units
    # All later questions depend on this answer, so nothing is tested ahead of time.
    is_enough = oracle.among(units, lambda _answers, _number: [])(frozenset(preferred))
    LOG.info(f"{prefer} alone {'is' if is_enough else 'is not'} enough")
    return preferred if is_enough else units


def _weigh(session: Session, units: Sequence[Unit], name: str, target: Baseline, full: Baseline) -> Prior | None:
    """The prior score of each unit; None if it cannot be computed, or the algorithm uses none."""
    return effects_of(session, units, name, target, full) if session.recipe.search == "guided" else None


def effects_of(session: Session, units: Sequence[Unit], name: str, target: Baseline, full: Baseline) -> Prior | None:
    """The expected effect of each unit on refusing; None if it cannot be computed.

    It comes from the journal if recorded, so that a resumed search asks the same questions.
    """
    journal = session.journal
    scores = journal.notes.get(name, {})
    # An earlier search with another outcome may have scored blocks of other units, and a stranger anything.
    if scores is not None and not (isinstance(scores, dict) and all(_is_score(scores.get(str(one))) for one in units)):
        scores = None
        try:
            with task("weighing the units by one backward pass", 2 * MAX_CONTRASTS, "responses"):
                limit = session.bench.meter.batch_size.limit
                found = effects_between(session.bench.live, units, target.responses, full.responses, limit)
            scores = {str(unit): score for unit, score in found.items()}
        except (ValueError, CheckpointError, DoesNotFit) as error:
            LOG.info(f"going on without a prior, because {error}")
        journal.note(name, scores)
    return None if scores is None else {unit: scores[str(unit)] for unit in units}


def _is_score(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _minimize(
    session: Session,
    oracle: Oracle,
    bundles: Sequence[Bundle],
    prior: Prior | None,
    *,
    num_free: int = 0,
    most: int | None = None,
) -> Minimum[Unit]:
    """Delta debugging among bundles of units; `num_free` of its tests do not count, and `most` limits the others."""
    recipe = session.recipe
    if session.options.uses_ray:
        # Free the memory for the workers, one of which may use the same device.
        session.bench.close()
    sizes = {unit: session.plan.num_parameters((unit,)) for bundle in bundles for unit in bundle}
    left = most if recipe.max_tests is None else max(1, recipe.max_tests - len(oracle.asked) + num_free)
    tests = expected_tests(len(bundles), recipe.search, has_prior=prior is not None, max_tests=left)
    oracle.expect(tests, session.bench.num_prompts * ASKED)
    return minimize_bundles(bundles, oracle.among, algorithm=recipe.search, prior=prior, sizes=sizes, max_tests=left)


def _path(session: Session, oracle: Oracle, target: Baseline, full: Baseline) -> Iterator[Asked]:
    for name, units in oracle.asked.items():
        test = session.journal.tests.get(name)
        if test is None:
            # The empty and the full selection are not tested: they are the baselines.
            yield Asked(tuple(in_order(units)), bool(units), (full if units else target).score)
            continue
        asked = [piece for piece in pieces_of_test(test) if piece.kind == session.bench.constraints[0].check]
        num_prompts = sum(piece.num_prompts for piece in asked)
        score = 1 - sum(piece.num_wrong for piece in asked) / num_prompts if num_prompts else None
        yield Asked(tuple(in_order(units)), bool(test["holds"]), score)
