"""Triton kernels on a machine without a GPU: run by the interpreter under guard, counted, and compiled to machine code.

    with interpreting() as launches: …      kernels run on CPU tensors; each launch is recorded, each address checked
    with compiling(arch=90) as compiled: …  kernels are compiled as a launch on sm_90 would have them; nothing runs

Both take the library's own host functions (on CPU tensors; on meta tensors), so that what is tested is what ships.
`mutant` plants a fault in a copy of a module: a test that cannot find it proves nothing.
Tied to the pinned Triton: it reaches into the interpreter, some of whose faults it mends.
"""

import importlib.util
import linecache
import math
import re
import subprocess
import tempfile
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.compiler.code_generator  # before anything is interpreted: it copies functions that the interpreter replaces
import triton.language as tl
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from minilora.kernels import arithmetic, backend

SECTOR = 32  # bytes: what DRAM hands out at once


class _StandInDriver:
    """What Triton asks of a driver before it launches, for a device that is not there."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0


@contextmanager
def _standing_in(arch: int):
    old = driver._active
    driver.set_active(_StandInDriver(arch))
    try:
        yield
    finally:
        driver._active = old


# ── interpret ────────────────────────────────────────────────────────────────────────────────────────────────────────


class MemoryFault(AssertionError):
    """A kernel touched what is not its own, or two of its programs wrote one address."""


@dataclass
class Launch:
    """What one launch did."""

    kernel: str
    flops: int = 0  # of matrix products, padding included
    read: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))  # sectors, by argument
    written: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    @property
    def bytes(self) -> dict[str, int]:
        """By argument, each sector once for reading and once for writing."""
        moved = Counter()
        for sectors in (self.read, self.written):
            moved.update({name: SECTOR * len(np.unique(np.concatenate(parts))) for name, parts in sectors.items()})
        return dict(moved)


class _Memory:
    """The argument tensors of the running launch, and what was done to them."""

    def __init__(self, launch: Launch, arguments: dict):
        self.launch = launch
        self.tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor) and t.numel()}
        self.legal = {name: self._addresses(t) for name, t in self.tensors.items()}
        self.written: list[np.ndarray] = []

    @staticmethod
    def _addresses(t: torch.Tensor) -> np.ndarray:
        offsets = np.zeros(1, np.int64)
        for size, stride in zip(t.shape, t.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
        return np.unique(t.data_ptr() + offsets * t.element_size())

    def touch(self, pointers: TensorHandle, mask: TensorHandle, writing: bool) -> None:
        addresses = np.asarray(pointers.data)
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)].astype(np.int64)
        if not addresses.size:
            return
        name = next((name for name, legal in self.legal.items() if self._all_in(addresses, legal)), None)
        if name is None:
            raise MemoryFault(f"{self.launch.kernel} {'stores to' if writing else 'loads'} what is no element of one argument")
        (self.launch.written if writing else self.launch.read)[name].append(np.unique(addresses // SECTOR))
        if writing:
            self.written.append(addresses)

    @staticmethod
    def _all_in(addresses: np.ndarray, legal: np.ndarray) -> bool:
        at = np.minimum(np.searchsorted(legal, addresses), len(legal) - 1)
        return bool((legal[at] == addresses).all())

    def close(self) -> None:
        if self.written:
            everything = np.concatenate(self.written)
            if len(np.unique(everything)) != len(everything):
                raise MemoryFault(f"{self.launch.kernel} stores to one address twice")


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> np.ndarray:
    """A handle's numbers; the interpreter holds those of bfloat16 as their bits."""
    if not _is_bf16(handle):
        return handle.data
    return torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16)).view(torch.bfloat16).float().numpy()


def _as_bf16(numbers: np.ndarray) -> TensorHandle:
    rounded = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _builder_methods(memory: list[_Memory]) -> dict:
    """The interpreter's operations, recorded, guarded and mended; memory[-1] is the running launch's."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    cast, binary, unary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def masked_load(self, pointers, mask, other, *more):
        memory[-1].touch(pointers, mask, writing=False)
        if other is None and not np.all(mask.data):  # undefined on a GPU: here it is what nobody can overlook
            number = interpreter._get_np_dtype(pointers.get_element_ty())
            poison = np.nan if number.kind == "f" else 0x7FC0 if number == np.uint16 else np.iinfo(number).max
            other = TensorHandle(np.full(np.shape(pointers.data), poison, number), pointers.get_element_ty())
        return load(self, pointers, mask, other, *more)

    def masked_store(self, pointers, value, mask, *more):
        memory[-1].touch(pointers, mask, writing=True)
        return store(self, pointers, value, mask, *more)

    def cast_impl(self, source, to):
        if tl.bfloat16 not in (source.dtype.scalar, to.scalar) or source.dtype.scalar == to.scalar:
            return cast(self, source, to)
        numbers = _widened(source)
        return (
            _as_bf16(numbers)
            if to.scalar == tl.bfloat16
            else TensorHandle(numbers.astype(interpreter._get_np_dtype(to)), to.scalar)
        )

    def binary_op(self, left, right, operation):
        if not _is_bf16(left):
            return binary(self, left, right, operation)
        numbers = operation(_widened(left), _widened(right))
        return TensorHandle(numbers, left.dtype.scalar) if numbers.dtype == np.bool_ else _as_bf16(numbers)

    def unary_op(self, handle, operation):
        return _as_bf16(operation(_widened(handle))) if _is_bf16(handle) else unary(self, handle, operation)

    def dot(self, a, b, c, precision, _):
        x, y = _widened(a).astype(np.float32), _widened(b).astype(np.float32)
        if a.dtype.scalar == tl.float32 and "TF32" in str(precision):  # tensor cores read 10 bits of the mantissa
            x, y = ((u.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for u in map(np.ascontiguousarray, (x, y)))
        memory[-1].launch.flops += 2 * x.size * y.shape[-1]
        return TensorHandle(x @ y + c.data, c.dtype.scalar)

    return {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "cast_impl": cast_impl,
        "create_fp_to_fp": lambda self, source, to, rounding: cast_impl(self, source, to),
        "binary_op": binary_op,
        "unary_op": unary_op,
        "create_dot": dot,
    }


@contextmanager
def interpreting(arch: int = 90) -> Iterator[list[Launch]]:
    """Runs kernels on CPU tensors, with the tiles of sm_<arch>; yields the launches as they come.

    Raises inside: MemoryFault, for an address outside every argument tensor or stored to twice in a launch. Memory from
    torch.empty holds NaN, so that an element never written shows.
    """
    launches, memory = [], []
    functions: dict = {}

    def function(kernel: JITFunction) -> InterpretedFunction:
        return functions.setdefault(kernel.fn, InterpretedFunction(kernel.fn))

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel.fn.__name__))
        memory.append(_Memory(launches[-1], dict(zip(kernel.arg_names, args, strict=False)) | kwargs))
        try:
            GridExecutor(function(kernel).rewrite(), kernel.arg_names, grid)(*args, **kwargs)
        except interpreter.InterpreterError as error:
            raise error.__cause__ from None
        memory.pop().close()

    with ExitStack() as stack:
        stack.enter_context(_standing_in(arch))
        stack.enter_context(mock.patch.object(backend, "_obstacle_of", return_value=""))
        stack.enter_context(mock.patch.object(arithmetic, "multiplies", return_value=True))  # as a GPU does, any dtype
        for name, method in _builder_methods(memory).items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, method))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        # Copies of the arguments to the host and back: they are there, and may be larger than the memory that they touch.
        stack.enter_context(mock.patch.object(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs)))
        stack.enter_context(mock.patch.object(GridExecutor, "_restore_args_dev"))
        # Functions called by kernels: Triton's own way patches its language again for each call, and never restores it.
        stack.enter_context(
            mock.patch.object(JITFunction, "__call__", lambda kernel, *a, **k: function(kernel).rewrite()(*a, **k))
        )
        stack.callback(interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})).restore)
        deterministic = torch.are_deterministic_algorithms_enabled()
        stack.callback(torch.use_deterministic_algorithms, deterministic)
        torch.use_deterministic_algorithms(True)
        yield launches


# ── compile ──────────────────────────────────────────────────────────────────────────────────────────────────────────

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes that one block may have
# Multiply-and-add of 16-bit numbers into float32, in operations (2 each) a clock and processor; bytes from DRAM likewise.
TENSOR_RATE = {80: 2048, 89: 512, 90: 4096}
DRAM_RATE = {80: 10.2, 89: 3.1, 90: 13.9}  # A100 40 GB at 1.41 GHz, RTX 4090 at 2.52 GHz, H100 SXM at 1.83 GHz
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)(.*)$")


@dataclass
class Compiled:
    """A kernel as one launch would have it, with the facts of its machine code."""

    kernel: str
    arch: int
    constants: dict  # the launch's keyword arguments: tile and options
    registers: int  # of a thread
    stack: int  # bytes of a thread; more than 0 is spilled
    shared: int  # bytes of a block
    opcodes: Counter
    ptx: str
    loop: list[tuple[str, str]]  # opcode and its suffixes, of the innermost loop with the most tensor-core work

    @property
    def spill_instructions(self) -> int:
        return self.opcodes["STL"] + self.opcodes["LDL"]

    @property
    def tensor_instructions(self) -> int:
        return self.opcodes["HMMA"] + self.opcodes["HGMMA"]

    @property
    def loads_in_flight(self) -> int:
        """The largest number of wgmma groups that the code lets run on while it waits: above 0, products overlap loads."""
        return max((int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", self.ptx)), default=0)

    @property
    def issue_clocks(self) -> float:
        """To issue one turn of the loop: four schedulers a processor, one instruction a clock each."""
        return len(self.loop) * self.constants["num_warps"] / 4

    @property
    def issue_ratio(self) -> float:
        """Clocks to issue the loop's instructions over clocks of its tensor cores: above 1, they wait for instructions."""
        return self.issue_clocks / (_loop_operations(self.loop, self.constants["num_warps"]) / TENSOR_RATE[self.arch])


def _loop_operations(loop: list[tuple[str, str]], warps: int) -> int:
    """Tensor-core operations of all warps in one turn of a loop."""
    total = 0
    for opcode, suffixes in loop:
        if opcode == "HMMA":  # HMMA.16816: 16 × 8 × 16, for each warp
            rows, columns, depth = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[suffixes.split(".")[1]]
            total += 2 * rows * columns * depth * warps
        elif opcode == "HGMMA":  # HGMMA.64x256x16: for four warps together
            rows, columns, depth = map(int, suffixes.split(".")[1].split("x"))
            total += 2 * rows * columns * depth * warps // 4
    return total


def _main_loop(lines: list[str]) -> list[tuple[str, str]]:
    labels, instructions, loops = {}, [], []
    for line in lines:
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append((match[2], match[3]))
            back = re.search(r"`\((\.L_x_\d+)\)", match[4]) if match[2] == "BRA" else None
            if back and labels.get(back[1], len(instructions)) < len(instructions) - 1:
                loops.append(instructions[labels[back[1]] :])
    return max(loops, key=lambda loop: (_loop_operations(loop, 4), -len(loop)), default=[])


def examine(name: str, arch: int, constants: dict, kernel) -> Compiled:
    """Reads the facts of a compiled kernel from its machine code, with the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines = code.splitlines()
    return Compiled(
        name,
        arch,
        constants,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        opcodes=Counter(match[2] for match in map(_INSTRUCTION.match, lines) if match),
        ptx=kernel.asm["ptx"],
        loop=_main_loop(lines),
    )


@contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Compiles for sm_<arch> what each launch on meta tensors would run; yields the kernels as they come."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        result = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(examine(kernel.fn.__name__, arch, kwargs, result))

    with _standing_in(arch), mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


# ── count ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Operation(NamedTuple):
    """A launch."""

    bytes: int
    flops: int  # of matrix products
    kernel: str  # a Triton kernel's name, which ends in _kernel, or that of torch's operation


NO_LAUNCH = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view")  # beside what is marked as a view
READS = {"embedding": 1, "nll_loss_forward": 1, "nll_loss_backward": 0}  # of what they write; they take a table, or its shape
IN_PLACE = {"cross_entropy_kernel": "Z"}  # arguments that a kernel reads and overwrites


class Traffic(TorchDispatchMode):
    """Sums what operations on meta tensors would move and multiply, Triton launches and torch's own alike.

    Each launch and each torch operation reads its tensors once and writes its results once: within one, caches serve every
    further use; from one to the next, they remember nothing. Our own operations launch what they would on a GPU. Tensors without
    values answer every question with yes, and a mask picks all rows.
    """

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.bytes = Counter()  # by operation's name
        self.partial = 0  # bytes of partial sums, (count, …), written by launches and read again to be added

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace == "minilora":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs or {})
        if name in ("is_nonzero", "item", "_local_scalar_dense") and args[0].is_meta:
            return True
        if name == "nonzero" and args[0].is_meta:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if name == "index" and args[1][0].dtype == torch.bool:
            return self.__torch_dispatch__(torch.ops.aten.clone.default, types, args[:1])
        out = function(*args, **kwargs or {})
        if not function.is_view and not name.startswith(NO_LAUNCH):
            self._count(name, args, kwargs, out)
        return out

    def _count(self, name: str, args, kwargs, out) -> None:
        """Counts one of torch's own operations."""
        read = args[1:] if name == "copy_" else args  # what it is copied over is not read
        inputs = [t for t in tree_leaves((read, kwargs)) if isinstance(t, torch.Tensor)]
        written = args[0] if name.startswith("_foreach") and name.endswith("_") else out
        results = [t for t in tree_leaves(written) if isinstance(t, torch.Tensor)]
        if name in ("sum", "_to_copy"):  # the second rounds what the first has added, and reads what that wrote
            self.partial += sum(map(_own_bytes, inputs)) * (1 if name == "sum" else 2)
        flops = 0
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            flops = 2 * inputs[-2].numel() * inputs[-1].shape[-1]
        elif name == "linear":  # inside our operations, which autograd does not take apart
            flops = 2 * inputs[0].numel() * len(inputs[1])
        elif name.startswith("_scaled_dot_product_flash_attention"):
            # Q Kᵀ and P V; backward makes Q Kᵀ again, and dP, dQ, dK and dV. Half of each, which is causal.
            query, key = inputs[-3:-1] if len(inputs) == 3 else inputs[1:3]
            flops = (2 if len(inputs) == 3 else 5) * query.numel() * key.shape[-2]
        inputs = READS[name] * results if name in READS else inputs
        if inputs or results:
            self.add(name, [*inputs, *results], flops)

    def launch(self, kernel: JITFunction, arguments: dict) -> None:
        """Counts a Triton launch: the products of its equation, without what tiles pad."""
        tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
        if "SLICES" in arguments:
            self.partial += sum(_own_bytes(t) for t in tensors.values() if t.ndim == 3 and len(t) > 1)
        overwritten = [t for name, t in tensors.items() if name == IN_PLACE.get(kernel.fn.__name__)]
        self.add(kernel.fn.__name__, [*tensors.values(), *overwritten], self._products(tensors, arguments))

    @staticmethod
    def _products(tensors: dict, arguments: dict) -> int:
        """Operations of a LoRA kernel's products; the other kernels have none."""
        if "SLICES" not in arguments:
            return 0
        wide = tensors["X"] if "X" in tensors else tensors["P"]
        update = len(wide) * arguments["R"] * sum(stop - start for start, stop, _ in arguments["SLICES"])
        frozen = wide.numel() * arguments["N"] if "X" in tensors else 0
        return 2 * (frozen + update * (2 if "T" in tensors else 1))

    def add(self, name: str, tensors, flops: int = 0) -> None:
        moved = sum(map(_own_bytes, tensors))
        self.bytes[name] += moved
        self.operations.append(Operation(moved, flops, name))


def _own_bytes(t: torch.Tensor) -> int:
    """Of the distinct elements of t, which may be expanded."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)


@contextmanager
def counting(arch: int) -> Iterator[Traffic]:
    """Counts what functions, called on meta tensors, would launch and move on sm_<arch>; nothing is compiled or run."""

    def count_only(kernel, *args, grid, warmup, **kwargs):
        traffic.launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs)

    with ExitStack() as stack:
        stack.enter_context(_standing_in(arch))
        stack.enter_context(mock.patch.object(backend, "_obstacle_of", return_value=""))
        stack.enter_context(mock.patch.object(JITFunction, "run", count_only))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash_attention))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", return_value=False))  # it knows no meta device,
        stack.enter_context(mock.patch.object(torch, "autocast", return_value=nullcontext()))  # and nor does this
        yield (traffic := stack.enter_context(Traffic()))


def _flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What scaled_dot_product_attention launches on a GPU for a causal sequence without a mask."""
    assert (attn_mask, is_causal, enable_gqa) == (None, True, False), "only plain causal attention is counted"
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


# ── mutate ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def planted(module, old: str, new: str, count: int, folder: Path):
    """A copy of a module with a fault planted in its source: new, where old stands count times."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == count, "the source has changed: plant this fault anew"
    path = folder / f"{Path(module.__file__).stem}_with_a_fault.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    linecache.checkcache()  # of a fault planted in the same folder before
    spec = importlib.util.spec_from_file_location(path.stem, path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant
