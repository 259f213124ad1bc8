"""Write a header in which every function of TensorRT's three runtime interfaces ends the process: what a double builds on.

python make_unused.py include/NvInferImpl.h unused.hpp

A double then overrides what the runtime calls, and a call of anything else shows at once. Made from the SDK's own header, so
that it fits whichever version the build uses.
"""

import re
import sys
from pathlib import Path

CLASSES = ("VRuntime", "VCudaEngine", "VExecutionContext")


def unused(header: str, name: str) -> str:
    body = header.split(f"class {name} :")[1].split("\n};", maxsplit=1)[0]
    functions = re.findall(r"virtual\s+([^;]*?)\s*=\s*0;", re.sub(r"//[^\n]*", "", body))
    lines = [f"  {' '.join(function.split())} override {{ std::abort(); }}" for function in functions]
    return "\n".join([f"class Unused{name} : public apiv::{name} {{", " public:", *lines, "};", ""])


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    # Behind a macro that is not set, and so not in the interface.
    header = re.sub(r"#if ENABLE_FEATURE.*?#endif", "", source.read_text(encoding="utf-8"), flags=re.DOTALL)
    classes = "\n".join(unused(header, name) for name in CLASSES)
    target.write_text(
        f"#pragma once\n#include <NvInferRuntime.h>\n#include <cstdlib>\nnamespace nvinfer1 {{\n{classes}}}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
