"""What an upload of a result costs where its parent is already stored: hf_xet's deduplication, with a cold cache.

`python tests/benchmarks/dedup.py [--folder F] [--one-commit]`: writes a bf16 checkpoint of random values, Llama-shaped,
1.8 GB in three shards, and its source; stores the target with hf_xet in a local store (`local://`), each file in a
commit of its own; repairs it with named layers by `dapa-merge run --no-evaluate`; and uploads the weights of the result
into a copy of that store, in a new process, after the client's index of known chunks (`shard-cache`) was removed.
Prints the bytes of the files, those of the changed tensors, those that hf_xet did not find (before its compression),
those that it counted as uploaded (xorbs and shards), by how much the store grew on disk, and the limit: the changed
bytes and 1 % of the files. Beside it: the same weights as `mergekit-yaml` writes them, with another header, and in
other shards.

The client chunks, asks and compresses as it does for the Hub, and the store answers by the Hub's rule: it knows the
first chunk of each file and about one chunk in 1,024 (64 MB), and answers with the index of the whole commit that has
the chunk. `--one-commit` stores the target in one commit, so that one found chunk of any file is enough for all; with a
commit for each file, no file answers for another. Not measured: the Hub itself, whose answer may hold more or less, and
the network. hf_xet's compression saves a seventh of random bf16 values, which is why the uploaded bytes can be fewer
than the changed ones; the column `new` is without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import parse
from transplant import MERGEKIT, OURS, TINY_SHAPE, in_child, write_checkpoint

# A gate is 1.3 % of this model, so that 3.8 % can be changed.
HIDDEN, INTERMEDIATE, NUM_LAYERS = 2048, 5632, 15
# One layer, 3.8 % of the model apart from each other, and 6.4 % side by side.
SELECTIONS = ([7], [1, 6, 11], [3, 4, 5, 6, 7])
UPLOAD = (
    "import json, sys, hf_xet\n"
    "commit = hf_xet.XetSession().new_upload_commit(endpoint=f'local://{sys.argv[1]}')\n"
    "for path in sys.argv[2:]: commit.start_upload_file(path)\n"
    "found = commit.wait_to_finish().dedup_metrics\n"
    "print(json.dumps({name: getattr(found, name) for name in"
    " ('total_bytes', 'new_bytes', 'total_bytes_uploaded', 'deduped_bytes_by_global_dedup')}))"
)


def weights(folder: Path) -> list[Path]:
    """The files that the Hub would keep in its Xet storage."""
    return sorted(folder.glob("*.safetensors"))


def upload(store: Path, files: list[Path]) -> dict[str, int]:
    """Put files into a store in one commit and a process of its own; what hf_xet says about it."""
    # Its log goes to HF_HOME.
    environment = os.environ | {"HF_HOME": str(store.with_name("home"))}
    command = [sys.executable, "-c", UPLOAD, str(store), *map(str, files)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)


def stored_bytes(store: Path) -> int:
    """What the store holds: xorbs and shards, without its lookup tables, whose size is a matter of its database."""
    folder = store / "xet" / "xorbs"
    return sum(path.stat().st_size for kind in ("xorbs", "shards") for path in (folder / kind).iterdir())


def cold_upload(parent: Path, result: Path) -> dict[str, int]:
    """Upload a result to a copy of the store that has its parent, as somebody who never saw the parent's chunks."""
    store = parent.with_name("store")
    shutil.copytree(parent, store)
    cache = store / "xet" / "shard-cache"
    if not list(cache.iterdir()):
        raise SystemExit("the client keeps its index of chunks elsewhere: this would not be a cold cache")
    shutil.rmtree(cache)
    before = stored_bytes(store)
    found = upload(store, weights(result))
    grown = stored_bytes(store) - before
    shutil.rmtree(store)
    return found | {"grown": grown}


def with_other_header(result: Path, out: Path) -> None:
    """The same shards with one more line of metadata, which moves every tensor."""
    out.mkdir()
    for path in weights(result):
        save_file(load_file(path), out / path.name, metadata={"format": "pt", "made_by": "another program"})


def with_other_shards(result: Path, out: Path) -> None:
    """The same tensors by name in two files, each about half."""
    out.mkdir()
    owners = {}
    for path in weights(result):
        with safe_open(path, framework="pt") as file:
            owners |= dict.fromkeys(file.keys(), path)
    names = sorted(owners)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        tensors = {}
        for name in part:
            with safe_open(owners[name], framework="pt") as file:
                tensors[name] = file.get_tensor(name)
        save_file(tensors, out / f"model-{number + 1:05d}-of-00002.safetensors", metadata={"format": "pt"})


def report(name: str, found: dict[str, int], changed: int) -> None:
    """One line of the table."""
    total = found["total_bytes"]
    limit = changed + total // 100
    uploaded = max(found["total_bytes_uploaded"], found["grown"])
    verdict = "within" if uploaded <= limit else "ABOVE"
    print(
        f"{name:<22}{total / 1e6:9.1f} {changed / 1e6:8.1f} {found['new_bytes'] / 1e6:8.1f}"
        f" {found['total_bytes_uploaded'] / 1e6:9.1f} {found['grown'] / 1e6:8.1f} {limit / 1e6:8.1f}"
        f"   {verdict} ({uploaded / total:.2%} uploaded, {found['new_bytes'] / total:.2%} before compression,"
        f" for {changed / total:.2%})",
        flush=True,
    )


def measure(folder: Path, parent: Path, layers: list[int], gate_bytes: int) -> None:
    """All ways to write the result of one selection."""
    recipe, out, peer = folder / "recipe.yml", folder / "out", folder / "peer"
    recipe.write_text(
        f"merge_method: dapa\nbase_model: {folder / 'target'}\nmodels:\n  - model: {folder / 'source'}\n"
        f"parameters:\n  layers: {json.dumps(','.join(map(str, layers)))}\n"
    )
    changed = len(layers) * gate_bytes
    print(f"gates of layers {', '.join(map(str, layers))}", flush=True)
    in_child(OURS, "--quiet", "run", str(recipe), str(out), "--no-evaluate")
    report("dapa-merge run", cold_upload(parent, out), changed)
    in_child(MERGEKIT, str(recipe), str(peer), "--quiet", "--no-copy-tokenizer")
    report("mergekit-yaml", cold_upload(parent, peer), changed)
    shutil.rmtree(peer)
    for name, rewrite in (("with another header", with_other_header), ("in other shards", with_other_shards)):
        rewrite(out, peer)
        report(name, cold_upload(parent, peer), changed)
        shutil.rmtree(peer)
    shutil.rmtree(out)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the models and the store, upload every result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--one-commit", action="store_true", help="store the target in one commit")
    arguments = parse(parser, argv)
    shape: dict[str, int] = {"hidden": HIDDEN, "intermediate": INTERMEDIATE}
    num_layers, selections = NUM_LAYERS, SELECTIONS
    if arguments.tiny:
        shape, num_layers, selections = TINY_SHAPE, 2, ([1],)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        for seed, name in enumerate(("target", "source")):
            write_checkpoint(folder / name, num_layers, seed, **shape)
        parent = folder / "parent"
        files = weights(folder / "target")
        for commit in [files] if arguments.one_commit else [[path] for path in files]:
            upload(parent, commit)
        print(f"in MB{'':<17}{'files':>9} {'changed':>8} {'new':>8} {'uploaded':>9} {'on disk':>8} {'limit':>8}")
        for layers in selections:
            measure(folder, parent, layers, 2 * shape["hidden"] * shape["intermediate"])


if __name__ == "__main__":
    main()
