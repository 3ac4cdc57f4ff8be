"""The symbol table of an ELF file (vmlinux, xen-syms, a firmware image): pyelftools finds it, struct reads its records."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from elftools.elf.elffile import ELFFile

from tracedbg.errors import FormatError

MAX_NAME = 4096  # bytes; longer ones are cut
_SYM = struct.Struct("<IBBHQQ")  # st_name st_info st_other st_shndx st_value st_size: ELF-64, figure 6
_FUNC, _CODE = 2, frozenset({0, 2, 10})  # STT_NOTYPE (assembly), STT_FUNC, STT_GNU_IFUNC
_KINDS = _CODE | {1}  # STT_OBJECT
_SHN_RESERVED = 0xFF00  # absolute and common symbols are no addresses


@dataclass(frozen=True, slots=True)
class ElfSymbol:
    """One symbol; `size` 0: not told."""

    address: int
    size: int
    name: bytes
    is_code: bool
    is_local: bool


def elf_symbols(data: bytes, path: str, limit: int) -> Iterator[ElfSymbol]:
    """The defined symbols of code and data. Raises FormatError: no 64-bit x86 image, damaged, or more than `limit`."""
    records, names, at = _tables(data, path)
    if len(records) // _SYM.size > limit:
        raise FormatError(path, f"more than {limit} symbols", at)
    for name_at, info, _, section, address, size in _SYM.iter_unpack(records):
        kind = info & 15
        if kind not in _KINDS or not 0 < section < _SHN_RESERVED or not 0 < name_at < len(names):
            continue
        end = names.find(b"\0", name_at, name_at + MAX_NAME)
        name = names[name_at : end if end >= 0 else name_at + MAX_NAME]
        if name:
            yield ElfSymbol(address, size, name, kind in _CODE, info >> 4 == 0)


def _tables(data: bytes, path: str) -> tuple[bytes, bytes, int]:
    """Records, names and the offset of the records."""
    try:
        image = ELFFile(io.BytesIO(data))
        header = image.header
        if image.elfclass != 64 or not image.little_endian or header["e_machine"] != "EM_X86_64":
            raise FormatError(path, "not an ELF file for x86-64", 0)
        if header["e_type"] == "ET_REL":
            raise FormatError(path, "a relocatable ELF file: where it was loaded is not in it", 0)
        for wanted in ("SHT_SYMTAB", "SHT_DYNSYM"):
            for section in image.iter_sections():
                if section["sh_type"] == wanted:
                    strings = image.get_section(section["sh_link"])
                    at, size = section["sh_offset"], section["sh_size"] // _SYM.size * _SYM.size
                    begin = strings["sh_offset"]
                    return data[at : at + size], data[begin : begin + strings["sh_size"]], at
    except FormatError:
        raise
    except Exception as error:  # whatever a damaged file does to the parser
        raise FormatError(path, f"damaged ELF file ({type(error).__name__})", 0) from None
    raise FormatError(path, "the ELF file has no symbol table (stripped)", 0)
