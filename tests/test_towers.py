"""Models that see: their language tower is repaired and measured as a text model is, and the rest left alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import answer, call, configuration, num_different, tiny_llama, weights, write_few
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from dapa_merge import miniature
from dapa_merge.errors import DapaError
from dapa_merge.measure.live import LiveModel
from dapa_merge.plan.selection import given_selection, make_plan
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.verify.tensors import verify

TEXT = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
IMAGE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
# Qwen's: each position has three coordinates.
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN_IMAGE = dict(depth=2, hidden_size=16, out_hidden_size=32, intermediate_size=24, num_heads=2, patch_size=14)


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**IMAGE), image_token_index=300)


def mistral3():
    from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig

    text = MistralConfig(**TEXT)
    return Mistral3Config(text_config=text, vision_config=PixtralVisionConfig(**IMAGE), image_token_index=300)


def gemma3():
    text = {**TEXT, "head_dim": 8, "sliding_window": 16}
    tokens = dict(image_token_index=300, boi_token_index=301, eoi_token_index=302)
    return transformers.Gemma3Config(text_config=text, vision_config=IMAGE, mm_tokens_per_image=4, **tokens)


def qwen2_5_vl():
    image = {**QWEN_IMAGE, "fullatt_block_indexes": [1]}
    return transformers.Qwen2_5_VLConfig(text_config={**TEXT, **ROPE}, vision_config=image, **QWEN_TOKENS)


def qwen3_vl():
    image = {**QWEN_IMAGE, "depth": 3, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16}
    return transformers.Qwen3VLConfig(text_config={**TEXT, **ROPE, "head_dim": 8}, vision_config=image, **QWEN_TOKENS)


QWEN_TOKENS = dict(image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)
MODELS = {config.__name__: config for config in (llava, mistral3, gemma3, qwen2_5_vl, qwen3_vl)}
# mergekit's definition has the names of the published files, which transformers' own differ from.
NOT_BY_MERGEKIT = ("gemma3",)
# mergekit has no definition of it, and does not find it under transformers' names.
LOST_BY_MERGEKIT = ("llava",)


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    folders = [
        saved(AutoModelForImageTextToText, MODELS[request.param](), tmp_path / name, seed)
        for seed, name in enumerate(("target", "source"))
    ]
    return request.param, *folders


def saved(kind, config, folder, seed):
    """A random model of a config, saved by transformers under the names of published files."""
    torch.manual_seed(seed)
    kind.from_config(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(miniature.path("target")).save_pretrained(folder)
    return folder


@pytest.fixture(params=[(name, order) for name in ("gemma3", "mistral3") for order in ("text first", "text second")])
def siblings(request, tmp_path):
    """Target and source, one a model that sees and one its language tower alone; and a third like the source."""
    name, order = request.param
    config = MODELS[name]()
    kinds = [(AutoModelForCausalLM, config.text_config), (AutoModelForImageTextToText, config)]
    target, source = kinds if order == "text first" else reversed(kinds)
    return (
        saved(*target, tmp_path / "target", 0),
        saved(*source, tmp_path / "source", 1),
        saved(*source, tmp_path / "pretrained", 2),
    )


def test_the_language_towers_gates_are_transplanted_by_every_path(pair, write_recipe, tmp_path):
    name, target, source = pair
    recipe = load_recipe(write_recipe(target, source, layers='"0,2"'))
    plan = make_plan(recipe)
    selection = given_selection(recipe, plan)
    assert [str(unit) for unit in plan.units] == ["0.gate", "1.gate", "2.gate"]
    assert call("run", tmp_path / "recipe.yml", tmp_path / "out", "--no-evaluate").exit_code == 0
    before, taken, after = weights(target), weights(source), weights(tmp_path / "out")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for unit in selection for name in unit.tensors}
    assert all("gate_proj" in name and "vis" not in name for name in changed)
    assert all(torch.equal(after[name], taken[name]) for name in changed)
    ids = torch.arange(3, 15)[None]
    live = LiveModel(plan, torch.device("cpu"))
    with torch.no_grad(), live.transplanted(selection) as candidate:
        logits = candidate(input_ids=ids).logits
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto").eval()
        assert torch.equal(model(input_ids=ids).logits, logits)
    if name in LOST_BY_MERGEKIT:
        with pytest.raises(DapaError, match=r"would leave .* out of its result"):
            run_merge(configuration(target, source, layers="0,2"), str(tmp_path / "merged"), MergeOptions(quiet=True))
        assert not (tmp_path / "merged").exists()
    elif name not in NOT_BY_MERGEKIT:
        run_merge(configuration(target, source, layers="0,2"), str(tmp_path / "merged"), MergeOptions(quiet=True))
        verification = verify(tmp_path / "merged", plan)
        assert verification.differences == ()
        assert verification.transplanted == selection


def test_a_model_that_sees_is_measured_by_texts(pair, tmp_path):
    _, target, _ = pair
    few = write_few(tmp_path / "few", 2)
    figures = answer("evaluate", target, "--prompts", few, "--max-new-tokens", 3, "--text", "builtin", "--json")
    assert figures["num_harmful"] == 2
    assert figures["perplexity"] > 1


def test_a_text_only_model_and_its_sibling_that_sees_repair_each_other(siblings, write_recipe, tmp_path):
    target, source, pretrained = siblings
    few = write_few(tmp_path / "few", 2)
    said = {"layers": '"0,2"', "modules": "gate,down,q", "max_new_tokens": 3}
    recipe = write_recipe(target, source, prompts=str(few), **said)
    report = answer("run", recipe, tmp_path / "out", "--json")
    before, theirs, after = weights(target), weights(source), weights(tmp_path / "out")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    parts = ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj")
    units = {f"model.layers.{layer}.{part}.weight" for layer in (0, 2) for part in parts}
    # In files, the tower of the model that sees has a prefix.
    assert {name.removeprefix("language_model.") for name in changed} == units
    by_end = {name.removeprefix("language_model."): name for name in theirs}
    twins = {name: by_end[name.removeprefix("language_model.")] for name in changed}
    assert all(torch.equal(after[name], theirs[other]) for name, other in twins.items())
    assert report["parameters_changed"] == num_different(target, tmp_path / "out")
    # Each class is measured as itself.
    figures = answer("evaluate", source, "--prompts", few, "--max-new-tokens", 3, "--json")
    assert figures["perplexity"] == report["source_alone"]["perplexity"]
    checked = answer("verify", tmp_path / "out", "--json")
    assert checked["correct"]
    assert checked["units"] == report["units"]
    added = {**said, "edit": "difference", "pretrained": str(pretrained)}
    assert call("run", write_recipe(target, source, **added), tmp_path / "added", "--no-evaluate").exit_code == 0
    third, result = weights(pretrained), weights(tmp_path / "added")
    for name, other in twins.items():
        expected = before[name].float() + (theirs[other].float() - third[other].float())
        assert torch.equal(result[name], expected.bfloat16())
    with pytest.raises(DapaError, match=r"mergekit merges models of one class only, .* use `dapa-merge run`"):
        run_merge(configuration(target, source, layers="0,2"), str(tmp_path / "merged"), MergeOptions(quiet=True))


def test_a_sibling_of_another_family_or_for_another_task_is_refused(write_recipe, tmp_path):
    """Their tensors have the same shapes, so that only the configs tell them apart."""
    target = saved(AutoModelForImageTextToText, mistral3(), tmp_path / "target", 0)
    llama = saved(AutoModelForCausalLM, tiny_llama(**TEXT), tmp_path / "llama", 1)
    refused = call("plan", write_recipe(target, llama))
    assert refused.exit_code == 4
    assert "is a LlamaForCausalLM but the target" in refused.stderr
    judge = saved(transformers.AutoModelForSequenceClassification, mistral3().text_config, tmp_path / "judge", 1)
    refused = call("plan", write_recipe(target, judge))
    assert refused.exit_code == 4
    assert "is a MistralForSequenceClassification but the target" in refused.stderr
