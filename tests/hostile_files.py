"""Weight files and shard indices as an enemy would make them: sound ones, and mutations of these.

Nothing here knows the readers that are tried. `Random` is handed in: hypothesis', which shrinks, or a seeded one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any

BITS = {"BOOL": 8, "U8": 8, "F8_E4M3": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "I64": 64, "F4": 4, "F6_E2M3": 6}
NAMES = (
    "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight",
    "lm_head.weight", "a", "\u00fc", "weight ", "__metadata__x",
)  # fmt: skip
HOSTILE_NAMES = ("", "__metadata__", "a\nb", "\0", "\x1b[2J", "\u202e", "\ud800", "../a", "x" * 1001, "\u2028", "%s{0}")
HOSTILE_SHARDS = (
    "../outside.safetensors", "/etc/passwd", "/etc/passwd.safetensors", "a/b.safetensors", "..\\x.safetensors", "..",
    "x" * 300 + ".safetensors", "a\0.safetensors", "\ud800.safetensors", "a\n.safetensors", ".safetensors", "", "x.bin",
    "loop.safetensors", "pipe.safetensors", "folder.safetensors", "absent.safetensors", "config.json",
    "same.safetensors", "outside.safetensors", "C:\\x.safetensors", "\u202esrotsnetefas.safetensors",
)  # fmt: skip


class Raw(str):
    """A piece of JSON as it stands, right or wrong."""


class Object(list[list[Any]]):
    """A JSON object as its [key, value] pairs, so that a key can occur twice."""


HOSTILE_VALUES = (
    *map(Raw, ("-0", "-1", "1.0", "1e2", "1E400", "NaN", "Infinity", "-Infinity", "true", "null", "01", "+1", "0x1")),
    *map(Raw, (str(2**63), str(2**64), str(2**64 - 1), "9" * 5000, '"\\ud800"', '"\\u0000"', "{}", "[]", '""', "'a'")),
    *map(Raw, ("[" * 100 + "]" * 100, "[" * 3000 + "]" * 3000, "[" * 3000, '{"a":' * 200 + "1" + "}" * 200, "")),
    0, 1, 2, 3, 7, 8, 2**31, 2**53 + 1, "U8", "F32", "f32", [0, 0], [1] * 70, [2**63, 2, 0], [0, 2**63, 2], [[1]],
)  # fmt: skip


def dump(node: Any) -> str:
    """The JSON of a tree of `Raw`, `Object`, lists, texts and numbers."""
    if isinstance(node, Raw):
        return node
    if isinstance(node, Object):
        return "{" + ",".join(f"{dump(key)}:{dump(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(dump, node)) + "]"
    return json.dumps(node)


def load(raw: bytes) -> tuple[Object, bytes] | None:
    """The header of a weight file as a tree, and its data; None if it is too broken for that."""
    num_header_bytes = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + num_header_bytes], object_pairs_hook=lambda pairs: Object(map(list, pairs)))
    except (ValueError, RecursionError):
        return None
    return (header, raw[8 + num_header_bytes :]) if isinstance(header, Object) else None


def weight_file(header: str | bytes, data: bytes, num_header_bytes: int | None = None) -> bytes:
    """A safetensors file, or what claims to be one."""
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return (len(raw) if num_header_bytes is None else num_header_bytes).to_bytes(8, "little") + raw + data


def sound_header(random: Random) -> tuple[Object, bytes]:
    """A header that every program reads, of up to four tensors in any order, and its data."""
    header, position = Object(), 0
    for name in random.sample(NAMES, random.randrange(5)):
        dtype, shape = random.choice(list(BITS)), [random.randrange(4) for _ in range(random.randrange(4))]
        if math.prod(shape) * BITS[dtype] % 8:
            shape.append(4)
        num_bytes = math.prod(shape) * BITS[dtype] // 8
        header.append([name, tensor(dtype, shape, position, position + num_bytes)])
        position += num_bytes
    random.shuffle(header)
    if random.randrange(3) == 0:
        header.insert(0, ["__metadata__", Object([["format", "pt"]])])
    return header, bytes(index % 64 for index in range(position))


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> Object:
    """A header's entry."""
    return Object([["dtype", dtype], ["shape", shape], ["data_offsets", [begin, end]]])


def hostile_file(random: Random, header: Object | None = None, data: bytes = b"") -> bytes:
    """A weight file after none to four mutations of its tree and, at times, one of its bytes."""
    if header is None:
        header, data = sound_header(random)
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        random.choice(TREE_MUTATIONS)(random, header)
    raw = weight_file(dump(header), data)
    return random.choice(BYTE_MUTATIONS)(random, raw) if random.randrange(4) == 0 else raw


def hostile_index(random: Random, owners: dict[str, str]) -> bytes:
    """A shard index after none to four mutations."""
    shards = Object([name, shard] for name, shard in owners.items())
    index = Object([["metadata", Object([["total_size", 8]])], ["weight_map", shards]])
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        if shards and random.randrange(2):
            random.choice(shards)[1] = random.choice(HOSTILE_SHARDS + tuple(owners.values()))
        else:
            random.choice(TREE_MUTATIONS)(random, index)
    raw = dump(index).encode("utf-8", "surrogatepass")
    return _mutate_bytes(random, raw) if random.randrange(6) == 0 else raw


def _slots(node: Any) -> Iterator[tuple[list[Any], int]]:
    """Every place of a tree that holds a value."""
    for index, child in enumerate(node):
        container, place = (child, 1) if isinstance(node, Object) else (node, index)
        yield container, place
        if isinstance(container[place], list):
            yield from _slots(container[place])


def _objects(node: Any) -> list[Object]:
    found = [node] if isinstance(node, Object) else []
    for container, place in _slots(node):
        if isinstance(container[place], Object):
            found.append(container[place])
    return found


def _replace(random: Random, header: Object) -> None:
    if slots := list(_slots(header)):
        container, place = random.choice(slots)
        container[place] = deepcopy(random.choice(HOSTILE_VALUES))


def _nudge(random: Random, header: Object) -> None:
    if slots := [slot for slot in _slots(header) if type(slot[0][slot[1]]) is int]:
        container, place = random.choice(slots)
        container[place] += random.choice((-8, -4, -2, -1, 1, 2, 4, 8, 2**32, 2**63))


def _duplicate(random: Random, header: Object) -> None:
    pairs = random.choice(_objects(header))
    if pairs:
        key, value = random.choice(pairs)
        pairs.insert(random.randrange(len(pairs) + 1), [key, deepcopy(value)])


def _remove(random: Random, header: Object) -> None:
    pairs = random.choice(_objects(header))
    if pairs:
        del pairs[random.randrange(len(pairs))]


def _swap(random: Random, header: Object) -> None:
    slots = list(_slots(header))
    if len(slots) > 1:
        (one, here), (other, there) = random.sample(slots, 2)
        if not _holds(one[here], other) and not _holds(other[there], one):
            one[here], other[there] = other[there], one[here]


def _holds(node: Any, wanted: list[Any]) -> bool:
    """Whether a list is a part of a tree, so that a swap would make the tree its own part."""
    return isinstance(node, list) and (node is wanted or any(_holds(child, wanted) for child in node))


def _rename(random: Random, header: Object) -> None:
    pairs = random.choice(_objects(header))
    if pairs:
        pair = random.choice(pairs)
        escaped = Raw('"' + "".join(f"\\u{ord(letter) & 0xFFFF:04x}" for letter in str(pair[0])) + '"')
        pair[0] = random.choice((escaped, *HOSTILE_NAMES, *NAMES))


def _add_empty(random: Random, header: Object) -> None:
    position = random.choice((0, 1, 2, 4, 8, 16, 32))
    shape = random.choice(([0], [0, 2**40], [2**40, 0], [3, 0], [2**63, 4, 0], [0] * 65))
    entry = tensor(random.choice(list(BITS)), list(shape), position, position)
    header.append([random.choice(NAMES + HOSTILE_NAMES), entry])


def _add_key(random: Random, header: Object) -> None:
    value = random.choice((Object(), Object([["a", "b"]]), Object([["a", 1]]), *HOSTILE_VALUES))
    random.choice(_objects(header)).append(
        [random.choice(("__metadata__", "extra", "dtype", "strides")), deepcopy(value)]
    )


def _other_dtype(random: Random, header: Object) -> None:
    if slots := [slot for slot in _slots(header) if slot[0][slot[1]] in tuple(BITS)]:
        container, place = random.choice(slots)
        container[place] = random.choice([*BITS, "F99", "float32", "F8_E8M0", "C64"])


TREE_MUTATIONS: tuple[Callable[[Random, Object], None], ...] = (
    _replace, _nudge, _duplicate, _remove, _swap, _rename, _add_empty, _add_key, _other_dtype,
)  # fmt: skip


def _mutate_bytes(random: Random, raw: bytes) -> bytes:
    place = random.randrange(len(raw) + 1)
    piece = random.choice(
        (b"", b"\0", b" ", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"{", b"]", b",", b"\n", b"0")
    )
    return raw[:place] + piece + raw[place + random.choice((0, 1, 1, 2, 8)) :]


def _lie_about_length(random: Random, raw: bytes) -> bytes:
    length = len(raw) - 8
    wrong = random.choice((0, 1, length, length + 1, length - 1, 2**31, 2**63, 2**64 - 1, 100_000_001, 16_000_001))
    return max(wrong, 0).to_bytes(8, "little") + raw[8:]


def _resize(random: Random, raw: bytes) -> bytes:
    return random.choice((raw[: random.randrange(len(raw) + 1)], raw[:-1], raw + b"\0", raw + bytes(8)))


def _recode(random: Random, raw: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    text = header.decode("utf-8", "surrogatepass")
    codec = random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "spaces", "newlines", "nul"))
    pads = {"spaces": header + b"   ", "newlines": b"\r\n\t " + header, "nul": header + b"\0"}
    return weight_file(pads[codec] if codec in pads else text.encode(codec, "surrogatepass"), data)


BYTE_MUTATIONS: tuple[Callable[[Random, bytes], bytes], ...] = (_mutate_bytes, _lie_about_length, _resize, _recode)
