"""Tables of the architecture: vectors, error codes, RFLAGS bits, selectors. Sources: SDM Vol. 3A table 6-1, AMD APM Vol. 2."""

from __future__ import annotations

# Mnemonics of the architectural vectors; others are interrupts without a name of their own.
VECTOR_NAMES: dict[int, str] = {
    0: "#DE",
    1: "#DB",
    2: "NMI",
    3: "#BP",
    4: "#OF",
    5: "#BR",
    6: "#UD",
    7: "#NM",
    8: "#DF",
    10: "#TS",
    11: "#NP",
    12: "#SS",
    13: "#GP",
    14: "#PF",
    16: "#MF",
    17: "#AC",
    18: "#MC",
    19: "#XM",
    20: "#VE",
    21: "#CP",
    28: "#HV",
    29: "#VC",
    30: "#SX",
}

NMI = 2
DOUBLE_FAULT = 8
PAGE_FAULT = 14
MACHINE_CHECK = 18

# Exceptions (never INT n, interrupts or NMI) that push an error code: SDM Vol. 3A 6.13; #VC, #SX: APM Vol. 2 8.2.
ERROR_CODE_VECTORS = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})

# Fault-class exceptions store RFLAGS with RF set: SDM Vol. 3B 17.3.1.1.
FAULT_VECTORS = frozenset({0, 5, 6, 7, 10, 11, 12, 13, 14, 16, 17, 19, 20, 21, 29, 30})

RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9
RFLAGS_NT = 1 << 14
RFLAGS_RF = 1 << 16

GATE_INTERRUPT = 0xE
GATE_TRAP = 0xF

# Slots of a frame from its lowest address up, as bit numbers in a finding's slot masks.
SLOT_NAMES = ("rip", "cs", "rflags", "rsp", "ss", "error-code")


def vector_name(vector: int) -> str:
    """`NMI`, `#PF`, ... or `vector 0xec`."""
    return VECTOR_NAMES.get(vector, f"vector {vector:#x}")


def cpl(cs: int) -> int:
    """The privilege level of a CS selector in 64-bit mode (its RPL)."""
    return cs & 3


def is_canonical(addr: int) -> bool:
    """Whether an address can be canonical: SDM Vol. 1 3.3.7.1, with 57 bits, as a trace need not tell the paging mode."""
    return addr < 1 << 56 or addr >= (1 << 64) - (1 << 56)
