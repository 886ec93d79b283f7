"""The commands as functions for Python: same words, same defaults; they log, return results, and raise `DapaError`.

Leaves out what a notebook does not need: locks, cards and exit codes. Where a model or a path is named, a text or a
path object will do. Modules that load torch are imported by the call that needs them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dapa_merge import flow
from dapa_merge.checkpoint.location import Location, is_published
from dapa_merge.errors import UsageError
from dapa_merge.files import new_file, replace_file
from dapa_merge.imports import lasting
from dapa_merge.plan.directions import FILE_NAME
from dapa_merge.plan.edit import may_choose
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.plan.plan import reduced
from dapa_merge.publish import push as publishing
from dapa_merge.publish.commit import Published
from dapa_merge.publish.options import CardOptions, Destination, given_license
from dapa_merge.recipe.asking import Asking, ServedModel, sampling_of
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, pair_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.replay import replay_text
from dapa_merge.report.report import Report
from dapa_merge.search.result import Search
from dapa_merge.verify.published import check_published
from dapa_merge.verify.result import Check, check_manifest, location_option, verify_result

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dapa_merge.inspect.inspection import Inspection
    from dapa_merge.measure.evaluate import Evaluated

Place = str | os.PathLike[str]


class Settings(TypedDict, total=False):
    """Settings of the machine, for searching and measuring.

    Attributes:
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ...
        journal: The file of the search's journal; by default one in the user's cache folder.
        workers: Number of Ray actors that test candidates; by default this process does.
        pick: The number of the point to take, of those that an edit offers.
        evaluator_file: A Python file that registers evaluators; it is run.
        task_files: Task files of lm-evaluation-harness; what they name is run.
        judge_model: The judge's model, at an OpenAI-compatible endpoint.
        judge_url: Its endpoint.
        judge_requests: Maximum number of requests to it.
        allow_pickle: Read weights that exist only as pickles, accepting only tensors.
        max_memory: The most of each device that a model may take, as `cuda:0=20GiB,cpu=60GiB`.
        dtype: What models are measured in: `float32`, `bfloat16` or `float16`.
        quantize: How weights of candidates are quantized: `8bit` or `4bit`.
    """

    device: str
    journal: Place | None
    workers: int | None
    pick: int | None
    evaluator_file: Place | None
    task_files: Sequence[Place]
    judge_model: str | None
    judge_url: str | None
    judge_requests: int | None
    allow_pickle: bool
    max_memory: str | None
    dtype: str | None
    quantize: str | None


def repair(
    recipe: Recipe | Place | None = None,
    out: Place | None = None,
    *,
    target: Place | None = None,
    source: Place | None = None,
    pretrained: Place | None = None,
    keep: Place | None = None,
    prompts: Place | None = None,
    skills: Place | None = None,
    system: str | None = None,
    chat_template: Place | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    max_tests: int | None = None,
    evaluate: bool = True,
    link: bool = False,
    manifest: bool = True,
    options: Options | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Repair a model by a recipe, or by the names of target and source, and write the result with its report.

    Without a recipe, tries one edit after the other, the smallest first, and takes the first that repairs.

    ```python
    report = dapa_merge.repair("recipe.yml", "out")
    report = dapa_merge.repair(target="tuned", source="aligned", out="out", keep="mine.jsonl")
    ```

    Args:
        recipe: A recipe, or its file.
        out: The output folder, which must be absent or empty.
        target: The fine-tune: a folder, a Hub id or id@revision.
        source: The aligned model of the same family and size.
        pretrained: The model that both were fine-tuned from.
        keep: Prompts of the kind that the fine-tune is for.
        prompts: Harmful and harmless prompts; by default the packaged ones.
        skills: Questions that test what it can do.
        system: The system message that the target is used with.
        chat_template: A file with the chat template to ask with in place of the models' own; `none` for none.
        max_new_tokens: Length at which responses are cut off.
        batch_size: Prompts that are answered at once.
        max_tests: Tests after which the search for what can be left out ends.
        evaluate: Measure target, result and source. If false, the recipe must name its layers.
        link: Hard-link unchanged weight files instead of copying them.
        manifest: Write `dapa.json` into the result.
        options: The settings as one object, in place of `settings`.
        settings: Of the machine; see `Settings`.

    Raises:
        CannotRepair: If the source does not improve the target; nothing is written.
        DapaError: If anything else fails; nothing is written.
    """
    if out is None:
        raise UsageError("out is missing; name a new folder for the result")
    given = {"pretrained": pretrained, "keep": keep, "prompts": prompts, "skills": skills, "system": system}
    given["chat_template"] = chat_template
    named: dict[str, str | int] = {name: os.fspath(value) for name, value in given.items() if value is not None}
    numbers = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "max_tests": max_tests}
    named |= {name: value for name, value in numbers.items() if value is not None}
    if recipe is not None:
        if target is not None or source is not None or named:
            beside = next(iter(["target"] if target else ["source"] if source else named))
            raise UsageError(f"{beside} is for a repair without a recipe; write it into the recipe, or leave that out")
        followed = _recipe(recipe)
    elif target is None or source is None:
        raise UsageError("there is nothing to repair; name a recipe, or target and source")
    else:
        followed = pair_recipe(os.fspath(target), os.fspath(source), named)
    chosen = options or _options(**settings)
    return flow.repair(followed, Path(out), evaluate=evaluate, link=link, manifest=manifest, options=chosen)


def search(recipe: Recipe | Place, *, out: Place | None = None, **settings: Unpack[Settings]) -> Search:
    """Find the few layers that are needed; writes no model.

    ```python
    found = dapa_merge.search("recipe.yml")
    print(found.minimum.units, found.minimum.certificate)
    ```

    Args:
        recipe: A recipe, or its file.
        out: A new file for the recipe that transplants what was found; chosen directions go beside it.
        settings: Of the machine; see `Settings`.

    Raises:
        CannotRepair: If the source does not improve the target.
        DapaError: If anything else fails.
    """
    with lasting():
        from dapa_merge.search.ladder import search_ladder

    options = _options(**settings)
    followed = _recipe(recipe)
    with nullcontext() if out is None else new_file(Path(out)) as write:
        if out is not None and may_choose(followed.edit) and (beside := Path(out).with_name(FILE_NAME)).exists():
            raise UsageError(f"{beside} exists, and would hold what is chosen; name a file in another folder")
        climbed = search_ladder(make_ladder(followed, allow_pickle=options.allow_pickle), options)
        found = climbed.search
        if out is not None and write is not None:
            for name, content in reduced(found.plan, found.minimum.units).edit.files().items():
                replace_file(Path(out).with_name(name), content)
            write(replay_text(climbed.recipe, found.plan, found.minimum.units))
    return found


def evaluate(
    *models: Place,
    prompts: Place = "builtin",
    evaluator: str = "refusal",
    text: Place | None = None,
    skills: Place | None = None,
    attacks: Place | None = None,
    system: str | None = None,
    chat_template: Place | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    served: str | None = None,
    served_models: Sequence[str] = (),
    concurrency: int = 8,
    **settings: Unpack[Settings],
) -> Evaluated:
    """Measure the safety and skill of any models, one after the other on the same prompts.

    ```python
    found = dapa_merge.evaluate("out", limit=8)
    print(found.models["out"].figures.dsr)
    ```

    Args:
        models: Folders, Hub ids or id@revision; each is compared with the first.
        prompts: A packaged set, a file, a folder or a Hub dataset, or several with commas.
        evaluator: What else scores the models, as in a recipe.
        text: What perplexity is taken of.
        skills: Questions that test what the models can do.
        attacks: Attacks under which refusals are also counted.
        system: A system message before every prompt and question.
        chat_template: The file of a chat template in place of the model's own, or `none`.
        temperature: Temperature of sampled responses; by default the likeliest token is taken.
        top_p: Probability of the likeliest tokens that are sampled from, in (0, 1].
        seed: What the samples depend on.
        limit: Maximum number of prompts of each kind, and of questions of each skill.
        max_new_tokens: Length at which responses are cut off.
        batch_size: Prompts that are answered at once.
        served: An OpenAI-compatible endpoint, such as http://localhost:8000/v1.
        served_models: The names there of models to measure too, after the others.
        concurrency: Most requests to it under way at once.
        settings: Of the machine; see `Settings`.

    Raises:
        DapaError: If a model cannot be read, loaded, reached or run.
    """
    if (served is None) == bool(served_models):
        raise UsageError("served and served_models go together: the endpoint's address, and the models' names there")
    if not (models or served_models):
        raise UsageError("no model: name a folder or a Hub id, or a served one")
    asked = [os.fspath(model) for model in models]
    there = [ServedModel(name, served or "", concurrency) for name in served_models]
    with lasting():
        from dapa_merge.measure.evaluate import evaluate_models

    sampling = sampling_of(temperature, top_p, seed, {name: name for name in ("temperature", "top_p", "seed")})
    asking = Asking(system, None if chat_template is None else os.fspath(chat_template), sampling, limit)
    names = {"text": text, "skills": skills, "attacks": attacks}
    named: dict[str, Any] = {name: None if value is None else os.fspath(value) for name, value in names.items()}
    return evaluate_models(
        [*asked, *there],
        os.fspath(prompts),
        _options(**settings),
        asking=asking,
        evaluator=evaluator,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        **named,
    )


def inspect(target: Place, source: Place, *, pretrained: Place | None = None, allow_pickle: bool = False) -> Inspection:
    """Tell what was done to a target, and what to try.

    ```python
    found = dapa_merge.inspect("tuned", "aligned")
    print(found.damage.kind, found.command)
    ```

    Args:
        target: The fine-tune: a folder, a Hub id or id@revision.
        source: The aligned model of the same family and size.
        pretrained: The model that both were fine-tuned from, if known.
        allow_pickle: Read weights that exist only as pickles, accepting only tensors.

    Raises:
        DapaError: If a model cannot be read.
    """
    with lasting():
        from dapa_merge.inspect.inspection import inspect_pair

    places = {"target": target, "source": source, "pretrained": pretrained}
    one, other, base = (_location(place, name) for name, place in places.items())
    assert one is not None
    assert other is not None
    return inspect_pair(one, other, base, allow_pickle=allow_pickle)


def verify(
    out: Place,
    *,
    recipe: Place | None = None,
    target: Place | None = None,
    source: Place | None = None,
    files_only: bool = False,
    write_manifest: bool = False,
    allow_pickle: bool = False,
) -> Check:
    """Check a result against its target, its source and its manifest.

    ```python
    check = dapa_merge.verify("out")
    print(check.is_correct, check.faults)
    ```

    Args:
        out: The result: a folder, a Hub id or id@revision.
        recipe: The recipe that it was made by; by default the one in it.
        target: Where the target is, if elsewhere than the recipe says.
        source: Where the source is, likewise.
        files_only: Compare its files with its `dapa.json` only; needs no other model.
        write_manifest: Write its `dapa.json` if it is correct and has none.
        allow_pickle: Read weights that exist only as pickles, accepting only tensors.

    Raises:
        DapaError: If the result, its recipe, the target or the source cannot be read.
    """
    name = os.fspath(out)
    if files_only and (recipe or target or source or write_manifest):
        raise UsageError("--files-only reads no recipe and no other model; leave out the other options")
    if write_manifest and is_published(name):
        raise UsageError(f"{name} is on the Hub, where --write-manifest cannot write; download it, and name the folder")

    def check(folder: Path) -> Check:
        if files_only:
            return check_manifest(folder, name)
        return verify_result(
            folder,
            None if recipe is None else Path(recipe),
            target=_location(target, "--target"),
            source=_location(source, "--source"),
            write=write_manifest,
            allow_pickle=allow_pickle,
            name=name,
        )

    return check_published(name, check) if is_published(name) else check(Path(out))


def push(
    out: Place,
    repository: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    replace: bool = False,
    message: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    target: Place | None = None,
    source: Place | None = None,
) -> Published:
    """Verify a result, write its card, and publish it in one commit or one pull request.

    ```python
    published = dapa_merge.push("out", "you/your-model", license="apache-2.0")
    print(published.url)
    ```

    Args:
        out: The result's folder.
        repository: Its id on the Hub.
        private: Create the repository as private; refuse a public one.
        create_pr: Open a pull request rather than commit.
        revision: The branch; None for the default one.
        tag: A tag for the commit.
        replace: Replace a model that dapa-merge did not publish.
        message: The commit message, or the title of the pull request.
        license: The license of the result; by default the one of all its models.
        license_name: Its name, for `other`.
        license_link: The address of its text.
        target: Where the target is published, if the recipe names a folder.
        source: Where the source is published, likewise.

    Raises:
        UsageError: If it is not a result, or its license has to be stated.
        CheckpointError: If it is wrong; nothing is published.
        HubError: If the Hub refuses, or does not answer.
    """
    card = CardOptions(
        license=given_license(license, license_name, license_link),
        target=_location(target, "--target"),
        source=_location(source, "--source"),
    )
    place = Destination(repository, private, revision, create_pr, tag, replace, message)
    return publishing.push(Path(out), place, card)


def _recipe(recipe: Recipe | Place) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _location(place: Place | None, name: str) -> Location | None:
    return None if place is None else location_option(os.fspath(place), name)


def _options(
    journal: Place | None = None,
    workers: int | None = None,
    evaluator_file: Place | None = None,
    task_files: Sequence[Place] = (),
    **others: Any,
) -> Options:
    return Options(
        journal=None if journal is None else Path(journal),
        uses_ray=workers is not None,
        num_workers=workers,
        evaluator_file=None if evaluator_file is None else Path(evaluator_file),
        task_files=tuple(map(Path, task_files)),
        **others,
    )
