"""ELF dumps of QEMU."""
