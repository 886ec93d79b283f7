"""A source on the Hub of which only some bytes are fetched: real HTTP, real processes, and what goes wrong."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import warm
from conftest import answer, asking_hub, change_tensor, save_random, tiny_llama
from hub_server import SHA, Faults, command_line, dapa_merge, environment, hub

from dapa_merge import miniature
from dapa_merge.checkpoint import fetch as ranges
from dapa_merge.checkpoint.fetch import mirror_folder
from dapa_merge.checkpoint.open import open_checkpoint, read_bytes
from dapa_merge.checkpoint.region import Region
from dapa_merge.errors import HubError
from dapa_merge.measure.live import choose_device, load_model, mapped_values
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.parse import load_recipe

LAYERS = "0,2"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A target and a source of four layers with gates of 1 MiB, in shards of 2 MB and of 3."""
    folder = tmp_path_factory.mktemp("megabytes")
    config = tiny_llama(hidden_size=256, intermediate_size=2048)
    return (
        save_random(folder / "target", config, seed=1, max_shard_size="2MB"),
        save_random(folder / "source", config, seed=2, max_shard_size="3MB"),
    )


@pytest.fixture
def recipe(models, write_recipe) -> Path:
    return write_recipe(models[0], "someone/source", layers=f'"{LAYERS}"')


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory) -> dict[str, bytes]:
    """What a source in a folder gives."""
    folder = tmp_path_factory.mktemp("expected")
    recipe = folder / "recipe.yml"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {models[0]}\nmodels: [{{model: {models[1]}}}]\n"
        f'parameters: {{layers: "{LAYERS}"}}\n'
    )
    answer("run", recipe, folder / "out", "--no-evaluate", "--json")
    return weights(folder / "out")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def num_header_bytes(folder: Path) -> int:
    return sum(8 + int.from_bytes(content[:8], "little") for content in weights(folder).values())


def num_confirmed_bytes(folder: Path, layers: str) -> int:
    """Bytes that something is written or proved by: all headers, the gates of some layers, and these again with the
    headers of their files."""
    tensors = open_checkpoint(str(folder)).tensors
    files = {tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].file for layer in layers.split(",")}
    again = sum(8 + int.from_bytes(weights(folder)[file][:8], "little") for file in files)
    return num_header_bytes(folder) + 2 * num_gate_bytes(folder, layers) + again


def num_gate_bytes(folder: Path, layers: str) -> int:
    tensors = open_checkpoint(str(folder)).tensors
    return sum(tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].num_bytes for layer in layers.split(","))


def test_headers_and_selected_gates_are_all_that_is_fetched_of_a_source_and_are_fetched_twice(
    models, recipe, expected, tmp_path
):
    with hub({"someone/source": models[1]}) as (endpoint, log):
        result = dapa_merge(endpoint, tmp_path / "home", "run", recipe, tmp_path / "out", "--no-evaluate")
    assert result.returncode == 0, result.stderr
    assert weights(tmp_path / "out") == expected
    assert log.num_weight_bytes() == num_confirmed_bytes(models[1], LAYERS)
    assert "fetching 2.1 MB of someone/source" in result.stderr


def test_a_plan_needs_headers_only_of_either_model(models, write_recipe, tmp_path, call_at_hub):
    recipe = write_recipe("someone/target", "someone/source")
    with hub({"someone/target": models[0], "someone/source": models[1]}) as (endpoint, log):
        result = call_at_hub(endpoint, tmp_path / "home", "plan", recipe, "--json")
    assert result.exit_code == 0, result.stderr
    assert log.num_weight_bytes() == num_header_bytes(models[0]) + num_header_bytes(models[1])
    # What differs is then unknown, and said to be.
    found = json.loads(result.stdout)
    assert (found["differing_units"], found["differing_parameters"]) == (None, None)


def test_verifying_a_result_needs_the_gates_that_its_recipe_names(models, recipe, tmp_path, monkeypatch, call_at_hub):
    with hub({"someone/source": models[1]}) as (endpoint, log):
        ran = call_at_hub(endpoint, tmp_path / "home", "run", recipe, tmp_path / "out", "--no-evaluate")
        assert ran.exit_code == 0, ran.stderr
        log.served.clear()
        # On another machine.
        with monkeypatch.context() as other:
            other.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
            result = call_at_hub(endpoint, tmp_path / "other", "verify", tmp_path / "out")
        assert result.exit_code == 0, result.stdout + result.stderr
        assert log.num_weight_bytes() == num_confirmed_bytes(models[1], LAYERS)
        # A gate of the source that the recipe does not name.
        change_tensor(tmp_path / "out", "model.layers.1.mlp.gate_proj.weight", lambda tensor: tensor.fill_(1))
        result = call_at_hub(endpoint, tmp_path / "home", "verify", tmp_path / "out")
    assert result.exit_code == 4
    assert "model.layers.1.mlp.gate_proj.weight differs from the target" in result.stdout


@pytest.mark.parametrize("drop_every", [100_000, 700_000])
def test_broken_connections_and_busy_servers_only_cost_time(
    models, recipe, expected, tmp_path, monkeypatch, drop_every, call_at_hub
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    faults = Faults(drop_every=drop_every, refusals=[429, 500, 503, 429], has_cdn=True)
    with hub({"someone/source": models[1]}, faults=faults) as (endpoint, log):
        result = call_at_hub(endpoint, tmp_path / "home", "run", recipe, tmp_path / "out", "--no-evaluate")
    assert result.exit_code == 0, result.stderr
    assert not faults.refusals
    assert weights(tmp_path / "out") == expected
    # What came before a connection broke is not fetched again.
    assert log.num_weight_bytes() == num_confirmed_bytes(models[1], LAYERS)
    assert [line for line in log if "/cdn/" in line]
    assert log.authorized
    assert not [line for line in log.authorized if "/cdn/" in line]


def test_a_killed_download_goes_on_where_it_was(models, recipe, expected, tmp_path, call_at_hub):
    total = num_header_bytes(models[1]) + num_gate_bytes(models[1], LAYERS)
    arguments = ("run", recipe, tmp_path / "out", "--no-evaluate")
    faults = Faults(drop_every=200_000, stall_after=total - 300_000)
    with hub({"someone/source": models[1]}, faults=faults) as (endpoint, _):
        process = warm.Process(command_line(*arguments), env=environment(endpoint, tmp_path / "home"))
        assert faults.stalled.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    with hub({"someone/source": models[1]}) as (endpoint, log):
        result = call_at_hub(endpoint, tmp_path / "home", *arguments)
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "out") == expected
    # No header comes again but to be compared.
    assert log.num_weight_bytes() <= num_confirmed_bytes(models[1], LAYERS) - num_header_bytes(models[1])


def test_a_server_without_ranges_gives_the_whole_model(models, recipe, expected, tmp_path, call_at_hub):
    with hub({"someone/source": models[1]}, faults=Faults(ignores_ranges=True)) as (endpoint, _):
        result = call_at_hub(endpoint, tmp_path / "home", "run", recipe, tmp_path / "out", "--no-evaluate")
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "out") == expected


def test_a_model_that_is_in_the_cache_is_not_fetched_again_and_needs_no_connection(
    models, recipe, expected, tmp_path, monkeypatch, call_at_hub
):
    home = tmp_path / "home"
    with hub({"someone/source": models[1]}) as (endpoint, log):
        with asking_hub(monkeypatch, endpoint, home):
            huggingface_hub.snapshot_download("someone/source")
        log.served.clear()
        result = call_at_hub(endpoint, home, "run", recipe, tmp_path / "out", "--no-evaluate")
        assert result.exit_code == 0, result.stderr
        assert log.num_weight_bytes() == 0
    result = dapa_merge(endpoint, home, "run", recipe, tmp_path / "off", "--no-evaluate", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "off") == expected


def test_bytes_that_were_fetched_once_need_no_connection_and_others_say_so(
    models, recipe, expected, tmp_path, call_at_hub
):
    home = tmp_path / "home"
    with hub({"someone/source": models[1]}) as (endpoint, _):
        assert call_at_hub(endpoint, home, "run", recipe, tmp_path / "out", "--no-evaluate").exit_code == 0
    result = call_at_hub(endpoint, home, "run", recipe, tmp_path / "off", "--no-evaluate", offline=True)
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "off") == expected
    recipe.write_text(recipe.read_text().replace(LAYERS, "1"))
    result = call_at_hub(endpoint, home, "run", recipe, tmp_path / "other", "--no-evaluate", offline=True)
    assert result.exit_code == 5
    assert "HF_HUB_OFFLINE is set" in result.stderr
    assert not (tmp_path / "other").exists()


SPOILS = ["a flipped bit", "other bytes", "half of it", "a page", "a flipped header"]


@pytest.mark.parametrize(("spoil", "turn"), [*((spoil, 0) for spoil in SPOILS), ("a flipped bit", 1)])
def test_a_bad_answer_is_neither_written_nor_kept(models, recipe, expected, tmp_path, call_at_hub, spoil, turn):
    """The first answer with a gate, or the second one that it is compared with."""
    faults = Faults(spoils=[*["none"] * 2 * turn, spoil])
    home, out = tmp_path / "home", tmp_path / "out"
    with hub({"someone/source": models[1]}, faults=faults) as (endpoint, _):
        first = call_at_hub(endpoint, home, "run", recipe, out, "--no-evaluate")
        assert not faults.spoils
        if first.exit_code:
            assert first.exit_code == 5
            assert first.stderr.count("Error:") == 1
            assert not out.exists()
            assert call_at_hub(endpoint, home, "run", recipe, out, "--no-evaluate").exit_code == 0
        assert weights(out) == expected
        found = call_at_hub(endpoint, home, "verify", out)
    assert found.exit_code == 0, found.output


def test_weights_of_a_bad_answer_are_never_called_correct(models, recipe, tmp_path, call_at_hub, monkeypatch):
    """As an older version, which fetched once, wrote them and kept their mirror."""
    home, out = tmp_path / "home", tmp_path / "out"
    with hub({"someone/source": models[1]}, faults=Faults(spoils=["a flipped bit"])) as (endpoint, _):
        with monkeypatch.context() as patch:
            patch.setattr("dapa_merge.flow.confirm_units", lambda *_: {})
            assert call_at_hub(endpoint, home, "run", recipe, out, "--no-evaluate").exit_code == 0
        offline = call_at_hub(endpoint, home, "verify", out, offline=True)
        assert offline.exit_code == 5
        assert "correct" not in offline.stdout
        first = call_at_hub(endpoint, home, "verify", out)
        assert first.exit_code == 5
        assert "had other bytes" in first.stderr
        assert "correct" not in first.stdout
        again = call_at_hub(endpoint, home, "verify", out)
        assert again.exit_code == 4
        assert "is neither the target's nor the source's" in again.stdout


def test_a_proof_says_what_it_rests_on_and_needs_no_connection_afterwards(models, recipe, tmp_path, call_at_hub):
    home, out = tmp_path / "home", tmp_path / "out"
    with hub({"someone/source": models[1]}) as (endpoint, _):
        assert call_at_hub(endpoint, home, "run", recipe, out, "--no-evaluate").exit_code == 0
    found = call_at_hub(endpoint, home, "verify", out, "--json", offline=True)
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["rests_on"] == {
        "source": f"someone/source@{SHA} at commit {SHA}, by two fetches of the same bytes"
    }
    # What changes on this disk is not taken for what was confirmed.
    tensor = open_checkpoint(str(models[1])).tensors["model.layers.0.mlp.gate_proj.weight"]
    (mirrored,) = mirror_folder("someone/source", SHA).glob(tensor.file)
    with mirrored.open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"damage")
    found = call_at_hub("http://127.0.0.1:9", home, "verify", out, offline=True)
    assert found.exit_code in (4, 5)
    assert "correct" not in found.stdout


def test_a_cached_file_with_other_bytes_than_its_name_says_proves_nothing(models, recipe, tmp_path, call_at_hub):
    home, out = tmp_path / "home", tmp_path / "out"
    with hub({"someone/source": models[1]}, faults=Faults(ignores_ranges=True)) as (endpoint, _):
        assert call_at_hub(endpoint, home, "run", recipe, out, "--no-evaluate").exit_code == 0
        found = call_at_hub(endpoint, home, "verify", out, "--json")
        assert "by the Hub's SHA-256s" in json.loads(found.stdout)["rests_on"]["source"]
        tensor = open_checkpoint(str(models[1])).tensors["model.layers.0.mlp.gate_proj.weight"]
        (cached,) = home.rglob(f"snapshots/*/{tensor.file}")
        for path in (cached.resolve(), out / open_checkpoint(str(out)).tensors[tensor.name].file):
            place = tensor if path == cached.resolve() else open_checkpoint(str(out)).tensors[tensor.name]
            with path.open("r+b") as file:
                file.seek(place.start)
                file.write(b"damage")
        (out / "dapa.json").unlink()
        found = call_at_hub(endpoint, home, "verify", out)
        assert found.exit_code == 5
        assert f"{tensor.file} of someone/source" in found.stderr
        assert "correct" not in found.stdout
        assert call_at_hub(endpoint, home, "verify", out).exit_code == 4


def test_a_whole_file_that_arrives_with_other_bytes_is_not_kept(models, recipe, expected, tmp_path, call_at_hub):
    home, out = tmp_path / "home", tmp_path / "out"
    faults = Faults(ignores_ranges=True, spoils=["none", "none", "none", "a flipped bit"])
    with hub({"someone/source": models[1]}, faults=faults) as (endpoint, _):
        first = call_at_hub(endpoint, home, "run", recipe, out, "--no-evaluate")
        assert first.exit_code == 5, first.output
        assert "has not the SHA-256 that the Hub states" in first.stderr
        assert call_at_hub(endpoint, home, "run", recipe, out, "--no-evaluate").exit_code == 0
    assert weights(out) == expected


def use_endpoint(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def partial(models, tmp_path, monkeypatch):
    """The source, served and opened in this process; nothing but headers is here of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(ranges.time, "sleep", lambda _: None)
    served = shutil.copytree(models[1], tmp_path / "served")
    faults = Faults()
    with hub({"someone/source": served}, faults=faults) as (endpoint, log):
        log.faults = faults
        use_endpoint(monkeypatch, endpoint)
        checkpoint = open_checkpoint("someone/source", partial=True)
        assert checkpoint.partial is not None
        yield checkpoint, log
        # The client of this process keeps its connections open.
        huggingface_hub.utils.close_session()


def test_no_byte_that_is_not_present_is_read_as_if_it_were(models, partial):
    checkpoint, _ = partial
    local = open_checkpoint(str(models[1]))
    for number, (name, tensor) in enumerate(local.tensors.items()):
        if number % 2:
            assert read_bytes(checkpoint, checkpoint.tensors[name]) == read_bytes(local, tensor)
        else:
            found = mapped_values(checkpoint, Region.of(checkpoint.tensors[name]))
            assert torch.equal(found, mapped_values(local, Region.of(tensor)))
    shard = checkpoint.shards[0]
    with checkpoint.open(shard) as file:
        assert file.read() == (models[1] / shard).read_bytes()


def test_many_ranges_are_fetched_at_once_with_progress_and_only_once(partial, monkeypatch):
    checkpoint, log = partial
    wanted = [(tensor.file, tensor.start, tensor.stop) for tensor in checkpoint.tensors.values()]
    missing = checkpoint.num_missing(wanted)
    assert missing == checkpoint.num_bytes
    log.served.clear()
    counted: list[int] = []
    monkeypatch.setattr("dapa_merge.checkpoint.fetch.advance", lambda num_bytes, _: counted.append(num_bytes))
    checkpoint.ensure_all([*wanted, *wanted])
    assert sum(counted) == log.num_weight_bytes() == missing
    checkpoint.ensure_all(wanted)
    assert sum(counted) == missing
    again = open_checkpoint("someone/source", partial=True)
    assert again.num_missing(wanted) == 0
    assert again.commit == SHA


def test_a_model_that_is_loaded_is_fetched_whole(models, partial):
    checkpoint, _ = partial
    model, _ = load_model(checkpoint, choose_device("cpu"))
    whole = checkpoint.whole()
    assert whole.partial is None
    assert (whole.name, whole.tensors) == (checkpoint.name, checkpoint.tensors)
    weight = model.get_parameter("model.layers.1.mlp.gate_proj.weight")
    region = Region.of(checkpoint.tensors["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(weight, mapped_values(open_checkpoint(str(models[1])), region))


def test_a_lost_network_is_one_sentence_and_keeps_what_came(partial, monkeypatch):
    checkpoint, _ = partial
    first, second, *_ = checkpoint.tensors.values()
    checkpoint.ensure(first.file, first.start, first.stop)
    # A port at which nobody listens.
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    again = open_checkpoint("someone/source", SHA, partial=True)
    assert read_bytes(again, first) == read_bytes(checkpoint, first)
    with pytest.raises(HubError, match=r"cannot read http.*out of reach \(ConnectError: .*run the command again"):
        read_bytes(again, second)


def test_a_file_that_changed_its_size_on_the_hub_is_not_mixed_with_what_came(partial, tmp_path):
    checkpoint, _ = partial
    first, *_ = checkpoint.tensors.values()
    with (tmp_path / "served" / first.file).open("ab") as file:
        file.write(b"more")
    with pytest.raises(HubError, match="but received 'bytes"):
        read_bytes(checkpoint, first)


def test_a_mirror_whose_file_was_removed_starts_anew(partial):
    checkpoint, _ = partial
    first, *_ = checkpoint.tensors.values()
    expected = read_bytes(checkpoint, first)
    checkpoint.path(first.file).unlink()
    again = open_checkpoint("someone/source", partial=True)
    assert read_bytes(again, first) == expected


LIES = {
    "no Content-Range": "with status 206 and no Content-Range",
    "another range": "but received 'bytes",
    "another size": "but received 'bytes",
    "more bytes": "but received 'bytes",
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_not_what_was_asked_for_is_not_kept(models, partial, lie):
    checkpoint, log = partial
    first, *_ = checkpoint.tensors.values()
    log.faults.lie = lie
    with pytest.raises(HubError, match=LIES[lie]):
        read_bytes(checkpoint, first)
    log.faults.lie = ""
    local = open_checkpoint(str(models[1]))
    assert read_bytes(checkpoint, first) == read_bytes(local, local.tensors[first.name])


def test_a_search_fetches_all_gates_and_nothing_else(write_recipe, tmp_path, few, call_at_hub):
    target, source = miniature.path("target"), miniature.path("source")
    recipe = write_recipe(target, "someone/source", prompts=few, max_new_tokens=12, batch_size=128)
    with hub({"someone/source": source}) as (endpoint, log):
        result = call_at_hub(endpoint, tmp_path / "home", "search", recipe, "--json")
    assert result.exit_code == 0, result.stderr
    units = make_plan(load_recipe(write_recipe(target, source))).units
    tensors = open_checkpoint(str(source)).tensors
    gates = sum(tensors[name].num_bytes for unit in units for name in unit.tensors)
    assert log.num_weight_bytes() == num_header_bytes(source) + gates
    assert f"model: someone/source@{SHA}" in json.loads(result.stdout)["recipe"]


def test_mergekit_fetches_a_source_once(models, recipe, expected, tmp_path):
    code = "from mergekit.scripts.run_yaml import main; main()"
    with hub({"someone/source": models[1]}) as (endpoint, log):
        command = [sys.executable, "-c", code, recipe, tmp_path / "out", "--quiet"]
        done = warm.run(command, env=environment(endpoint, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    ours, other = open_checkpoint(str(tmp_path / "out")), tmp_path / "expected"
    shutil.copytree(models[0], other)
    for name, content in expected.items():
        (other / name).write_bytes(content)
    twin = open_checkpoint(str(other))
    assert all(
        read_bytes(ours, tensor) == read_bytes(twin, twin.tensors[name]) for name, tensor in ours.tensors.items()
    )
    assert log.num_weight_bytes() == sum(len(content) for content in weights(models[1]).values())
