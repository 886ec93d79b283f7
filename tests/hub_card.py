"""What the Hub says of a card's metadata, as far as its documentation and its answers tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import yaml

LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma unknown other
"""
TASKS = """
any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition biology
depth-estimation document-question-answering feature-extraction fill-mask graph-ml image-classification
image-feature-extraction image-segmentation image-text-to-image image-text-to-text image-text-to-video
image-to-3d image-to-image image-to-text image-to-video keypoint-detection mask-generation multiple-choice
object-detection other question-answering reinforcement-learning robotics sentence-similarity summarization
table-question-answering table-to-text tabular-classification tabular-regression tabular-to-text
text-classification text-generation text-ranking text-retrieval text-to-3d text-to-audio text-to-image
text-to-speech text-to-video text2text-generation time-series-forecasting token-classification translation
unconditional-image-generation video-classification video-text-to-text video-to-video
visual-document-retrieval visual-question-answering voice-activity-detection zero-shot-classification
zero-shot-image-classification zero-shot-object-detection
"""
RELATIONS = ("adapter", "merge", "quantized", "finetune")
NO_METADATA = "empty or missing yaml metadata in repo card"


class Loader(yaml.SafeLoader):
    """YAML in which no key may come twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.YAMLError(f"duplicated mapping key {key!r}")
        return super().construct_mapping(node, deep)


def front_matter(content: str) -> str | None:
    """The text between the first line, `---`, and the next like it."""
    lines = content.lstrip().splitlines()
    if lines and lines[0] == "---":
        for place, line in enumerate(lines[1:], 1):
            if line.rstrip() == "---":
                return "\n".join(lines[1:place])
    return None


def metadata(content: str) -> dict:
    """The metadata of a card, none if they are not valid YAML."""
    try:
        found = yaml.load(front_matter(content) or "", Loader)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def check_card(content: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """What is wrong with a card's metadata, and what else the Hub says of them."""
    text = front_matter(content)
    if not (text or "").strip():
        return [], [NO_METADATA]
    try:
        found = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        return [f"Invalid YAML in README.md: {error}"], []
    if not isinstance(found, dict):
        return ["The YAML metadata must be a mapping"], []
    errors = [*check_license(found), *check_languages(found), *check_lists(found)]
    if kind == "model":
        errors += [*check_base(found), *check_index(found)]
    return errors, list(warn(found))


def listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


def check_license(card: dict) -> Iterator[str]:
    licenses = listed(card.get("license", []))
    for license in licenses:
        if license not in LICENSES.split():
            yield f'"license" must be one of [{", ".join(LICENSES.split())}]: {license!r}'
    for key in ("license_name", "license_link"):
        if key in card and not is_text(card[key]):
            yield f'"{key}" must be a string'
    if "other" in licenses and "license_name" not in card:
        yield '"license_name" is required where "license" is "other"'


def check_languages(card: dict) -> Iterator[str]:
    for language in listed(card.get("language", [])):
        if not (is_text(language) and (re.fullmatch("[a-z]{2,3}", language) or language in ("code", "multilingual"))):
            yield f'"language" must be of ISO 639 codes of two or three letters, "code" or "multilingual": {language!r}'


def check_lists(card: dict) -> Iterator[str]:
    for key in ("tags", "datasets", "metrics"):
        values = card.get(key, [])
        if not isinstance(values, list):
            yield f'"{key}" must be an array'
            continue
        for place, value in enumerate(values):
            if not is_text(value):
                yield f'"{key}[{place}]" must be a string'
            elif key == "datasets" and not is_id(value):
                yield f'"{key}[{place}]" with value "{value}" is not valid. Use a dataset id'
    for key in ("library_name", "pipeline_tag"):
        if key in card and not is_text(card[key]):
            yield f'"{key}" must be a string'


def check_base(card: dict) -> Iterator[str]:
    for base in listed(card.get("base_model", [])):
        if not is_id(base):
            yield f'"base_model" with value "{base}" is not valid. Use a model id'
    if card.get("base_model_relation", "merge") not in RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'


def warn(card: dict) -> Iterator[str]:
    tag = card.get("pipeline_tag")
    if is_text(tag) and tag not in TASKS.split():
        yield f'The pipeline tag "{tag}" is not in the official list'
    if "other" not in listed(card.get("license", [])) and {"license_name", "license_link"} & set(card):
        yield '"license_name" and "license_link" are for "license: other"'


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_id(value: object) -> bool:
    """Whether this may be the name of a repository."""
    if not isinstance(value, str) or "--" in value or ".." in value:
        return False
    return all(re.fullmatch(r"\w(?:[\w.-]{0,94}\w)?", part, re.ASCII) for part in value.split("/")) and (
        value.count("/") < 2
    )


def check_index(card: dict) -> Iterator[str]:
    """What is wrong with the results of evaluations."""
    if "model-index" not in card:
        return
    for place, model in items(card, "model-index", ""):
        if isinstance(model, str):
            yield model
            continue
        yield from need(model, place, "name", is_text, "a string")
        for place_of_result, result in items(model, "results", f"{place}."):
            yield from [result] if isinstance(result, str) else check_result(result, place_of_result)


def check_result(result: dict, place: str) -> Iterator[str]:
    for key, required in (("task", ["type"]), ("dataset", ["type", "name"])):
        if not isinstance(result.get(key), dict):
            yield f'"{place}.{key}" {"must be an object" if key in result else "is required"}'
            continue
        for field in required:
            yield from need(result[key], f"{place}.{key}", field, is_text, "a string")
        for field in {"name", "config", "split", "revision"} & set(result[key]) - set(required):
            yield from need(result[key], f"{place}.{key}", field, is_text, "a string")
    for place_of_metric, metric in items(result, "metrics", f"{place}."):
        if isinstance(metric, str):
            yield metric
            continue
        yield from need(metric, place_of_metric, "type", is_text, "a string")
        yield from need(metric, place_of_metric, "value", lambda value: value is not None, "a value")
        for field in {"name", "config"} & set(metric):
            yield from need(metric, place_of_metric, field, is_text, "a string")
    if "source" in result:
        source = result["source"] if isinstance(result["source"], dict) else {}
        yield from need(source, f"{place}.source", "url", lambda url: str(url).startswith("http"), "a valid uri")


def items(parent: dict, key: str, place: str) -> Iterator[tuple[str, dict | str]]:
    """The places and mappings of a list; in place of what is no mapping, what is wrong with it."""
    if not isinstance(parent.get(key), list):
        yield place, f'"{place}{key}" {"must be an array" if key in parent else "is required"}'
        return
    for number, item in enumerate(parent[key]):
        where = f"{place}{key}[{number}]"
        yield where, item if isinstance(item, dict) else f'"{where}" must be an object'


def need(parent: dict, place: str, key: str, holds: Callable[[object], bool], what: str) -> Iterator[str]:
    if key not in parent:
        yield f'"{place}.{key}" is required'
    elif not holds(parent[key]):
        yield f'"{place}.{key}" must be {what}'
