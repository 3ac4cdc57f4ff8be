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

# Words of a frame from its top down, as indices into SLOT_NAMES. FRED stores two more above SS: zero, and the event data
# (Intel FRED specification, 346446).
IDT_WORDS: tuple[int, ...] = (4, 3, 2, 1, 0, 5)
FRED_WORDS: tuple[int | None, ...] = (None, None, *IDT_WORDS)
FRED_ABOVE = ("zero", "event-data")

# The popped SS word of a FRED return, from bit 16 up: bit 2 (18 of the word) unblocks NMIs.
FRED_NMI = 1 << 2

# MSRs that decide about delivery, masking and ring changes: SDM Vol. 4 table 2-2, FRED specification.
MSR_MCG_STATUS = 0x17A
MSR_TPR = 0x808
MSR_LSTAR = 0xC0000082
MSR_SYSENTER_EIP = 0x176
MSR_NAMES: dict[int, str] = {
    0x174: "SYSENTER_CS",
    0x175: "SYSENTER_ESP",
    MSR_SYSENTER_EIP: "SYSENTER_EIP",
    MSR_MCG_STATUS: "MCG_STATUS",
    0x1CC: "FRED_RSP0",
    0x1CD: "FRED_RSP1",
    0x1CE: "FRED_RSP2",
    0x1CF: "FRED_RSP3",
    0x1D0: "FRED_STKLVLS",
    0x1D4: "FRED_CONFIG",
    0x6A8: "INTERRUPT_SSP_TABLE",
    MSR_TPR: "X2APIC_TPR",
    0xC0000080: "EFER",
    0xC0000081: "STAR",
    MSR_LSTAR: "LSTAR",
    0xC0000084: "FMASK",
    0xC0000100: "FS_BASE",
    0xC0000101: "GS_BASE",
    0xC0000102: "KERNEL_GS_BASE",
}
MCIP = 1 << 2  # of MCG_STATUS: SDM Vol. 3B 15.3.1.2
CR4_MCE = 1 << 6
CR4_FRED = 1 << 32


def vector_name(vector: int) -> str:
    """`NMI`, `#PF`, ... or `vector 0xec`."""
    return VECTOR_NAMES.get(vector, f"vector {vector:#x}")


def cpl(cs: int) -> int:
    """The privilege level of a CS selector in 64-bit mode (its RPL)."""
    return cs & 3


def is_canonical(addr: int) -> bool:
    """Whether an address can be canonical: SDM Vol. 1 3.3.7.1, with 57 bits, as a trace need not tell the paging mode."""
    return addr < 1 << 56 or addr >= (1 << 64) - (1 << 56)
