"""What a loading process does with itself before its first batch, and whose word ends it.

A scheduler or launcher that stops a run signals every process of it (scancel, Slurm's warning before the time limit,
DeepSpeed's launcher, Ctrl-C). The rank then finishes its step and saves, and needs its loading processes until then: a
signal from elsewhere must not end them. The rank ends them itself: torch closes their queue, or, if one does not listen
any more, sends it SIGTERM.
"""

from __future__ import annotations

import gc
import os
import signal
import threading

import cv2


def begin(number: int) -> None:
    """``worker_init_fn`` of the DataLoader, in the new process."""
    cv2.setNumThreads(0)  # torch's DataLoader already sets one torch thread
    gc.freeze()  # a collection would write to every inherited page, and each process would get its own copy
    for other in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(other, signal.SIG_IGN)
    # A handler is not told who sends; who waits for a blocked signal is. Threads made later inherit the block.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_request, args=(os.getppid(),), name="signals", daemon=True).start()


def _end_on_request(rank: int) -> None:
    """End this process at the SIGTERM of ``rank`` (its process id), and at anybody's once that process is gone."""
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == rank or os.getppid() != rank:
            os._exit(0)  # torch takes any other code for a crash
