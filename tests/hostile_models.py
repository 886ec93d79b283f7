"""The whole way of a hostile pair of models: refused without a trace, or transplanted as safetensors would do it."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

from conftest import prove
from hostile_checks import Contents, library_reads, reason
from hostile_files import BITS, TREE_MUTATIONS, Object, dump, hostile_file, hostile_index, tensor, weight_file

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import DapaError
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.transplant.result import transplant
from dapa_merge.verify.tensors import verify

GATES = ("model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight")
SHAPES = {
    "model.embed_tokens.weight": [4, 2], "model.norm.weight": [2], "lm_head.weight": [],
    **{gate: [3, 2] for gate in GATES},
    **{gate.replace("gate", "up"): [3, 2] for gate in GATES},
    **{gate.replace("gate", "down"): [2, 3] for gate in GATES},
}  # fmt: skip


def sound_part(random: Random, names: list[str], dtype: str) -> tuple[Object, bytes]:
    """Header and data of a file with some of a Llama's tensors, of finite values."""
    header, position = Object(), 0
    for name in random.sample(names, len(names)):
        num_bytes = BITS[dtype] // 8
        for size in SHAPES[name]:
            num_bytes *= size
        header.append([name, tensor(dtype, list(SHAPES[name]), position, position + num_bytes)])
        position += num_bytes
    return header, bytes(random.randrange(64) for _ in range(position))


def write_model(folder: Path, random: Random, *, mutations: int) -> None:
    """A Llama of two layers in one file or two, of which so many files are mutated."""
    folder.mkdir()
    names, dtype = list(SHAPES), random.choice(("BF16", "BF16", "BF16", "F16", "F32"))
    cut = random.choice((0, 4))
    parts = {"one.safetensors": names[:cut], "two.safetensors": names[cut:]} if cut else {"model.safetensors": names}
    damaged = random.sample([*parts, "config.json", "index"], mutations)
    for file, part in parts.items():
        header, data = sound_part(random, part, dtype)
        raw = hostile_file(random, header, data) if file in damaged else weight_file(dump(header), data)
        (folder / file).write_bytes(raw)
    if cut:
        owners = {name: file for file, part in parts.items() for name in part}
        index = Object([["weight_map", Object([name, file] for name, file in owners.items())]])
        raw = hostile_index(random, owners) if "index" in damaged else dump(index).encode()
        (folder / "model.safetensors.index.json").write_bytes(raw)
    config = Object([["architectures", ["LlamaForCausalLM"]], ["model_type", "llama"], ["num_hidden_layers", 2]])
    if "config.json" in damaged:
        random.choice(TREE_MUTATIONS)(random, config)
    (folder / "config.json").write_text(dump(config), errors="surrogatepass")


def check_pair(folder: Path, random: Random) -> str:
    """Make a pair of models in an empty folder, transplant one's gates into the other, and check what came of it."""
    target, source, out = (folder / name for name in ("target", "source", "out"))
    mutations = random.choice(((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2)))
    for member, number in zip((target, source), mutations, strict=True):
        write_model(member, random, mutations=number)
    before = _files(folder)

    def prove_made(made: Path) -> None:
        # A result that is wrong is no refusal.
        try:
            prove(made, plan, plan.units)
        except DapaError as error:
            raise AssertionError(str(error)) from error

    try:
        plan = plan_transplant(open_checkpoint(str(target)), open_checkpoint(str(source)), ("gate",))
        transplant(plan, plan.units, out, finish=prove_made)
    except DapaError as error:
        assert _files(folder) == before
        return reason(error)
    assert verify(out, plan).holds
    after = _files(folder)
    assert {name: content for name, content in after.items() if not name.startswith("out/")} == before
    donor = _read(source, plan.source.shards)
    for shard in plan.target.shards:
        ours, made = before[f"target/{shard}"], after[f"out/{shard}"]
        start = 8 + int.from_bytes(ours[:8], "little")
        assert made[:start] == ours[:start]
        expected = library_reads(ours)
        assert expected is not None
        expected |= {name: _as(donor[name], expected[name][0]) for name in GATES if name in expected}
        assert library_reads(made) == expected
    return "transplanted"


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _read(folder: Path, shards: tuple[str, ...]) -> Contents:
    found: Contents = {}
    for shard in shards:
        found |= library_reads((folder / shard).read_bytes()) or {}
    return found


def _as(found: tuple[str, tuple[int, ...], bytes], dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor as torch casts it."""
    if found[0] == dtype:
        return found
    import torch

    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    values = torch.frombuffer(bytearray(found[2]), dtype=types[found[0]]).to(types[dtype])
    return dtype, found[1], values.view(torch.uint8).numpy().tobytes()


def empty(folder: Path) -> Path:
    """The folder, new."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
