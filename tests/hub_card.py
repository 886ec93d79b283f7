"""The rules of the Hub for a card's metadata, as far as its documentation and its answers tell."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import yaml
from huggingface_hub.utils import validate_repo_id
from pydantic import AfterValidator, AnyHttpUrl, BaseModel, Field, StrictStr, ValidationError, model_validator

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


def one_of_the_licenses(name: str) -> str:
    if name not in LICENSES.split():
        raise ValueError(f"must be one of {LICENSES.split()}")
    return name


def a_language(name: str) -> str:
    if not re.fullmatch("[a-z]{2,3}|code|multilingual", name):
        raise ValueError('must be an ISO 639 code of two or three letters, "code" or "multilingual"')
    return name


def an_id(name: str) -> str:
    validate_repo_id(name)
    return name


def a_text(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Text = Annotated[StrictStr, AfterValidator(a_text)]
Id = Annotated[StrictStr, AfterValidator(an_id)]
License = Annotated[StrictStr, AfterValidator(one_of_the_licenses)]
Language = Annotated[StrictStr, AfterValidator(a_language)]
T = TypeVar("T")
OneOrMore = T | list[T]


class Metric(BaseModel):
    type: Text
    value: StrictStr | float | dict | list
    name: Text = ""
    config: Text = ""


class Task(BaseModel):
    type: Text
    name: Text = ""


class Dataset(BaseModel):
    type: Text
    name: Text
    config: Text = ""
    split: Text = ""
    revision: Text = ""


class Source(BaseModel):
    url: AnyHttpUrl
    name: Text = ""


class Result(BaseModel):
    task: Task
    dataset: Dataset
    metrics: list[Metric]
    source: Source | None = None


class Model(BaseModel):
    name: Text
    results: list[Result]


class Card(BaseModel):
    """The keys of which the Hub has something to say; others may be there."""

    license: OneOrMore[License] = []
    license_name: Text = ""
    license_link: Text = ""
    language: OneOrMore[Language] = []
    tags: list[Text] = []
    datasets: list[Id] = []
    metrics: list[Text] = []
    library_name: Text = ""
    pipeline_tag: Text = ""
    base_model: OneOrMore[Id] = []
    base_model_relation: Literal["adapter", "merge", "quantized", "finetune"] = "merge"
    model_index: list[Model] = Field([], alias="model-index")

    @model_validator(mode="after")
    def has_a_license_name(self) -> Card:
        if self.license in ("other", ["other"]) and not self.license_name:
            raise ValueError('"license_name" is required where "license" is "other"')
        return self


class Loader(yaml.SafeLoader):
    """YAML in which no key may come twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.YAMLError(f"duplicated mapping key {key!r}")
        return super().construct_mapping(node, deep)


def metadata(content: str) -> dict:
    """The mapping between the first line, `---`, and the next like it."""
    found = re.match(r"---\n(.*?)^---\s*$", content.lstrip(), re.DOTALL | re.MULTILINE)
    return (yaml.load(found[1], Loader) or {}) if found else {}


def check_card(content: str) -> list[str]:
    """The faults of a card's metadata."""
    try:
        Card.model_validate(metadata(content))
    except yaml.YAMLError as error:
        return [f"Invalid YAML in README.md: {error}"]
    except ValidationError as error:
        return [f'"{".".join(map(str, one["loc"]))}": {one["msg"]}' for one in error.errors()]
    return []
