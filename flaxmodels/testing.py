"""For tests of your own: what a piece of code compiles."""

import contextlib
from collections.abc import Iterator, Sequence

from flaxmodels.runtime import compiles
from flaxmodels.runtime.compiles import Compile


@contextlib.contextmanager
def assert_compiles(number: int) -> Iterator[list[Compile]]:
    """Exactly `number` programs are compiled within; those count that JAX has from its folder of compiled programs.

    A step that is compiled again and again, because a shape, dtype or sharding changes from call to call, trains well
    and takes a hundred times as long: a test of the loss doesn't see it.

        state, _ = step(state, next(batches))  # warm-up
        with assert_compiles(0):
            for batch in itertools.islice(batches, 10):
                state, metrics = step(state, batch)

    Each function counts, by each thread, also the little programs of eager operations such as `jnp.ones(3) + 1`.

    Args:
      number: of programs.

    Yields:
      What was compiled so far.

    Raises:
      AssertionError: it was another number; with each program, and how it differs from the one of its name before it.
    """
    with compiles.heard(explained=True) as found:
        yield found
    if len(found) != number:
        raise AssertionError("\n".join([f"{_counted(len(found))} compiled, expected {number}", *_told(found)]))


def _counted(number: int) -> str:
    return "1 program was" if number == 1 else f"{number} programs were"


def _told(found: Sequence[Compile]) -> Iterator[str]:
    before: dict[str, tuple[str, ...]] = {}
    for one in found:
        old = before.get(one.name)
        before[one.name] = one.arguments
        yield f"  {one.name}{'' if old is None else ' again'}: {', '.join(one.arguments) or 'no arguments'}"
        if old is not None and len(old) == len(one.arguments):
            pairs = enumerate(zip(old, one.arguments))
            yield from (f"    array {i} was {a}, is {b}" for i, (a, b) in pairs if a != b)
        yield from (f"    {line}" for line in one.why.splitlines())
