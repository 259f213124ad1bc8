"""Flush denormal numbers to zero for a while on the calling thread, and leave its floating-point mode as it was.

Masked keys get weights around 1e-40 there, which some processors multiply at a hundredth of their speed. onnxruntime has an
option for it, but that changes the mode of the thread that makes the session, for good. glibc's fenv_t holds the control
register: MXCSR at byte 28 on x86-64 (Intel SDM volume 1, 10.2.3: FTZ is bit 15, DAZ bit 6), FPCR at byte 0 on 64-bit Arm
(Arm ARM, FPCR: FZ is bit 24).
"""

import ctypes
import platform

_REGISTERS = {"x86_64": (28, 1 << 15 | 1 << 6), "aarch64": (0, 1 << 24)}
_OFFSET, _BITS = _REGISTERS.get(platform.machine(), (0, 0))


class _Fenv(ctypes.Structure):
    _fields_ = (("before", ctypes.c_ubyte * _OFFSET), ("mode", ctypes.c_uint32), ("after", ctypes.c_ubyte * 32))


def _load() -> ctypes.CDLL | None:
    if platform.system() != "Linux" or not _BITS:
        return None
    try:
        library = ctypes.CDLL("libm.so.6")
    except OSError:  # another C library, whose fenv_t is another
        return None
    return library if hasattr(library, "fegetenv") else None


_LIBM = _load()


class Flushed:
    """A context manager: denormals are zero inside, on this thread. Does nothing on other processors. For one use."""

    __slots__ = ("_fenv", "_mode")

    def __enter__(self) -> None:
        if _LIBM is not None:
            self._fenv = _Fenv()
            _LIBM.fegetenv(ctypes.byref(self._fenv))
            self._mode = self._fenv.mode
            self._fenv.mode = self._mode | _BITS
            _LIBM.fesetenv(ctypes.byref(self._fenv))

    def __exit__(self, *_: object) -> None:
        if _LIBM is not None:
            self._fenv.mode = self._mode
            _LIBM.fesetenv(ctypes.byref(self._fenv))
