"""The verb `watch` as a user calls it: what it remembers from command to command, what it refuses, what it says."""

import argparse
import time
from dataclasses import replace

import pytest
from modelled import settings

from tpu import gcloud, processes, shipping, state, watch
from tpu.cost import Life
from tpu.gcloud import Cloud
from tpu.goodcase import GoodCase
from tpu.meaning import CloudError
from tpu.noting import Action
from tpu.processes import Done
from tpu.settings import UserError
from tpu.shipping import Parcel
from tpu.state import Held, Kept


class Laptop:
    """A folder, a repository whose code is a word, and a cloud in which all goes well.

    Attributes:
      code: what `shipping.pack` packs now.
      ran: verbs of the commands that were run.
      said: lines that were printed.
      meddle: is asked before each command; an answer of its own counts.
    """

    def __init__(self, folder, monkeypatch):
        self.s = settings(state=folder / "runs", bucket=str(folder / "bucket"), max_hours=10.0)
        self.code, self.ran, self.said, self.meddle = "c0de", [], [], lambda words: None
        self.good = GoodCase(self.s, there=False)
        monkeypatch.setattr(shipping, "pack", self.pack)
        monkeypatch.setattr(processes, "run", self.run)

    def pack(self, repository, folder, *, dry_run=False):
        file = folder / f"parcel-{self.code}.tar"
        if not dry_run:
            folder.mkdir(parents=True, exist_ok=True)
            file.touch()
        return Parcel(file, self.code, "1" * 40, "", (), "d" * 64)

    def run(self, commands, limit, stream=None):
        self.ran += [" ".join(words[3:5]) for words in commands]
        return [self.meddle(words) or self.good(words) for words in commands]

    def watch(self, s=None, *, dry_run=False, update=False, again=False):
        self.said, self.ran = [], []
        cloud = Cloud(dry_run, self.said.append, good=self.good, sleep=lambda seconds: None)
        flags = argparse.Namespace(every=30.0, update=update, again=again)
        return watch.watch(s or self.s, cloud, flags)

    def kept(self):
        return state.load(self.s.folder)

    def heard(self, words):
        return any(words in line for line in self.said)


@pytest.fixture
def laptop(tmp_path, monkeypatch):
    return Laptop(tmp_path, monkeypatch)


def test_one_command_is_the_whole_life(laptop):
    assert laptop.watch() == 0
    kept = laptop.kept()
    assert (kept.phase, kept.attempt, kept.parcel.sha, kept.command) == ("done", 1, "c0de", laptop.s.command)
    assert kept.held is None and [life.zone for life in kept.lives] == ["z1-a"] and kept.lives[0].ended
    assert laptop.heard("# done: every worker ended with exit code 0")
    assert laptop.heard("# nothing of the name a is left in z1-a, z2-b") and laptop.heard("# 1 machine, 0.00 hours")
    acts = [verb for verb in laptop.ran if verb.split()[1] not in ("describe", "list", "ssh")]
    assert acts == ["queued-resources create", "tpu-vm scp", "queued-resources delete"]
    assert laptop.ran[-1] == "tpu-vm list", "the proof is the last that is asked"


def test_a_dry_run_prints_the_same_commands_and_leaves_nothing(laptop):
    def printed(quiet):
        return [line for line in laptop.said if line.startswith("$ ") and not any(word in line for word in quiet)]

    laptop.watch(dry_run=True)
    dry = printed(())
    assert laptop.ran == [] and not laptop.s.state.exists()
    assert laptop.heard("# that is the good case; nothing was run")
    laptop.good = GoodCase(laptop.s, there=False)
    laptop.watch()
    assert dry == printed(())


def test_after_the_end_nothing_is_begun_unless_it_is_asked_for(laptop):
    laptop.watch()
    assert laptop.watch() == 0
    assert not {"queued-resources create", "tpu-vm ssh"} & set(laptop.ran)
    assert laptop.heard("it ended before this command. --again goes on.")
    assert laptop.watch(update=True) == 0 and "queued-resources create" not in laptop.ran  # the code is the same
    assert laptop.watch(again=True) == 0
    kept = laptop.kept()
    assert (kept.attempt, len(kept.lives)) == (2, 2)
    laptop.code = "c0de2"
    assert laptop.watch(update=True) == 0 and laptop.kept().parcel.sha == "c0de2"


def test_after_the_end_a_machine_is_not_overlooked(laptop):
    laptop.watch()
    laptop.good = GoodCase(laptop.s, there=True)
    with pytest.raises(CloudError, match=r"has ended \(done\), and yet there is queued resource a in z1-a: ACTIVE"):
        laptop.watch()


def test_a_limit_that_is_raised_is_no_end(laptop):
    long = Life("z1-a", time.time() - 40_000, time.time() - 100, 16, 3.84, "preempted")
    laptop.s.folder.mkdir(parents=True)
    state.save(laptop.s.folder, Kept(project="p", lives=(long,)))
    assert laptop.watch() == 3
    assert laptop.kept().phase == "limit" and laptop.heard("--max_hours=10: 11.08 hours")
    assert laptop.watch() == 3 and laptop.heard("A higher limit goes on")
    assert laptop.watch(replace(laptop.s, max_hours=20.0)) == 0
    assert laptop.kept().phase == "done" and len(laptop.kept().lives) == 2


def interrupted(laptop, verb="tpu-vm ssh", **flags):
    """Ctrl-C at the first command of a verb."""

    def meddle(words):
        if " ".join(words[3:5]) == verb:
            raise KeyboardInterrupt

    laptop.meddle = meddle
    code = laptop.watch(**flags)
    laptop.meddle = lambda words: None
    return code


def test_ctrl_c_leaves_all_as_it_is_and_says_how_to_go_on(laptop):
    assert interrupted(laptop) == 130
    assert laptop.heard("left as they are") and laptop.heard("The same command goes on")
    assert laptop.heard("launch.py down --name=a")
    kept = laptop.kept()
    assert kept.held.zone == "z1-a" and kept.lives[0].ended is None and kept.parcel.sha == "c0de"
    assert laptop.watch() == 0
    assert "queued-resources create" not in laptop.ran and len(laptop.kept().lives) == 1


def test_a_run_goes_on_with_the_code_that_it_began_with(laptop):
    interrupted(laptop)
    laptop.code = "c0de2"
    other = replace(laptop.s, command=("python", "train.py", "--config=configs/digits_cnn.py"))
    interrupted(laptop)
    assert laptop.heard("the code or the command has changed") and laptop.kept().parcel.sha == "c0de"
    assert laptop.watch(other) == 0
    assert laptop.heard("parcel-c0de.tar") and not laptop.heard("c0de2") and not laptop.heard("other.py")


def test_update_ships_what_is_here_now(laptop):
    interrupted(laptop, "tpu-vm scp")
    laptop.code = "c0de2"
    assert (
        laptop.watch(replace(laptop.s, command=("python", "train.py", "--config=configs/digits_cnn.py")), update=True)
        == 0
    )
    assert laptop.heard("parcel-c0de2.tar") and laptop.heard("--config=configs/digits_cnn.py")
    assert laptop.kept().parcel.sha == "c0de2"


def test_an_update_that_is_killed_stays_one(laptop):
    """What runs is of the old code till it is replaced, however often the command is given."""
    laptop.good = GoodCase(laptop.s, there=True, trains=True)
    interrupted(laptop)
    laptop.code = "c0de2"
    for _ in range(2):
        assert interrupted(laptop, update=True) == 130
        assert laptop.kept().update
    interrupted(laptop)
    assert laptop.kept().update


def test_code_that_can_not_be_packed_holds_up_no_run_that_has_begun(laptop, monkeypatch):
    def refuse(*words, **flags):
        raise UserError("'data.bin' is too large")

    pack = laptop.pack
    monkeypatch.setattr(shipping, "pack", refuse)
    with pytest.raises(UserError, match="too large"):
        laptop.watch()
    assert laptop.ran == []
    monkeypatch.setattr(shipping, "pack", pack)
    interrupted(laptop)
    monkeypatch.setattr(shipping, "pack", refuse)
    with pytest.raises(UserError, match="too large"):
        laptop.watch(update=True)
    assert laptop.watch() == 0 and laptop.heard("can't be shipped: 'data.bin' is too large")


def test_code_that_is_gone_is_said(laptop):
    interrupted(laptop)
    laptop.kept().parcel.file.unlink()
    laptop.code = "c0de2"
    with pytest.raises(UserError, match=r"parcel-c0de.tar.*is not there any more. --update ships"):
        laptop.watch()


def test_attempts_of_an_earlier_life_are_counted_on(laptop):
    """The state file may be lost, or of another laptop: the bucket knows the numbers."""
    (laptop.s.state.parent / "bucket/a/logs/attempt-6").mkdir(parents=True)
    laptop.watch()
    assert laptop.kept().attempt == 7


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(project="q"), "--project='q': the machine of this run is in 'p'"),
        (dict(zones=("z3-c",)), "a machine of this run may be in z1-a. Say --zone=z1-a,z3-c"),
        (dict(bucket="/elsewhere"), "this run saves in '/.*/bucket/a', not in '/elsewhere/a'"),
    ],
)
def test_settings_under_which_something_would_be_forgotten(laptop, changes, said):
    interrupted(laptop)
    before = laptop.kept()
    with pytest.raises(UserError, match=said):
        laptop.watch(replace(laptop.s, **changes))
    assert laptop.kept() == before and laptop.ran == []


def test_a_machine_of_another_type_is_not_taken_over(laptop):
    laptop.good = GoodCase(replace(laptop.s, type="v5litepod-8"), there=True)
    with pytest.raises(UserError, match="--name='a' is taken in z1-a: a v5litepod-8"):
        laptop.watch()


def test_one_watch_at_a_time(laptop):
    with state.held(laptop.s.folder, "watch"), pytest.raises(UserError, match="belongs to another command: watch"):
        laptop.watch()


def test_a_cost_limit_needs_a_price(laptop, monkeypatch):
    monkeypatch.setattr("tpu.machines.price", lambda *words: None)
    with pytest.raises(UserError, match=r"--max_cost=5: no price of v5litepod-16 is known.*--prices"):
        laptop.watch(replace(laptop.s, max_cost=5.0))
    assert laptop.watch() == 0 and laptop.heard("of no known price")


def test_no_limit_is_said(laptop):
    laptop.watch(replace(laptop.s, max_hours=None))
    assert laptop.heard("# no limit")


def test_what_a_zone_refused_is_asked_again_by_the_next_command(laptop):
    laptop.s.folder.mkdir(parents=True)
    state.save(laptop.s.folder, Kept(project="p", refused={"z1-a": "quota"}, code=2))
    assert laptop.watch() == 0 and laptop.kept().lives[0].zone == "z1-a"


def test_while_a_machine_is_held_only_its_zone_is_asked(laptop):
    here, elsewhere = (Kept(held=Held(zone, 1.0, met=True)) for zone in ("z1-a", "z2-b"))

    def looked(kept, first=False):
        laptop.said.clear()
        cloud = Cloud(dry_run=True, echo=laptop.said.append, good=GoodCase(laptop.s, there=True))
        seen = watch.look(cloud, laptop.s, kept, first)
        return list(seen.found), len(seen.workers), laptop.heard("zone=z1-a"), laptop.heard("zone=z2-b")

    assert looked(here) == looked(replace(here, end="limit")) == (["z1-a"], 4, True, False)
    assert looked(elsewhere) == ([], 0, False, True)
    assert looked(here, first=True) == looked(Kept()) == (["z1-a"], 4, True, True)


def test_the_proof_deletes_what_no_request_holds(laptop):
    """A command that half works may leave TPU VMs without a queued resource."""
    nodes, deleted = [{"name": "projects/p/locations/z2-b/nodes/a", "state": "READY"}], []

    def meddle(words):
        place = "--zone=z2-b" in words
        if place and words[3:5] == ("tpu-vm", "list"):
            return Done(0, '[{"name": "projects/p/locations/z2-b/nodes/a", "state": "READY"}]' if nodes else "[]", "")
        if place and words[3:5] == ("tpu-vm", "delete"):
            deleted.append(nodes.pop())
        return None

    laptop.meddle = meddle
    assert laptop.watch() == 0
    assert len(deleted) == 1 and laptop.heard("nothing of the name a is left")


def test_what_can_not_be_deleted_is_said_till_it_can(laptop):
    left = ["queued resource a in z1-a: ACTIVE"] * 3
    said = []

    def refuse(words):
        if words == gcloud.delete(laptop.s, "z1-a") and left:
            said.append(left.pop())
            return Done(1, "", "ERROR: PERMISSION_DENIED: no.")
        return None

    laptop.meddle = refuse
    assert laptop.watch() == 0
    assert len(said) == 3 and laptop.heard("PERMISSION_DENIED")


def test_what_a_check_printed_is_shown(laptop):
    """The machine is given up, and three of them are enough."""
    lines = [f"worker 0: hosts {n}" for n in range(40)] + ["worker 0: problem: 8 of 16 chips are there"]

    def meddle(words):
        failed = any("worker.sh check" in word for word in words)
        return Done(1, "\n".join(lines), "ssh failed") if failed else None

    laptop.meddle = meddle
    assert laptop.watch() == 1
    assert laptop.heard("#   worker 0: problem: 8 of 16 chips are there")
    assert laptop.heard("#   worker 0: hosts 39") and not laptop.heard("#   worker 0: hosts 5")
    assert laptop.ran.count("queued-resources create") == 3 and "3 machines in a row" in laptop.kept().why


def test_a_worker_that_installs_something_else_is_an_error(laptop):
    said = "".join(f"worker {number}: state installed attempt=0 code=- sha=0ther\n" for number in range(4))
    cloud = Cloud(dry_run=True, echo=laptop.said.append, good=lambda words: Done(0, said, ""))
    action = Action("install", Kept(parcel=laptop.pack(None, laptop.s.folder)), "z1-a")
    with pytest.raises(CloudError, match="worker 0 says that 0ther is installed"):
        watch.act(cloud, laptop.s, action)


@pytest.mark.parametrize("text", ["5", "0.05", "600"])
def test_seconds_between_looks(text):
    parser = argparse.ArgumentParser()
    watch.add_flags(parser)
    assert parser.parse_args([f"--every={text}"]).every == float(text)


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "1e9", ""])
def test_seconds_that_are_none(text):
    parser = argparse.ArgumentParser(exit_on_error=False)
    watch.add_flags(parser)
    with pytest.raises(argparse.ArgumentError, match="expected seconds"):
        parser.parse_args([f"--every={text}"])
