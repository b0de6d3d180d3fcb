"""Every kernel compiles for every target, with NVRTC or else nvcc, on machines without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cachegen.errors import CacheGenError
from cachegen.native.cuda import device, encode_plan, plan, source
from cachegen.native.cuda.device import TARGETS, compile_cubin


def compile_with_nvcc(target: str, path: Path) -> bytes:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("neither NVRTC (pip install cachegen[cuda]) nor nvcc")
    kernels = path / "kernels.cu"
    kernels.write_text(source.joined_source(), encoding="utf-8")
    cubin = path / "kernels.cubin"
    flags = ["-std=c++17", f"-arch={target}", "-DCACHEGEN_SMALL", "-cubin"]
    done = subprocess.run(
        [nvcc, *flags, str(kernels), "-o", str(cubin)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return cubin.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str, tmp_path: Path) -> None:
    try:
        code = compile_cubin(target, small=True).read_bytes()
    except (CacheGenError, RuntimeError):  # no cuda.core, or no NVRTC
        code = compile_with_nvcc(target, tmp_path)
    assert code[:4] == b"\x7fELF"
    for kernel in source.KERNELS:
        assert kernel.encode() in code


def test_kernels_and_python_agree_on_structs() -> None:
    text = source.joined_source()
    sizes = {name: int(size) for name, size in re.findall(r"sizeof\((\w+)\) == (\d+)\)", text)}
    for name, dtype in (plan.SIZES | encode_plan.SIZES).items():
        assert sizes[name] == dtype.itemsize, name
    kernels = re.findall(r"CACHEGEN_KERNEL\((\w+)\)", text)
    assert [name for name in kernels if name != "name"] == sorted(source.KERNELS, key=kernels.index)


def test_the_emulation_knows_every_kernel() -> None:
    text = (source.source_folder() / "cuda" / "emulation.cpp").read_text(encoding="utf-8")
    assert set(re.findall(r'{"(\w+)", cachegen::', text)) == set(source.KERNELS)


def test_nothing_needs_a_library() -> None:
    """The joined source stands alone but for what only other compilers read."""
    includes = re.findall(r"^#include .*$", source.joined_source(), re.MULTILINE)
    assert set(includes) <= {"#include <cstdint>", "#include <bit>", "#include <cstddef>"}


def test_compiled_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEGEN_KERNEL_CACHE", str(tmp_path / "cache"))
    calls = []

    def make(path: Path) -> None:
        calls.append(path)
        path.write_bytes(b"code")

    for _ in range(2):
        assert device.cache.cached("one.cubin", make).read_bytes() == b"code"
    assert len(calls) == 1
    with pytest.raises(OSError, match="broken"):
        device.cache.cached("two.cubin", _broken)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["one.cubin"]


def _broken(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError("broken")
