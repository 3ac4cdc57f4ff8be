"""Builds the extension modules: the part of their headers between the cffi markers is the cdef, as it stands."""

from pathlib import Path

from cffi import FFI
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent

HEADERS = {
    "tracedbg._core": ("tdb.h",),
    "tracedbg._decode": tuple(f"decode/{name}.h" for name in ("decode", "merge", "xentrace", "ftrace", "pt", "qemu_log")),
}


def make_ffi(module: str) -> FFI:
    ffi = FFI()
    for name in HEADERS[module]:
        header = (HERE / name).read_text(encoding="utf-8")
        ffi.cdef(header.split("/* cffi: begin */")[1].split("/* cffi: end */")[0])
    ffi.set_source(module, "".join(f'#include "{name}"\n' for name in HEADERS[module]))
    return ffi


class BuildExt(build_ext):
    """Generates the cffi glue beside the objects and compiles it with the module."""

    def build_extension(self, ext):  # type: ignore[no-untyped-def]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        glue = str(Path(self.build_temp) / f"{ext.name.rpartition('.')[2]}.c")
        make_ffi(ext.name).emit_c_code(glue)
        ext.sources = [*ext.sources, glue]
        ext.define_macros = [*ext.define_macros, ("Py_LIMITED_API", "0x030b0000")]
        super().build_extension(ext)
