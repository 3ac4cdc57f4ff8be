"""The names that the kernel and trace-cmd print for VM exits, and their numbers.

VMX: SDM Vol. 3D appendix C; the names are those of the kernel's arch/x86/include/uapi/asm/vmx.h. SVM: APM Vol. 2 appendix C;
uapi/asm/svm.h, and libtraceevent's plugins/plugin_kvm.c (EXIT_*).
"""

from __future__ import annotations

VMX, SVM = 0, 1  # as the `arg` of a native VM exit

VMX_EXCEPTION_NMI, SVM_NMI = 0, 0x61

_VMX = {
    "EXCEPTION_NMI": 0, "EXTERNAL_INTERRUPT": 1, "TRIPLE_FAULT": 2, "INIT_SIGNAL": 3, "SIPI_SIGNAL": 4, "OTHER_SMI": 6,
    "INTERRUPT_WINDOW": 7, "PENDING_INTERRUPT": 7, "NMI_WINDOW": 8, "TASK_SWITCH": 9, "CPUID": 10, "HLT": 12, "INVD": 13,
    "INVLPG": 14, "RDPMC": 15, "RDTSC": 16, "VMCALL": 18, "VMCLEAR": 19, "VMLAUNCH": 20, "VMPTRLD": 21, "VMPTRST": 22,
    "VMREAD": 23, "VMRESUME": 24, "VMWRITE": 25, "VMOFF": 26, "VMON": 27, "CR_ACCESS": 28, "DR_ACCESS": 29,
    "IO_INSTRUCTION": 30, "MSR_READ": 31, "MSR_WRITE": 32, "INVALID_STATE": 33, "MSR_LOAD_FAIL": 34,
    "MWAIT_INSTRUCTION": 36, "MONITOR_TRAP_FLAG": 37, "MONITOR_INSTRUCTION": 39, "PAUSE_INSTRUCTION": 40,
    "MCE_DURING_VMENTRY": 41, "TPR_BELOW_THRESHOLD": 43, "APIC_ACCESS": 44, "EOI_INDUCED": 45, "GDTR_IDTR": 46,
    "LDTR_TR": 47, "EPT_VIOLATION": 48, "EPT_MISCONFIG": 49, "INVEPT": 50, "RDTSCP": 51, "PREEMPTION_TIMER": 52,
    "INVVPID": 53, "WBINVD": 54, "XSETBV": 55, "APIC_WRITE": 56, "RDRAND": 57, "INVPCID": 58, "VMFUNC": 59, "ENCLS": 60,
    "RDSEED": 61, "PML_FULL": 62, "XSAVES": 63, "XRSTORS": 64, "UMWAIT": 67, "TPAUSE": 68, "BUS_LOCK": 74, "NOTIFY": 75,
}  # fmt: skip

_VECTORS = {
    "DE": 0, "DB": 1, "BP": 3, "OF": 4, "BR": 5, "UD": 6, "NM": 7, "DF": 8, "TS": 10, "NP": 11, "SS": 12, "GP": 13, "PF": 14,
    "MF": 16, "AC": 17, "MC": 18, "XF": 19,
}  # fmt: skip
_SVM = {
    "interrupt": 0x60, "intr": 0x60, "nmi": 0x61, "smi": 0x62, "init": 0x63, "vintr": 0x64, "cr0_sel_write": 0x65,
    "read_idtr": 0x66, "read_gdtr": 0x67, "read_ldtr": 0x68, "write_idtr": 0x6A, "write_gdtr": 0x6B, "write_ldtr": 0x6C,
    "rdtsc": 0x6E, "rdpmc": 0x6F, "pushf": 0x70, "popf": 0x71, "cpuid": 0x72, "rsm": 0x73, "iret": 0x74, "swint": 0x75,
    "invd": 0x76, "pause": 0x77, "hlt": 0x78, "invlpg": 0x79, "invlpga": 0x7A, "io": 0x7B, "ioio": 0x7B, "msr": 0x7C,
    "task_switch": 0x7D, "ferr_freeze": 0x7E, "shutdown": 0x7F, "vmrun": 0x80, "hypercall": 0x81, "vmmcall": 0x81,
    "vmload": 0x82, "vmsave": 0x83, "stgi": 0x84, "clgi": 0x85, "skinit": 0x86, "rdtscp": 0x87, "icebp": 0x88,
    "wbinvd": 0x89, "monitor": 0x8A, "mwait": 0x8B, "xsetbv": 0x8D, "npf": 0x400,
    **{f"read_cr{n}": n for n in range(16)}, **{f"write_cr{n}": 0x10 + n for n in range(16)},
    **{f"read_dr{n}": 0x20 + n for n in range(16)}, **{f"write_dr{n}": 0x30 + n for n in range(16)},
    **{f"{name} excp": 0x40 + vector for name, vector in _VECTORS.items()},
    **{f"excp_{name.lower()}": 0x40 + vector for name, vector in _VECTORS.items()},
}  # fmt: skip


def reason(name: str) -> tuple[int | None, int | None]:
    """Vendor and number of an exit; None where the name does not tell."""
    if name in _VMX:
        return VMX, _VMX[name]
    own = name.removeprefix("EXIT_").lower() if name.startswith("EXIT_") else name
    if own in _SVM:
        return SVM, _SVM[own]
    return None, None
