"""Memory that the C library's heap keeps, so that a CPU's train step does not ask the kernel for it again each time.

XLA allocates the temporaries of a program when it is called and frees them at its end. The GNU C library gives what is
large back to the kernel at once, which then clears each page anew when the next step touches it: 5 to 10 thousand page
faults a step of a small transformer, a quarter of its time. Kept, memory is faulted in once. The process then stays as
large as it has been at its largest.

Not all of it: JAX's threads allocate from arenas of their own, in heaps of at most 64 MiB, and what does not fit there
is still given back. One arena for all threads (M_ARENA_MAX) keeps everything, but made a small MLP's step slower by a
tenth.
"""

import ctypes

# From glibc's malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
# Bytes of a heap of a thread's arena. One that is empty goes back to the kernel unless the padding is as large.
HEAP = 2**26


def keep(platform: str) -> bool:
    """Have freed memory stay with this process, where steps are computed in it; to be called before the first one.

    Where the C library is another one, or its allocator has been replaced, nothing changes.

    Args:
      platform: of the devices: a step of an accelerator takes no memory of the host.

    Returns:
      Whether the library took it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if platform != "cpu" or mallopt is None:
        return False
    # Nothing is trimmed, no heap is returned, and nothing comes from mmap, which is given back whatever these say.
    return all([mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_TOP_PAD, HEAP), mallopt(M_MMAP_MAX, 0)])
