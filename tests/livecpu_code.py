"""The guest's code: a dispatcher that takes operations from a tape in R15, and what the operations do.

Whoever runs - the start, a handler, user mode - reads the next operation from the same tape, so a program is a list of
operations and dropping some of them leaves a program. Operands are in RBX and RCX. No instruction changes an
arithmetic flag: the package does not show them.
"""

from __future__ import annotations

from functools import cache

CODE = 0x10000
HANDLERS = CODE + 0x8000  # 16 bytes a vector, twice
CODE_SIZE = 0xA000
COPIES = 4  # of the dispatcher and every operation: saved RIPs differ
COPY_SIZE = 0x2000
APIC_EOI, APIC_SVR, APIC_ICR = 0x1FF0B0, 0x1FF0F0, 0x1FF300
USER_CS, USER_SS = 0x23, 0x1B

_DISPATCHER = ("498b07", "498b5f08", "498b4f10", "4d8d7f18", "ffe0")  # rax rbx rcx = r15[0..2]; lea r15, [r15+24]; jmp rax
_VECTORS = (0, 1, 2, 3, 6, 8, 13, 14, 18, *range(0x20, 0x30))


def _apic_store(register: int) -> str:
    return "891c25" + register.to_bytes(4, "little").hex()  # mov [register], ebx


# The instructions of each operation.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "nop": ("90",),
    **{f"int {n:#x}": (f"cd{n:02x}",) for n in _VECTORS},
    "int3": ("cc",),
    "icebp": ("f1",),
    "ud2": ("0f0b",),
    "load": ("488b03",),  # mov rax, [rbx]
    "load-ss": ("4889dd", "488b4500"),  # mov rbp, rbx; mov rax, [rbp]
    "store8": ("48890b",),  # mov [rbx], rcx
    "store4": ("890b",),
    "store1": ("880b",),
    "push": ("53",),  # push rbx
    "adjust": ("488d241c",),  # lea rsp, [rsp+rbx]
    "set-rsp": ("4889dc",),
    "iret": ("48cf",),
    "sti": ("fb",),
    "cli": ("fa",),
    "icr": (_apic_store(APIC_ICR),),
    "svr": (_apic_store(APIC_SVR),),
    "eoi": (_apic_store(APIC_EOI),),
    # push USER_SS; push rcx; push 0x202; push USER_CS; push rbx; iretq
    "user": (f"6a{USER_SS:02x}", "51", "6802020000", f"6a{USER_CS:02x}", "53", "48cf"),
}


def _place() -> tuple[dict[tuple[str, int], int], dict[int, bytes]]:
    """Where each operation begins, and all instructions by address."""
    begins: dict[tuple[str, int], int] = {}
    code: dict[int, bytes] = {}

    def put(at: int, instructions: tuple[str, ...]) -> int:
        for instruction in instructions:
            code[at] = bytes.fromhex(instruction)
            at += len(code[at])
        return at

    for copy in range(COPIES):
        dispatcher = at = CODE + copy * COPY_SIZE
        at = put(at, _DISPATCHER)
        for name, instructions in OPERATIONS.items():
            at = begins[name, copy] = (at + 15) & ~15
            at = put(at, instructions)
            at = put(at, (_jump(at, dispatcher),))
        assert at <= dispatcher + COPY_SIZE
    for copy in range(2):
        for vector in range(256):
            at = put(handler(vector, copy), ("90",))
            put(at, (_jump(at, CODE + (vector + copy) % COPIES * COPY_SIZE),))
    return begins, code


def handler(vector: int, copy: int) -> int:
    """Where a handler begins. Its first instruction cannot fault: the model saves a wrong RIP for that after an NMI."""
    return HANDLERS + copy * 0x1000 + vector * 16


def _jump(at: int, to: int) -> str:
    return "e9" + (to - at - 5).to_bytes(4, "little", signed=True).hex()


ADDRESS, INSTRUCTIONS = _place()
DISPATCH = frozenset(CODE + copy * COPY_SIZE for copy in range(COPIES))
ADJUST = frozenset(ADDRESS[name, copy] for name in ("adjust", "set-rsp") for copy in range(COPIES))
IRETS = frozenset(at for at, code in INSTRUCTIONS.items() if code == b"\x48\xcf")


@cache
def image() -> bytes:
    """The code, from CODE up; between the pieces INT3."""
    out = bytearray(b"\xcc" * CODE_SIZE)
    for at, code in INSTRUCTIONS.items():
        out[at - CODE : at - CODE + len(code)] = code
    return bytes(out)


@cache
def inside() -> frozenset[int]:
    """Addresses in the middle of an instruction. What runs there could change flags that the package does not show."""
    return frozenset(at + n for at, code in INSTRUCTIONS.items() for n in range(1, len(code)))
