"""`dapa-merge inspect`: what was done to a target is named from its weights, for models whose history is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from conftest import answer, call, change_tensor, save_random, tiny_llama, weights

from dapa_merge import load_recipe
from dapa_merge.checkpoint.location import Location
from dapa_merge.inspect import difference as measuring
from dapa_merge.inspect.difference import MAX_RANK, Difference, decay_of
from dapa_merge.inspect.inspection import Inspection, inspect_pair

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LAYERS = 4
HIDDEN = 96


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model whose matrices are large enough for ranks to differ from full rank."""
    config = tiny_llama(hidden_size=HIDDEN, intermediate_size=160, num_hidden_layers=LAYERS)
    return save_random(tmp_path_factory.mktemp("inspected") / "source", config, seed=3, max_shard_size="1MB")


@pytest.fixture
def make(source, tmp_path) -> Callable[..., Path]:
    """Copies the source, and changes some of its tensors."""

    def copy(change: Callable[[str, torch.Tensor], None], name: str = "target", of: Path = source) -> Path:
        folder = shutil.copytree(of, tmp_path / name)
        for tensor in weights(folder):
            change_tensor(folder, tensor, lambda values, tensor=tensor: change(tensor, values))
        return folder

    return copy


def lora(modules: tuple[str, ...], rank: int, strength: float = 0.05) -> Callable[[str, torch.Tensor], None]:
    """Adds a product of two factors to some modules, a share of their norms."""
    generator = torch.Generator().manual_seed(1)

    def change(name: str, values: torch.Tensor) -> None:
        if name.split(".")[-2] in modules:
            left, right = (torch.randn(size, rank, generator=generator) for size in values.shape)
            product = left @ right.T
            values += (strength * values.float().norm() / product.norm() * product).to(values.dtype)

    return change


def training(strength: float, seed: int = 2, only: tuple[str, ...] = ()) -> Callable[[str, torch.Tensor], None]:
    """Adds noise of full rank to every tensor, or to some modules."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, values: torch.Tensor) -> None:
        if not only or name.split(".")[-2] in only:
            noise = torch.randn(values.shape, generator=generator)
            values += (strength * values.float().norm() / noise.norm() * noise).to(values.dtype)

    return change


def ablation(name: str, values: torch.Tensor) -> None:
    """Removes one direction from what writes to the residual stream."""
    direction = torch.nn.functional.normalize(torch.arange(1.0, HIDDEN + 1), dim=0)
    if name.split(".")[-2] in ("o_proj", "down_proj"):
        values -= torch.outer(direction, direction @ values.float()).to(values.dtype)
    if "embed" in name:
        values -= torch.outer(values.float() @ direction, direction).to(values.dtype)


def nothing(name: str, values: torch.Tensor) -> None:
    """Leaves a tensor as it is."""


def inspected(target: Path, source: Path, pretrained: Path | None = None) -> Inspection:
    return inspect_pair(*(Location(str(path)) for path in (target, source)), pretrained and Location(str(pretrained)))


HISTORIES = {
    "identical": (nothing, "identical", None),
    "LoRA on everything": (lora((*ATTENTION, *MLP), 8), "lora", 8),
    "LoRA on the attention": (lora(ATTENTION, 4), "lora", 4),
    "LoRA of rank 1": (lora((*ATTENTION, *MLP), 1), "lora", 1),
    "LoRA near the noise of bfloat16": (lora(MLP, 8, 0.02), "lora", 8),
    "training of everything": (training(0.05), "training", None),
    "training of the MLPs": (training(0.05, only=MLP), "training", None),
    "training as small as rounding": (training(0.002), "training", None),
    "abliteration": (ablation, "abliteration", None),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_a_history_is_read_from_the_weights(history, make, source):
    change, kind, rank = HISTORIES[history]
    found = inspected(make(change), source)
    assert found.damage.kind == kind
    if rank is not None:
        assert {module.rank for module in found.modules if module.layers} == {rank}
        assert f"rank {rank}:" in found.damage.what


ARCHITECTURES = {
    "fused projections": ("Phi3Config", {}, ("gate", "up", "down", "q", "k", "v", "o")),
    "experts": ("MixtralConfig", {"num_local_experts": 4}, ("gate", "up", "down", "q", "k", "v", "o")),
    "no gate": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4}, ("up", "down", "q", "k", "v", "o")),
}


@pytest.mark.parametrize("which", ARCHITECTURES)
def test_ranks_are_read_from_any_architecture(which, tmp_path):
    name, more, modules = ARCHITECTURES[which]
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    config = getattr(transformers, name)(vocab_size=152, pad_token_id=0, num_key_value_heads=2, **sizes, **more)
    base = save_random(tmp_path / "source", config, seed=1, max_shard_size="1MB")
    target = shutil.copytree(base, tmp_path / "target")
    generator = torch.Generator().manual_seed(1)

    def change(values: torch.Tensor) -> None:
        matrices = values.reshape(-1, values.shape[-1])
        product = torch.randn(len(matrices), 4, generator=generator) @ torch.randn(
            4, values.shape[-1], generator=generator
        )
        values += (0.1 * values.float().norm() / product.norm() * product).reshape(values.shape).to(values.dtype)

    inside = [one for one in inspected(target, base).differences if one.module in modules]
    for tensor in {one.tensor.partition("[")[0] for one in inside} | {
        part for part in weights(base) if "experts" in part
    }:
        change_tensor(target, tensor, change)
    found = inspected(target, base)
    assert found.damage.kind == "lora"
    assert [(one.module, one.rank) for one in found.modules if one.layers] == [(module, 4) for module in modules]


def test_modules_and_layers_that_differ_are_named(make, source):
    change = lora(("q_proj",), 4)

    def in_two_layers(name: str, values: torch.Tensor) -> None:
        if ".1." in name or ".3." in name:
            change(name, values)

    found = inspected(make(in_two_layers), source)
    assert found.damage.what.startswith("q (layers 1,3) differ by low rank")
    assert [(module.module, module.layers) for module in found.modules if module.layers] == [("q", (1, 3))]


def test_norms_and_shares_are_those_of_a_direct_computation(make, source):
    target = make(training(0.05))
    ours, theirs = weights(target), weights(source)
    name = "model.layers.2.mlp.down_proj.weight"
    [found] = [one for one in inspected(target, source).differences if one.tensor == name]
    difference = ours[name].double() - theirs[name].double()
    assert found.norm == pytest.approx(float(difference.norm() / theirs[name].double().norm()))
    assert found.num_changed == int((difference != 0).sum())
    assert found.num_values == difference.numel()
    values = numpy.linalg.svd(difference.numpy(), compute_uv=False) ** 2
    assert found.decay.first == pytest.approx(values[0] / values.sum())
    assert found.decay.num_directions == int((values.cumsum() < 0.9 * values.sum()).sum()) + 1


def test_every_tensor_is_compared_once(make, source):
    found = inspected(make(training(0.05)), source)
    assert sum(one.num_values for one in found.differences) == sum(value.numel() for value in weights(source).values())
    assert sum(one.num_changed for one in found.differences) == sum(
        int((value != theirs).sum())
        for value, theirs in zip(weights(make(training(0.05), "again")).values(), weights(source).values(), strict=True)
    )


def test_a_target_that_was_only_rounded_is_named(make, source, tmp_path):
    exact = shutil.copytree(source, tmp_path / "exact")
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(5)
    for path in exact.glob("*.safetensors"):
        content = {
            name: value.float() * (1 + 0.003 * torch.rand(value.shape, generator=generator))
            for name, value in load_file(path).items()
        }
        save_file(content, path, metadata={"format": "pt"})
        save_file(
            {name: value.to(torch.bfloat16) for name, value in content.items()}, tmp_path / path.name, {"format": "pt"}
        )
    rounded = shutil.copytree(source, tmp_path / "rounded")
    for path in tmp_path.glob("*.safetensors"):
        shutil.copy(path, rounded / path.name)
    found = inspected(rounded, exact)
    assert found.damage.kind == "rounded"
    assert any("float32" in note and "bfloat16" in note for note in found.notes)
    noise = sum(one.rounding for one in found.differences) / sum(one.squares for one in found.differences)
    assert 0.5 < noise <= 1
    # One value that moved by a whole digit is more than rounding.
    change_tensor(rounded, "model.layers.0.mlp.up_proj.weight", lambda values: values[0, 0].mul_(1.02))
    assert inspected(rounded, exact).damage.kind == "training"


def test_the_pretrained_model_tells_siblings_from_a_fine_tune_of_the_source(make, source):
    aligned, fine_tune = make(training(0.05, 7), "aligned"), make(training(0.05, 8), "sibling")
    assert inspected(fine_tune, aligned).damage.kind == "training"
    found = inspected(fine_tune, aligned, source)
    assert found.damage.kind == "siblings"
    assert found.damage.what.startswith("the target holds 0 % of what the source was taught")
    of_aligned = make(training(0.05, 9), "of aligned", aligned)
    assert inspected(of_aligned, aligned, source).damage.kind == "training"


def test_values_that_are_not_numbers_are_refused_by_name(make, source):
    target = make(nothing)
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensor(target, name, lambda values: values[0, 0].fill_(float("nan")))
    ran = call("inspect", target, source)
    assert ran.exit_code == 4
    assert name in ran.stderr
    assert "target" in ran.stderr


@pytest.mark.parametrize("rank", [1, 16, 100])
def test_a_large_matrix_decays_as_its_exact_values_do(rank):
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(700, rank, generator=generator), torch.randn(rank, 500, generator=generator)
    matrix = left @ right / rank**0.5 + 0.05 * torch.randn(700, 500, generator=generator)
    found = decay_of(matrix)
    values = numpy.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    assert found.rank == rank
    assert found.rest == pytest.approx(values[rank:].sum() / values.sum(), rel=1e-2)
    assert found.first == pytest.approx(values[0] / values.sum(), rel=1e-3)
    assert found.num_directions == int((values.cumsum() < 0.9 * values.sum()).sum()) + 1


def test_a_large_matrix_of_full_rank_has_no_rank():
    found = decay_of(torch.randn(700, 500, generator=torch.Generator().manual_seed(0)))
    assert found.rank == 0
    assert found.num_directions is None
    assert found.rest > MAX_RANK / 500


def test_matrices_that_are_read_in_parts_count_as_a_whole(make, source, monkeypatch):
    target = make(training(0.05))
    whole = inspected(target, source).differences
    monkeypatch.setattr(measuring, "MAX_VALUES", 1000)
    parts = inspected(target, source).differences
    sums = [
        [(one.num_values, one.num_changed, one.num_beyond, *map(rounded, (one.squares, one.source_squares)))
         for one in found]
        for found in (whole, parts)
    ]  # fmt: skip
    assert sums[0] == sums[1]


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def test_rows_of_further_tokens_are_counted_and_not_compared(make, source):
    from safetensors.torch import load_file, save_file

    target = make(nothing)
    for path in target.glob("*.safetensors"):
        content = load_file(path)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in content:
                content[name] = torch.cat([content[name], torch.ones(8, HIDDEN, dtype=torch.bfloat16)])
        save_file(content, path, metadata={"format": "pt"})
    found = inspected(target, source)
    assert found.damage.kind == "identical"
    assert found.notes[0].startswith(f"the target has {2 * 8 * HIDDEN} values")


def test_what_surrounds_the_weights_is_compared(make, source, tmp_path):
    target, other = make(nothing), shutil.copytree(source, tmp_path / "official")
    (target / "README.md").write_text("---\nlicense: mit\n---\n")
    (other / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: me/Target\n---\n")
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 999, "content": "<more>"})
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (other / name).unlink(missing_ok=True)
    found = inspected(target, other)
    notes = "\n".join(found.notes)
    assert "swapped" in found.swap
    assert "the tokenizers differ" in notes
    assert "the source has no chat template" in notes
    assert "mit and apache-2.0" in notes


# Rounding hides the order of changes that are no larger.
SWAPPABLE = [name for name in HISTORIES if name not in ("identical", "training as small as rounding")]


@pytest.mark.parametrize("history", SWAPPABLE)
def test_weights_show_which_of_two_models_was_made_of_the_other(history, make, source):
    tuned = make(HISTORIES[history][0], "tuned")
    for target, other, is_swapped in ((tuned, source, False), (source, tuned, True)):
        swap = inspected(target, other).swap
        assert (swap is not None and "by the weights, the source is the target plus a change" in swap) is is_swapped


def test_ablation_after_training_is_no_swap(make, source):
    def change(name: str, values: torch.Tensor) -> None:
        training(0.02)(name, values)
        ablation(name, values)

    assert inspected(make(change, "tuned"), source).swap is None


SIGNS = {
    "a config": ("config.json", '"_name_or_path": "me/tuned"', "was loaded from me/tuned"),
    "files of a training": ("trainer_state.json", "{}", "holds trainer_state.json"),
    "names": ("", "", "the source's name says 'uncensored'"),
}


@pytest.mark.parametrize("what", SIGNS)
def test_what_lies_beside_the_weights_may_tell_of_a_swap_and_is_a_hint(what, make, source, tmp_path):
    file, text, told = SIGNS[what]
    target, other = make(nothing, "tuned"), shutil.copytree(source, tmp_path / "official-uncensored")
    if what != "names":
        other = other.rename(tmp_path / "official")
    if file == "config.json":
        (other / file).write_text((other / file).read_text().replace("{", "{" + text + ",", 1))
    elif file:
        (other / file).write_text(text)
    note = inspected(target, other).swap
    assert note.startswith("target and source may be swapped: ")
    assert told in note
    assert "dapa-merge evaluate" in note
    assert inspected(other, target).swap is None
    shown = call("inspect", target, other).stdout
    assert shown.index("look first") < shown.index("\ntry ")
    # Told before the work, too; the weights are not read for it.
    assert note in call("plan", target, other, "--prompts", "miniature").stderr
    assert "swapped" not in call("plan", other, target, "--prompts", "miniature").stderr


@pytest.mark.parametrize("kind", ["text", "list", "json"])
def test_a_chat_template_is_the_same_in_whichever_file_it_is(kind, make, source):
    target = make(nothing)
    template = (target / "chat_template.jinja").read_text()
    (target / "chat_template.jinja").unlink()
    path = target / ("chat_template.json" if kind == "json" else "tokenizer_config.json")
    settings = json.loads(path.read_text()) if path.is_file() else {}

    def write(text: str) -> None:
        named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": text}]
        path.write_text(json.dumps({**settings, "chat_template": named if kind == "list" else text}))

    write(template)
    assert inspected(target, source).notes == ()
    write(template + "{{ more }}")
    assert any("chat templates differ" in note for note in inspected(target, source).notes)


def test_models_that_are_not_one_family_are_an_answer(source, llama_pair):
    found = answer("inspect", source, llama_pair[0], "--json")
    assert found["kind"] == "not one family"
    assert found["edit"] is None
    assert found["command"] is None
    assert found["modules"] == []


def test_the_advice_is_written_as_a_recipe_that_loads(make, source, tmp_path):
    target = make(lora(MLP, 4))
    ran = call("inspect", target, source, "--pretrained", source, "--write", tmp_path / "recipe.yml")
    assert ran.exit_code == 0, ran.output
    command = f"dapa-merge repair {target} {source} OUT --keep PROMPTS --pretrained {source}"
    assert f"command        {command}" in ran.stdout.splitlines()
    recipe = load_recipe(tmp_path / "recipe.yml")
    assert (str(recipe.target), str(recipe.source)) == (str(target), str(source))
    assert recipe.edit == "auto"
    assert str(recipe.pretrained) == str(source)
    assert (tmp_path / "recipe.yml").read_text().startswith("# Gate, up, down differ by low rank")


def test_no_recipe_is_written_where_nothing_can_help(make, source, tmp_path):
    ran = call("inspect", make(nothing), source, "--write", tmp_path / "recipe.yml")
    assert ran.exit_code == 3
    assert "it looks like  identical" in ran.stdout
    assert not (tmp_path / "recipe.yml").exists()


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_chart_is_drawn_into_the_file_that_is_named(ending, make, source, tmp_path):
    chart = tmp_path / f"map{ending}"
    ran = call("inspect", make(lora(MLP, 4)), source, "--chart", chart)
    assert ran.exit_code == 0, ran.output
    assert chart.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[ending])


def test_no_chart_is_drawn_of_equal_models(make, source, tmp_path):
    ran = call("inspect", make(nothing), source, "--chart", tmp_path / "map.png")
    assert ran.exit_code == 0, ran.output
    assert "was not drawn" in ran.stderr
    assert not list(tmp_path.glob("*.png"))


WRONG = {
    "a chart of another kind": (["--chart", "map.jpg"], ".png or .svg"),
    "a recipe that exists": (["--write", "there.yml"], "exists already"),
    "a chart that exists": (["--chart", "there.svg"], "exists already"),
    "no location": (["--pretrained", "a@b@c"], "--pretrained"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_refused_before_the_models_are_read(wrong, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("there.yml", "there.svg"):
        (tmp_path / name).write_text("mine")
    options, words = WRONG[wrong]
    ran = call("inspect", "absent/target", source, *options)
    assert ran.exit_code == 2
    assert words in ran.stderr
    assert (tmp_path / "there.yml").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.svg", "there.yml"]


def test_a_difference_without_a_source_is_a_whole_one():
    assert Difference(0, "gate", "x", 1, 1, squares=1.0).norm == 1.0
    assert Difference(0, "gate", "x", 1).noise == 0.0
