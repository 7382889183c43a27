"""The command line: composed by Hydra, checked, and answered in one line where something is wrong."""

import contextlib
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genfound.config import compose, environment, options, sweeps
from genfound.config.errors import USER_ERRORS, sentence
from genfound.config.streams import make_lasting

SEVERAL_TYPES = (
    "compile", "native", "model.learn_sigma", "model.activation_checkpointing", "objective.time_shift", "sampler.shift",
    "sampler.steps", "labels", "size", "sizes", "rope.target",
)  # fmt: skip
"""Keys whose values may be of another type than their default."""

ALWAYS_SET = ("objective.", "sampler.", "guidance.")
"""Groups of which only keys that are null may be null."""

OF_THE_ORIGIN = ("sampler", "guidance")
"""Groups that a command with `from=` takes from the model, unless they are chosen."""

EXTRAS = {"joblib": "joblib", "ray": "ray", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""The extra of this package that holds each of Hydra's launchers."""

HELP = {"--help", "-h"}

OOM_ADVICE = {
    "train": "a smaller data.max_tokens (dense layouts: data.batch_size; the global step stays what it is), "
    "model.activation_checkpointing=true, or a smaller sample.batch for previews",
    "sample": "a smaller batch or size",
    "evaluate": "a smaller batch or sizes",
    "encode": "a smaller tokenizer.pixels_per_call, data.max_image_tokens, or tokenizer.precision=bf16 (another "
    "out=, once there are shards)",
}
"""What a command needs less memory with."""


@contextlib.contextmanager
def explain_oom(command: str) -> Iterator[None]:
    """Name the way out, in a ValueError, where a device has no more memory."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" or command not in OOM_ADVICE:
            raise
        reason = str(error).partition(". See documentation")[0].splitlines()[0]
        raise ValueError(f"{reason} -- it needs less with {OOM_ADVICE[command]}") from error


ReadOrigin = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
"""From {key: value} of overrides, the configuration of the model that they name; `None` if they name none."""


Task = Callable[[DictConfig], str | None]
"""What a command does with its composed configuration; how that ended, if it was not simply done."""


def hydra_main(
    task: Task, config_name: str, read_origin: ReadOrigin | None = None, may_lack: Collection[str] = ()
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and run `task`, once or for each job of a sweep.

    With `read_origin`, sampler and guidance are those of the model in `from=`; see `with_origin`. Keys in `may_lack`
    may be missing. Exits with 1, after a line on standard error for what is wrong, with the code of `Stopped`, or with
    128 + the number of a signal.
    """
    errors: list[str] = []
    make_lasting()
    size, copies = _copies()

    def job(cfg: DictConfig) -> None:
        def work() -> str | None:
            varied = read_origin and not _added  # a sweep varies the model
            overrides = HydraConfig.get().overrides.task
            composed = hydra.compose(config_name, with_origin(read_origin, overrides)) if varied else cfg
            _check(composed, config_name, may_lack)
            _check_copies(composed, size, copies, config_name)
            with explain_oom(config_name):
                return task(composed)

        if sweeps.in_sweep():
            return sweeps.attempt(work)
        try:
            work()
        except USER_ERRORS as error:
            errors.append(str(error))
            print_error(sentence(error))

    code: Any = 0
    try:
        _answer(job, config_name, read_origin)
    except (HydraException, OmegaConfBaseException, *USER_ERRORS) as error:
        errors.append(str(error))
        print_error(composition_error(error, config_name, sys.argv[1:]))
    except (KeyboardInterrupt, SystemExit) as end:
        code = end.code if isinstance(end, SystemExit) else 130
    sys.exit(0 if sweeps.finish() and not (code or errors) else code or 1)


def _answer(job: Callable[[DictConfig], None], config_name: str, read_origin: ReadOrigin | None) -> None:
    """Help, or the jobs of the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _refuse_new_keys(sys.argv[1:], config_name)
    given, sys.argv[1:] = sys.argv[1:], with_origin(read_origin, sys.argv[1:])
    _added[:] = [argument for argument in sys.argv[1:] if argument not in given]
    if HELP.issuperset(flags := [a for a in sys.argv[1:] if a.startswith("-")]) and flags:
        print(_help(config_name, [a for a in sys.argv[1:] if a not in flags]))
    else:
        hydra.main(version_base="1.3", config_path=compose.config_dir(), config_name=config_name)(job)()


def _copies() -> tuple[str, int]:
    """See `environment.copies`; what else launchers have left is forgotten, with a note."""
    found = environment.copies(os.environ)
    inherited = environment.forget_inherited(os.environ)
    if inherited and found[1] == 1:
        print(f"note: ignoring {', '.join(inherited)}: this command is one process", file=sys.stderr, flush=True)
    return found


def _help(config_name: str, overrides: list[str]) -> str:
    """What Hydra prints for --help, without its look at each of its own groups, which takes a second."""
    folder = Path(compose.config_dir())
    groups = sorted({file.parent.relative_to(folder).as_posix() for file in folder.rglob("*/*.yaml")})
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        cfg = hydra.compose(config_name, overrides, return_hydra_config=True)
    template = Template(cfg.hydra.help.template)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    options = "\n".join(f"{group}: {', '.join(compose.option_names(group))}" for group in groups)
    return template.substitute(APP_CONFIG_GROUPS=options, CONFIG=OmegaConf.to_yaml(cfg))


def print_error(message: str) -> None:
    """One line on standard error."""
    if message:
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)


SEVERAL_DEVICES = {
    "train": " with trainer.devices=N, or on each of M machines with trainer.num_nodes=M",
    "evaluate": " with devices=N",
    "encode": " with devices=N, or on each of M machines with num_nodes=M node_rank=K",
}
"""How a command is given more than one device."""


def _check_copies(cfg: DictConfig, size: str, copies: int, config_name: str) -> None:
    """Raise a ValueError in each of several processes that would all do the same; one on each machine may be."""
    machines = OmegaConf.select(cfg, "trainer.num_nodes", default=OmegaConf.select(cfg, "num_nodes", default=1))
    if copies not in (1, machines):
        raise ValueError(
            f"{size}={copies}: a launcher has started {copies} copies of this command, which would all do the same; "
            f"start it once{SEVERAL_DEVICES.get(config_name, '')}, or unset {size} if each of them is another command"
        )


def _check(cfg: DictConfig, config_name: str, may_lack: Collection[str]) -> None:
    """Refuse values that are missing, or of another type than the default."""
    if missing := sorted(OmegaConf.missing_keys(cfg) - {*may_lack}):
        raise ValueError(f"{missing[0]} is missing; give {missing[0]}=...")
    choices = [f"{key}={value}" for key, value in HydraConfig.get().runtime.choices.items() if "/" not in key and value]
    composed = hydra.compose(config_name, choices), cfg
    default, given = (compose.flatten(compose.to_dict(c, resolve=False)) for c in composed)
    for key, value in given.items():
        usual = default.get(key)
        if usual is None or usual == "???" or (value is None and not key.startswith(ALWAYS_SET)):
            continue
        if not (_alike(value, usual) or (key in SEVERAL_TYPES and value is not None)):
            raise ValueError(f"{key}={value} must be {TYPES[type(usual)]}, such as {usual}")


TYPES = {float: "a number", int: "a whole number", bool: "true or false", list: "a list", str: "a text"}


def _alike(value: Any, usual: Any) -> bool:
    """Whether a value is of the type of another one; whole numbers are numbers, truth values are not."""
    if isinstance(usual, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(usual, list) and usual and isinstance(value, list):
        return all(_alike(item, usual[0]) for item in value)
    return type(value) is type(usual) or type(usual) not in TYPES


_added: list[str] = []


def with_origin(read_origin: ReadOrigin | None, arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, before them what makes sampler and guidance those of the model in `from=`.

    What the arguments set themselves is left to them, and so is all if a sweep varies the model.
    """
    given = {override.key_or_group: override for override in _parsed(arguments)} if read_origin else {}
    if read_origin is None or "from" not in given or given["from"].is_sweep_override():
        return list(arguments)
    config = read_origin({key: override.value() for key, override in given.items()}) or {}
    groups = [group for group in OF_THE_ORIGIN if group in config and group not in given]
    try:
        compose.refuse_interpolations({group: config[group] for group in groups})
        added = [text for group in groups for text in _as_overrides(group, config[group], given)]
    except ValueError as error:
        raise ValueError(f"{given['from'].value()}: {error}") from None
    place = next(k for k, argument in enumerate(arguments) if "=" in argument and not argument.startswith("-"))
    return [*arguments[:place], *added, *arguments[place:]]


def _as_overrides(group: str, options: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Overrides that compose the options of a group, but for what is given; those of others in the place of any."""
    if options.get("name") in compose.option_names(group):
        usual = compose.read_option(group, options["name"])
        wanted = {key: value for key, value in options.items() if key not in usual or value != usual[key]}
        own = [f"{group}.{key}={_literal(value)}" for key, value in wanted.items() if f"{group}.{key}" not in given]
        return [f"{group}={options['name']}", *own]
    return [f"~{group}", *(f"+{group}.{_name(key)}={_literal(value)}" for key, value in options.items())]


def _literal(value: Any) -> str:
    """A value out of a file in the grammar of overrides, as nothing else than what it is."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_name(key)}:{_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_literal, value)) + "]"
    return _quoted(value) if isinstance(value, str) else "null" if value is None else str(value).lower()


def _name(key: Any) -> str:
    """A key out of a file, which may hold no grammar."""
    if not re.fullmatch(r"[A-Za-z_]\w*", str(key), re.ASCII):
        raise ValueError(f"{key} is no name of an option")
    return str(key)


def _parsed(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments of a command, as Hydra reads them."""
    found = []
    for argument in (argument for argument in arguments if "=" in argument and not argument.startswith("-")):
        if (override := _parse(argument)) is None:
            raise ValueError(_rewritten(argument))
        found.append(override)
    return found


def _rewritten(argument: str) -> str:
    """What to write instead of an override that cannot be parsed."""
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{argument} is not key=value; quote texts with spaces: 'key=\"a text\"'"
    if "\r" in argument:
        return f"{argument!r} holds a carriage return: save the script with Unix line ends (sed -i 's/\\r$//' SCRIPT)"
    if value.startswith("~"):
        return f"{argument}: ~ stands for no folder after =; write {key}=$HOME{value[1:]}"
    items = [item.strip() for item in value.strip("[]").split(",")]
    items = [item if _parse(f"{key}={item}") else _quoted(item) for item in items]
    attempts = [f"[{','.join(items)}]"] if value.startswith("[") and value.endswith("]") else []
    for attempt in (*attempts, _quoted(value)):
        if _parse(written := f"{key}={attempt}"):
            way_out = f"quote texts with spaces, brackets, = or unusual letters: {shlex.quote(written)}"
            return f"{argument} cannot be read; {way_out}"
    return f"{argument} cannot be read; write key=value, with texts in quotes: 'key=\"a text\"'"


def _parse(override: str) -> Override | None:
    with contextlib.suppress(HydraException):
        return OverridesParser.create().parse_override(override)
    return None


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def user_overrides() -> list[str]:
    """The overrides of the command line, without those that were added for the model."""
    return [override for override in HydraConfig.get().overrides.task if override not in _added]


NAMED = {"callbacks": "callbacks.", "logger": "logger.", "alignment": "alignment.teachers."}
"""Group -> where it holds things by names that a command line may add."""

ADDED = "+alignment.teachers.NAME={_target_:CLASS,width:CHANNELS} adds a teacher"


def _refuse_new_keys(arguments: list[str], config_name: str) -> None:
    """`+key=value` would add a key that nothing reads, but for what has names; `~key` take one that is read.

    And `key={}` takes nothing away: Hydra merges.
    """
    groups = compose.read_yaml(Path(compose.config_dir()) / f"{config_name}.yaml").get("defaults", [])
    addable = ("hydra", *(NAMED[key] for group in groups if isinstance(group, dict) for key in NAMED.keys() & group))
    for argument in arguments:
        if (match := re.match(r"(\+{1,2})([^=]+)=", argument)) and not match[2].startswith(addable):
            key, added = match[2], match[1]
            raise ValueError(f"{argument} would add the unknown key {key}, which nothing reads; drop the {added}")
        if argument.startswith("~"):
            raise ValueError(f"{argument} would take away a key that is read; set {argument[1:]}=... instead")
        if match := re.fullmatch(r"([^=]+)=\{\s*\}", argument):
            raise ValueError(f"{argument} would change nothing; {match[1]}.KEY=null takes one of its keys away")


def _of_another_command(config_name: str, arguments: Sequence[str]) -> str | None:
    """About an experiment on the command line that this command cannot compose."""
    chosen = next((text.partition("=")[2] for text in arguments if text.startswith("experiment=")), "")
    for name in (chosen, f"evaluate/{chosen}"):
        command = "evaluate" if name.startswith("evaluate/") else "train"
        there = (Path(compose.config_dir()) / "experiment" / f"{name}.yaml").is_file()
        if there and (command, name) != (config_name, chosen):
            return f"experiment={chosen} is not one of this command; python -m genfound.{command} experiment={name}"
    return None


def composition_error(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    """Hydra's messages about a command line, in one line that names the key and the nearest real one."""
    if isinstance(error, OSError) and error.strerror:  # of the system, not of Hydra
        return sentence(error)
    return _of_another_command(config_name, arguments) or _composition_error(error, config_name, arguments)


def _of_options(group: str, key: str) -> str:
    """The options of a group that have a key, as a way out; empty if there are none."""
    leaf = key.removeprefix(f"{group}.")
    found = [f"{group}={name}" for name in compose.option_names(group) if leaf in compose.read_option(group, name)]
    return f"{' or '.join(found)} has it" if found else ""


def _composition_error(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    if isinstance(error, OverrideParseException):
        return _rewritten(error.override)
    text = f"{error} {error.__cause__ or ''}"
    key = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    if key and (told := options.elsewhere(key[1])):
        return told
    if key and ("not in struct" in text or "Could not override" in text):
        groups = dict(argument.partition("=")[::2] for argument in arguments)
        group = key[1].partition(".")[0]
        foreign = f": it is not an option of {group}={groups[group]}" if group in groups and "." in key[1] else ""
        near = difflib.get_close_matches(key[1], _known_keys(config_name, arguments), 1, 0.85 if foreign else 0.6)
        hint = f"did you mean {near[0]}?" if near else _of_options(group, key[1]) or "see --help"
        return f"unknown key {key[1]}{foreign}; {ADDED if key[1].startswith('alignment.teachers') else hint}"
    # Hydra lists nothing where the default is null
    if experiment := re.search(r"Could not find 'experiment/([^']+)'", text):
        folder = Path(compose.config_dir()) / "experiment"
        names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
        names = [name for name in names if name.startswith("evaluate/") == (config_name == "evaluate")]
        return f"experiment={experiment[1]} is unknown; choose one of {', '.join(names)}"
    listed = r"Could not find '([^']+)/([^']+)'.*?Available options in '[^']+':(.*?)(Config search|$)"
    option = re.search(listed, text, re.DOTALL)
    plugin = re.search(r"Could not (?:find|load) 'hydra/launcher/(\w+)'", text)
    if plugin and plugin[1] in EXTRAS:
        text = f"hydra/launcher={plugin[1]} is not installed; pip install 'genfound[{EXTRAS[plugin[1]]}]'"
    elif found := option or re.search(r"Could not load '([^'/]+)/([^']+)'", text):  # the latter of a list of options
        names = option[3].split() if option else compose.option_names(found[1])
        return f"{found[1]}={found[2]} is unknown; choose one of {', '.join(names)}"
    return text


def _known_keys(config_name: str, arguments: Sequence[str]) -> list[str]:
    """The keys of a configuration with these choices of options."""
    groups = [path.name for path in Path(compose.config_dir()).iterdir() if path.is_dir()]
    choices = [argument for argument in arguments if argument.partition("=")[0] in groups]
    begun = GlobalHydra.instance().is_initialized()  # in a sweep
    folder = (
        contextlib.nullcontext() if begun else hydra.initialize_config_dir(compose.config_dir(), version_base="1.3")
    )
    with folder:
        try:
            composed = hydra.compose(config_name, choices)
        except HydraException:
            composed = hydra.compose(config_name)
        flat = compose.flatten(compose.to_dict(composed, resolve=False))
    return sorted(flat.keys() | {key.rpartition(".")[0] for key in flat})
