"""What a crash of the machine can leave of what a program wrote: its system calls, replayed as far as it synced.

After CrashMonkey (Mohan et al., OSDI 2018). Until a folder was synced, each new, renamed or removed name in it may be
on storage or not, in any combination; until a file was synced, its content may be the new one, cut off, or the old one.
"""

import dataclasses
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

CALLS = (
    "openat,open,creat,write,pwrite64,writev,pwritev,ftruncate,fsync,fdatasync,"
    "rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir"
)
RECORD = ("-f", "-qq", "-y", "-xx", "-s", "9999999", "-e", f"trace={CALLS}")  # of strace
ROOT = 0  # the inode of the folder that is watched
PLAIN = 4  # cases of `states` that are not random
Content = bytes | None  # of a file; None is a folder


@dataclasses.dataclass
class Call:
    """One thing that happened to an inode.

    Attributes:
      kind: "name" (given to it), "move", "drop", "data" or "sync".
      inode: whose.
      old: (folder, name) before; None where there was none.
      new: (folder, name) after; None where there is none.
      content: of the whole file from then on.
    """

    kind: str
    inode: int
    old: tuple[int, str] | None = None
    new: tuple[int, str] | None = None
    content: bytes = b""


def lines(text: str) -> Iterator[tuple[str, list[str], int]]:
    """(call, its arguments, result) of each system call that succeeded; one that was interrupted, when it ended."""
    begun: dict[str, str] = {}
    for line in text.splitlines():
        pid, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>").strip()
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            rest = begun.pop(pid, "") + resumed[1]
        if (found := re.match(r"(\w+)\((.*)\)\s*= (\d+)", rest)) is not None:
            yield found[1], re.split(r", (?![^<]*>)", found[2]), int(found[3])


def text_of(argument: str) -> bytes:
    """The bytes that strace shows as hexadecimals."""
    return bytes.fromhex("".join(re.findall(r"\\x([0-9a-f]{2})", argument)))


def record(text: str, folder: Path) -> tuple[list[Call], dict[str, Content]]:
    """All that happened in `folder`, and the tree that it ended as: path -> content, None of a folder."""
    tree: dict[int, dict[str, int]] = {ROOT: {}}
    data: dict[int, bytes] = {}
    at: dict[int, int] = {}  # descriptor -> where in its file
    calls: list[Call] = []

    def place(path: bytes) -> tuple[int, str] | None:
        try:
            parts = Path(os.fsdecode(path)).relative_to(folder).parts
        except ValueError:
            return None
        inode = ROOT
        for part in parts[:-1]:
            inode = tree[inode][part]
        return inode, parts[-1] if parts else ""

    def inode_of(path: bytes) -> int | None:
        where = place(path)
        return None if where is None else ROOT if where[1] == "" else tree[where[0]].get(where[1])

    def add(where: tuple[int, str], *, is_folder: bool) -> int:
        inode = 1 + max([*tree, *data])
        tree[where[0]][where[1]] = inode
        if is_folder:
            tree[inode] = {}
        else:
            data[inode] = b""
        calls.append(Call("name", inode, new=where))
        return inode

    def written(inode: int, content: bytes) -> None:
        data[inode] = content
        calls.append(Call("data", inode, content=content))

    for name, words, result in lines(text):
        paths = [text_of(word) for word in words if word.startswith('"')]
        if name in ("openat", "open", "creat"):
            where = place(paths[0])
            if where is None or where[1] == "":
                continue
            at[result] = 0
            if where[1] not in tree[where[0]]:
                add(where, is_folder=False)
            elif "O_TRUNC" in words[-2] + words[-1]:
                written(tree[where[0]][where[1]], b"")
        elif name in ("mkdir", "mkdirat"):
            if (where := place(paths[0])) is not None and where[1]:
                add(where, is_folder=True)
        elif name.startswith("rename"):
            old, new = place(paths[0]), place(paths[1])
            if old is not None and new is not None:
                inode = tree[old[0]].pop(old[1])
                tree[new[0]][new[1]] = inode
                calls.append(Call("move", inode, old, new))
        elif name in ("unlink", "unlinkat", "rmdir"):
            # Python removes a tree by names relative to the descriptor of a folder.
            inside = re.match(r"\d+<(.*)>", words[0])
            where = place(b"/".join((text_of(inside[1]), paths[0])) if inside else paths[0])
            if where is not None:
                calls.append(Call("drop", tree[where[0]].pop(where[1]), where))
        elif inside := re.match(r"(\d+)<(.*)>", words[0]):
            inode, descriptor = inode_of(text_of(inside[2])), int(inside[1])
            if inode is None:
                continue
            if name in ("fsync", "fdatasync"):
                calls.append(Call("sync", inode))
            elif name == "ftruncate":
                written(inode, data[inode][: int(words[1])].ljust(int(words[1]), b"\0"))
            else:
                new_bytes = text_of("".join(words[1:]))
                begin = int(words[-1]) if name.startswith("pwrite") else at.get(descriptor, 0)
                before = data[inode].ljust(begin, b"\0")
                written(inode, before[:begin] + new_bytes[:result] + before[begin + result :])
                at[descriptor] = begin + result
    return calls, flat(tree, data)


def flat(tree: dict[int, dict[str, int]], data: dict[int, bytes]) -> dict[str, Content]:
    """Path -> content of what can be reached from the root."""
    found: dict[str, Content] = {}
    waiting = [("", ROOT)]
    while waiting:
        path, inode = waiting.pop()
        for name, inner in tree[inode].items():
            found[path + name] = data.get(inner) if inner not in tree else None
            if inner in tree:
                waiting.append((f"{path}{name}/", inner))
    return found


def states(calls: list[Call], count: int, rng: random.Random) -> Iterator[tuple[int, dict[str, Content]]]:
    """(how many calls were made, the tree that a crash then leaves), `count` random ones each, and four plain ones.

    Only what was synced; all names, but no content that was not synced; all, as after a kill; what was synced, without
    what was removed, synced or not.
    """
    folders = {ROOT, *(c.inode for c in calls if c.kind == "name")} - {c.inode for c in calls if c.kind == "data"}
    for made in range(len(calls) + 1):
        if made and calls[made - 1].kind in ("data",):
            continue  # of a file's writes the one before its sync counts
        synced: dict[int, int] = {}
        for number, call in enumerate(calls[:made]):
            if call.kind == "sync":
                synced[call.inode] = number
        for case in range(PLAIN + count):
            share = (0.0, 1.0, 1.0, 0.0, *([rng.choice((0.1, 0.5, 0.9))] * count))[case]
            tree: dict[int, dict[str, int]] = {inode: {} for inode in folders}
            data: dict[int, bytes] = {}
            for number, call in enumerate(calls[:made]):
                if call.kind == "data":
                    durable = synced.get(call.inode, -1) > number
                    if durable or case == 2:
                        data[call.inode] = call.content
                    elif case >= PLAIN and rng.random() < share:
                        data[call.inode] = call.content[: rng.choice((0, len(call.content) // 2, len(call.content)))]
                elif call.kind != "sync":
                    touched = [where[0] for where in (call.old, call.new) if where is not None]
                    durable = all(synced.get(folder, -1) > number for folder in touched)
                    if durable or rng.random() < share or (case == 3 and call.kind == "drop"):
                        _apply(tree, call)
            for inode in {call.inode for call in calls} - folders:
                data.setdefault(inode, b"")
            yield made, flat(tree, data)


def _apply(tree: dict[int, dict[str, int]], call: Call) -> None:
    if call.old is not None:
        if tree[call.old[0]].get(call.old[1]) != call.inode:
            return  # what it was to happen to is not there
        del tree[call.old[0]][call.old[1]]
    if call.new is not None:
        tree[call.new[0]][call.new[1]] = call.inode


def write(tree: dict[str, Content], folder: Path) -> None:
    """Make a tree on disk."""
    folder.mkdir()
    for path in sorted(tree):
        content = tree[path]
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
