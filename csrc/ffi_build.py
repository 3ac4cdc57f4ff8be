"""Builds tracedbg._core: the part of tdb.h between the cffi markers is the cdef, as it stands."""

from pathlib import Path

from cffi import FFI
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


def make_ffi() -> FFI:
    header = (HERE / "tdb.h").read_text(encoding="utf-8")
    ffi = FFI()
    ffi.cdef(header.split("/* cffi: begin */")[1].split("/* cffi: end */")[0])
    ffi.set_source("tracedbg._core", '#include "tdb.h"')
    return ffi


class BuildExt(build_ext):
    """Generates the cffi glue beside the objects and compiles it with the core."""

    def build_extension(self, ext):  # type: ignore[no-untyped-def]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        glue = str(Path(self.build_temp) / "_core.c")
        make_ffi().emit_c_code(glue)
        ext.sources = [*ext.sources, glue]
        ext.define_macros = [*ext.define_macros, ("Py_LIMITED_API", "0x030b0000")]
        super().build_extension(ext)
