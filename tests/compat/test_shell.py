"""Scripts read without being run."""

import pytest

from internvl.compat import shell
from internvl.errors import ConfigError

SCRIPT = """
set -x

GPUS=${GPUS:-8}
BATCH_SIZE=${BATCH_SIZE:-128}
PER_DEVICE_BATCH_SIZE=${PER_DEVICE_BATCH_SIZE:-"4"}
GRADIENT_ACC=$((BATCH_SIZE / PER_DEVICE_BATCH_SIZE / GPUS))

export PYTHONPATH="${PYTHONPATH}:$(pwd)"
OUTPUT_DIR='work_dirs/my run'  # a comment

if [ ! -d "$OUTPUT_DIR" ]; then
  mkdir -p "$OUTPUT_DIR"
fi

torchrun \\
  --nnodes=1 --nproc_per_node=${GPUS} \\
  --master_port 34229 \\
  internvl/train/internvl_chat_finetune.py \\
  --output_dir ${OUTPUT_DIR} \\
  --ps_version 'v2' ${MORE} \\
  --gradient_accumulation_steps ${GRADIENT_ACC} \\
  2>&1 | tee -a "${OUTPUT_DIR}/training_log.txt"
"""


def read(text, **environment):
    return shell.read(text, environment, name="mine.sh")


def test_a_script_of_torchrun():
    launch = read(SCRIPT, GPUS="2", PYTHONPATH="/x")
    assert (launch.launcher, launch.num_gpus, launch.num_nodes) == ("torchrun", 2, 1)
    assert launch.entry == "internvl/train/internvl_chat_finetune.py"
    assert launch.environment["PYTHONPATH"] == "/x:."
    # Unquoted, so a shell makes two words of it; an empty variable becomes none.
    assert launch.flags[:3] == ("--output_dir", "work_dirs/my", "run")
    assert launch.flags[-2:] == ("--gradient_accumulation_steps", "16")
    assert "" not in launch.flags
    assert launch.skipped == ()


def test_defaults_are_the_scripts():
    assert read(SCRIPT).num_gpus == 8
    assert read(SCRIPT).flags[-1] == "4"


@pytest.mark.parametrize(
    ("command", "launcher", "gpus", "nodes"),
    [
        ("srun -p P --ntasks=32 --nodes=4 python -u a.py --x 1", "srun", 32, 4),
        ("srun -p P -N 2 --ntasks-per-node 8 python -u a.py --x 1", "srun", 16, 2),
        ("deepspeed --num_gpus 4 a.py --x 1", "deepspeed", 4, 1),
        ("torchrun --nnodes 2 --nproc-per-node 4 -m a --x 1", "torchrun", 8, 2),
        ("accelerate launch --num_processes 6 a.py --x 1", "accelerate", 6, 1),
        ("CUDA_VISIBLE_DEVICES=1 python a.py --x 1", "python", 1, 1),
    ],
)
def test_launchers(command, launcher, gpus, nodes):
    launch = read(command)
    assert (launch.launcher, launch.num_gpus, launch.num_nodes) == (launcher, gpus, nodes)
    assert (launch.entry, launch.flags) == ("a.py", ("--x", "1"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${A:-x}", "x"),
        ("${E:-x}", "x"),
        ('"${E-x}"', ""),
        ("${B:-x}", "b.tar.gz"),
        ("${A:=y}$A", "yy"),
        ("${B:+set}", "set"),
        ("${B%.*}", "b.tar"),
        ("${B%%.*}", "b"),
        ("${B#*.}", "tar.gz"),
        ("${B##*.}", "gz"),
        ("$(basename /p/q.sh .sh)", "q"),
        ("`dirname /p/q.sh`", "/p"),
        ("$(pwd)/x", "./x"),
        ("$((2 * (N + 1) % 5))", "3"),
        ("$((-7 / 2))", "-3"),
        ("'$B'", "$B"),
        ('"$B"', "b.tar.gz"),
        ("\\$B", "$B"),
        ("a$0", "amine.sh"),
    ],
)
def test_expansion(text, value):
    assert read(f"python a.py {text}", B="b.tar.gz", N="8", E="").flags == (value,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("for i in 1 2; do python a.py; done", "line 1: `for`"),
        ("X=1\nX=$(nvidia-smi -L | wc -l)\npython a.py", r"line 2: \$\(nvidia-smi"),
        ("X=$((8 / WORLD))\npython a.py", "WORLD is not set"),
        ("X=$((8 / 0))\npython a.py", "divides by 0"),
        ("X=$((8 ** 2))\npython a.py", "write its value"),
        ("X='a\npython a.py", "quote is not closed"),
        ("echo hello", "is expected; lines: none"),
        ("python a.py\npython b.py", "lines: 1, 2"),
        ("X=${NEEDED:?}\npython a.py", "set NEEDED"),
        ("torchrun --nproc_per_node=2", "starts no Python file"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(text, message):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_a_number_of_processes_must_be_one():
    with pytest.raises(ConfigError, match="'eight'"):
        _ = read("torchrun --nproc_per_node=eight a.py").num_gpus


def test_other_statements_are_listed():
    launch = read("conda activate internvl\nif [ -z $X ]; then\n  export X=1\nfi\npython a.py")
    assert launch.skipped == (
        "line 1: conda activate internvl",
        "line 3: export X=1 (inside an if)",
    )
    assert "X" not in launch.environment
