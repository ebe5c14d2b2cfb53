"""Compiles a kernel for a target without a device, and reads what came out: SASS on CUDA, AMDGCN assembly on ROCm.

Triton's wheel carries ptxas, nvdisasm and cuobjdump, and LLVM's AMDGPU back end; none of them asks for a driver. What
they print is read into `MachineCode`, on which budgets stand (`compile_matrix.py`): registers, spills, memory on chip,
matrix instructions, widths of global loads, instructions in the main loop. Nothing here says how fast a kernel is.

How it is counted:
    instructions     of the kernel, without NOP and what follows the last exit for alignment (CUDA pads by NOP)
    main loop        the longest innermost loop: from the target of a backward branch to that branch, no other inside
    spills           CUDA: LDL and STL, which Triton's code has for nothing else. ROCm: scratch_ instructions, and
                     buffer_ instructions that LLVM marks "Folded Spill" or "Folded Reload"
    loads            from global memory, by bits of one thread's load; "tma" for bulk copies. ROCm's scalar loads
                     (s_load: arguments and uniform values) are left out
"""

import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..gpu.compile_case import CompileCase
from ..gpu.target import Target

Instruction = tuple[str, str]  # mnemonic with its suffixes, operands


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What a compiled kernel asks of the device, per thread where not said otherwise.

    registers: 32-bit registers; ROCm: vector registers, accumulation registers included.
    spill_bytes: local memory (CUDA: stack and local, ROCm: private segment).
    spill_instructions: loads and stores of local memory in the listing.
    shared_bytes: shared memory (LDS) of a program.
    tensor_memory_columns: sm_100's tensor memory of a program, out of 512.
    matrix: matrix instruction (without suffixes on CUDA, with its shape on ROCm) -> how often it stands in the listing.
    loads: bits of one global load ("128", "32", or "tma") -> how often it stands in the listing.
    loop_loads: the same inside the main loop.
    instructions, loop_instructions: of the kernel and of its main loop (0: it has no loop).
    compile_s: wall seconds it took, near 0 where Triton's cache had it.
    """

    registers: int
    spill_bytes: int
    spill_instructions: int
    shared_bytes: int
    tensor_memory_columns: int
    matrix: Mapping[str, int]
    loads: Mapping[str, int]
    loop_loads: Mapping[str, int]
    instructions: int
    loop_instructions: int
    compile_s: float = field(default=0.0, compare=False)

    def wide_share(self) -> float:
        """Share of the globally loaded bytes that come 128 bits or more at a time: in the main loop, where it loads."""
        loads = self.loop_loads or self.loads
        bits = {width: count * (128 if width == "tma" else int(width)) for width, count in loads.items()}
        wide = sum(amount for width, amount in bits.items() if width == "tma" or int(width) >= 128)
        return wide / sum(bits.values()) if bits else 0.0


def compile_kernel(case: CompileCase, target: Target) -> MachineCode:
    """`case` compiled for `target`, by Triton's cache (TRITON_CACHE_DIR) where it was compiled before.

    ValueError where kernels are interpreted (TRITON_INTERPRET=1: there is nothing to compile); whatever Triton, LLVM or
    ptxas raise where they refuse the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(case.kernel, triton.JITFunction):
        raise ValueError(f"{case.name} is interpreted: unset TRITON_INTERPRET before the kernels are imported")
    start = time.perf_counter()
    compiled: Any = triton.compile(
        ASTSource(case.kernel, _signature(case), dict(case.constants), _attributes(case, target)),
        target=GPUTarget(target.backend, target.triton_arch, target.warp_threads),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": True,  # the default of Triton 3.9 changes in 3.10
            **case.options,
        },
    )
    compile_s = time.perf_counter() - start
    shared_bytes = compiled.metadata.shared
    if target.backend == "hip":
        return read_amdgcn(compiled.asm["amdgcn"], shared_bytes, compile_s)
    listing, usage = _disassemble(compiled.asm["cubin"])
    return read_sass(listing, usage, shared_bytes, getattr(compiled.metadata, "tmem_size", 0) or 0, compile_s)


def _signature(case: CompileCase) -> dict[str, str]:
    """In the kernel's order, constants among the rest. ValueError where an argument is missing or unknown."""
    given = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    names = case.kernel.arg_names
    if set(given) != set(names) or len(given) != len(case.signature) + len(case.constants):
        wrong = sorted(set(given) ^ set(names)) or sorted(set(case.signature) & set(case.constants))
        raise ValueError(f"{case.name}: give each argument once, in signature or constants; wrong: {', '.join(wrong)}")
    return {name: given[name] for name in names}


def _attributes(case: CompileCase, target: Target) -> dict[tuple[int, ...], list[list[Any]]]:
    """What the launch would find out from the arguments: divisible by 16; on ROCm, no larger than 2 GiB."""
    names = case.kernel.arg_names
    unknown = {*case.aligned, *case.large} - set(case.signature)
    if unknown:
        raise ValueError(f"{case.name}: aligned or large arguments that it has not: {', '.join(sorted(unknown))}")
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (names.index(name),): [["tt.divisibility", 16]] for name in case.aligned
    }
    if target.backend == "hip":
        for name, kind in case.signature.items():
            if kind.startswith("*") and name not in case.large:
                attributes.setdefault((names.index(name),), []).append(["tt.pointer_range", 32])
    return attributes


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """nvdisasm's listing and cuobjdump's resource usage."""
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (["nvdisasm", "-c", file.name], ["cuobjdump", "-res-usage", file.name])
        listing, usage = (
            subprocess.run([os.path.join(tools, tool), *rest], capture_output=True, text=True, check=True, timeout=120)
            for tool, *rest in commands
        )
    return listing.stdout, usage.stdout + usage.stderr


_SASS_LABEL = re.compile(r"\s*(\.L\w+):")
_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_MATRIX = re.compile(r"([HIQODB]MMA|[HIQ]GMMA|UTC\w*MMA)\b")
_SASS_LOAD = re.compile(r"(LDG|LDGSTS|LD)\.")
_SASS_TMA = re.compile(r"(UTMALDG|UBLKCP)\b")
_SASS_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+).*?LOCAL:(\d+)", re.DOTALL)


def read_sass(
    listing: str, usage: str, shared_bytes: int, tensor_memory_columns: int = 0, compile_s: float = 0.0
) -> MachineCode:
    """From `nvdisasm -c` and `cuobjdump -res-usage`. ValueError where the latter does not say what the kernel uses."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (match := _SASS_LINE.match(line)) and match[1] != "NOP":
            instructions.append((match[1], match[2]))
    used = _SASS_USAGE.search(usage)
    if used is None:
        raise ValueError(f"cuobjdump does not say what the kernel uses: {usage.strip()[-200:]!r}")
    registers, stack, local = (int(number) for number in used.groups())
    loop = _longest_innermost_loop(instructions, labels, "BRA")
    return MachineCode(
        registers=registers,
        spill_bytes=stack + local,
        spill_instructions=sum(name.split(".")[0] in ("LDL", "STL") for name, _ in instructions),
        shared_bytes=shared_bytes,
        tensor_memory_columns=tensor_memory_columns,
        matrix=Counter(match[1] for name, _ in instructions if (match := _SASS_MATRIX.match(name))),
        loads=Counter(filter(None, (_sass_load_bits(name) for name, _ in instructions))),
        loop_loads=Counter(filter(None, (_sass_load_bits(name) for name, _ in loop))),
        instructions=len(instructions),
        loop_instructions=len(loop),
        compile_s=compile_s,
    )


def _sass_load_bits(name: str) -> str | None:
    """LDG.E.128 and LDGSTS.E.BYPASS.LTC128B.128 load 128 bits, LDG.E 32, LDG.E.U16 16; None where it loads nothing."""
    if _SASS_TMA.match(name):
        return "tma"
    if not _SASS_LOAD.match(name):
        return None
    for part in name.split("."):
        if part in ("256", "128", "64"):
            return part
        if part in ("U16", "S16", "U8", "S8"):
            return part[1:]
    return "32"


_GCN_LABEL = re.compile(r"([.\w$]+):")
_GCN_LINE = re.compile(r"\t([a-z]\w+)(?:[ \t]+(.*))?$")
_GCN_MATRIX = re.compile(r"v_s?w?(?:mfma|mfmac|wmma|wmmac|mmac)_\w+")
_GCN_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_|tr_)?(\w+)")
_GCN_LOAD_BITS = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32"}
_GCN_SPILL = re.compile(r"scratch_(?:load|store)_")
_GCN_BRANCHES = ("s_branch", "s_cbranch")


def read_amdgcn(assembly: str, shared_bytes: int, compile_s: float = 0.0) -> MachineCode:
    """From the assembly text that LLVM prints. ValueError where its metadata are missing."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := _GCN_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (match := _GCN_LINE.match(line)) and match[1] not in ("s_nop", "s_code_end"):
            instructions.append((match[1], match[2] or ""))
    loop = _longest_innermost_loop(instructions, labels, _GCN_BRANCHES)
    return MachineCode(
        registers=_metadata(assembly, "vgpr_count"),
        spill_bytes=_metadata(assembly, "private_segment_fixed_size"),
        spill_instructions=sum(bool(_GCN_SPILL.match(name)) or " Folded " in rest for name, rest in instructions),
        shared_bytes=shared_bytes,
        tensor_memory_columns=0,
        matrix=Counter(name for name, _ in instructions if _GCN_MATRIX.match(name)),
        loads=Counter(filter(None, (_gcn_load_bits(name) for name, _ in instructions))),
        loop_loads=Counter(filter(None, (_gcn_load_bits(name) for name, _ in loop))),
        instructions=len(instructions),
        loop_instructions=len(loop),
        compile_s=compile_s,
    )


def _gcn_load_bits(name: str) -> str | None:
    """global_load_dwordx4 and buffer_load_b128 load 128 bits, buffer_load_ushort and global_load_d16_b16 16."""
    match = _GCN_LOAD.match(name)
    if match is None:
        return None
    kind = match[1]
    if kind in _GCN_LOAD_BITS:
        return _GCN_LOAD_BITS[kind]
    number = re.search(r"[bui](\d+)$", kind.replace("d16_hi_", "").replace("d16_", "").removesuffix("_d16"))
    if number:
        return number[1]
    return "8" if "byte" in kind else "16"  # ubyte, sbyte_d16; ushort, short_d16


def _metadata(assembly: str, key: str) -> int:
    match = re.search(rf"^\s*\.{key}:\s+(\d+)", assembly, re.MULTILINE)
    if match is None:
        raise ValueError(f"the assembly does not say its .{key}: was it made for another code object version?")
    return int(match[1])


def _longest_innermost_loop(
    instructions: list[Instruction], labels: Mapping[str, int], branches: str | tuple[str, ...]
) -> list[Instruction]:
    """The main loop; empty where no branch of more than one instruction goes back."""
    loops = []
    for end, (name, operands) in enumerate(instructions):
        if name.startswith(branches):
            starts = [labels[word] for word in re.findall(r"[.\w$]+", operands) if word in labels]
            loops += [(start, end) for start in starts if start < end]
    innermost = [
        loop
        for loop in loops
        if not any(inner != loop and loop[0] <= inner[0] and inner[1] <= loop[1] for inner in loops)
    ]
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    return instructions[start : end + 1]
