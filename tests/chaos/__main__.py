"""`python -m tests.chaos [CASES [FIRST]]`: cases with the seeds FIRST, FIRST + 1, ...; a table of what came of them."""

import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from tests.chaos import scenarios
from tests.cli import fork_server


def main(seeds: Iterable[int]) -> int:
    """Print a line for each seed, and how many passed; how many did not."""
    fork_server.preload()
    passed, failed, begin = 0, 0, time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="genfound-chaos-"))  # the forked processes would remove a TemporaryDirectory
    straight = scenarios.Undisturbed(scratch / "straight")
    straight.folder.mkdir()
    for seed in seeds:
        folder, scenario, start = scratch / str(seed), scenarios.of(seed), time.monotonic()
        folder.mkdir()
        try:
            outcome, what = "passed", scenario(straight, folder, random.Random(seed))
            shutil.rmtree(folder)
            passed += 1
        except Exception as error:
            outcome, what = "FAILED", f"{str(error) or traceback.format_exc()} ({folder})"
            failed += 1
        print(f"{seed:4} {scenario.__name__:10} {outcome} {time.monotonic() - start:6.1f} s  {what}", flush=True)
    if not failed:
        shutil.rmtree(scratch)
    print(f"{passed} of {passed + failed} passed in {time.monotonic() - begin:.0f} s")
    return failed


if __name__ == "__main__":
    cases, first = map(int, [*sys.argv[1:], *("200", "0")[len(sys.argv) - 1 :]])
    sys.exit(main(range(first, first + cases)) > 0)
