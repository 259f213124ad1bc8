"""The process of one contender: it makes ready, then takes a turn whenever it is told to on standard input.

Thread pools of two runtimes in one process disturb each other, so each contender has its own.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from bca_deploy.benchmarking.contenders import contender
from bca_deploy.benchmarking.setting import Place, Setting
from bca_deploy.bundle.read import Bundle
from bca_deploy.files import read_arrays
from bca_deploy.timing import memory
from bca_deploy.timing.turns import turn


def main(asked: dict[str, Any]) -> None:
    """Serve turns until standard input ends."""
    answers = _own_output()
    place = Place(**asked["place"]) if asked["place"] else None
    with Bundle.open(asked["bundle"], "off") as bundle:
        setting = Setting(bundle, Path(asked["folder"]), asked["precision"], asked["threads"], asked["backend"], place)
        run = contender(asked["name"], setting, read_arrays(Path(asked["feeds"])))
        made_ready, before = memory.peak_rss_mb(), memory.rss_mb()
        memory.forget_peak()
        times = turn(run)  # caches, threads, a compiler
        _say(answers, times, made_ready, before)
        for line in sys.stdin:
            times = turn(run, float(line), times[-1])
            _say(answers, times, made_ready, before)


def _own_output() -> TextIO:
    """Return standard output, and let what libraries print go to standard error."""
    mine = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return mine


def _say(answers: TextIO, times_ms: list[float], made_ready_mb: float, before_mb: float) -> None:
    peak = memory.peak_rss_mb()
    what = {"times_ms": times_ms, "peak_rss_mb": max(peak, made_ready_mb), "call_mb": max(peak - before_mb, 0.0)}
    answers.write(json.dumps(what) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
