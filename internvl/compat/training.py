"""`finetune` and `shell`: flags and scripts of the original's training as a recipe and its run."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from internvl.compat import evaluation, files, finetune, scripts, shell
from internvl.compat.shims import is_shim
from internvl.compat.translation import Translation
from internvl.config import Recipe
from internvl.config.recipes import resolve
from internvl.errors import ConfigError

HEAD = "# Written by `internvl compat`"
"""First words of a recipe that may be written again."""
_AUTHORS_PARTITIONS = ("INTERN2", "Intern5", "VC2", "VC5")
"""Defaults of the scripts, which only their authors' cluster has."""
_RANKED = "LOCAL_RANK"
"""Variable that torchrun sets in every process; scripts use RANK and WORLD_SIZE for nodes too."""
_SCRIPT_OPTIONS = ("--dry-run", "--here")
_ENTRY = "internvl/train/internvl_chat_finetune.py"
_PAIRS_ENTRY = "internvl/train/internvl_stage2_finetune.py"


def translate_flags(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates `finetune [ENTRY.py] --flag value …`.

    Under torchrun its processes train; without it GPUS=n counts them for the batch.
    """
    rest = list(words)
    dry = "--dry-run" in rest
    rest = [word for word in rest if word != "--dry-run"]
    is_entry = bool(rest) and rest[0].endswith(".py")
    # Only the entry of InternVL-14B has this flag.
    default = _PAIRS_ENTRY if "--dataset_name" in rest else _ENTRY
    entry = rest.pop(0) if is_entry else default
    # Under torchrun this process is one of those that train.
    name = "WORLD_SIZE" if _RANKED in environment else "GPUS"
    launch = shell.Launch(
        "torchrun",
        {"nproc_per_node": environment.get(name, "1")},
        entry,
        tuple(rest),
        environment,
        (),
    )
    options = ["--dry-run"] if dry else []
    return _translate(launch, options, (), environment, origin=f"finetune {shlex.join(words)}")


def translate_script(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates `shell SCRIPT [--flag value …] [key=value …] [--here] [--dry-run]`.

    A script that is here is read, whoever edited it; otherwise the path names the original's. Flags
    replace those that the script gives to its training. The original's other shell files take
    their own words, as far as they have a counterpart.
    """
    other = _other_file(words)
    if other in files.EVALUATIONS:
        rest = [word for word in words[1:] if word not in _SCRIPT_OPTIONS]
        translation = evaluation.translate(rest, environment)
        return dataclasses.replace(translation, runs="--dry-run" not in words)
    if other is not None:
        return _translate_other(other, words[1:], environment)
    options = [word for word in words if word in _SCRIPT_OPTIONS]
    rest = [word for word in words if word not in _SCRIPT_OPTIONS]
    if not rest:
        raise ConfigError("compat shell: name a script, such as shell/finetune/x.sh")
    # A shim hands on whatever stands after the name of the script.
    script, *more = rest
    # A list of data sets is a flag of the script, which a shim has no line for to edit.
    flags, overrides = _split_words(more)
    launch = shell.read(_text(script), environment, name=script)
    # The last of a repeated flag counts, as in argparse.
    launch = dataclasses.replace(launch, flags=(*launch.flags, *flags))
    return _translate(launch, options, overrides, environment, origin=f"shell {script}")


def _split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits what stands after a script into (flags with their values, overrides)."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            flags.append(word)
            # An override may follow a flag without a value: values of flags have no `key=`.
            if "=" not in word and rest and not rest[0].startswith("--") and "=" not in rest[0]:
                flags.append(rest.pop(0))
        elif "=" in word:
            overrides.append(word)
        else:
            options = ", ".join(_SCRIPT_OPTIONS)
            raise ConfigError(f"{word}: none of key=value, --flag value, {options}")
    return flags, overrides


def _other_file(words: Sequence[str]) -> str | None:
    """Returns the path below the original of a shell file that is no training script to read."""
    path = files.locate(words[0], Path()) if words else None
    # A user's own file goes first, whatever its name.
    if path is None or (Path(words[0]).is_file() and not is_shim(Path(words[0]))):
        return None
    is_training = path in scripts.paths() and path not in files.refused()
    return None if is_training else path


def _translate_other(
    path: str, words: Sequence[str], environment: Mapping[str, str]
) -> Translation:
    rest = [word for word in words if word not in _SCRIPT_OPTIONS]
    # First: a file that is refused is not helped by other words.
    translation = files.translate(path, environment)
    if rest:
        raise ConfigError(f"{path}: takes no words, not {rest[0]}")
    return dataclasses.replace(translation, runs="--dry-run" not in words)


def _text(script: str) -> str:
    """Returns the text of a script: a user's file, or the original's from the table."""
    path = Path(script)
    original = scripts.locate(script, Path())
    # A shim has no flags to read; its path is that of the original.
    if path.is_file() and not (original is not None and is_shim(path)):
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{script}: no UTF-8 text") from None
    if original is not None:
        return scripts.text(original)
    near = scripts.nearest(script, files.paths())
    hint = f"; did you mean {near}?" if near else ""
    raise ConfigError(f"there is no script {script}, and the original has none of this path{hint}")


def _translate(
    launch: shell.Launch,
    options: Sequence[str],
    overrides: Sequence[str],
    environment: Mapping[str, str],
    *,
    origin: str,
) -> Translation:
    num_gpus = launch.num_gpus
    translated = finetune.translate(
        launch.entry, launch.flags, num_gpus=num_gpus, environment=launch.environment
    )
    # Resolved with the overrides, so that `run` and problems are those of the run.
    recipe = resolve(translated.tree, overrides, name=origin)
    # Beside the run: a run folder that does not exist yet tells that the run is new.
    file = recipe.run.with_name(f"{recipe.run.name}.yaml")
    _check_own(file)
    notes = [f"{line}: not translated" for line in launch.skipped] + translated.notes
    notes += _memory_notes(recipe, environment)
    # Other launchers of the scripts start processes of one machine.
    on_slurm = launch.launcher == "srun" and "--here" not in options
    if on_slurm:
        command = _slurm(launch, file, environment, on_gpus=recipe.device != "cpu")
        notes.append("this hands a job to Slurm; with --here the line trains on this machine")
    else:
        _check_nodes(launch, options, environment, origin)
        command, more = _local(file, num_gpus, environment)
        notes += more
    return Translation(
        commands=((*command, *overrides),),
        notes=tuple(notes),
        recipe=f"{HEAD} {origin}\n{_yaml(translated.tree)}",
        file=file,
        runs="--dry-run" not in options,
    )


def _memory_notes(recipe: Recipe, environment: Mapping[str, str]) -> Iterator[str]:
    """Yields what takes the place of the samples of a forward pass, lowered to need less memory."""
    name = "PER_DEVICE_BATCH_SIZE"
    # Pairs are encoded so many at a time here too.
    if name not in environment or recipe.objective.name == "retrieval":
        return
    tokens = recipe.data.row_tokens or recipe.data.max_tokens
    yield (
        f"{name}={environment[name]}: samples share rows of {tokens:,} tokens here, so a smaller "
        "one needs no less memory; if a GPU runs out of it, the message names the key to add"
    )


def _check_nodes(
    launch: shell.Launch, options: Sequence[str], environment: Mapping[str, str], origin: str
) -> None:
    """Raises ConfigError if a script is to be typed on each of several nodes."""
    # Not the nodes of srun: fewer GPUs than a node has are 0 nodes in the scripts' arithmetic.
    if options or _RANKED in environment or launch.num_nodes == 1:
        return
    per_node = launch.num_gpus // launch.num_nodes
    raise ConfigError(
        f"{origin}: torchrun on {launch.num_nodes} nodes is not started from here; save the recipe "
        f"that --dry-run shows and use `internvl launch RECIPE --nodes {launch.num_nodes} "
        f"--gpus-per-node {per_node}`, or `torchrun … -m internvl train RECIPE` on every node"
    )


def _check_own(file: Path) -> None:
    """Raises ConfigError if a file exists that no translation has written."""
    if file.exists() and not file.read_text(encoding="utf-8").startswith(HEAD):
        raise ConfigError(f"{file}: exists, and is not from here; move it, or change --output_dir")


def _yaml(tree: Mapping[str, Any]) -> str:
    """Returns the tree as YAML, sections in a recipe's order."""
    # As people write recipes; rules set keys in the order of the flags.
    order = [field.name for field in dataclasses.fields(Recipe)]
    ordered = {name: tree[name] for name in order if name in tree}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _local(
    file: Path, num_gpus: int, environment: Mapping[str, str]
) -> tuple[tuple[str, ...], list[str]]:
    """Returns the command that trains on this machine, and what differs."""
    command = ("train", str(file))
    # Its processes are started already.
    if _RANKED in environment:
        return command, []
    from internvl.launch import local

    available = local.count_gpus()
    # Not all GPUs of the machine if the script asks for fewer.
    if num_gpus <= available:
        return (*command, "--gpus", str(num_gpus)), []
    if num_gpus == 1:
        return command, []
    return command, [
        f"{num_gpus} GPUs: this machine has {available}; every step still has as many samples"
    ]


def _slurm(
    launch: shell.Launch, file: Path, environment: Mapping[str, str], *, on_gpus: bool
) -> tuple[str, ...]:
    """Returns the command that hands a training to Slurm."""
    options = launch.options
    per_node = min(int(options.get("ntasks_per_node") or launch.num_gpus), launch.num_gpus)
    # A script divides and drops the rest, so that srun would refuse it.
    nodes, rest = divmod(launch.num_gpus, per_node)
    if rest:
        raise ConfigError(
            f"GPUS={launch.num_gpus}: no whole number of nodes of {per_node} GPUs; change GPUS or "
            "GPUS_PER_NODE"
        )
    partition = options.get("p") or options.get("partition")
    if partition in _AUTHORS_PARTITIONS and "PARTITION" not in environment:
        partition = None
    ranks = "--gpus-per-node" if on_gpus else "--processes-per-node"
    return (
        *("launch", "train", str(file), "--nodes", str(nodes), ranks, str(per_node)),
        *(("--partition", partition) if partition else ()),
        *((f"--srun-args={environment['SRUN_ARGS']}",) if environment.get("SRUN_ARGS") else ()),
        "--submit",
    )
