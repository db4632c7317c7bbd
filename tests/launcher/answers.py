"""A cloud in this process: a table of what is there, in place of the processes that would ask the real one."""

import json

from fake import sayings

from tpu.processes import Done


def request(state, type="v5litepod-16", slices=1, **more):
    """A queued resource as `describe` prints it."""
    several = {"multisliceParams": {"nodeCount": slices, "nodeIdPrefix": "a"}}
    return {
        "name": "projects/p/locations/z/queuedResources/a",
        "state": {"state": state, **more},
        "tpu": {"nodeSpec": [{"node": {"acceleratorType": type}, **({"nodeId": "a"} if slices == 1 else several)}]},
    }


class Google:
    """Stands for `tpu.processes.run`.

    Attributes:
      there: zone -> the request that is there, or a list of what it is at one look after the other.
      nodes: zone -> name -> TPU VM.
      grants: zone -> what `there` is after a create.
      say: verb -> errors, each of one command.
      workers: node -> how ssh ends.
      did: (verb, zone) of all commands.
    """

    def __init__(self, *zones):
        self.there = dict.fromkeys(zones)
        self.nodes = {zone: {} for zone in zones}
        self.grants, self.say, self.workers, self.did, self.slept = {}, {}, {}, [], []

    def __call__(self, commands, limit, stream=None):
        return [self.answer(words) for words in commands]

    def answer(self, words):
        verb = " ".join(words[3:5])
        zone = next(word[7:] for word in words if word.startswith("--zone="))
        self.did.append((verb.split()[1], zone))
        if self.say.get(verb):
            return Done(1, "", self.say[verb].pop(0))
        return getattr(self, "_" + words[4])(words, zone)

    def _describe(self, words, zone):
        found = self._now(zone)
        if isinstance(self.there[zone], list) and len(self.there[zone]) > 1:
            self.there[zone].pop(0)
        if found is None:
            fields = {"command": "x", "project": "p", "zone": zone, "kind": "queuedResources", "name": "a"}
            return Done(1, "", sayings.said("missing", **fields))
        return Done(0, json.dumps(found), "")

    def _now(self, zone):
        found = self.there.get(zone)
        return found[0] if isinstance(found, list) else found

    def _list(self, words, zone):
        if words[3] == "queued-resources":
            return Done(0, json.dumps([self._now(zone)] if self._now(zone) else []), "")
        nodes = self.nodes.get(zone, {})
        return Done(
            0, json.dumps([{"name": f"projects/p/locations/{zone}/nodes/{name}", **nodes[name]} for name in nodes]), ""
        )

    def _create(self, words, zone):
        self.there[zone] = self.grants.get(zone, request("ACTIVE"))
        self.nodes[zone] = {words[5]: {"state": "READY"}}
        return Done(0, "", "")

    def _delete(self, words, zone):
        if words[3] == "queued-resources":
            self.there[zone], self.nodes[zone] = None, {}
        else:
            self.nodes[zone].pop(words[5])
        return Done(0, "", "")

    def _ssh(self, words, zone):
        return self.workers.get(words[5], Done(255, "", "ERROR: exited with return code [255]."))

    def _scp(self, words, zone):
        return Done(0, "", "")
