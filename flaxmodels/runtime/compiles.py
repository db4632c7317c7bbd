"""What JAX compiles, as it does: each program by name, with the types and shardings of its arguments where asked.

JAX tells listeners of each program that XLA compiles, or that is read from the folder of compiled programs in its
place; and, by its log, what was traced again and why.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Compile:
    """One program.

    Attributes:
      name: such as "jit(step)".
      arguments: type and sharding of each array that it is given, in order; () where nobody asked, or nothing is known.
      why: what JAX says on how this call differs from those that the function was traced for before; "" if nothing.
    """

    name: str
    arguments: tuple[str, ...] = ()
    why: str = ""


@contextlib.contextmanager
def heard(explained: bool = False) -> Iterator[list[Compile]]:
    """Within, each program that is compiled, by any thread, is added to the list that this yields.

    Args:
      explained: with arguments and reasons. JAX's log of them is read, and kept off the terminal.
    """
    found: list[Compile] = []
    arguments: dict[str, tuple[str, ...]] = {}
    reasons: list[str] = []

    def compiled(event: str, duration_secs: float, **facts: Any) -> None:
        if event == EVENT:
            name = str(facts.get("fun_name", "a program"))
            found.append(Compile(name, arguments.pop(name, ()), "\n".join(reasons)))
            reasons.clear()

    def logged(record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("TRACING CACHE MISS"):
            reasons.extend(line.strip() for line in text.splitlines() if line.strip().startswith("* "))
            if "defined on the same line" in text:
                reasons.append(
                    "another function was defined on the same line before it: is it made anew for each call?"
                )
        elif text.startswith("Compiling ") and isinstance(record.args, tuple) and len(record.args) == 3:
            name, types, places = record.args
            if isinstance(types, tuple | list) and isinstance(places, tuple | list):
                arguments[str(name)] = tuple(f"{kind} {_place(place)}".strip() for kind, place in zip(types, places))
        elif not text.startswith("Finished ") and "compil" not in text.lower():  # of another matter
            logging.getLogger().handle(record)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        with _read(logged) if explained else contextlib.nullcontext():
            yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)


def _place(where: Any) -> str:
    return str(where.spec) if isinstance(where, jax.sharding.NamedSharding) else ""


@contextlib.contextmanager
def _read(take: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """JAX logs what it compiles, and why it traces again; `take` gets each record, and the terminal none."""
    logger, switches = logging.getLogger("jax"), ("jax_log_compiles", "jax_explain_cache_misses")
    before = {name: getattr(jax.config, name) for name in switches}
    handlers, passed_on = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [_Handler(take)], False
    for name in switches:
        jax.config.update(name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        logger.handlers[:], logger.propagate = handlers, passed_on


class _Handler(logging.Handler):
    """Gives records to a function."""

    def __init__(self, take: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record)
