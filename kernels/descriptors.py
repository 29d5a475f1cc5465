"""Whether the matrix instructions of a kernel compiled for Hopper read the shared memory that they are meant to.

An operand in shared memory is named by a descriptor in four uniform registers, or two where the other operand is in
registers: its address and layout, which are known to the compiler but for the block's own base. ptxas 12.8.93, which
triton 3.6 brings, computes some descriptors of a product's second and later steps from a register that holds something
else, the program's id for one, though what it was given is right. Such an instruction reads other shared memory than
its own, without a word, or none, which is an illegal access.
"""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?PT?\d*\s+)?(\S+)\s*([^;]*?)\s*;")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
#: What no descriptor may come from: kernel arguments and special registers, but for the base and the thread's index.
_FOREIGN = re.compile(r"c\[0x0\]|\bSR_(?!CgaCtaId|TID|LANEID)")
_LOADS = ("LD", "ATOM", "RED", "SHFL", "HGMMA")

Known = frozenset[tuple[str, int]]  #: registers that hold what a descriptor may come from


def strange_descriptors(sass: str) -> list[str]:
    """Hopper's matrix instructions in what `cuobjdump --dump-sass` prints, with an address or layout from elsewhere.

    What came through memory counts as such, so that in code that spills sound ones can be among them.
    """
    code = _INSTRUCTION.findall(sass)
    arriving: dict[str, Known] = {}  # by address, what is known wherever the program comes from
    while True:
        strange, known, before = [], frozenset[tuple[str, int]](), dict(arriving)
        for address, predicate, operation, operands in code:
            known = known & arriving.get(address, known)
            if operation.startswith("BRA"):
                target = f"{int(operands.split(',')[-1].split()[-1], 16):04x}"
                arriving[target] = arriving.get(target, known) & known
            elif operation.startswith("HGMMA") and "gdesc[" in operands:
                if not _descriptor(operands) <= known:
                    strange.append(f"{address}: {operation} {operands}")
            else:
                known = _after(known, bool(predicate), operation, operands)
        if arriving == before:
            return strange


def _descriptor(operands: str) -> Known:
    """The registers that name an instruction's operands in shared memory; none of an empty one, gdesc[URZ]."""
    if (named := re.search(r"gdesc\[UR(\d+)\]", operands)) is None:
        return frozenset()
    first, left_in_registers = int(named[1]), re.match(r"\w+, R\d+,", operands)
    return frozenset(("UR", i) for i in range(first + 2 if left_in_registers else first, first + 4))


def _after(known: Known, is_conditional: bool, operation: str, operands: str) -> Known:
    target, _, sources = operands.partition(",")
    if not (written := re.fullmatch(r"(U?R)(\d+)", target)):
        return known
    is_wide = ".64" in operation or "WIDE" in operation
    words = 4 if ".128" in operation else 2 if is_wide else 1
    read = {(kind, int(i)) for kind, i in _REGISTER.findall(sources)}
    if ".64" in operation:
        read |= {(kind, i + 1) for kind, i in read}
    results = {(written[1], int(written[2]) + i) for i in range(words)}
    if operation.startswith(_LOADS) or _FOREIGN.search(sources) or not read <= known:
        return known - results
    return known if is_conditional else known | results
