"""Runs an annotation that is killed again and again, each time a little later, until it is done.

    python -m tests.annotation.kill_driver PHOTOS OUTPUT

The kill (SIGKILL, from within) comes at the n-th time that data is synced or a file takes its name, so that it hits
every kind of moment: a draft half there, a file renamed but its shard not yet, outputs of which some are new. Prints
how often it was killed.
"""

import os
import signal
import sys
import threading
from pathlib import Path


def main(photos: str, output: str) -> None:
    from cocoedit_jax.annotation import run
    from cocoedit_jax.annotation.settings import check
    from configs.annotate import get_config

    config = get_config()
    config.models.name, config.mask.segmenter, config.box.convention = "fake", "box", "pixels"
    config.engine.shard_size = 2
    settings = check(config.to_dict())
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            _arm(2 + 2 * kills)
            done = run.annotate(settings, Path(output), source=photos)
            os._exit(0 if done is not None else 1)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(f"killed {kills} times, then exit code {os.WEXITSTATUS(status)}")
            sys.exit(os.WEXITSTATUS(status))
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1


def _arm(after: int) -> None:
    left, lock = after, threading.Lock()

    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            with lock:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    os.fsync, os.replace, os.link = counted(os.fsync), counted(os.replace), counted(os.link)


if __name__ == "__main__":
    main(*sys.argv[1:])
