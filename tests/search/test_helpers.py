"""A choice of directions whose work is shared: bit for bit the same, also on a cluster that loses a node."""

from __future__ import annotations

import functools
import json
import random
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import answer, call, write_few

from dapa_merge import miniature
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.search import ascent, choose, identity, search, slopes
from dapa_merge.search.bench import _make_hand, make_bench
from dapa_merge.search.cluster import Actors
from dapa_merge.search.journal import Journal
from dapa_merge.search.rounds import Helpers, Rounds
from dapa_merge.search.spectrum import spectra_of

# With whatever else starts Ray.
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SETTINGS = {"num_rounds": 2, "num_steps": 2, "rate": 0.12}


@pytest.fixture(scope="module", autouse=True)
def quick_settings():
    with pytest.MonkeyPatch.context() as patch:
        for module in (choose, identity, search):
            patch.setattr(module, "Settings", functools.partial(slopes.Settings, **SETTINGS))
        patch.setattr(choose, "MORE_ROUNDS", 0)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    keep = folder / "keep.txt"
    keep.write_text("\n".join(question.prompt for question in load_prompts("miniature").skill[:12]) + "\n")
    content = {
        "merge_method": "dapa",
        "base_model": str(miniature.path("shadow-target")),
        "models": [{"model": str(miniature.path("shadow-source"))}],
        "parameters": {
            "layers": "auto", "edit": "directions", "modules": "gate,up,down", "keep": str(keep), "retain": 0.5,
            "prompts": str(write_few(folder / "prompts", 12)), "max_new_tokens": 12, "batch_size": 64, "max_tests": 4,
        },
    }  # fmt: skip
    # JSON is YAML.
    (folder / "recipe.yml").write_text(json.dumps(content))
    return folder / "recipe.yml"


def entries(journal: Path) -> list[dict]:
    # The last line may not be whole yet.
    lines = [json.loads(line) for line in journal.read_text().split("\n")[:-1]]
    return [{key: value for key, value in line.items() if key not in ("check", "seal", "seconds")} for line in lines]


def notes(journal: Path) -> dict[str, object]:
    return {entry["note"]: entry["value"] for entry in entries(journal) if "note" in entry}


class Here(Actors):
    """Actors in this process that are done in any order."""

    def __init__(self, hands) -> None:
        self.number, self.hands = len(hands), hands
        self.random = random.Random(0)
        self.left = []
        self._num_rounds = 0

    def share(self, value):
        return Holding(value)

    def submit(self, key, argument, on=None):
        self.left.append((key, argument))

    def wait(self):
        key, work = self.left.pop(self.random.randrange(len(self.left)))
        return key, self.random.choice(self.hands)(work), None


class Holding:
    def __init__(self, value) -> None:
        self.value = value

    def get(self):
        return self.value


def test_rounds_do_not_depend_on_the_number_of_workers_or_on_their_order(recipe, monkeypatch):
    # As of a model whose groups are divided.
    monkeypatch.setattr(ascent, "MIN_LARGE", 0)
    parsed = load_recipe(recipe)
    plan, parts = make_plan(parsed), split_prompts(parsed)
    settings = slopes.Settings(**SETTINGS | {"num_rounds": 1, "num_steps": 3})
    sizes = []
    draw = ascent.Ascent._draw
    monkeypatch.setattr(ascent.Ascent, "_draw", lambda self: sizes.append(draw(self)) or sizes[-1])
    with closing(make_bench(parsed, plan, parts.search, Options("cpu"))) as made:

        def states(helpers: Helpers | None) -> list[torch.Tensor]:
            spectra = (
                list(spectra_of(plan, plan.units, made.device))
                if helpers is None
                else helpers.spectra(plan.units, plan, choose.Settings().max_rank)
            )
            return Rounds(plan, made, Journal(), parts.choice, settings, helpers).states(spectra, 1)

        hands = [_make_hand(parsed, parts.search, Options("cpu"), 1) for _ in range(2)]
        alone, shared = states(None), states(Helpers(Here(hands)))
        for hand in hands:
            hand.bench.close()
    assert torch.equal(alone[0], shared[0])
    assert max(len(section.rows) for chunks in sizes for (section,) in chunks) <= ascent.MAX_CHUNK
    assert max(map(len, sizes)) > 3
    assert float(alone[0][0].abs().max()) > 0


def test_a_cluster_that_loses_an_actor_chooses_the_same_directions(cluster, recipe, tmp_path):
    journals = {name: tmp_path / name for name in ("alone", "together")}
    result = call("search", recipe, "--journal", journals["alone"], "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    # Ray, which this command does not use, may still print what other tests did to its nodes.
    alone, _ = json.JSONDecoder().raw_decode(result.stdout[result.stdout.index("{\n") :])
    # Each search decomposes the models itself.
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.unlink()
    arguments = (recipe, "--journal", journals["together"], "--workers", "ray:2", "--json", "--device", "cpu")
    journal = journals["together"]
    with cluster.losing("actor", lambda: journal.exists() and "round 1" in notes(journal)) as lost:
        together = answer("search", *arguments)
    assert lost
    for key in ("units", "certificate", "tests", "points"):
        assert together[key] == alone[key]
    found = {name: entries(journal) for name, journal in journals.items()}
    # Cores and moments of every round, and the digest of the directions of every point.
    assert notes(journals["together"]) == notes(journals["alone"])
    assert "point 2" in notes(journals["alone"])
    tests = {name: [entry for entry in of_one if "holds" in entry] for name, of_one in found.items()}
    assert all(test in tests["together"] for test in tests["alone"])
