"""What license a result inherits."""

import pytest

from dapa_merge.errors import UsageError
from dapa_merge.publish.options import LICENSES, License, given_license, inherited, license_in, unknown_licenses

APACHE = License("apache-2.0")
PLACE = "https://huggingface.co/a/b/blob/main"

STATED = {
    "none": ({}, None),
    "unknown": ({"license": "unknown"}, None),
    "empty": ({"license": ""}, None),
    "a number": ({"license": 2}, None),
    "simple": ({"license": "apache-2.0"}, APACHE),
    "in a list": ({"license": ["apache-2.0"]}, APACHE),
    "two": ({"license": ["apache-2.0", "mit"]}, None),
    "other": (
        {"license": "other", "license_name": "mine", "license_link": "https://x/y"},
        License("other", "mine", "https://x/y"),
    ),
    "a file": (
        {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        License("other", "mine", f"{PLACE}/LICENSE"),
    ),
    "a file here": ({"license": "llama2", "license_link": "./L.txt"}, License("llama2", None, f"{PLACE}/L.txt")),
}  # fmt: skip


@pytest.mark.parametrize("what", STATED)
def test_what_a_card_states(what):
    metadata, license = STATED[what]
    assert license_in(metadata, PLACE) == license


def test_a_link_to_a_file_of_a_folder_is_none():
    assert license_in({"license": "llama2", "license_link": "LICENSE"}, "") == License("llama2")


def test_one_license_is_inherited_with_its_link():
    target = License("llama2", None, "https://a")
    assert inherited([("t", target), ("s", License("LLAMA2", "Llama 2", "https://b"))]) == target
    mine = License("other", "Mine", "https://a")
    assert inherited([("t", mine), ("s", License("other", "mine"))]) == mine


def test_where_a_model_states_none_nothing_is_claimed():
    assert inherited([("t", APACHE), ("s", None)]) is None
    assert inherited([("t", None), ("s", None)]) is None


@pytest.mark.parametrize("other", [License("mit"), License("other", "mine")])
def test_a_conflict_names_both(other):
    with pytest.raises(UsageError) as caught:
        inherited([("a/target", APACHE), ("an/adapter", None), ("b/source", other)])
    for part in ("a/target", "apache-2.0", "b/source", str(other), "--license"):
        assert part in str(caught.value)
    with pytest.raises(UsageError):
        inherited([("a", License("other", "one")), ("b", License("other", "two"))])


def test_what_the_command_line_states():
    assert given_license(None, None, None) is None
    assert given_license("mit", None, None) == License("mit")
    assert given_license("other", "mine", "https://x").to_metadata() == {
        "license": "other",
        "license_name": "mine",
        "license_link": "https://x",
    }
    for wrong in (
        ("apache2", None, None),
        ("unknown", None, None),
        (None, "mine", None),
        (None, None, "https://x"),
        ("other", None, "https://x"),
    ):
        with pytest.raises(UsageError):
            given_license(*wrong)


MISSPELT = {
    "apache2": "apache-2.0", "Apache-2.0": "apache-2.0", "MIT": "mit", "llama-3.1": "llama3.1", "cc-by-nc": "cc-by-nc-",
    "gpl-3": "gpl-3.0", "gemma2": "gemma",
}  # fmt: skip


@pytest.mark.parametrize("given", MISSPELT)
def test_a_licence_that_the_hub_does_not_know_is_refused_with_the_nearest(given):
    with pytest.raises(UsageError) as caught:
        given_license(given, None, None)
    assert f"--license is {given!r}, which the Hub does not know (did you mean '{MISSPELT[given]}" in str(caught.value)


def test_every_licence_that_the_hub_knows_is_taken():
    for key in LICENSES - {"other"}:
        assert given_license(key, None, None) == License(key)


def test_a_models_own_licence_that_the_hub_does_not_know_is_a_warning():
    found = list(unknown_licenses([("a/target", License("apache2")), ("a/source", License("mit")), ("b", None)]))
    assert len(found) == 1
    for part in ("a/target", "'apache2'", "'apache-2.0'", "--license"):
        assert part in found[0]
