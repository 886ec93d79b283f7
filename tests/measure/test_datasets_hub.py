"""Datasets of the Hub, against a real HTTP server on this machine and in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
from hub_server import SHA, hub

from dapa_merge.errors import UsageError
from dapa_merge.measure.prompts.datasets import DatasetName, load_rows, parse_dataset
from dapa_merge.measure.prompts.sets import load_prompts

# One line of JSON for each name on the command line: what was loaded, or the fault.
CODE = """
import json, sys
from dapa_merge.errors import DapaError
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.measure.prompts.sets import pinned_prompts
for name in sys.argv[1:]:
    try:
        found = load_prompts(name)
    except DapaError as error:
        print(json.dumps({"code": error.exit_code, "error": str(error)}))
        continue
    parts = {"harmful": found.harmful, "harmless": found.harmless, "pinned": pinned_prompts(name)}
    print(json.dumps({**parts, "categories": [[*key, value] for key, value in found.categories.items()]}))
assert "torch" not in sys.modules
"""


def load(endpoint, home, *names, **variables):
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    hub_variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    # A server that says nothing is given up soon.
    hub_variables |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CODE, *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**environment, **hub_variables, **variables},
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


CARD = """---
configs:
- config_name: behaviors
  data_files:
  - split: harmful
    path: data/harmful.csv
  - split: benign
    path: data/benign.csv
- config_name: other
  data_files:
  - split: test
    path: data/other.csv
---
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    behaviors = root / "behaviors"
    (behaviors / "data").mkdir(parents=True)
    (behaviors / "README.md").write_text(CARD)
    (behaviors / "data" / "harmful.csv").write_text("Index,Goal,Category\n0,steal a car,theft\n1,lie,lies\n")
    (behaviors / "data" / "benign.csv").write_text("Index,Goal,Category\n0,buy a car,theft\n")
    (behaviors / "data" / "other.csv").write_text("ask\nhack\n")
    labelled = root / "labelled"
    (labelled / "data").mkdir(parents=True)
    label = datasets.ClassLabel(names=["safe", "unsafe"])
    features = datasets.Features({"prompt": datasets.Value("string"), "type": datasets.Value("string"), "label": label})
    rows = {"prompt": ["kill a process", "kill a man"], "type": ["homonyms", "contrast_homonyms"], "label": [0, 1]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features).to_parquet(str(labelled / "data" / "train-00000-of-00001.parquet"))
    datasets.enable_progress_bars()
    names = ("JailbreakBench/JBB-Behaviors", "someone/behaviors", "someone/gated", "someone/closed", "someone/broken")
    return {
        **{f"datasets/{name}": behaviors for name in names},
        "datasets/Paul/XSTest": labelled,
        "datasets/someone/labelled": labelled,
    }


STATUSES = {
    "files of datasets/someone/gated": 401,
    "files of datasets/someone/closed": 403,
    "files of datasets/someone/broken": 410,
    "datasets/someone/failing": 500,
}


@pytest.fixture(scope="module")
def served(repositories):
    with hub(repositories, STATUSES) as (endpoint, log):
        yield endpoint, log


def test_datasets_are_read_by_id_and_short_name_then_from_the_cache_at_their_commit(served, tmp_path):
    endpoint, log = served
    names = (
        "jailbreakbench",
        "xstest",
        "someone/behaviors@v1?config=behaviors",
        "someone/behaviors?config=other&column=ask",
        "jailbreakbench, xstest, someone/labelled?kind=harmless",
        "someone/behaviors?config=behaviors&harmless=harmful",
        "someone/behaviors?config=behaviors&split=harmful[:1]",
    )
    jbb, xstest, tagged, other, joined, harmless, first = load(endpoint, tmp_path, *names)
    assert (jbb["harmful"], jbb["harmless"]) == (["steal a car", "lie"], ["buy a car"])
    assert ["harmless", "buy a car", "theft"] in jbb["categories"]
    assert jbb["pinned"] == (f"JailbreakBench/JBB-Behaviors@{SHA}?config=behaviors&split=harmful&harmless=benign")
    assert (xstest["harmful"], xstest["harmless"]) == (["kill a man"], ["kill a process"])
    assert ["harmful", "kill a man", "contrast_homonyms"] in xstest["categories"]
    assert tagged["pinned"] == f"someone/behaviors@{SHA}?config=behaviors"
    assert (tagged["harmful"], tagged["harmless"]) == (jbb["harmful"], jbb["harmless"])
    assert other["harmful"] == ["hack"]
    assert len(other["harmless"]) == 120
    assert joined["harmful"] == ["steal a car", "lie", "kill a man"]
    assert joined["harmless"] == ["buy a car", "kill a process", "kill a man"]
    assert (len(harmless["harmful"]), harmless["harmless"]) == (120, ["steal a car", "lie"])
    assert first["harmful"] == ["steal a car"]
    # A process asks about a dataset once.
    assert log.count("GET /api/datasets/Paul/XSTest") == 1
    log.clear()

    again, missing, tag = load(
        endpoint, tmp_path, jbb["pinned"], xstest["pinned"].replace("XSTest", "Other"), names[2], HF_HUB_OFFLINE="1"
    )
    assert not log
    assert (again["harmful"], again["pinned"]) == (jbb["harmful"], jbb["pinned"])
    assert missing["code"] == 5
    for part in ("the dataset Paul/Other", "HF_HUB_OFFLINE is set", "not in the cache"):
        assert part in missing["error"]
    assert "the dataset someone/behaviors@v1" in tag["error"]
    assert "a cached copy" in tag["error"]


CASES = {
    "someone/gated": (5, "the dataset someone/gated: it is gated; accept its terms at http://127.0.0.1:"),
    "someone/closed": (5, "the dataset someone/closed: it is gated; accept its terms at http://127.0.0.1:"),
    "someone/nothing": (5, "the dataset someone/nothing: there is no such repository, or the token may not see it"),
    "someone/failing": (5, "the dataset someone/failing: the Hub is not available now (it answers 500"),
    "someone/broken": (5, "cannot get the files of the dataset someone/broken: "),
    "someone/behaviors@v9": (5, "the dataset someone/behaviors@v9: there is no such revision"),
    "someone/behaviors": (
        2,
        "the dataset someone/behaviors has the configs behaviors, other: choose one, as in ?config=",
    ),
    "someone/behaviors?config=othr": (2, "has no config 'othr' (did you mean 'other'?); it has behaviors, other"),
    "jailbreakbench?split=harmfull": (
        2,
        "has no split 'harmfull' (did you mean 'harmful'?); it has harmful, benign",
    ),
    "jailbreakbench?column=goals": (
        2,
        "split harmful has no column 'goals' (did you mean 'Goal'?); its columns are Index",
    ),
    "jailbreakbench?splt=harmful": (
        2,
        "key 'splt' (did you mean 'split'?); the keys here are config, split",
    ),
    "jailbreakbench?kind=harmful": (2, "leave out harmless=benign"),
}


def test_a_hub_that_says_no_is_one_sentence_and_its_exit_code(served, tmp_path):
    endpoint, _ = served
    for case, found in zip(CASES, load(endpoint, tmp_path, *CASES), strict=True):
        code, message = CASES[case]
        assert found["code"] == code, (case, found)
        assert message in found["error"], (case, found)
        assert "\n" not in found["error"]


def test_a_hub_that_is_out_of_reach_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            endpoints = [f"http://127.0.0.1:{server.getsockname()[1]}" for server in (silent, closed)]
        (of_silent,), (of_closed,) = pool.map(lambda endpoint: load(endpoint, tmp_path, "xstest"), endpoints)
    assert of_silent["code"] == of_closed["code"] == 5
    assert "the dataset Paul/XSTest: the Hub is out of reach (" in of_silent["error"]
    assert of_closed["error"].endswith("it is not in the cache either; name a local file")


# pandas 2, the last for Python 3.10, leaves a file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_local_folder_of_data_is_a_dataset(repositories, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = repositories["datasets/someone/behaviors"]
    prompts = load_prompts(f"{folder}?config=behaviors")
    assert (prompts.harmful, prompts.harmless) == (("steal a car", "lie"), ("buy a car",))
    rows = load_rows(parse_dataset(f"{folder}?config=other"))
    assert (rows.rows, rows.columns, rows.split, rows.commit) == (({"ask": "hack"},), ("ask",), "test", None)
    with pytest.raises(UsageError, match=r"has the splits harmful, benign: choose one, as in \?split=harmful"):
        load_rows(parse_dataset(f"{folder}?config=behaviors"))
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    assert load_prompts(str(tmp_path / "saved")).harmful == ("a",)


def test_names_of_datasets_are_parsed():
    assert parse_dataset("a/b") == DatasetName("a/b")
    assert parse_dataset("a/b.c@refs/pr/1?config=d&split=train%5B:5%5D&column=e%26f", ("column",)) == DatasetName(
        "a/b.c", "refs/pr/1", "d", "train[:5]", (("column", "e&f"),)
    )
    for name in ("b", "a/b/c", "a/b@", "/a/b", "../b"):
        with pytest.raises(UsageError, match="and it is not the id of a dataset on the Hub"):
            parse_dataset(name)
