"""A computer without memory ends a command in one sentence, whichever library noticed it."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch
from conftest import call

from dapa_merge import miniature
from dapa_merge.errors import CheckpointError, UsageError, lacks_memory

NO_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("can't start new thread"),
    RuntimeError("could not create a primitive"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
@pytest.mark.parametrize("is_told_of_a_checkpoint", [False, True])
def test_a_lack_of_memory_is_one_sentence(error, is_told_of_a_checkpoint, monkeypatch):
    def fail(*_, **__):
        if not is_told_of_a_checkpoint:
            raise error
        raise CheckpointError("transformers cannot load it") from error

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr("dapa_merge.measure.evaluate.evaluate_models", fail)
    result = call("evaluate", miniature.path("target"))
    (line,) = result.stderr.strip().splitlines()
    assert result.exit_code == 1
    assert line.startswith("Error: ")
    assert "memory" in line


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a"),
        OSError(errno.ENOENT, "No such file"),
        torch.OutOfMemoryError("CUDA out of memory"),
        UsageError("'cannot allocate memory' is not a folder"),
    ],
    ids=str,
)
def test_other_errors_are_no_lack_of_memory(error):
    assert not lacks_memory(error)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_process_with_too_little_memory_for_torch_ends_in_one_sentence():
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (250 << 20, 250 << 20)); "
        "from dapa_merge.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", limited, "evaluate", miniature.path("target")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert "memory" in line


def test_an_error_that_was_raised_again_as_its_own_cause_is_looked_at_once():
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__cause__ = second, first
    assert not lacks_memory(first)
    second.__cause__ = MemoryError()
    assert lacks_memory(first)
