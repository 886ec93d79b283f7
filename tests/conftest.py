"""Checkpoints that the tests make: small, random, of many architectures, in several shards; and calls of commands."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small gain nothing from more threads, and lose much where they have to share their cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Journals of searches: not the user's own, nor those of an earlier session. Workers of pytest-xdist, and what they start,
# make theirs in that of the process that started them, which removes it. (This module is loaded twice: by pytest, and by
# name.)
if f"/dapa-merge-tests-{os.getpid()}-" not in os.environ.get("XDG_CACHE_HOME", ""):
    started_by_tests = "PYTEST_XDIST_WORKER" in os.environ
    if started_by_tests:
        os.makedirs(os.environ["XDG_CACHE_HOME"], exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(
        prefix=f"dapa-merge-tests-{os.getpid()}-", dir=os.environ["XDG_CACHE_HOME"] if started_by_tests else None
    )
    # Where the key of journals is.
    os.environ["XDG_STATE_HOME"] = os.path.join(os.environ["XDG_CACHE_HOME"], "state")

import contextlib
import gc
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import needs
import pytest
import warm
from click.testing import CliRunner, Result
from hypothesis import settings
from packaging.version import Version

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.cli import main
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.plan import join
from dapa_merge.recipe.constraints import CONSTRAINTS
from dapa_merge.search.requirement import Requirement, constraints_of
from dapa_merge.verify.tensors import verify

# On a busy machine any example may take long; others are drawn each time.
settings.register_profile("without deadline", deadline=None, max_examples=50)
settings.load_profile("without deadline")

# Tests make little garbage, and many objects that stay.
gc.set_threshold(50_000, 50, 100)

MakeCheckpoint = Callable[..., Path]
SHAPE = dict(
    vocab_size=152, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

# Every architecture with a gate that mergekit defines and transformers can build as a text model, and others that
# mergekit has to infer.
ARCHITECTURES = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": 16}),
    "GemmaForCausalLM": ("GemmaConfig", {"head_dim": 8}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"head_dim": 8, "sliding_window": 16}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 16}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 8}),
    "CohereForCausalLM": ("CohereConfig", {"use_qk_norm": True}),
    "Cohere2ForCausalLM": ("Cohere2Config", {"sliding_window": 16}),
    "GraniteForCausalLM": ("GraniteConfig", {"mlp_bias": True}),
    "Olmo2ForCausalLM": ("Olmo2Config", {}),
    "StableLmForCausalLM": ("StableLmConfig", {}),
    "Lfm2ForCausalLM": ("Lfm2Config", {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False}),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {}),
    "Olmo3ForCausalLM": ("Olmo3Config", {}),
    # Gate and up in one tensor.
    "Phi3ForCausalLM": ("Phi3Config", {"original_max_position_embeddings": 64}),
    "Glm4ForCausalLM": ("Glm4Config", {"head_dim": 8}),
    # Mixtures of experts: in files one tensor for each expert, or one for all; some with a shared one beside them.
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", {"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 8, "num_experts_per_tok": 2}),
    "AfmoeForCausalLM": ("AfmoeConfig", {"num_experts": 4, "moe_intermediate_size": 16, "num_dense_layers": 1, "head_dim": 8, "num_experts_per_tok": 2, "global_attn_every_n_layers": 2}),
    "GraniteMoeHybridForCausalLM": ("GraniteMoeHybridConfig", {"num_local_experts": 4, "shared_intermediate_size": 24, "layer_types": ["attention"] * 4, "mamba_n_heads": 4, "mamba_d_head": 16}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4, "num_key_value_heads": 4}),
    "Llama4ForCausalLM": ("Llama4TextConfig", {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8, "moe_layers": [1, 3]}),
    "DbrxForCausalLM": ("DbrxConfig", {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}, "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}}),
    "JambaForCausalLM": ("JambaConfig", {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}),
}  # fmt: skip
# Those whose MLP has no gate: up or mlp can be transplanted.
UNGATED = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 4, "n_embd": 32, "n_head": 4}),
    "FalconForCausalLM": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "MptForCausalLM": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 4}),
    "PhiForCausalLM": ("PhiConfig", {}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}),
    "GPTBigCodeForCausalLM": ("GPTBigCodeConfig", {"n_layer": 4, "n_embd": 32, "n_head": 4}),
    "Starcoder2ForCausalLM": ("Starcoder2Config", {}),
    "ArceeForCausalLM": ("ArceeConfig", {}),
    "ApertusForCausalLM": ("ApertusConfig", {}),
}
# Older versions of transformers cannot run these: DBRX's router expected as many inputs as an expert has hidden units,
# and Apertus took the name of a dtype for one.
for _name, _since in (("DbrxForCausalLM", "5.15"), ("ApertusForCausalLM", "5.12")):
    if Version(version("transformers")) < Version(_since):
        (ARCHITECTURES if _name in ARCHITECTURES else UNGATED).pop(_name)

# Families that can be measured, but not repaired: no MLP.
MEASURED_ONLY = {
    "MambaForCausalLM": ("MambaConfig", {"state_size": 8}),
}


# What takes long to make, and the group of the tests that have it; both demonstrations are made together.
MADE_ONCE = {
    "traced": "traced",
    "of_directions": "traced",
    "families": "families",
    "demo": "demo",
    "shadow_demo": "demo",
}


def pytest_itemcollected(item: pytest.Item) -> None:
    """One worker of pytest-xdist has all tests of what takes long to make, or is made for a module, and makes it once."""
    if item.get_closest_marker("xdist_group"):
        return
    fixtures = getattr(item, "fixturenames", ())
    group = next((group for name, group in MADE_ONCE.items() if name in fixtures), None)
    known = item._fixtureinfo.name2fixturedefs if fixtures else {}
    if group is None and any(found[-1].scope == "module" for found in known.values()):
        group = item.module.__name__
    if group is not None:
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this system does not have, with the reason."""
    missing = needs.missing_here()
    for item in items if missing else ():
        for reason in needs.reasons(item, missing):
            item.add_marker(pytest.mark.skip(reason=reason))


num_modules_frozen = 0


def pytest_runtest_setup() -> None:
    """Leave the modules out of garbage collections: one for each model would take longer than many a test."""
    global num_modules_frozen
    if len(sys.modules) > num_modules_frozen + 100:
        gc.collect()
        gc.freeze()
        num_modules_frozen = len(sys.modules)


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def save_random(folder: Path, config, *, seed: int, dtype=None, max_shard_size: str = "25KB") -> Path:
    """Save a randomly initialized causal model of `config`, with the miniature's tokenizer beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype or torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            # Also norms and biases, which start as ones and zeros in every model.
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    AutoTokenizer.from_pretrained(miniature.path("target")).save_pretrained(folder)
    return folder


def change_tensor(folder: Path, name: str, change: Callable) -> None:
    """Rewrite the file of one tensor of a checkpoint after `change` was called with it."""
    from safetensors.torch import load_file, save_file

    shard = folder / open_checkpoint(str(folder)).tensors[name].file
    content = load_file(shard)
    change(content[name])
    save_file(content, shard, metadata={"format": "pt"})


def weights(folder: Path) -> dict:
    """All tensors of a checkpoint, as torch loads them."""
    from safetensors.torch import load_file

    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def num_different(one: Path, other: Path) -> int:
    """Elements of two checkpoints of the same tensors that are not equal as numbers."""
    theirs = weights(other)
    return sum(int((theirs[name] != value).sum()) for name, value in weights(one).items())


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_format_1(out: Path) -> Path:
    """Give a result the manifest that versions before format 2 wrote, with SHA-256s."""
    content = json.loads((out / "dapa.json").read_text())
    tensors = open_checkpoint(str(out)).tensors
    content["format"] = 1
    del content["algorithm"]
    for name, entry in content["files"].items():
        del entry["digest"]
        entry["sha256"] = sha256_of(out / name)
    for name, entry in content["tensors"].items():
        del entry["digest"]
        raw = (out / entry["file"]).read_bytes()[tensors[name].start : tensors[name].stop]
        entry["sha256"] = hashlib.sha256(raw).hexdigest()
    (out / "dapa.json").write_text(json.dumps(content, indent=1) + "\n")
    return out


def prove(out: Path, plan, selection) -> None:
    """Raise `CheckpointError` unless `out` is the target with exactly the selected units."""
    selection = join(plan, selection)
    verification = verify(out, replace(plan, units=selection))
    if not verification.holds:
        raise CheckpointError("the result is wrong: " + " ".join(verification.differences[0]))
    if not verification.is_exactly(selection):
        raise CheckpointError("its transplanted units are not those that were selected")


def fail_in_swap(monkeypatch: pytest.MonkeyPatch, number: int, fault: BaseException) -> None:
    """Make the `number`-th tensor that LiveModel puts in place raise, once."""
    from dapa_merge.measure.live import LiveModel

    put = LiveModel._put
    calls = []

    def failing(self, tensor, values):
        calls.append(tensor)
        if len(calls) == number:
            raise fault
        put(self, tensor, values)

    monkeypatch.setattr(LiveModel, "_put", failing)


def tiny_llama(**changes):
    from transformers import LlamaConfig

    shape = dict(
        vocab_size=152, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    return LlamaConfig(**{**shape, **changes})


def configuration(target, source, **parameters):
    """A merge as mergekit's own object, validated as `mergekit-yaml` does it."""
    from mergekit.config import MergeConfiguration

    return MergeConfiguration.model_validate(
        {
            "merge_method": "dapa",
            "base_model": str(target),
            "models": [{"model": str(source)}],
            "parameters": parameters,
        }
    )


def call(*arguments: object) -> Result:
    """A command of dapa-merge, run in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict:
    """What a command that succeeds prints with --json."""
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def without_certificates(monkeypatch) -> None:
    """Where every server speaks plain HTTP: each new client reads them, which takes longer than most answers."""
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *_, **__: None)


@contextlib.contextmanager
def asking_hub(monkeypatch, endpoint: str, home: Path, *, offline: bool = False) -> Iterator[None]:
    """Let this process's client of the Hub ask that server, with its cache there, as `hub_server.environment` does."""
    from huggingface_hub import close_session

    with monkeypatch.context() as patch:
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        without_certificates(patch)
        yield
        close_session()


@pytest.fixture
def call_at_hub(monkeypatch) -> Callable[..., Result]:
    """As `hub_server.dapa_merge`, in this process: where the Hub's variables and a fresh process are not the point."""

    def call_there(endpoint: str, home: Path, *arguments: object, offline: bool = False) -> Result:
        with asking_hub(monkeypatch, endpoint, home, offline=offline):
            return call(*arguments)

    return call_there


def write_few(folder: Path, number: int) -> Path:
    """A folder with the first so many harmful and harmless prompts of the miniature, and a few of its texts."""
    from dapa_merge.measure.prompts.sets import load_prompts

    prompts = load_prompts("miniature")
    folder.mkdir()
    for kind in ("harmful", "harmless"):
        (folder / f"{kind}.txt").write_text("\n".join(getattr(prompts, kind)[:number]) + "\n")
    shipped = miniature.path("target").parent / "prompts" / "perplexity.jsonl"
    (folder / shipped.name).write_text("".join(shipped.read_text().splitlines(keepends=True)[:8]))
    return folder


def without_time(content: Any) -> Any:
    """Plain data without what a clock or the machine's memory says."""
    if isinstance(content, dict):
        return {key: without_time(value) for key, value in content.items() if key not in ("seconds", "peak_bytes")}
    if isinstance(content, list):
        return [without_time(value) for value in content]
    return content


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """The cache folder, each test's own: no search goes on where another test's was."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def demo(both_demos) -> tuple[Path, dict]:
    """The demonstration's first result, and its report; `shadow_demo` has the second."""
    out, report, _ = both_demos
    return out, report


@pytest.fixture(scope="session")
def shadow_demo(both_demos) -> tuple[Path, dict]:
    """The demonstration's second result, and its report; its journals are in the cache folder next to it."""
    out, _, report = both_demos
    return out.with_name(f"{out.name}-shadow"), report


@pytest.fixture(scope="session")
def both_demos(tmp_path_factory) -> tuple[Path, dict, dict]:
    """The folder of the demonstration's first result, and the reports of both."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out.with_name("cache")))
        report = answer("demo", out, "--json")
    return out, report, report.pop("shadow")


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory) -> tuple[Path, Path]:
    """A random target and source, Llama, three shards or more each."""
    folder = tmp_path_factory.mktemp("llama")
    return (
        save_random(folder / "target", tiny_llama(), seed=1),
        save_random(folder / "source", tiny_llama(), seed=2),
    )


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """A folder with a quarter of the miniature's prompts, for searches of which only the course matters."""
    return write_few(tmp_path_factory.mktemp("few") / "prompts", 32)


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """The one Ray cluster of all tests, of two nodes with a core each; those that use it are in the group `ray`."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Ray would end actors where other programs take the machine's memory.
    os.environ.update(RAY_memory_monitor_refresh_ms="0")
    with _same_sigterm():
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        found = RayCluster(nodes)
        found.add_node()
        ray.init(nodes.address, log_to_driver=False, logging_level="error")
    yield found
    with _same_sigterm():
        ray.shutdown()
        nodes.shutdown()


@contextlib.contextmanager
def _same_sigterm() -> Iterator[None]:
    """Put the handler of SIGTERM back: Ray's own ends the process, which is that of other tests, too."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@dataclass
class RayCluster:
    """Nodes on this machine, of which all but the first may be lost."""

    nodes: Any
    second: Any = None

    def add_node(self) -> None:
        with _same_sigterm():
            self.second = self.nodes.add_node(num_cpus=1)

    @contextlib.contextmanager
    def losing(self, what: str, is_time: Callable[[], bool]) -> Iterator[list[str]]:
        """Inside the block, lose the second `node` or an `actor` as soon as it is time; yields what was lost."""
        psutil = pytest.importorskip("psutil")
        ended, lost = threading.Event(), []

        def lose() -> None:
            while not lost and not ended.wait(0.02):
                if is_time() and what == "node":
                    self.nodes.remove_node(self.second, allow_graceful=False)
                    lost.append(what)
                elif is_time():
                    # Actors name themselves in their process title.
                    for child in psutil.Process().children(recursive=True):
                        if not lost and child.is_running() and child.name().startswith("ray::_Actor"):
                            child.kill()
                            lost.append(what)

        loser = threading.Thread(target=lose)
        loser.start()
        try:
            yield lost
        finally:
            ended.set()
            loser.join()
            if lost == ["node"]:
                self.add_node()


@pytest.fixture
def warm_processes(monkeypatch) -> None:
    """The processes of Python that a script starts by `subprocess` need not load torch."""
    # A script that takes the time of its first process shall not take that of the server's start.
    warm.run([sys.executable, "-c", ""])
    warm.stand_in_for_subprocess(monkeypatch)


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Nothing is drawn: for results of the same numbers as those whose pictures are looked at, and beside the point."""
    skip_drawing(monkeypatch, "png", "svg")


@pytest.fixture
def only_png(monkeypatch) -> None:
    """Of each picture one file is drawn, which fails if the other would."""
    skip_drawing(monkeypatch, "svg")


def skip_drawing(monkeypatch, *kinds: str) -> None:
    from dapa_merge.report import drawing

    render = drawing.render
    monkeypatch.setattr(drawing, "render", lambda figure, kind: b"" if kind in kinds else render(figure, kind))


@pytest.fixture
def write_recipe(tmp_path) -> Callable[..., Path]:
    """Writes a recipe for two folders; keyword arguments are its parameters."""

    def write(target: Path, source: Path, **parameters: object) -> Path:
        lines = ["merge_method: dapa", f"base_model: {target}", "models:", f"  - model: {source}"]
        if parameters:
            lines += ["parameters:", *(f"  {key}: {value}" for key, value in parameters.items())]
        path = tmp_path / "recipe.yml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def required(*, measure: str = "DSR", **limits: float) -> Requirement:
    """A requirement of absolute limits, by their names in a report."""
    constraints = constraints_of([constraint.key for constraint in CONSTRAINTS], measure)
    return Requirement(tuple((one, limits[one.name]) for one in constraints if one.name in limits))
