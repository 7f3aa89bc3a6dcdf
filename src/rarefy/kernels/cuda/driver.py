"""Kernels compiled where they are used, by the compiler that PyTorch brings along (NVRTC), and their launch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rarefy.core.errors import UnsupportedError
from rarefy.sources.cache import cache_root, cached_bytes

LARGE = 48 * 1024  # bytes of shared memory that need no leave
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAP = 128  # bytes of a tensor map, and what it is aligned to
_16_BITS = 1  # CU_TENSOR_MAP_DATA_TYPE_UINT16
_SWIZZLED = 3  # CU_TENSOR_MAP_SWIZZLE_128B
_WHOLE_LINES = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60)]


class _Configuration(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


class Kernel:
    """``name`` of a source file and the headers beside it, for the current device, with so many bytes of ``shared``
    memory, or more at a launch, ``most`` in all. Raises UnsupportedError with the compiler's words when it does not
    compile."""

    def __init__(self, source: Path, name: str, options: Sequence[str], shared: int, most: int = 0):
        major, minor = torch.cuda.get_device_capability()
        torch.cuda.current_stream().synchronize()  # there is a context now
        self._image = compiled(source, (major, minor), options)
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        cuda = _driver()
        _answer(cuda.cuModuleLoadData(ctypes.byref(module), self._image), "loading a kernel")
        _answer(cuda.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), f"finding {name}")
        most = max(most, shared)
        if most > LARGE:
            code = cuda.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, most)
            _answer(code, f"asking for {most} bytes of shared memory")
        self._shared = shared
        self._overlap = (_Attribute * 1)(_Attribute(_PROGRAMMATIC, 0, 1))
        self._launch = cuda.cuLaunchKernelEx

    def __call__(
        self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure, stream: int, overlap: bool = False,
        more: int = 0,
    ) -> None:  # fmt: skip
        """Launch with one structure as the argument and ``more`` bytes of shared memory. ``overlap`` lets it start
        before what precedes it in the stream is done; the kernel itself then waits where it has to."""
        shared = self._shared + more
        configuration = _Configuration(*grid, threads, 1, 1, shared, stream, self._overlap, int(overlap))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _answer(self._launch(ctypes.byref(configuration), self._function, parameters, None), "launching a kernel")


@functools.lru_cache(maxsize=256)
def tensor_map(address: int, rows: int, columns: int, stride: int, box: int) -> bytes:
    """How ``copy_box`` (bulk.cuh) finds 16-bit numbers ``[rows, columns]`` at ``address``, rows ``stride`` numbers
    apart, in boxes of ``box`` rows and 64 columns. Address and stride are multiples of 16 bytes."""
    place = ctypes.create_string_buffer(2 * _MAP)
    aligned = -ctypes.addressof(place) % _MAP
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * stride)
    boxes, every = (ctypes.c_uint32 * 2)(64, box), (ctypes.c_uint32 * 2)(1, 1)
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(place, aligned), _16_BITS, 2, ctypes.c_void_p(address), sizes, strides, boxes, every, 0,
        _SWIZZLED, _WHOLE_LINES, 0,
    )  # fmt: skip
    _answer(code, f"describing {rows} tokens of {columns} numbers")
    return place.raw[aligned : aligned + _MAP]


# Machine code by source, compute capability and options; other processes may have compiled it.
images: dict[tuple[Path, tuple[int, int], tuple[str, ...]], bytes] = {}


def compiled(source: Path, capability: tuple[int, int], options: Sequence[str]) -> bytes:
    """Machine code of ``source`` for a compute capability, from rarefy's cache where some process has compiled these
    very texts with this compiler. Raises UnsupportedError with the compiler's words."""
    key = source, capability, tuple(options)
    if key not in images:
        # The instructions of 9.0 that no other has go by the letter.
        suffix = "a" if capability == (9, 0) else ""
        every = [f"-arch=sm_{capability[0]}{capability[1]}{suffix}", "-std=c++17", "-default-device", *options]
        texts = {path.name: path.read_bytes() for path in (source, *sorted(source.parent.glob("*.cuh")))}
        made = hashlib.sha256(repr((_version(), every, texts)).encode()).hexdigest()
        path = cache_root() / "kernels" / "images" / f"{made}.cubin"
        images[key] = cached_bytes(path, lambda: _compile(texts, every))
    return images[key]


def _compile(texts: Mapping[str, bytes], options: Sequence[str]) -> bytes:
    """Of the first text; the others are what it includes."""
    nvrtc = _nvrtc()
    source, *headers = texts
    contents = (ctypes.c_char_p * len(headers))(*(texts[header] for header in headers))
    names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
    program = ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), texts[source], source.encode(), len(headers), contents, names
    )
    if created != 0:
        what = f"CUDA's run-time compiler answers {created} when it is given {source}"
        raise UnsupportedError(f"{what}; reinstall a CUDA build of PyTorch.")
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given) != 0:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise UnsupportedError(f"{source} does not compile with {' '.join(options)}: {log.value.decode()}")
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, image)
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _version() -> tuple[int, int]:
    """Of the compiler."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"There is no CUDA driver, so layers are computed in torch: {error}") from None


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library beside PyTorch, or wherever the system finds one."""
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    beside = [path for folder in sys.path for path in Path(folder or ".").glob(f"nvidia/*/lib/{name}")]
    for place in (name, *map(str, beside), "libnvrtc.so"):
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise UnsupportedError(f"CUDA's run-time compiler ({name}) was not found; a CUDA build of PyTorch brings it along.")


def _answer(code: int, what: str) -> None:
    if code != 0:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        raise UnsupportedError(f"CUDA answers {(name.value or b'an unknown error').decode()} when {what}.")


def check() -> None:
    """Raise UnsupportedError where kernels cannot be compiled or launched."""
    _driver()
    _nvrtc()
