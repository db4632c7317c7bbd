"""The commands and flags of gcloud that the launcher may use, as Google documents them. All else is refused.

Each command is documented at REFERENCE + its words, joined with "/"; the flags are those of its SYNOPSIS (release GA).
"""

from typing import NamedTuple

REFERENCE = "https://docs.cloud.google.com/sdk/gcloud/reference/"

# https://docs.cloud.google.com/sdk/gcloud/reference#GLOBAL-FLAGS
EVERYWHERE = (
    "--access-token-file= --account= --billing-project= --configuration= --flags-file= --flatten= --format= --help "
    "--impersonate-service-account= --log-http --project= --quiet --trace-token= --user-output-enabled "
    "--no-user-output-enabled --verbosity= -q"
)
LISTS = "--filter= --limit= --page-size= --sort-by= --uri"
KEYS = (
    "--dry-run --force-key-file-overwrite --plain --ssh-key-file= --strict-host-key-checking= --worker= --zone= "
    "--ssh-key-expiration= --ssh-key-expire-after="
)


class Form(NamedTuple):
    """Form of a command.

    Attributes:
      flags: those of its own; "=" at the end of those that take a value.
      least: positional words, at least.
      most: and at most.
      required: groups of flags; of each, exactly one must be there.
      asks: whether it asks "Do you want to continue (Y/n)?" where no --quiet is given.
      rest: whether words may follow "--".
    """

    flags: str
    least: int = 1
    most: int = 1
    required: tuple[tuple[str, ...], ...] = ()
    asks: bool = False
    rest: bool = False


FORMS = {
    "compute tpus queued-resources create": Form(
        "--zone= --runtime-version= --accelerator-type= --topology= --type= --node-id= --node-count= --node-prefix= "
        "--async --boot-disk= --data-disk= --description= --guaranteed --internal-ips --labels= --metadata= "
        "--metadata-from-file= --network= --range= --reserved --scopes= --service-account= --shielded-secure-boot "
        "--spot --subnetwork= --tags= --valid-after-duration= --valid-after-time= --valid-until-duration= "
        "--valid-until-time= --reservation-host-folder= --reservation-host-organization= --reservation-host-project=",
        required=(("--runtime-version",), ("--accelerator-type", "--topology"), ("--node-id", "--node-count")),
    ),
    "compute tpus queued-resources describe": Form("--zone="),
    "compute tpus queued-resources list": Form(f"--zone= {LISTS}", least=0, most=0),
    "compute tpus queued-resources delete": Form("--zone= --async --force", asks=True),
    "compute tpus queued-resources reset": Form("--zone= --async", asks=True),
    "compute tpus queued-resources ssh": Form(
        f"--batch-size= --node= --ssh-flag= --command= --output-directory= --internal-ip --tunnel-through-iap {KEYS}",
        rest=True,
    ),
    "compute tpus queued-resources scp": Form(
        f"--batch-size= --node= --scp-flag= --compress --recurse --internal-ip --tunnel-through-iap {KEYS}",
        least=2,
        most=99,
    ),
    "compute tpus tpu-vm describe": Form("--zone="),
    "compute tpus tpu-vm list": Form(f"--zone= {LISTS}", least=0, most=0),
    "compute tpus tpu-vm delete": Form("--zone= --async", asks=True),
    "compute tpus tpu-vm ssh": Form(f"--internal-ip --ssh-flag= --command= --output-directory= {KEYS}", rest=True),
    "compute tpus tpu-vm scp": Form(f"--internal-ip --scp-flag= --compress --recurse {KEYS}", least=2, most=99),
    "storage ls": Form(
        "--additional-headers= --all-versions -a --buckets -b --etag -e --exhaustive --fetch-encrypted-object-hashes "
        "--next-page-token= --read-paths-from-stdin -I --readable-sizes --recursive -R -r --soft-deleted --full -L "
        "--json -j --long -l --decryption-keys=",
        least=0,
        most=99,
    ),
    "storage cp": Form(
        "--additional-headers= --all-versions -A --no-clobber -n --content-md5= --continue-on-error -c --daisy-chain "
        "-D --do-not-decompress --include-managed-folders --manifest-path= -L= --preserve-posix -P "
        "--print-created-message -v --read-paths-from-stdin -I --recursive -R -r --skip-unsupported -U "
        "--storage-class= -s= --gzip-in-flight= --gzip-in-flight-all -J --gzip-local= "
        "--gzip-local-all -Z --ignore-symlinks --preserve-symlinks "
        "--cache-control= --content-type= --if-generation-match= --if-metageneration-match=",
        least=2,
        most=99,
    ),
    "storage cat": Form("--additional-headers= --display-url -d --range= -r= --decryption-keys=", most=99),
}


class UsageError(Exception):
    """gcloud refuses the words of a command, with exit code 2."""


class Command(NamedTuple):
    """A command that is of its documented form.

    Attributes:
      name: "compute tpus tpu-vm ssh".
      words: positional ones.
      flags: with dashes -> value, "" for a switch; the last value where a flag is repeated.
      rest: what follows "--".
    """

    name: str
    words: tuple[str, ...]
    flags: dict[str, str]
    rest: tuple[str, ...] = ()

    @property
    def dotted(self) -> str:
        """As gcloud's messages name it."""
        return f"gcloud.{self.name.replace(' ', '.')}"


def parse(words: list[str]) -> Command:
    """The command of the words after `gcloud`.

    Raises:
      UsageError: gcloud has no such command, or it has no such flag.
    """
    name = next((name for name in FORMS if words[: len(name.split())] == name.split()), "")
    if not name:
        groups = [name.split()[:i] for name in FORMS for i in range(len(name.split()))]
        group = max((one for one in groups if words[: len(one)] == one), key=len)
        raise UsageError(f"({'.'.join(['gcloud', *group])}) Invalid choice: {' '.join(words[len(group) :][:1])!r}.")
    form, given = FORMS[name], words[len(name.split()) :]
    known = {flag.rstrip("="): flag.endswith("=") for flag in f"{form.flags} {EVERYWHERE}".split()}
    command, rest = Command(name, (), {}), tuple[str, ...]()
    if "--" in given:
        given, rest = given[: given.index("--")], tuple(given[given.index("--") + 1 :])
    positional, flags, queue = list[str](), dict[str, str](), list(given)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            positional.append(word)
        elif flag not in known or (equals and not known[flag]):
            import difflib  # takes a while, and a command that is right needs none

            near = difflib.get_close_matches(flag, known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near and near[0] != flag else ""
            raise UsageError(f"({command.dotted}) unrecognized arguments: {word}{hint}")
        elif known[flag] and not equals and (not queue or queue[0].startswith("--")):
            raise UsageError(f"({command.dotted}) argument {flag}: expected one argument")
        else:
            flags[flag] = value if equals or not known[flag] else queue.pop(0)
    if not form.least <= len(positional) <= form.most:
        what = "unrecognized arguments" if len(positional) > form.most else "argument: Must be specified"
        raise UsageError(f"({command.dotted}) {what}: {' '.join(positional)}")
    if rest and not form.rest:
        raise UsageError(f"({command.dotted}) unrecognized arguments: {' '.join(rest)}")
    for group in form.required:
        if sum(flag in flags for flag in group) != 1:
            raise UsageError(f"({command.dotted}) Exactly one of ({' | '.join(group)}) must be specified.")
    if form.asks and not {"--quiet", "-q"} & flags.keys():
        raise UsageError(f"({command.dotted}) This prompt could not be answered because there is nobody to answer it.")
    return Command(name, tuple(positional), flags, rest)
