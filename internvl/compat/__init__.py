"""Command lines of the original, translated to commands of ours.

Tables of its flags, scripts and keys are data beside the modules that read them. Only the command
line imports this.
"""

import difflib
from collections.abc import Mapping, Sequence

from internvl.compat import benchmark, evaluation, shims, tools, training
from internvl.compat.translation import Translate, Translation
from internvl.errors import ConfigError

__all__ = ["COMMANDS", "Translation", "translate"]

COMMANDS: dict[str, tuple[Translate, str]] = {
    "evaluate.sh": (
        evaluation.translate,
        "CHECKPOINT KEY [--dynamic --max-num N --auto …], with GPUS=n",
    ),
    "finetune": (training.translate_flags, "[ENTRY.py] --flag value … [--dry-run]"),
    "shell": (
        training.translate_script,
        "SCRIPT [--flag value …] [key=value …] [--here] [--dry-run], with GPUS=n, BATCH_SIZE=n …",
    ),
    "clip_benchmark": (
        benchmark.translate,
        "eval --model_type internvl --dataset D --model M --pretrained P …",
    ),
    "merge_lora": (tools.merge_lora, "INPUT OUTPUT"),
    "internvl_custom2hf": (tools.custom2hf, "--custom_path IN --save_path OUT"),
    "internvl_hf2custom": (tools.hf2custom, "--hf_path IN --save_path OUT"),
    "install-shims": (shims.install, "DIR"),
}
"""Name -> what translates its words, and those words for the help."""


def translate(command: str, words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates a command line of the original.

    Raises:
        ConfigError: no such command, or words that it does not have or that have no counterpart.
    """
    name = command.removesuffix(".py")
    # A name of the original that has no command is told why, not that it is unknown.
    reason = tools.without_command().get(name)
    if reason is not None:
        raise ConfigError(f"{command}: {reason}")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        raise ConfigError(f"{command}: no command of the original; {hint}")
    # Tools are called with and without their .py.
    run, usage = COMMANDS[name]
    # Before translating: flags that are missing are no reason to refuse help.
    if "--help" in words or "-h" in words:
        return Translation(done=f"internvl compat {name} {usage}")
    return run(words, environment)
